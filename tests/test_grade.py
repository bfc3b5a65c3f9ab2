"""Points for a student's run."""
import json
import subprocess
import sys

import pytest

import data
from tests import grade

COMMAND = "python sft.py --init runs/x --eval-every 30 --out runs/y --seed 1 --device cpu --resume"


@pytest.fixture
def results():
    """Two seeds, mean 0.9 on the test, 0.4 on ood."""
    return dict(cells=[dict(cell="strong/sft", seed=seed, commands=["base", COMMAND, "evaluate"],
                            points=[dict(step=0, held_out=0.7), dict(step=96, held_out=0.9)],
                            splits=dict(test=dict(accuracy=0.9 + shift, format=1.0),
                                        ood=dict(accuracy=0.4 - shift, format=1.0)))
                       for seed, shift in ((1, 0.02), (2, -0.02))])


@pytest.fixture
def run(tmp_path):
    """A run of the default options with 860 of 1,000 right on the test, 360 on ood."""
    options = vars(grade.sft.Config(device="cpu", steps=96, lr=3e-3)) | dict(finished=True)
    (tmp_path / "run.json").write_text(json.dumps(options))
    rows = []
    for split, right in (("test", 860), ("ood", 360)):
        for i in range(1000):
            response = data.world_example(split, i).response
            said = response if i < right else "<think>Hm.</think><answer>none</answer>"
            rows.append(dict(split=split, index=i, response=said, correct=True))
    (tmp_path / "answers.jsonl").write_text(data.jsonl_text(rows))
    course = [dict(step=step, val_accuracy=share) for step, share in ((0, 0.75), (96, 0.87))]
    (tmp_path / "metrics.jsonl").write_text(data.jsonl_text([*course, dict(step=97)]))
    return tmp_path


def test_points_of_a_good_run(run, results):
    """Within the margin of the mean over seeds; graded anew, whatever the rows claim to be."""
    rows = grade.points("sft", run, results)
    assert {name: got for name, got, *_ in rows} == grade.POINTS
    why = {name: text for name, *_, text in rows}
    assert why["test"] == "86.0%, asked for 82.0%" and why["ood"] == "36.0%, asked for 32.0%"
    assert why["rise"] == "12.0%, asked for 10.0%"
    made = grade.gradescope(rows)
    assert made["score"] == 100 == sum(one["max_score"] for one in made["tests"])


@pytest.mark.parametrize("change, lost", [
    (dict(traces="answer"), "options"), (dict(epochs=30), "options"), (dict(steps=99), "options"),
    (dict(finished=False), "finished")])
def test_other_options_cost_points(run, results, change, lost):
    path = run / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    rows = grade.points("sft", run, results)
    assert [name for name, got, most, _ in rows if got < most] == [lost]


def test_a_base_that_was_good_already_has_not_learnt(run, results):
    """Half of the study's untrained bases pass GRPO's bar out of distribution."""
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().replace("0.75", "0.8"))
    rows = grade.points("sft", run, results)
    assert [name for name, got, most, _ in rows if got < most] == ["rise"]


def test_worse_answers_cost_points(run, results):
    """50 fewer right ones on each split, and one that is claimed to be right."""
    path = run / "answers.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[810:860] + rows[1310:1360]:
        row["response"] = "<answer>none</answer>"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lost = [name for name, got, most, _ in grade.points("sft", run, results) if got < most]
    assert lost == ["test", "ood"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:1500]))
    with pytest.raises(data.DataError, match="1000 of test, 500 of ood"):
        grade.points("sft", run, results)
    path.write_text(data.jsonl_text(rows[:500] * 2 + rows[1000:]))     # two samples a question
    with pytest.raises(data.DataError, match="500 of test, 1000 of ood"):
        grade.points("sft", run, results)


def test_without_a_run_it_says_so(tmp_path):
    done = subprocess.run([sys.executable, "-m", "tests.grade", "sft", str(tmp_path)],
                          cwd=grade.ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
