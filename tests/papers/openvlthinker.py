"""OpenVLThinker (arXiv 2503.17352): rounds of SFT on what the last RL model says, then RL.

Its sentence: each round, SFT from the base on the last GRPO model's answers and GRPO after that,
gains; filtering the answers mattered most.

    round k: answers of the last GRPO model to the training questions; of the right ones those that
    are short and without filler -> SFT from the base -> GRPO

Round 0 is GRPO from the base. Short, here: no longer than the median right answer of its family;
filler: a step that claims nothing (data.FILLERS), for which the paper cuts sentences, and here the
answer goes (no base here has such words, so it is length that filters). How many answers a question
gets was not found: one. SFT takes the steps of three epochs of all questions, however many answers
are left. k rounds have k + 1 times the steps of GRPO, so they stand beside GRPO of as many.
"""
import math
import pathlib
import shlex
from dataclasses import dataclass
from statistics import median

import data
import grpo
import sft
from evaluate import CommonConfig, Finding, grouped, option, run_command
from model import write_file
from tests.papers import options_of, register, run_paper

register("openvlthinker")


@dataclass
class Config(grpo.Config):
    """Options of grpo.py, and two more."""
    rounds: int = option(2, "of SFT and GRPO, after the first GRPO", least=1)
    unfiltered: bool = option(False, "learn every right answer")


def filtered(rows):
    """The right ones without filler, no longer than the median of the right ones of a family."""
    right = [row for row in rows if row["correct"]]
    longest = {family: median(len(row["response_ids"]) for row in some)
               for family, some in grouped(right, "family").items()}
    return [row for row in right if len(row["response_ids"]) <= longest[row["family"]]
            and not any(filler in row["response"] for filler in data.FILLERS)]


def train(c):
    """The commands of all rounds; the last GRPO is this run itself."""
    rl, out = options_of(c, grpo.Config), shlex.quote(c.out)
    steps = math.ceil(c.examples / sft.Config.batch) * sft.Config.epochs
    imitation = f" --steps {steps}{options_of(c, sft.RunConfig, 'steps', 'lr', 'eval_every')}"
    policy = f"{out}/grpo-0"
    run_command(f"python grpo.py --out {policy} --resume{rl}")
    for k in range(1, c.rounds + 1):
        said, learnt = (pathlib.Path(c.out, f"{name}-{k}.jsonl") for name in ("said", "learnt"))
        if not learnt.exists():
            run_command(f"python evaluate.py --model {policy} --split train --limit {c.examples} "
                        f"--temperature 1 --out {out}/said-{k}.jsonl{options_of(c, CommonConfig)}")
            rows = data.read_jsonl(said)
            rows = rows if c.unfiltered else filtered(rows)
            write_file(learnt, data.jsonl_text(rows))
        start = f"{out}/sft-{k}"
        run_command(f"python sft.py --traces {out}/learnt-{k}.jsonl --out {start} --resume"
                    f"{imitation}")
        if k < c.rounds:
            policy = f"{out}/grpo-{k}"
            run_command(f"python grpo.py --out {policy} --resume{rl} --init {start}")
    c.init = f"{c.out}/sft-{c.rounds}"
    grpo.main(c)


FINDING = Finding(
    "OpenVLThinker: does another round of SFT and GRPO gain, and does filtering?", "base",
    ("weak", "strong"), ("test", "ood"),
    {"GRPO, 200 steps": "{}/grpo --steps 200", "one round": "{}/openvlthinker --rounds 1",
     "GRPO, 300 steps": "{}/grpo --steps 300", "two rounds": "{}/openvlthinker",
     "two, unfiltered": "{}/openvlthinker --unfiltered", "SFT → GRPO": "{}/sft/grpo"},
    {"a round leads GRPO of as many steps (weak base)":
        lambda a: a("weak/openvlthinker --rounds 1") - a("weak/grpo --steps 200"),
     "the second round leads the first (weak base)":
        lambda a: a("weak/openvlthinker") - a("weak/openvlthinker --rounds 1"),
     "filtered answers lead all right ones (weak base)":
        lambda a: a("weak/openvlthinker") - a("weak/openvlthinker --unfiltered")})

if __name__ == "__main__":
    run_paper(FINDING, train, Config, __doc__)
