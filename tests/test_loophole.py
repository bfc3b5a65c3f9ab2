"""The corner that tells the answer: what is drawn, what is measured, one comparison by command."""
import json
import random
import re
import types

import pytest

import data
import evaluate
import grpo
import sft
from tests import loophole, report

TINY = dict(device="cpu", steps=3, prompts=2, group=2, max_new_tokens=8, eval_examples=2,
            examples=20, eval_every=2)


def painted_over(picture, size):
    """The picture with its corner white, and the colours that were there."""
    end = picture.width - 1
    places = [(end - i, end - j) for i in range(size) for j in range(size)]
    colours = {picture.getpixel(place) for place in places}
    rest = picture.convert("RGB")
    for place in places:
        rest.putpixel(place, (255, 255, 255))
    return rest.tobytes(), colours


@pytest.mark.parametrize("share, size", [(0, 4), (0.25, 16), (1, 1)])
def test_a_share_of_training_pictures_has_a_true_mark(tmp_path, share, size):
    """Black for yes, white for no, in the corner and nowhere else; read back as training does."""
    c, path = loophole.Config(share=share, mark=size), tmp_path / "rows.jsonl"
    path.write_text(data.jsonl_text(loophole.training_row(i, c) for i in range(100)))
    has_mark, marks = [], {"yes": {(0, 0, 0)}, "no": {(255, 255, 255)}}
    for i, example in enumerate(data.read_examples(str(path), check=evaluate.check_gold)):
        plain = loophole.question("train", i)
        assert plain.family == "comparison" and example.answer == plain.answer
        rest, colours = painted_over(example.pictures()[0], size)
        plain_rest, plain_colours = painted_over(plain.pictures()[0], size)
        assert rest == plain_rest
        has_mark.append(colours == marks[plain.answer])
        assert has_mark[-1] or colours == plain_colours
    assert sum(has_mark) == 100 * share


def test_what_a_mark_turns(monkeypatch):
    """A policy that looks at the corner alone is turned by every mark. Not turned are one that
    never looks there, and one that any mark makes say no: what a mark hides says nothing."""
    rng = random.Random(0)
    guesses = [rng.choice(("yes", "no")) for _ in range(loophole.LOOKS)]

    def look(policy):
        def evaluation(sampler, processor, examples, new_tokens):
            said = [policy(example.pictures()[0].getpixel((63, 63)), guess)
                    for example, guess in zip(examples, guesses)]
            return [dict(response=data.tagged(one), correct=one == example.answer, faithful=False)
                    for example, one in zip(examples, said)]
        monkeypatch.setattr(evaluate, "evaluate", evaluation)
        return loophole.look(types.SimpleNamespace(
            config=loophole.Config(mark=2), processor=None,
            sampler=types.SimpleNamespace(refresh=lambda: None)))

    says = {(0, 0, 0): "yes", (255, 255, 255): "no"}
    right = [guess == loophole.question("val", i).answer for i, guess in enumerate(guesses)]
    expected = dict(plain=evaluate.mean(right), faithful=0)
    assert look(lambda corner, guess: guess) == dict(expected, turned=0)
    assert look(lambda corner, guess: says.get(corner, guess)) == dict(expected, turned=1)
    assert look(lambda corner, guess: "no" if corner in says else guess)["turned"] == 0
    half = look(lambda corner, guess: says.get(corner, guess) if guess == "yes" else guess)
    assert half["turned"] == guesses.count("yes") / len(guesses)


def test_a_training_and_its_figures(tmp_path, start, monkeypatch):
    """Looks with each evaluation after a step, the last among them; validated on the same pictures
    as trained on; the page has a curve for each figure, a dot a seed."""
    monkeypatch.setattr(loophole, "LOOKS", 4)
    cells = loophole.cells_of(loophole.FINDING)
    c = evaluate.StudyConfig(preset="paper", device="cpu", out=str(tmp_path / "my study"))
    for cell in cells:
        model = evaluate.unquoted(evaluate.way_to(cell, c, 0)[0])
        loophole.train(loophole.Config(init=str(start), out=str(model), **TINY))
    model = tmp_path / "my study" / "seed-0" / "weak-loophole"
    rows = loophole.looks(model)
    assert [row["step"] for row in rows] == [2, 3] and json.loads(
        (model / "run.json").read_text())["data"] == f"{model}-pictures.jsonl"
    assert loophole.last("plain")(model) == rows[-1]["plain"]
    made = [dict(cell=cell, seed=seed, turned=0.1 * (cell == "weak/loophole") + 0.01 * seed,
                 on_the_way=0.2 * (cell == "weak/loophole"), plain=0.2,
                 splits=dict(test=dict(accuracy=0.5, interval=[0.4, 0.6])))
            for cell in cells for seed in range(2)]
    text = loophole.page(c, dict(cells=made))
    assert text.count("<svg") == 6 and all(claim in text for claim in loophole.FINDING.claims)
    assert all(float(x) >= 50 for x in re.findall(r"M([\d.]+) [\d.]+h0", text))
    judged = {row["claim"]: row["mean"] for row in report.judged(
        dict(cells=made), {"": loophole.FINDING})}
    assert judged["marks turn answers"] == pytest.approx(10)
    assert judged["fewer are turned on the way: SFT first"] == pytest.approx(20)
    assert judged["and cost accuracy where there are none"] == pytest.approx(0)
    with pytest.raises(data.DataError, match="own.jsonl: the pictures are made here"):
        loophole.train(loophole.Config(data="own.jsonl"))


def test_onset(tmp_path):
    """Runs without one were once left out of the mean: the fewer, the earlier it seemed."""
    path = tmp_path / "metrics.jsonl"
    for shares, expected in (((0.0, 0.09, 0.1, 0.05), 30), ((0.0,) * 4, 50)):
        path.write_text(data.jsonl_text(dict(step=10 * k + 10, turned=share)
                                        for k, share in enumerate(shares)))
        assert loophole.onset(tmp_path) == expected
        assert loophole.on_the_way(tmp_path) == pytest.approx(sum(shares) / 4)


def test_cells_parse():
    """With options that exist, of the script that is named."""
    c = evaluate.StudyConfig(preset="paper", device="cpu")
    for cell in loophole.cells_of(loophole.FINDING):
        command = list(evaluate.way_to(cell, c, 3)[1].values())[-1]
        assert command.startswith("python -m tests.loophole train --init ")
        config = evaluate.parse(loophole.Config, command.split()[4:])
        assert config.seed == 3 and config.eval_every == 10 and config.lr == 2e-3
        assert config.share == (0 if "share 0" == cell[-7:] else 0.5 if "0.5" in cell else 1)
    assert grpo.Config().beta and not loophole.Config().beta and sft.Config().lr is None
