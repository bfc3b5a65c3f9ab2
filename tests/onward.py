"""A run goes on in TRL: accelerate launch --num_processes 8 tests/onward.py grpo runs/sft world
--output_dir runs/onward --max_steps 100. Then `cp runs/sft/prompt.json runs/onward`, the one file
that TRL drops, and every script here takes runs/onward.

First sft or grpo, the model, --data; then TRL's options. sft needs --max_length where a row has
over 1,024 tokens, pictures counted; a CPU --use_cpu true --bf16 false.
"""
import pathlib
import re
import sys

import datasets
import trl

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import data
import evaluate
import model

way, start, file, *options = sys.argv[1:]
examples, asker = data.load_dataset(file, "train", 2000), model.load_checkpoint(start)[1]


def message(role, text):
    """A turn of a chat, with its pictures in place; none without a text."""
    parts = [dict(type="image") if part == data.IMAGE else dict(type="text", text=part)
             for part in re.split(f"({data.IMAGE})", text) if part]
    return [dict(role=role, content=parts)] if parts else []


def row(index, one):
    """What TRL learns of an example: token for token what sft.py does."""
    asked = f"{one.question}\n{asker.style['instruction']}".removesuffix("\n")
    prompt = message("system", one.system or asker.style["system"]) + message("user", asked)
    said = message("assistant", asker.decode(asker.response_ids(one.response)))
    return dict(index=index, images=one.pictures(), prompt=prompt, completion=said)


def reward(completions, index, **_):
    texts = [turns[0]["content"] for turns in completions]
    return [float(evaluate.grade(text, examples[i], asker.style["answer_format"]).correct)
            for text, i in zip(texts, index)]


if __name__ == "__main__":
    name, more = ("SFT", {}) if way == "sft" else ("GRPO", dict(reward_funcs=reward))
    config, = trl.TrlParser(getattr(trl, f"{name}Config")).parse_args_and_config(options)[:1]
    rows = datasets.Dataset.from_list([row(index, one) for index, one in enumerate(examples)])
    trainer = getattr(trl, f"{name}Trainer")(start, args=config, train_dataset=rows, **more)
    trainer.train()
    trainer.save_model()
