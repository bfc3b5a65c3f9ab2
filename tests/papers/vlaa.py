"""VLAA-Thinking (arXiv 2504.11468): a reward by the type of an answer.

Its sentence: on mixed questions a reward that knows types (numbers by value, the letter of a
choice, boxes by overlap, words) teaches more than one that compares texts.

    typed   evaluate.py's grader, as everywhere here
    exact   1 where the text of the answer is that of the gold answer

The file: the tabletop's questions, of which every other one with a number gives four choices, so
that its gold answer is a letter. In this world a right number, word or box is written in one way,
so the two rewards differ on choices alone: the test has none, new rows of the same kind (`mixed`,
graded as `typed` rewards) do. Weights of the paper's mixed reward were not found: 1 and 0.1.
"""
import dataclasses
import functools
import json
import pathlib
import random
import tempfile
from dataclasses import dataclass

import data
import grpo
from evaluate import Finding, option, summary
from model import load_checkpoint, write_file
from tests.papers import answered, register, row_of, run_paper

register("vlaa")


@dataclass
class Config(grpo.Config):
    """Options of grpo.py, and one more."""
    typed: str = option("typed", "reward", ("typed", "exact"))


def mixed_row(index):
    """A row of the file: a question with a number, a word, a letter or a box as its answer."""
    example, rng = data.world_example("train", index), random.Random(f"choices/{index}")
    row = row_of(example)
    if example.family == "location":
        row["answer"] = json.loads(example.answer)
    elif example.answer.isdecimal() and index // len(data.FAMILIES) % 2:
        gold = int(example.answer)
        others = rng.sample([n for n in range(max(0, gold - 4), gold + 5) if n != gold], 3)
        row["choices"] = rng.sample([gold, *others], 4)
        row["answer"] = "ABCD"[row["choices"].index(gold)]
    return row


def reward(response, length, example, answer_format, c):
    """grpo.reward of `exact` texts, spaces apart."""
    parts = grpo.reward(response, length, example, answer_format, c)
    if "accuracy" not in parts:      # the grader failed
        return parts
    said, gold = ("".join(text.split()) for text in (data.extract_answer(response), example.answer))
    said = said == gold
    parts["reward"] += said - parts["accuracy"]
    return dict(parts, accuracy=float(said))


def train(c):
    path = pathlib.Path(f"{c.out}-{c.examples}.jsonl")
    if not path.exists():
        write_file(path, data.jsonl_text(map(mixed_row, range(c.examples))))
    rewarded = reward if c.typed == "exact" else grpo.reward
    rollout = functools.partial(grpo.rollout, reward=rewarded)
    grpo.main(dataclasses.replace(c, data=str(path)),
              functools.partial(grpo.explore, rollout=rollout))


def mixed(directory, count=600):
    """Accuracy on new rows, as evaluate.py grades."""
    with tempfile.TemporaryDirectory() as home:
        path = f"{home}/mixed.jsonl"
        write_file(path, data.jsonl_text(mixed_row(10_000_000 + i) for i in range(count)))
        examples = data.read_examples(path)
    return summary(answered(*load_checkpoint(directory), examples))["accuracy"]


FINDING = Finding(
    "VLAA-Thinking: does a reward that knows the types of answers teach more?", "base",
    ("weak", "strong"), ("test", "mixed"),
    {"typed": "{}/vlaa", "exact": "{}/vlaa --typed exact", "GRPO without choices": "{}/grpo"},
    {f"typed leads exact on {split} (strong base)": lambda a, split=split:
        a("strong/vlaa", split) - a("strong/vlaa --typed exact", split)
     for split in ("test", "mixed")})
MEASURES = dict(mixed=mixed)

if __name__ == "__main__":
    run_paper(FINDING, train, Config, __doc__, **MEASURES)
