"""The grader's truth table, the statistics, the command line, and what an evaluation writes."""
import itertools
import json
import math

import pytest
import torch

import data
import evaluate
import kernels
import model as models

RIGHT = [("5", "5"), (" 5 ", "5"), ("5.", "5"), ("5.0", "5"), ("05", "5"), ("+5", "5"),
         ("-3", "-3"),
         ("0.5", "1/2"), ("2/4", "1/2"), (".5", "0.5"), ("1,234", "1234"), ("$12", "12"),
         ("50%", "50"), ("Yes", "yes"), ("yes.", "yes"), ("'Blue'", "blue"),
         ("dark  red", "Dark red"),
         ("[1, 2, 30, 40]", "[1, 2, 30, 40]"), ("[2,2,30,40]", "[1, 2, 30, 40]"),
         ("[1.0, 2.0, 30.5, 40]", "[1, 2, 30, 40]")]
WRONG = [("6", "5"), ("5 6", "5"), ("55", "5"), ("", "5"), ("five", "5"), ("-5", "5"), ("5/0", "5"),
         ("1e3", "1000"), ("no", "yes"), ("yes no", "yes"), ("", "yes"), (".", "yes"),
         ("1,23", "123"),
         ("[30, 40, 1, 2]", "[1, 2, 30, 40]"), ("[0, 0, 64, 64]", "[1, 2, 10, 10]"),
         ("[1, 2, 30]", "[1, 2, 30, 40]"), ("5", "[1, 2, 30, 40]"), ("[1, 2, 30, 40]", "5"),
         ("5" * 300, "5"), ("nan", "5"), ("inf", "5"), ("٥", "5x")]
CHOICES = ["6", "3", "4", "2"]


@pytest.mark.parametrize("answer, gold", RIGHT)
def test_right(answer, gold):
    assert evaluate.is_right(answer, gold)


@pytest.mark.parametrize("answer, gold", WRONG)
def test_wrong(answer, gold):
    assert not evaluate.is_right(answer, gold)


@pytest.mark.parametrize("answer, right", [
    ("C", True), ("c", True), ("(C)", True), ("C.", True), ("4", True), ("(C) 4", True),
    ("C: 4", True), ("(C) 3", False), ("B", False), ("3", False), ("E", False), ("", False),
    ("C or B", False), ("Cat", False)])
def test_choices(answer, right):
    """A letter or its text; a letter with another choice's text is neither."""
    assert evaluate.is_right(answer, "4", CHOICES) == right
    assert evaluate.is_right(answer, "C", CHOICES) == right


def test_grader_survives_anything():
    """Nothing that a model writes crashes or hangs the grader."""
    example = data.world_example("test", 2)
    pick, alphabet = torch.Generator().manual_seed(0), "[](){}<>/\\,.-+*=%$ 0123456789abc\n\x00é٣²"
    pieces = [*alphabet, "<think>", "</think>", "<answer>", "</answer>", "circles: ", "1 + 1 = "]
    for _ in range(4000):
        some = torch.randint(len(pieces), (12,), generator=pick).tolist()
        response = "".join(pieces[i] for i in some)
        for gold, choices in ((example.answer, None), ("[1, 2, 3, 4]", None), ("4", CHOICES)):
            evaluate.is_right(data.strip_answer(response), gold, choices)
        assert evaluate.grade(response, example).correct in (True, False)


def test_faithful_and_lucky():
    """Right with every step true is faithful; right with a false or gibberish step is lucky."""
    example = data.world_example("test", 1)
    true = example.response.split("<think>")[1].split("</think>")[0]
    count = int(true.split(": ")[1][0])
    false = true.replace(f": {count}.", f": {count + 1}.", 1)

    def verdict(thought, answer=example.answer):
        return evaluate.grade(f"<think>{thought}</think><answer>{answer}</answer>", example)

    assert verdict(true).faithful and verdict(true).correct
    assert not verdict(false).faithful and verdict(false).correct
    assert not verdict(true + " Hello there.").faithful
    assert verdict("Okay, let me look at the table. " + true).faithful
    assert not verdict("Okay, let me look at the table.").faithful, "it claims nothing"
    assert not verdict(true, "99").faithful and not verdict(true, "99").correct


@pytest.mark.parametrize("response, formatted", [
    ("<think>a</think><answer>5</answer>", True), ("<think>a</think> \n<answer>5</answer>", True),
    ("<answer>5</answer>", False), ("<think></think><answer>5</answer>", False),
    ("<think>a</think><answer>5</answer> more", False), ("5", False),
    ("<think>a<think>b</think></think><answer>5</answer>", False),
    ("<think>a</think><answer>4</answer><answer>5</answer>", False)])
def test_format(response, formatted):
    assert evaluate.grade(response, data.Example("x", "?", "5")).formatted == formatted


def test_wilson():
    """Against the published example: 81 of 263 gives 0.2553 .. 0.3662 (Newcombe 1998)."""
    low, high = evaluate.wilson(81, 263)
    assert abs(low - 0.2553) < 1e-3 and abs(high - 0.3662) < 1e-3
    assert evaluate.wilson(0, 10)[0] == 0 and evaluate.wilson(10, 10)[1] == 1


def test_pass_at_k_counts_subsets():
    for right in range(6):
        marks = [i < right for i in range(5)]
        for k in range(1, 6):
            subsets = list(itertools.combinations(marks, k))
            expected = sum(map(any, subsets)) / len(subsets)
            assert math.isclose(evaluate.pass_at_k(5, min(right, 5), k), expected)


def test_spearman():
    assert math.isclose(evaluate.spearman([1, 2, 3, 4], [10, 20, 30, 25]), 0.8)
    assert math.isclose(evaluate.spearman([1, 2, 2, 3], [3, 2, 2, 1]), -1)
    assert evaluate.spearman([1, 1, 1], [1, 2, 3]) is None


def test_paired_bootstrap_covers():
    """Its interval holds the true gap in about 95 % of draws, and is narrow for paired answers."""
    pick, inside = torch.Generator().manual_seed(0), 0
    for trial in range(200):
        easy = torch.rand(150, generator=pick)
        first = (torch.rand(150, generator=pick) < 0.5 * easy + 0.4).tolist()
        second = (torch.rand(150, generator=pick) < 0.5 * easy + 0.3).tolist()
        gap, low, high = evaluate.paired_bootstrap(first, second, 400, trial)
        inside += low <= 0.1 <= high
    assert 178 <= inside <= 199
    assert evaluate.paired_bootstrap([1, 0] * 50, [1, 0] * 50) == (0, 0, 0)


def test_summary_counts_questions_not_samples():
    rows = [dict(id=f"test/{i}", split="test", family="count", correct=s < i, formatted=True,
                 faithful=s == 0 and i > 0, truncated=False, response_ids=[1, 2])
            for i in range(5) for s in range(4)]
    figures = evaluate.summaries(rows)["test"]
    assert figures["n"] == 5 and figures["accuracy"] == 0.5 and figures["length"] == 2
    assert figures["interval"] == evaluate.wilson(2.5, 5)
    assert figures["pass_at"] == {1: 0.5, 2: (0 + 1 / 2 + 5 / 6 + 1 + 1) / 5, 4: 0.8}
    assert math.isclose(figures["lucky"], (10 - 4) / 20)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    model, processor = models.fresh("s", [data.base_example(i) for i in range(300)], 0)
    out = tmp_path_factory.mktemp("model")
    models.save(model, processor, out)
    return out


def test_rows_of_an_evaluation(tmp_path, directory, capsys):
    """The names that other tools rely on; log-probs are those of the trainer's scorer."""
    out = tmp_path / "rows.jsonl"
    evaluate.main(evaluate.Config(model=str(directory), split="test,text", limit=7, samples=2,
                                  max_new_tokens=6, out=str(out), device="cpu",
                                  against=str(directory)))
    rows = evaluate.read_rows(out)
    assert len(rows) == 28 and [r["id"] for r in rows[:3]] == ["test/0", "test/0", "test/1"]
    assert {"id", "prompt_ids", "response_ids", "logprobs", "prompt", "response", "answer",
            "correct", "formatted", "faithful"} <= set(rows[0])
    model, processor = models.load(directory)
    row = rows[0]
    batch = processor.batch([data.world_example("test", 0)])
    assert batch.ids[0].tolist() == row["prompt_ids"]
    ids = torch.tensor([row["response_ids"]])
    logprob, _ = model.score(batch, ids, torch.ones_like(ids) > 0,
                             banned=processor.banned(model.vocabulary))
    assert torch.allclose(logprob, torch.tensor([row["logprobs"]]), atol=1e-4)
    said = capsys.readouterr().out
    assert "pass@2" in said and "location" in said and "+0.0% [+0.0%, +0.0%]" in said


def test_greedy_does_not_depend_on_the_batch(directory):
    model, processor = models.load(directory)
    sampler = kernels.Sampler(model, processor.banned(model.vocabulary), processor.stop)
    examples = [data.world_example("test", i) for i in range(9)]
    one, many = (evaluate.evaluate(sampler, processor, examples, new_tokens=8, rows_at_once=n)
                 for n in (2, 256))
    assert [row["response_ids"] for row in one] == [row["response_ids"] for row in many]


def test_unknown_option_names_the_nearest(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse(evaluate.Config, ["--modle", "x"])
    assert "did you mean --model?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.parse(evaluate.Config, ["--limit", "0"])
    assert "--limit 0: expected at least 1" in capsys.readouterr().err


def test_curve(tmp_path):
    """Reward up while held-out accuracy falls: ρ is -1 and the regret is the fall."""
    rows = [dict(step=0, val_accuracy=0.5)]
    for step in range(1, 7):
        rows.append(dict(step=step, reward=step / 10, accuracy=0.1, format=0.2, length=5))
        rows.append(dict(step=step, val_accuracy=0.6 - step / 20))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curve = evaluate.reward_curve(tmp_path)
    assert len(curve["points"]) == 6 and math.isclose(curve["spearman"], -1)
    assert math.isclose(curve["regret"], 0.25)
