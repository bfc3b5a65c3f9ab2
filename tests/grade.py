"""python -m tests.grade sft runs/sft: points for a student's run, by task: sft or grpo.

What is asked: the run is finished, its options are those of the task, and its answers,

    python evaluate.py --model runs/sft --limit 1000 --out runs/sft/answers.jsonl

which are graded again here, are at most MARGIN points worse than those of the study's cell, mean
over its seeds (.github/results.json, where its commands stand); and accuracy on val has risen at
least half as much as there, for a good base passes some of these bars untrained. It does not check
that the run's model gave these answers; to be sure, make them again.

    --json FILE     the points as Gradescope's autograder takes them
"""
import argparse
import json
import pathlib
import shlex
import sys
from statistics import fmean as mean

import data
import evaluate
import grpo
import sft
from model import read_json, write_file

ROOT = pathlib.Path(__file__).parents[1]
TASKS = dict(sft=("strong/sft", sft.Config), grpo=("strong/grpo", grpo.Config))
POINTS = {"finished": 10, "options": 20, "rise": 20, "test": 30, "ood": 10, "format": 10}
MARGIN = 8                           # points of accuracy; between seeds the standard deviation is 3
FREE = ("init", "out", "seed", "device", "resume", "eval_every", "eval_examples", "save_every",
        "keep", "micro_batch", "recompute", "lr")


def asked_for(task, results):
    """-> {option: value} of a task, {figure: least share} from the cells of the study."""
    name, Config = TASKS[task]
    cells = [cell for cell in results["cells"] if cell["cell"] == name]
    if not cells:
        sys.exit(f"error: .github/results.json has no cell {name}: nothing to compare with")
    options = vars(evaluate.parse(Config, shlex.split(cells[0]["commands"][-2])[2:]))
    options["steps"] = cells[0]["points"][-1]["step"]        # as the script chose them
    least = {split: mean(cell["splits"][split]["accuracy"] for cell in cells) - MARGIN / 100
             for split in ("test", "ood")}
    least["format"] = mean(cell["splits"]["test"]["format"] for cell in cells) - MARGIN / 100
    courses = [[point["held_out"] for point in cell["points"]] for cell in cells]
    least["rise"] = mean(course[-1] - course[0] for course in courses) / 2
    return {name: value for name, value in options.items() if name not in FREE}, least


def shares(rows):
    """-> accuracy by split, and format on the test, of answers that are graded anew."""
    graded = {"test": {}, "ood": {}}                 # by question
    for row in rows:
        if row["split"] in graded:
            example = data.world_example(row["split"], row["index"])
            graded[row["split"]][row["index"]] = evaluate.grade(row["response"], example)
    if min(map(len, graded.values())) < 1000:
        there = ", ".join(f"{len(some)} of {split}" for split, some in graded.items())
        raise data.DataError(f"answers: {there}; expected 1,000 each: evaluate.py --limit 1000")
    found = {split: mean(one.correct for one in some.values()) for split, some in graded.items()}
    return found | dict(format=mean(one.formatted for one in graded["test"].values()))


def points(task, run, results):
    """-> [(what, points, of how many, why)]"""
    options, least = asked_for(task, results)
    stored = read_json(run / "run.json")
    other = [f"--{name.replace('_', '-')} {stored.get(name)}, not {value}"
             for name, value in options.items() if stored.get(name) != value]
    held_out = [row["val_accuracy"] for row in data.read_jsonl(run / "metrics.jsonl")
                if "val_accuracy" in row]
    found = shares(data.read_jsonl(run / "answers.jsonl")) | dict(rise=held_out[-1] - held_out[0])
    rows = [("finished", bool(stored.get("finished")), "run.json"),
            ("options", not other, "; ".join(other) or "as asked")]
    rows += [(name, found[name] >= share, f"{found[name]:.1%}, asked for {share:.1%}")
             for name, share in least.items()]
    return [(name, POINTS[name] * good, POINTS[name], why) for name, good, why in rows]


def gradescope(rows):
    return dict(score=sum(got for _, got, *_ in rows), tests=[
        dict(name=name, score=got, max_score=most, output=why) for name, got, most, why in rows])


def parser():
    made = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("task", choices=[*TASKS], help="what was asked for")
    made.add_argument("run", type=pathlib.Path, help="directory of the run")
    made.add_argument("--json", help="file for Gradescope")
    return made


def main():
    args = parser().parse_args()
    try:
        rows = points(args.task, args.run, read_json(ROOT / ".github" / "results.json"))
    except (OSError, LookupError, ValueError) as error:
        sys.exit(f"error: {args.run}: {error}")
    for name, got, most, why in rows:
        print(f"{got:3} of {most:3}  {name}: {why}")
    print(f"{sum(got for _, got, *_ in rows)} of {sum(POINTS.values())}")
    if args.json:
        write_file(args.json, json.dumps(gradescope(rows), indent=1))


if __name__ == "__main__":
    main()
