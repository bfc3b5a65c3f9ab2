"""The study: its smoke run as a user runs it, and what is made of its numbers."""
import html
import html.parser
import json
import os
import pathlib
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from PIL import Image

import data
import evaluate
import grpo
import report
import sft

ROOT = pathlib.Path(__file__).parents[1]
EASYVQA = ROOT.parent / "shared" / "data" / "easyvqa"
PAPER = evaluate.StudyConfig(preset="paper", device="cpu")


def run(*words):
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True,
                          text=True, env=dict(os.environ, CUDA_VISIBLE_DEVICES=""))


def study(out, *more):
    return run("evaluate.py", "study", "--preset", "smoke", "--jobs", "2", "--out", out,
               "--device", "cpu", *more)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("a study")         # a path with a space
    done = study(out)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (out / "said.txt").write_text(done.stdout)
    return out


def cells_in(out):
    return json.loads((out / "results.json").read_text())["cells"]


def test_smoke_has_every_cell_and_its_model_learns(out):
    """Figures, costs and commands of base, SFT and GRPO; what is visibly learnt is the format."""
    base, explored, imitated = cells_in(out)
    assert explored["cell"] == "strong/grpo" and imitated["cell"] == "strong/sft"
    said = (out / "said.txt").read_text()
    for cell in (base, explored, imitated):
        assert all(command in said for command in cell["commands"])
        for split in ("test", "text"):
            low, high = cell["splits"][split]["interval"]
            assert low <= cell["splits"][split]["accuracy"] <= high
    for cell in (explored, imitated):
        assert min(cell[cost] for cost in ("seconds", "flops", "trained")) > 0
    assert "seconds" not in base and "labels" not in base            # it is where costs begin
    assert (explored["sampled"], imitated["sampled"]) == (explored["trained"], 0)
    assert (imitated["labels"], explored["labels"]) == (1280, 2000)
    assert {"reward", "held_out", "accuracy", "format"} <= set(explored["points"][-1])
    rows = data.read_jsonl(out / "seed-0" / "base" / "metrics.jsonl")
    loss = [row["loss"] for row in rows if "loss" in row]
    assert loss[-1] < loss[0] / 4
    shares = [cell["splits"]["test"]["format"] for cell in (base, imitated)]
    assert shares[1] > shares[0] + 0.5


def test_study_goes_on_where_it_stopped(out, tmp_path):
    """Nothing is trained twice: a cell that is missing answers anew; a changed command is run
    again, and nothing that does not depend on it."""
    again = study(out)
    assert again.returncode == 0 and again.stdout.count("$ python") == 1          # the report
    results = json.loads((out / "results.json").read_text())
    (out / "results.json").write_text(json.dumps(results | dict(cells=results["cells"][:-1])))
    again = study(out)
    assert again.stdout.count("$ python") == 2 and "$ python sft.py" not in again.stdout
    assert [c["splits"] for c in cells_in(out)] == [c["splits"] for c in results["cells"]]


def test_changed_command_is_run_again_with_what_it_made(tmp_path, monkeypatch):
    """By a directory that holds a run of other options: --resume would refuse it."""
    ran, made = [], tmp_path / "a run"

    def run_command(command):
        ran.append(command)
        made.mkdir(exist_ok=True)
        (made / "run.json").write_text('{"finished": true}')

    monkeypatch.setattr(evaluate, "run_command", run_command)
    for commands in (["base", "a"], ["base", "a"], ["base", "b"], ["base", "b"], ["other", "b"]):
        evaluate.make(shlex.quote(str(made)), commands)
        (made / f"left by {commands}").touch()
    assert ran == ["a", "b", "b"]
    assert {path.name for path in made.iterdir()} == {"run.json", "left by ['other', 'b']"}


def test_unfinished_run_goes_on(tmp_path, monkeypatch):
    """The same command again; its --resume does the rest."""
    ran = []
    monkeypatch.setattr(evaluate, "run_command", ran.append)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    evaluate.make(str(tmp_path / "run"), ["a"])
    evaluate.make(str(tmp_path / "run"), ["a"])
    assert ran == ["a", "a"] and (tmp_path / "run" / "run.json").exists()


def test_failed_cell_is_named_and_the_others_go_on(out, tmp_path):
    """Its directory is a file: GRPO cannot start, SFT and the base answer."""
    shutil.copytree(out / "seed-0" / "base", tmp_path / "seed-0" / "base")
    for stage in ("base", "strong-sft"):
        shutil.copytree(out / "seed-0" / stage, tmp_path / "seed-0" / stage, dirs_exist_ok=True)
    (tmp_path / "seed-0" / "strong-grpo").write_text("in the way")
    done = study(tmp_path)
    assert done.returncode == 1 and "strong/grpo of seed 0" in done.stderr
    assert "strong/sft" not in done.stderr.splitlines()[-1]
    assert [cell["cell"] for cell in cells_in(tmp_path)] == ["strong", "strong/sft"]
    assert (tmp_path / "report.html").exists()


# ------------------------------------------------------------------------------ cells and commands
def test_way_to_a_cell():
    """A base of its own for each seed; a chain of trainings; a teacher's rollouts."""
    model, way = evaluate.way_to("weak/sft/grpo --grader lenient", PAPER, 3)
    home = "runs/study/seed-3"
    assert model == f"{home}/weak-sft-grpo-grader-lenient"
    assert list(way) == [f"{home}/base", f"{home}/weak-sft", model]
    base, imitated, explored = way.values()
    assert "--stage base" in base and f"--init {home}/base/step-800 " in imitated
    assert f"--init {home}/weak-sft " in explored and "--grader lenient" in explored
    assert all("--seed 3 " in command for command in way.values())
    model, way = evaluate.way_to("middle/sft --traces @strong", PAPER, 0)
    rollouts = "runs/study/seed-0/base/rollouts.jsonl"
    assert list(way) == ["runs/study/seed-0/base", rollouts, model]
    assert "--split train" in way[rollouts] and f"--traces {rollouts}" in way[model]
    assert "--init runs/study/seed-0/base/step-1200 " in way[model]


@pytest.mark.parametrize("preset", evaluate.PRESETS)
def test_commands_of_every_cell_parse(preset):
    """With options that exist and values that they take; each model has a directory of its own;
    none trains on a split that is tested."""
    c, owners = evaluate.StudyConfig(preset=preset, device="cpu"), {}
    configs = {"sft.py": sft.Config, "grpo.py": grpo.Config, "evaluate.py": evaluate.Config}
    for cell in set(evaluate.PRESETS[preset]["cells"]):
        model, way = evaluate.way_to(cell, c, 0)
        assert owners.setdefault(model, cell) == cell
        for command in evaluate.commands_of(cell, c, 0):
            python, script, *words = shlex.split(command)
            options = evaluate.parse(configs[script], words)
            assert python == "python" and options.device == "cpu"
        for command in way.values():
            assert "--split" not in command or "--split train " in command


def test_budgets_of_data(monkeypatch, tmp_path):
    """2,000 questions are the scripts' default, so that cell is the one of the other findings; GRPO
    sees each question of a larger budget once, and takes 100 steps on a smaller one."""
    class Looked(Exception):
        pass

    def look(config, *_, **__):
        raise Looked(config.steps)

    monkeypatch.setattr(grpo, "starting_model", lambda *_, **__: (None, None))
    monkeypatch.setattr(grpo, "Run", look)
    for examples, steps in ((125, 100), (2000, 100), (8000, 250), (20000, 625)):
        with pytest.raises(Looked, match=str(steps)):
            grpo.main(grpo.Config(examples=examples, beta=0.0))
    cells = evaluate.FINDINGS["data"].cells()
    assert cells["SFT"][:3] == ["strong/sft --examples 125", "strong/sft --examples 500",
                                "strong/sft"]
    assert sft.Config().examples == grpo.Config().examples == 2000


def test_every_claim_is_of_cells_that_run():
    """A claim about a cell that no preset makes would never be judged."""
    rows = report.judged(made_up(random.Random(0), 2))
    claims = [claim for finding in evaluate.FINDINGS.values() for claim in finding.claims]
    assert [row["claim"] for row in rows] == claims and len(set(claims)) == len(claims)
    for name, finding in evaluate.FINDINGS.items():
        cells = {*evaluate.YOUNG, *sum(finding.cells().values(), [])}
        some = made_up(random.Random(0), 2, cells)
        assert {row["claim"] for row in report.judged(some)} >= set(finding.claims), name


# ------------------------------------------------------------------------------ figures
def test_course_of_a_run():
    """Costs and points from rows of metrics.jsonl, by hand: 2 · parameters · passes · tokens."""
    step = dict(seconds=2, prompt_tokens=30, tokens=10)
    explored = step | dict(reward=0.5, accuracy=0.4, format=1.0)
    rows = [dict(step=0, val_accuracy=0.2), dict(explored, step=1),
            dict(explored, step=2, reward=0.7, kl=0.1), dict(step=2, val_accuracy=0.3),
            dict(explored, step=3, reward=0.9), dict(step=3, val_accuracy=0.4)]
    spent = dict(seconds=100, flops=1, trained=5, sampled=0)
    first, second, last = evaluate.course(rows, 1000, spent)
    assert first == dict(spent, step=0, held_out=0.2)
    assert second == dict(step=2, held_out=0.3, seconds=104, trained=25, sampled=20,
                          flops=1 + 2 * 1000 * 40 * (4 + 5), reward=0.6, accuracy=0.4, format=1.0)
    assert (last["reward"], last["flops"]) == (0.9, 1 + 2 * 1000 * 40 * (4 + 5 + 4))
    again = [*rows[:4], dict(explored, step=3, sampled=35), rows[5]]         # TRAPO samples anew
    assert evaluate.course(again, 1000, spent)[-1]["flops"] == last["flops"] + 2 * 1000 * (35 - 10)
    imitated = [dict(step=0, val_accuracy=0.2), dict(step, step=1), dict(step=1, val_accuracy=0.3)]
    assert evaluate.course(imitated, 1000, spent)[-1] == dict(
        step=1, held_out=0.3, seconds=102, trained=15, sampled=0, flops=1 + 2 * 1000 * 40 * 3)


def test_gains_of_a_deceptive_reward():
    points = [dict(held_out=0.5)] + [dict(reward=r, held_out=h) for r, h in (
        (0.2, 0.5), (0.3, 0.6), (0.5, 0.55), (0.6, 0.5), (0.7, 0.4), (0.8, 0.3))]
    figures = report.gains(points)
    assert figures["spearman"] == pytest.approx(-1)
    assert figures["reward_gain"] == pytest.approx(0.6)
    assert figures["held_out_gain"] == pytest.approx(-0.2)
    assert figures["regret"] == pytest.approx(0.3)


def test_blind_levels_come_from_the_training_set_alone(monkeypatch):
    """The commonest answer of each family in training, wherever it is right in a split; what the
    splits themselves answer most changes nothing."""
    levels = report.blind_levels.__wrapped__(["test", "ood"])
    world, train = data.World, data.World("train", size=6000)
    for split in ("test", "ood"):
        for family in data.FAMILIES:
            common = Counter(one.answer for one in train if one.family == family)
            answer, _ = common.most_common(1)[0]
            asked = [one for one in world(split, size=1200) if one.family == family]
            assert levels[split][family] == pytest.approx(
                sum(evaluate.judge(answer, one) is True for one in asked) / len(asked))

    class Yes(data.World):
        def __getitem__(self, index):
            one = super().__getitem__(index)
            one.answer = "17" if one.id.startswith("train") else one.answer
            return one

    monkeypatch.setattr(data, "World", Yes)
    report.training_answers.cache_clear()
    assert report.blind_levels.__wrapped__(["test"])["test"]["comparison"] == 0
    report.training_answers.cache_clear()


# ------------------------------------------------------------------------------ verdicts
def test_t_interval_against_known_values():
    """Student's tables: two-sided 95 % quantiles, and p-values."""
    for n, quantile in ((2, 12.706), (3, 4.303), (5, 2.776), (6, 2.571), (8, 2.365), (30, 2.045)):
        values = [1.0, 3.0] * (n // 2) + [2.0] * (n % 2)
        middle, low, high, _ = report.t_interval(values)
        spread = (sum((x - 2) ** 2 for x in values) / (n - 1) / n) ** 0.5
        assert middle == pytest.approx(2)
        assert (high - 2) / spread == pytest.approx(quantile, rel=1e-3) == (2 - low) / spread
    for n, t, p in ((3, 4.303, 0.05), (8, 2.365, 0.05), (8, 3.499, 0.01), (8, 5.408, 0.001),
                    (6, 2.015, 0.1), (2, 1.0, 0.5)):
        values = [1.0, -1.0] * (n // 2) + [0.0] * (n % 2)
        error = (sum(x * x for x in values) / (n - 1) / n) ** 0.5
        assert report.t_interval([x + t * error for x in values])[3] == pytest.approx(p, rel=5e-3)
        assert report.t_interval([x - t * error for x in values])[3] == pytest.approx(p, rel=5e-3)
    assert report.t_interval([3.0])[1:] == (-float("inf"), float("inf"), 1.0)
    assert report.t_interval([0.0] * 8)[3] == pytest.approx(1, abs=1e-3)


def made_up(rng, seeds, cells=evaluate.PRESETS["paper"]["cells"], effect=lambda cell: 0.0,
            noise=0.02):
    """A study's results: accuracy 0.5, a shift of all cells of a seed, an effect and noise."""
    made = []
    for seed in range(seeds):
        shift = rng.gauss(0, 0.06)

        def draw(cell):
            return 0.5 + shift + effect(cell) + rng.gauss(0, noise)

        for cell in dict.fromkeys(cells):
            figures = dict(n=1000, interval=[0.4, 0.6], format=1.0, parsed=1.0, length=20.0,
                           truncated=0.0, faithful=0.4, lucky=0.1)
            splits = {split: dict(figures, accuracy=draw(cell),
                                  families=dict.fromkeys(data.FAMILIES, 0.5))
                      for split in ("test", "ood", "text")}
            points = [dict(step=10 * i, held_out=draw(cell), flops=1e12 * i, reward=0.1 * i,
                           accuracy=0.1 * i, format=0.1 * i) for i in range(1, 11)]
            made.append(dict(
                cell=cell, seed=seed, commands=[f"python {cell}"], splits=splits,
                points=points, labels=2000, seconds=1.0, flops=1e12, trained=10, sampled=10,
                spearman=0.0, regret=abs(rng.gauss(0, noise)), trace_logprob=-rng.random(),
                reward_gain=rng.gauss(0, noise), held_out_gain=rng.gauss(0, noise)))
    return dict(cells=made)


def verdicts(results, key="verdict"):
    return {row["claim"]: row[key] for row in report.judged(results)}


FAIR = ["from the weak base, SFT leads GRPO",
        "SFT's lead over GRPO is smaller from the strong base",
        "SFT leads GRPO in words",
        "SFT gains in words (strong)",
        "a lenient reward is worth less (strong base)",
        "short traces gain ood (strong)",
        "hesitant traces lose ood (strong)",
        "SFT first makes the regret of GRPO smaller (weak base)"]      # 0 where nothing differs


def test_false_alarms_of_a_study_in_which_nothing_differs():
    """Of single claims 5 %; of studies with at least one claim that stands among all, at most 5 %:
    of 300 studies 15 are expected at most, 27 are three standard deviations more."""
    rng, alarms, families = random.Random(0), 0, 0
    cells = ["weak", "strong", "weak/sft", "weak/grpo", "weak/sft/grpo", "strong/sft",
             "strong/grpo", "strong/grpo --grader lenient", "strong/sft --traces hesitant"]
    for _ in range(300):
        rows = [row for row in report.judged(made_up(rng, 8, cells)) if row["claim"] in FAIR]
        assert len(rows) == len(FAIR)
        alarms += sum(row["verdict"] != "undecided" for row in rows)
        families += any(row["holm"] != "undecided" for row in rows)
    assert 0.03 < alarms / 300 / len(FAIR) < 0.07
    assert families <= 27


def test_power_of_a_study_of_eight_seeds():
    """An effect of two standard deviations of a difference is found in nearly all studies, its
    sign is right, and the shift that all cells of a seed share hides nothing: they are paired."""
    rng, found = random.Random(1), Counter()
    sizes = {"weak/sft": 0.06, "strong/sft": 0.06, "strong/grpo": 0.12, "weak/grpo": 0.0}
    cells = ["weak", "strong", *sizes]
    for _ in range(60):
        said = verdicts(made_up(rng, 8, cells, lambda cell: sizes.get(cell, 0.0)))
        found.update([said[FAIR[0]], said[FAIR[1]], said[FAIR[2]] + " in words"])
    assert found["holds"] >= 110                     # of 120
    assert found["opposite in words"] >= 55          # of 60
    assert found["opposite"] == found["holds in words"] == 0


def test_holm_by_hand(monkeypatch):
    """p-values times the number of claims that are left; after the first that fails none stands."""
    given = iter([0.02, 0.001, 0.6, 0.009, 0.018, 0.012])
    monkeypatch.setattr(report, "t_interval", lambda values: (1.0, 0.5, 1.5, next(given)))
    cells = ["weak", "strong", "weak/sft", "weak/grpo", "strong/sft", "strong/grpo"]
    rows = report.judged(made_up(random.Random(0), 8, cells))
    stand = [row["holm"] == "holds" for row in rows]     # 0.018 · 3 ends it
    assert stand == [False, True, False, True, False, True]
    assert {row["verdict"] for row in rows} == {"holds"}


def test_few_seeds_are_a_first_look():
    for seeds, look in ((1, True), (5, True), (6, False)):
        table = report.verdict_table(made_up(random.Random(0), seeds))
        assert all(("first look" in row[4]) is look for row in table[1:])
        assert seeds > 1 or all("[" not in row[2] and "undecided" in row[4] for row in table[1:])


def test_main_table_counts_collapsed_runs_and_means_over_seeds(monkeypatch):
    levels = {split: dict.fromkeys(data.FAMILIES, 0.3) for split in ("test", "ood", "text")}
    monkeypatch.setattr(report, "blind_levels", lambda splits: levels)
    results = made_up(random.Random(0), 4, ["weak", "weak/grpo"])
    low, *others = [cell for cell in results["cells"] if cell["cell"] == "weak/grpo"]
    low["splits"]["test"]["accuracy"] = 0.29
    head, blind, base, explored = report.main_table(results)
    assert head[:6] == ["model", "seeds", "collapsed", "test", "ood", "text"]
    assert blind[3:6] == ["30.0"] * 3 and base[1:3] == ["4", "0"] and explored[1:3] == ["4", "1"]
    values = [cell["splits"]["test"]["accuracy"] for cell in (low, *others)]
    middle, down, up, _ = report.t_interval([100 * value for value in values])
    assert explored[3] == f"{middle:.1f} [{down:.0f}, {up:.0f}]"


# ------------------------------------------------------------------------------ the page
class Links(html.parser.HTMLParser):
    """Collects every address that a page refers to."""

    def __init__(self):
        super().__init__()
        self.found, self.tags = [], Counter()

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.found += [value for name, value in attributes if name in ("src", "href")]


def test_report_is_self_contained_and_escapes(out):
    """Everything that a model wrote is escaped: a script in an answer stays text."""
    results = json.loads((out / "results.json").read_text())
    path = report.answers_of(results["cells"][-1])
    kept, rows = path.read_text(), data.read_jsonl(path)
    evil = "<script>alert(1)</script>"
    rows[0]["response"] = f"<think>{evil}</think><answer>{evil}</answer>"
    rows[1]["response"] = f"{evil}<img src=x onerror=alert(1)>"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page, links = report.report(results), Links()
    path.write_text(kept)
    links.feed(page)
    assert "script" not in links.tags and "&lt;script&gt;" in page
    assert links.found and all(link.startswith("data:image/webp;base64,") for link in links.found)
    assert links.tags["img"] == 12 and links.tags["svg"]
    assert re.search("class=(faithful|lucky|right|wrong|mis)", page)


def test_report_begins_with_verdicts_and_has_every_command(out):
    page = (out / "report.html").read_text()
    text = html.unescape(page).replace("\xa0", " ")
    results = json.loads((out / "results.json").read_text())
    for cell in results["cells"]:
        assert all(command in text for command in cell["commands"])
    tables = report.verdict_table(results), report.main_table(results)
    places = []
    for row in sum(tables, []):
        assert "<tr><td>" + "<td>".join(row) in text
        places.append(text.index("<tr><td>" + "<td>".join(row)))
    assert places == sorted(places) and places[0] < text.index("<svg")


def test_calibration_of_a_seed_whose_figures_are_known(monkeypatch):
    """Levels against the blind ones by family; a seed without its bases is left out."""
    blind = dict.fromkeys(data.FAMILIES, 0.2) | dict(count=0.5)
    monkeypatch.setattr(report, "blind_levels", lambda splits: {"test": blind})
    results = made_up(random.Random(0), 2, ["weak", "strong", "strong/sft"])
    results["cells"].pop()                           # the second seed's SFT
    weak, strong, taught = (cell["splits"] for cell in results["cells"][:3])
    weak["test"]["accuracy"], strong["test"]["accuracy"] = 0.35, 0.7
    strong["test"]["families"] = dict.fromkeys(data.FAMILIES, 0.9) | dict(count=0.69, sum=0.4)
    strong["test"]["format"], strong["text"]["format"] = 0.2, 0.6
    strong["text"]["accuracy"], taught["test"]["accuracy"] = 0.8, 0.95
    taught["test"]["families"] = dict.fromkeys(data.FAMILIES, 0.98) | dict(location=0.76)
    *_, row = table = report.calibration_table(results)
    assert row == ["0", "10", "70", "19", "20", "80", "60", "95", "76"]
    assert len(table) == 3 and all(len(row) == 9 for row in table)


def test_faithful_of_right_by_hand():
    """Over seeds a t interval, of one Wilson's over its right answers; a model that is never right
    says nothing."""
    results = made_up(random.Random(0), 3, ["weak"])
    wholes = [cell["splits"]["test"] for cell in results["cells"]]
    for whole, accuracy, faithful in zip(wholes, (0.5, 0.8, 0.0), (0.3, 0.6, 0.0)):
        whole.update(accuracy=accuracy, faithful=faithful, n=100)
    _, low, high, _ = report.t_interval([60.0, 75.0])
    assert report.faithful_of_right(results["cells"], "test") == f"67.5 [{low:.0f}, {high:.0f}]"
    low, high = evaluate.wilson(30, 50)
    expected = f"60.0 [{100 * low:.0f}, {100 * high:.0f}]"
    assert report.faithful_of_right(results["cells"][:1], "test") == expected
    assert report.faithful_of_right(results["cells"][2:], "test") == ""
    assert report.faithful_of_right(results["cells"][::-2], "test") == expected
    del wholes[1]["lucky"]                           # of a study older than that figure
    assert "lucky" not in report.pooled(results["cells"], "test")


def test_deceptive_rewards_of_three_seeds():
    """A reward that rises in every seed, and a held-out accuracy that falls, or rises as well."""
    results = made_up(random.Random(0), 3, ["weak", "weak/grpo", "weak/grpo --grader lenient"])
    for cell in results["cells"]:
        sign = -1 if "lenient" in cell["cell"] else 1
        cell |= dict(reward_gain=0.2 + 0.01 * cell["seed"], regret=0.03, spearman=0.5 * sign,
                     held_out_gain=sign * 0.1 + 0.01 * cell["seed"])
    del results["cells"][0]["reward_gain"], results["cells"][3]["reward_gain"]
    del results["cells"][6]["reward_gain"]           # of the bases
    _, honest, lenient = report.reward_table(results)
    interval = report.in_points([20.0, 21.0, 22.0])
    assert honest[:3] == ["weak/grpo", "3", interval] and interval.startswith("+21.0 [+18.5, ")
    assert honest[4:] == ["3.0", "0 of 3", "no"]
    assert lenient[3].startswith("-9.0 [-11.5,") and lenient[4:] == ["3.0", "3 of 3", "yes"]


def test_figures_of_every_finding():
    """Of eight seeds: a dot each, a whisker for each mean, legend, axis and ticks; one figure a
    split, one over compute for each base, one for each run of a reward."""
    results = made_up(random.Random(0), 8)
    page = report.report(results)
    for finding in evaluate.FINDINGS.values():
        assert finding.question in page
        assert all(f">{name}</text>" in page for name in finding.series)
        assert all(f">{tick}</text>" in page for tick in finding.ticks)
    accuracy, _, *compute = report.charts(results, "capacity")
    assert accuracy.count("h0") == 8 * 5 * 4         # seeds, series, ages
    assert len(compute) == 4 and all("FLOP" in one and "1e12" in one for one in compute)
    assert len(list(report.charts(results, "rewards"))) == 1 + 12


def test_a_figure_compares_the_same_seeds():
    """A way that one seed has stood beside the means of eight others: TRAPO of one base, SFT of
    all. Where no seed has all cells yet, what is there is shown."""
    results = made_up(random.Random(0), 3)
    missing = [cell for cell in results["cells"] if cell["cell"] == "weak/sft"]
    results["cells"].remove(missing[0])
    assert next(report.charts(results, "capacity")).count("h0") == 2 * 5 * 4
    for cell in missing[1:]:
        results["cells"].remove(cell)
    assert next(report.charts(results, "capacity")).count("h0") == 3 * (5 * 4 - 1)


def test_chart_puts_values_where_they_belong():
    """0 at the bottom, 100 at the top; a whisker as long as the t interval, but for what no share
    can be; x along the ticks."""
    points = [(0, [0.0, 0.0]), (1, [90.0, 110.0]), (1, [49.0, 51.0])]
    drawn = report.chart("accuracy", "base", {"SFT": points}, {0: "weak", 1: "strong"})
    _, low, high, _ = report.t_interval([49.0, 51.0])
    line, dots = re.findall('d="(M[^"]*)"', drawn)[-2:]
    assert line.startswith("M50.0 250.0L420.0 50.0") and dots.count("M50.0 250.0h0") == 2
    assert "M420.0 70.0h0M420.0 30.0h0" in dots
    assert f"M420.0 {250 - 2 * low:.1f}L420.0 {250 - 2 * high:.1f}" in line
    assert "M420.0 250.0L420.0 50.0" in line         # from -37 to 237
    assert report.chart("accuracy", "base", {"SFT": []}, {0: "weak"}) == ""


def test_a_way_keeps_its_colour():
    """In the figures over compute, where the base has no points, SFT was drawn in its colour."""
    points = [(0, [50.0])]
    drawn = report.chart("accuracy", "base", {"base": [], "SFT": points}, {0: "weak"})
    assert f'fill="{report.COLOURS[1]}">SFT<' in drawn
    assert drawn.count("<g stroke") == 1


KEPT = ROOT / ".github" / "results.json"


@pytest.mark.skipif(not KEPT.exists(), reason="no results of a whole study are kept yet")
def test_readme_shows_the_kept_results():
    """A table that was edited by hand, or that an older study wrote, is caught."""
    results, text = report.read_results(KEPT), (ROOT / "README.md").read_text()
    of_papers = report.read_results(KEPT, KEPT.with_name("papers.json"))
    kept = json.loads(KEPT.with_name("example.json").read_text())
    assert report.readme(text, results, of_papers, kept) == text
    assert evaluate.text_table(report.example_table(kept)) in text
    shown = Image.open(KEPT.with_name("task.png")).resize((64, 64), Image.NEAREST)
    assert shown.tobytes() == data.world_example(*kept["id"].split("/")).images[0].tobytes()
    assert evaluate.text_table(report.verdict_table(results)) in text
    assert (ROOT / ".github" / "capacity.svg").read_text() == next(
        report.charts(results, "capacity"))


@pytest.mark.skipif(not EASYVQA.exists(), reason="the easyvqa data are not beside the repository")
def test_real_pictures_run_through_sft_grpo_and_evaluation(tmp_path):
    """easyvqa: pictures that nobody here drew, from scratch, through all three scripts."""
    rows = [line for line in (EASYVQA / "train.jsonl").read_text().splitlines()[:96]]
    train = EASYVQA / "train.jsonl"
    assert len(rows) == 96
    done = run("sft.py", "--data", train, "--size", "s", "--steps", "3", "--eval-examples", "8",
               "--batch", "16", "--out", tmp_path / "sft", "--device", "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    done = run("grpo.py", "--data", train, "--init", tmp_path / "sft", "--steps", "2", "--prompts",
               "4", "--eval-examples", "8", "--out", tmp_path / "grpo", "--device", "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    done = run("evaluate.py", "--data", EASYVQA / "test.jsonl", "--model", tmp_path / "grpo",
               "--limit", "20", "--out", tmp_path / "rows.jsonl", "--device", "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = data.read_jsonl(tmp_path / "rows.jsonl")
    assert len(rows) == 20 and rows[0]["faithful"] is None
