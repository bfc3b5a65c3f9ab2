"""Real pictures and questions through SFT, GRPO and evaluation, with each public family.

The checkpoints are tiny and random, so nothing is learnt here: what is tested is that every script
takes what a user has, and that all of them ask in the same way.
"""
import json
import pathlib
import re

import pytest
import torch

import data
import evaluate
import grpo
import model as models
import sft
from conftest import FAMILIES

REAL = pathlib.Path(__file__).parents[2] / "shared" / "data"
FILES = {"easyvqa": "test", "geometry3k": "test_clean", "puzzlevqa": "test"}


def metrics(out):
    return [json.loads(line) for line in open(out / "metrics.jsonl")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FILES)
def test_real_data(checkpoint, tmp_path, capsys, name, family):
    """SFT with an instruction and boxed answers, then GRPO with LoRA, then evaluation: the prompt
    goes along with the checkpoint, and sampler and trainer agree on every token."""
    source = REAL / name / f"{FILES[name]}.jsonl"
    if not source.exists():
        pytest.skip(f"{source} is not there")
    start, _ = checkpoint(family)
    common = dict(data=str(source), device="cpu", eval_examples=3, max_new_tokens=6, steps=2,
                  micro_batch=2)
    sft.main(sft.Config(**common, init=str(start), out=str(tmp_path / "sft"), batch=4,
                        longest_edge=112, system="Be brief.", instruction="Think step by step.",
                        answer_format="boxed", recompute=True, freeze_vision=True))
    before, after = (models.load_checkpoint(path)[0].state_dict()
                     for path in (start, tmp_path / "sft"))
    moved = {part for part in before if not torch.equal(before[part], after[part])}
    assert not [part for part in moved if re.search("vision_model|patch_embed|blocks", part)]
    assert any(re.search("connector|merger", part) for part in moved)
    grpo.main(grpo.Config(**common, init=str(tmp_path / "sft"), out=str(tmp_path / "grpo"),
                          prompts=3, group=2, lora_rank=2))
    steps = [row for row in metrics(tmp_path / "grpo") if "gap_max" in row]
    assert len(steps) == 2 and all(row["gap_max"] < 1e-3 for row in steps)
    evaluate.main(evaluate.Config(model=str(tmp_path / "grpo"), data=str(source), limit=3,
                                  max_new_tokens=6, device="cpu", out=str(tmp_path / "rows")))
    rows = data.read_jsonl(tmp_path / "rows")
    _, processor = models.load_checkpoint(tmp_path / "grpo")
    for row, example in zip(rows, data.read_examples(str(source))):
        text = processor.tokenizer.decode(row["prompt_ids"], skip_special_tokens=False)
        assert "Be brief." in text and "\nThink step by step." in text
        assert processor.encode(processor.prompt(example)[0]) == row["prompt_ids"]
    assert "accuracy" in capsys.readouterr().out
    with pytest.raises(models.CheckpointError, match="instruction"):
        evaluate.main(evaluate.Config(model=str(tmp_path / "grpo"), data=str(source),
                                      instruction="Answer at once."))


@pytest.mark.parametrize("family", FAMILIES)
def test_several_pictures_and_choices(checkpoint, tmp_path, family):
    """Questions with two pictures and lettered choices, beside one without pictures."""
    from PIL import Image
    for i in range(3):
        Image.new("RGB", (40 + 30 * i, 64), (80 * i, 0, 200)).save(tmp_path / f"{i}.png")
    rows = [dict(images=["0.png", "1.png"], question="Which is wider? <image> or <image>",
                 choices=["the first", "the second"], answer="B"),
            dict(image="2.png", problem="What colour?", choices=["red", "blue"], answer="blue"),
            dict(question="What is 1/2 + 1/4?", answer="\\frac{3}{4}")] * 4
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    start, _ = checkpoint(family)
    common = dict(init=str(start), data=str(path), device="cpu", steps=1, eval_examples=2,
                  max_new_tokens=4)
    sft.main(sft.Config(**common, out=str(tmp_path / "sft"), batch=4))
    grpo.main(grpo.Config(**common, out=str(tmp_path / "grpo"), prompts=4, group=2))
    examples = data.read_examples(str(path))
    for said, right in (("B", 0), ("the second", 0), ("(b) the second", 0), ("blue", 1), ("B", 1),
                        ("0.75", 2)):
        assert evaluate.grade(f"<answer>{said}</answer>", examples[right]).correct, said
    assert not evaluate.grade("<answer>A</answer>", examples[0]).correct
