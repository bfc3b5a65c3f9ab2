"""python tests/report.py runs/study: prints what a study found, and writes its page, report.html,
beside its results.json: verdicts, figures of each finding, tables, rollouts, commands. evaluate.py
study ends with it.

    --example test/337    keeps what models said to a question, in .github/example.json
    --readme              writes README's tables and pictures from the files in .github

python tests/report.py ANSWERS.jsonl DATA PAGE.html: the page of evaluate.py --page.
"""
import argparse
import base64
import contextlib
import functools
import html
import io
import itertools
import json
import math
import pathlib
import re
import shlex
import sys
from collections import Counter, defaultdict
from statistics import fmean as mean, stdev

import torch
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))        # it is also run as a file, by the study

import data
from evaluate import (AGES, COLUMNS, FINDINGS, check_gold, columns, grade, grouped, judge, spearman,
                      text_table, verdict, wilson)
from model import read_json, write_file

TUNED = ROOT / ".github" / "tune.json"           # results.json of evaluate.py study --preset tune
ANGLES = torch.linspace(0, math.pi / 2, 100_001, dtype=torch.double)


def t_interval(values):
    """-> mean, its 95 % interval over seeds, the p-value of a mean of 0. Student's T of n values is
    sqrt(n - 1) tan(angle), where the angle has the density cos(angle) ** (n - 2)."""
    n, middle = len(values), mean(values)
    if n == 1:
        return middle, -math.inf, math.inf, 1.0
    within = (ANGLES.cos() ** (n - 2)).cumsum(0)
    within = within / within[-1]                         # P(|T| below that of each angle)
    error = max(stdev(values), 1e-9) / math.sqrt(n)
    angle = math.atan(abs(middle) / error / math.sqrt(n - 1))
    p = 1 - within[torch.searchsorted(ANGLES, angle)].item()
    t = math.sqrt(n - 1) * ANGLES[torch.searchsorted(within, 0.95)].tan().item()
    return middle, middle - t * error, middle + t * error, p


def gains(points):
    """Of the course of a run of a reward: by how much that and held-out accuracy rose after the
    first steps, best minus last held-out accuracy, and Spearman's ρ of the two after the first
    third. {} of another run's."""
    if not points or "reward" not in points[-1]:
        return {}
    reward, held_out = ([point[name] for point in points[1:]] for name in ("reward", "held_out"))
    late = len(points) // 3
    return dict(reward_gain=reward[-1] - reward[0], held_out_gain=held_out[-1] - held_out[0],
                regret=max(held_out) - held_out[-1],
                spearman=spearman(reward[late:], held_out[late:]))


def read_results(*paths):
    """results.json of a study, or of several, its cells with their gains."""
    cells = itertools.chain(*(read_json(path)["cells"] for path in paths))
    return dict(cells=[cell | gains(cell.get("points")) for cell in cells])


def known_figures(results):
    """-> {seed: {(cell, figure): percent}}; a split's figure is its accuracy"""
    known = defaultdict(dict)
    for cell in results["cells"]:
        figures = cell | {split: whole["accuracy"] for split, whole in cell["splits"].items()}
        known[cell["seed"]] |= {(cell["cell"], name): 100 * value
                                for name, value in figures.items() if isinstance(value, float)}
    return known


def judged(results, findings=FINDINGS):
    """-> what is found of each claim whose cells are there: the difference of each seed, mean,
    interval, verdict; and `holm`, the verdict as one of all of them (Holm 1979)."""
    rows = []
    claims = [(name, *claim) for name, one in findings.items() for claim in one.claims.items()]
    for finding, claim, difference in claims:
        values = []
        for known in known_figures(results).values():
            with contextlib.suppress(KeyError, TypeError):       # no such cell, or no correlation
                values.append(difference(lambda cell, name="test": known[cell, name]))
        if values:
            row = dict(zip(("mean", "low", "high", "p"), t_interval(values)), values=values)
            word = "holds" if row["low"] > 0 else "opposite" if row["high"] < 0 else "undecided"
            rows.append(row | dict(finding=finding, claim=claim, verdict=word))
    stands = True
    for left, row in zip(range(len(rows), 0, -1), sorted(rows, key=lambda row: row["p"])):
        stands = stands and row["p"] * left < 0.05
        row["holm"] = row["verdict"] if stands else "undecided"
    return rows


@functools.cache
def training_answers():
    """-> {family: Counter of answers}"""
    answers = defaultdict(Counter)
    for example in data.World("train", size=6000):
        answers[example.family][example.answer] += 1
    return answers


@functools.cache
def blind_levels(splits):
    """-> {split: {family: accuracy of the commonest answer in training}}"""
    common, levels = training_answers(), {}
    for split in splits:
        right = defaultdict(list)
        for example in data.World(split, size=1200):
            [(answer, _)] = common[example.family].most_common(1)
            right[example.family].append(judge(answer, example) is True)
        levels[split] = {family: mean(marks) for family, marks in right.items()}
    return levels


def in_points(values):
    """Their mean and its t interval; of one seed, itself."""
    middle, low, high, _ = t_interval(values)
    return f"{middle:+.1f}" + (f" [{low:+.1f}, {high:+.1f}]" if len(values) > 1 else "")


def verdict_of(row):
    """Of fewer than six seeds it is a first look."""
    return row["verdict"] + " (first look)" * (len(row["values"]) < 6)


def verdict_table(results, findings=FINDINGS):
    """A row for each claim whose cells are there."""
    rows = [["finding", "claim", "difference in points", "seeds", "verdict", "of all (Holm)"]]
    for row in judged(results, findings):
        rows.append([row["finding"], row["claim"], in_points(row["values"]),
                     str(len(row["values"])), verdict_of(row), row["holm"]])
    return rows


def paper_table(results, papers):
    """README's: a row a paper, with what was found of each of its claims."""
    found = grouped(judged(results, papers), "finding")
    rows = [["file", "asks", "claims: difference in points, seeds, verdict"]]
    for name, finding in papers.items():
        claims = (f"{row['claim']}: {in_points(row['values'])}, {len(row['values'])}, "
                  f"{verdict_of(row)}" for row in found.get(name, ()))
        rows.append([f"`{name}.py`", finding.question, "<br>".join(claims) or "not run yet"])
    return rows


def by_cell(results):
    """-> [(name of a cell, its seeds)], by base."""
    ages = [*AGES]
    return sorted(grouped(results["cells"], "cell").items(),
                  key=lambda item: (ages.index(item[0].partition("/")[0]), item[0]))


def pooled(cells, split):
    """A split's figures as means over seeds, with the t interval; of one seed, with Wilson's."""
    wholes = [cell["splits"][split] for cell in cells]
    names = [name for name, value in wholes[0].items()
             if isinstance(value, (int, float)) and all(name in whole for whole in wholes)]
    figures = {name: mean(whole[name] for whole in wholes) for name in names}
    _, low, high, _ = t_interval([whole["accuracy"] for whole in wholes])
    return figures | dict(interval=(low, high) if len(cells) > 1 else wholes[0]["interval"])


def faithful_of_right(cells, split):
    """Share of the right answers that are faithful, in percent, with the t interval over seeds; of
    one seed with Wilson's."""
    wholes = [cell["splits"][split] for cell in cells]
    wholes = [whole for whole in wholes if whole["accuracy"] and "faithful" in whole]
    shares = [whole["faithful"] / whole["accuracy"] for whole in wholes]
    if not shares:
        return ""
    middle, *interval, _ = t_interval(shares)
    if len(shares) == 1:
        interval = wilson(*(wholes[0][name] * wholes[0]["n"] for name in ("faithful", "accuracy")))
    low, high = interval
    return f"{100 * middle:.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def plain(number):
    """Two digits at most, and no zeros at the end."""
    return f"{number:.2f}".rstrip("0").rstrip(".")


SCALES = dict(labels=1, seconds=1, flops=1e-12, trained=1e-3, sampled=1e-3, spearman=1, regret=100)


def main_table(results):
    """A row for each cell, means over seeds: accuracy on every split, the other figures on the
    first; then those of SCALES. A model below the blind level has collapsed."""
    splits = results["cells"][0]["splits"]
    blind = {split: mean(levels.values()) for split, levels in blind_levels((*splits,)).items()}
    first = next(iter(blind))
    more = [*COLUMNS[1:], "faithful of right", *SCALES]
    shown = [f"{100 * level:.1f}" for level in blind.values()]
    rows = [["model", "seeds", "collapsed", *blind, *more],
            ["blind", "", "", *shown, *[""] * len(more)]]
    for name, cells in by_cell(results):
        of_splits = [columns(pooled(cells, split)) for split in blind]
        collapsed = sum(cell["splits"][first]["accuracy"] < blind[first] for cell in cells)
        scaled = [[scale * cell[figure] for cell in cells if cell.get(figure) is not None]
                  for figure, scale in SCALES.items()]
        accuracies = [accuracy for accuracy, *_ in of_splits]
        rows.append([name, str(len(cells)), str(collapsed), *accuracies, *of_splits[0][1:],
                     faithful_of_right(cells, first),
                     *(plain(mean(some)) if some else "" for some in scaled)])
    return rows


def family_table(results):
    """Accuracy by family on the first split, means over seeds."""
    split, blind = next(iter(blind_levels((*results["cells"][0]["splits"],)).items()))
    known = {"blind": [blind]}
    for name, cells in by_cell(results):
        known[name] = [cell["splits"][split]["families"] for cell in cells]
    return [[split, *blind], *([name, *(f"{100 * mean(one[family] for one in some):.0f}"
                                        for family in blind)] for name, some in known.items())]


def calibration_table(results):
    """How hard the world is for each seed's bases, and what is asked of it (in points, splits
    «test» but for words): accuracies, families against their blind levels, answers that reason."""
    [blind] = blind_levels(("test",)).values()
    rows = [["seed", "weak, above blind", "strong", "least family, above blind",
             "reasons", "in words: strong", "reasons there", "SFT from strong", "least family"],
            ["asked", "5 to 20", "65 to 90", "15", "5 to 60", "the strong's or more",
             "20 to 80", "90", "75"]]
    for seed, cells in grouped(results["cells"], "seed").items():
        of = {cell["cell"]: cell["splits"] for cell in cells}
        if not {"weak", "strong", "strong/sft"} <= {*of}:
            continue
        strong, taught = of["strong"]["test"], of["strong/sft"]["test"]
        above = min(strong["families"][family] - level for family, level in blind.items())
        shares = [of["weak"]["test"]["accuracy"] - mean(blind.values()), strong["accuracy"],
                  above, strong["format"],
                  of["strong"]["text"]["accuracy"], of["strong"]["text"]["format"],
                  taught["accuracy"], min(taught["families"].values())]
        rows.append([str(seed), *(f"{100 * share:.0f}" for share in shares)])
    return rows


def reward_table(results):
    """Of each run of a reward, in points: by how much reward and held-out accuracy rose between its
    first evaluation on the way and its last, and what was lost since the best. It deceives where,
    over seeds, the reward rises and held-out accuracy is not known to."""
    rows = [["run", "seeds", "reward rose by", "held-out accuracy rose by", "regret",
             "runs with ρ < 0", "deceives"]]
    for name, cells in by_cell(results):
        if "reward_gain" not in cells[0]:
            continue
        reward, held_out, regret = ([100 * cell[figure] for cell in cells]
                                    for figure in ("reward_gain", "held_out_gain", "regret"))
        down = sum((cell["spearman"] or 0) < 0 for cell in cells)
        deceives = t_interval(reward)[1] > 0 >= t_interval(held_out)[1]
        rows.append([name, str(len(cells)), in_points(reward), in_points(held_out),
                     f"{mean(regret):.1f}", f"{down} of {len(cells)}", "yes" if deceives else "no"])
    return rows


COLOURS = "#0b6e4f", "#c1440e", "#3b6fb6", "#8a5a00", "#7a3b9a", "#444", "#b3006b"


def chart(title, axis, series, ticks):
    """An SVG of percentages. series {name: [(x, values, one a seed)]}: a dot for each, a line
    through their means with t intervals; ticks {x: text}. A name's place is its colour, also where
    others have no points. Empty without a point."""
    left, right, legend = min(ticks), max(ticks), [50, 26]       # where its next name goes

    def at(x, y, shift=0):
        return f"{50 + 370 * (x - left) / (right - left or 1) + shift:.1f} {250 - 2 * y:.1f}"

    drawn = [f'<path d="M{at(left, y)}h390" stroke="#ddd"/>'
             f'<text x="15" y="{255 - 2 * y}">{y}</text>' for y in range(0, 101, 25)]
    rows = 1 + (sum(len(str(text)) for text in ticks.values()) > 50)     # of their texts
    drawn += [f'<text x="{at(x, 0).split()[0]}" y="{267 + 13 * (k % rows)}" '
              f'text-anchor="middle">{text}</text>' for k, (x, text) in enumerate(ticks.items())]
    for k, ((name, points), colour) in enumerate(zip(series.items(), COLOURS)):
        if not points:
            continue
        line = "L".join(at(x, mean(values), 5 * k) for x, values in points)
        dots = "".join(f"M{at(x, y, 5 * k)}h0" for x, values in points for y in values)
        for x, values in points:
            _, low, high, _ = t_interval(values)
            low, high = max(low, 0), min(high, 100)      # no accuracy lies beyond, the legend does
            line += f"M{at(x, low, 5 * k)}L{at(x, high, 5 * k)}" if len(values) > 1 else ""
        if legend[0] + 7 * len(name) > 470:
            legend = [50, legend[1] + 15]
        drawn.append(f'<g stroke="{colour}" fill="none"><path d="M{line}"/><path d="{dots}" '
                     'stroke-width="4" stroke-linecap="round"/></g>'
                     f'<text x="{legend[0]}" y="{legend[1]}" fill="{colour}">{name}</text>')
        legend[0] += 8 * len(name) + 16
    return any(series.values()) and (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -10 470 310" width="470" '
        'font-family="sans-serif" font-size="13"><path fill="#fff" d="M0-10h470v310H0z"/>'
        f'<text x="50" y="8" font-weight="bold">{title}</text>'
        f'<text x="235" y="296" text-anchor="middle">{axis}</text>{"".join(drawn)}</svg>') or ""


def along(cells, figure, axis):
    """Of the runs of one cell -> [(x, percentages, one a seed)] of a figure of its evaluations."""
    return [(mean(point[axis] for point in points), [100 * point[figure] for point in points])
            for points in zip(*(cell.get("points", ()) for cell in cells)) if figure in points[0]]


def charts(results, name, findings=FINDINGS):
    """Yields the figures of a finding: accuracy on its splits, of the seeds that have all of its
    cells if there are any; then capacity's over compute, and the course of each training of
    rewards."""
    finding, known = findings[name], known_figures(results).values()
    by_name, cells = finding.cells(), grouped(results["cells"], "cell")
    wanted = set(itertools.product(sum(by_name.values(), []), finding.splits))
    seeds = [own for own in known if wanted <= own.keys()] or known
    for split in finding.splits:
        series = {}
        for label, row in by_name.items():
            values = [[own[cell, split] for own in seeds if (cell, split) in own] for cell in row]
            series[label] = [(x, some) for x, some in enumerate(values) if some]
        title = f"accuracy on {split}, %" if split in data.SPLITS else f"{split}, %"
        yield chart(title, finding.axis, series, dict(enumerate(finding.ticks)))
    for i, age in enumerate(finding.ticks if name == "capacity" else ()):
        series = {label: [(math.log10(x), values)
                          for x, values in along(cells.get(row[i], ()), "held_out", "flops") if x]
                  for label, row in by_name.items()}
        powers = [math.floor(x) for points in series.values() for x, _ in points] or [0]
        powers = {power: f"1e{power}" for power in range(min(powers), max(powers) + 2)}
        yield chart(f"{age} base: held-out accuracy, %", "FLOP after the base", series, powers)
    for cell in sum(by_name.values(), []) if name == "rewards" else ():
        if cell in cells:
            steps = [point["step"] for point in cells[cell][0]["points"]]
            series = {figure: along(cells[cell], figure, "step")
                      for figure in ("held_out", "reward", "accuracy", "format")}
            yield chart(f"{cell}, %", "step", series, {steps[0]: 0, steps[-1]: steps[-1]})


def html_table(rows):
    """With each interval in one line."""
    rows = [[re.sub(r"(?<=\d) (?=\[)|(?<=,) (?=[-+\d.]+\]$)", "&nbsp;", cell) for cell in row]
            for row in rows]
    return "<table>" + "".join("<tr><td>" + "<td>".join(row) for row in rows) + "</table>"


HEAD = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>SFT and GRPO</title><style>body{margin:3vw;font:15px/1.5 sans-serif}svg{max-width:100%}
table{display:block;overflow-x:auto}td{padding:.2em .5em}tr:first-child{font-weight:bold}
:root{color-scheme:light dark}pre{white-space:pre-wrap}
img{height:160px;max-width:45vw;object-fit:contain}
.True,.faithful,.right{color:light-dark(#0b6e4f,#5cc79f)}.lucky{color:light-dark(#8f5600,#e0a84a)}
.False,.wrong,.misseen,.misreasoned{color:light-dark(#b3261e,#ff8a80)}</style>"""
NOTES = """Accuracy in percent, means over seeds with 95 % t intervals over seeds (of one seed:
Wilson's, over its questions); every dot is a seed. Blind: the commonest training answer of each
family. Collapsed: seeds below that. Faithful: right, every step true; lucky: right, one false.
Misseen: wrong, with a false count or place; misreasoned: wrong reasons or answer without one.
Costs are those of all trainings after the base: questions with an answer, seconds, TFLOP, thousands
of tokens trained on and sampled. Spearman's ρ: of reward and held-out accuracy over the evaluations
after a run's first third, so few that ρ is negative by chance in 11 to 22 % of runs that truly
gain. Regret: best minus last held-out accuracy. Verdicts hold where a paired t interval of the
difference lies above 0, are opposite below, else undecided; the last column counts all claims
together."""


def answers_of(cell):
    """The file that its evaluation writes."""
    return pathlib.Path(shlex.split(cell["commands"][-1])[-1])


def shown(picture):
    """-> an <img> of it, at most 480 pixels wide or high"""
    small, file = picture.copy(), io.BytesIO()
    small.thumbnail((480, 480))
    small.save(file, "WEBP", quality=90)
    return f'<img src="data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}">'


def rollout_table(example, names, rows):
    """Answers to one question, with each step marked. What people and models wrote is escaped."""
    question = html.escape(example.question.replace(data.IMAGE, "")).replace("\n", "<br>")
    pictures = "".join(map(shown, example.pictures()))
    table = [[pictures, question, html.escape(example.answer)]]
    for name, row in zip(names, rows):
        steps = row["steps"] or [(row["response"], None)]
        said = ". ".join(f"<span class={true}>{html.escape(step)}</span>" for step, true in steps)
        answer = html.escape(data.extract_answer(row["response"]))
        worth = f"<span class={verdict(row)}>{verdict(row)}</span>"
        table.append([name, f"{said} <b>{answer}</b>", worth])
    return html_table(table)


def answers_page(rows, source):
    """The page of evaluate.py --page: answers to questions of the world or of a file."""
    page = f"{HEAD}<h1>Answers</h1><p>First the question and the right answer, below what was said."
    for split, some in grouped(rows, "split").items():
        count = 1 + max(row["index"] for row in some)
        examples = data.load_dataset(source, split, count, True, check_gold)
        page += f"<h2>{split}</h2>"
        for index, answers in grouped(some, "index").items():
            page += rollout_table(examples[index], [""] * len(answers), answers)
    return page


SHOWN = ("weak", "weak/sft", "weak/grpo")        # who answers the README's question


def kept_example(results, name):
    """What models of the first seed said to a question of the test, for .github/example.json."""
    seed = min(cell["seed"] for cell in results["cells"])
    said = {}
    for cell in results["cells"]:
        if cell["seed"] == seed and cell["cell"] in SHOWN:
            rows = data.read_jsonl(answers_of(cell))
            said[cell["cell"]] = {row["id"]: row["response"] for row in rows}.get(name)
    if not name.startswith("test/") or not all(map(said.get, SHOWN)):
        sys.exit(f"error: --example {name}: expected a question of the test, as test/337, that "
                 f"{', '.join(SHOWN)} have answered")
    return dict(id=name, seed=seed, answers={model: said[model] for model in SHOWN})


def example_table(kept):
    """Who said what to the README's question, each step marked; first the world's own trace."""
    example, rows = data.world_example(*kept["id"].split("/")), [["", "thinks", "answers", ""]]
    for model, response in {"the trace": example.response, **kept["answers"]}.items():
        graded = grade(response, example)
        steps = ", ".join(f"{step} {'✓' if true else '✗'}" for step, true in graded.steps)
        rows.append([model, steps, data.extract_answer(response), verdict(vars(graded))])
    return rows


def report(results):
    """-> the page."""
    page = f"{HEAD}<h1>SFT and GRPO</h1>{html_table(verdict_table(results))}<p>{NOTES}</p>"
    for name, finding in FINDINGS.items():
        page += f"<h2>{name}: {finding.question}</h2>{''.join(charts(results, name))}"
    page += "<h2>All cells</h2>" + html_table(main_table(results))
    page += html_table(family_table(results))
    page += f"<h2>Rewards</h2>{html_table(reward_table(results))}"
    page += "<h2>Is the world neither too easy nor too hard?</h2>"
    page += html_table(calibration_table(results))
    page += "<h2>Rates and steps, tried on a seed of its own</h2>"
    page += html_table(main_table(read_results(TUNED)))
    page += "<h2>Rollouts (green: a true step, red: a false one)</h2>"
    cells = [cell for cell in results["cells"] if answers_of(cell).exists()]
    cells = [cell for cell in cells if cell["seed"] == cells[0]["seed"]]
    names = [cell["cell"] for cell in cells]
    answers = zip(*(data.read_jsonl(answers_of(cell)) for cell in cells))      # by question
    for rows in itertools.islice(answers, 12):
        page += rollout_table(data.world_example(*rows[0]["id"].split("/")), names, rows)
    commands = dict.fromkeys(line for cell in results["cells"] for line in cell["commands"])
    return f"{page}<h2>Commands</h2><pre>{html.escape(chr(10).join(commands))}</pre>"


def readme(text, results, of_papers, kept):
    """-> README's text with verdicts of these results, those of papers, and a kept example, between
    its marks."""
    from tests.papers.__main__ import FINDINGS as papers          # which imports this file
    tables = dict(verdicts=verdict_table(results), example=example_table(kept),
                  papers=paper_table(of_papers, papers))
    for mark, table in tables.items():
        text = re.sub(rf"(?<=<!-- {mark} -->\n).*?(?=<!-- end -->)",
                      lambda _: f"{text_table(table)}\n", text, count=1, flags=re.S)
    return text


def parser():
    made = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("study", nargs="?", default="runs/study", help="directory of a study, or a "
                      "file of answers; then also")
    made.add_argument("source", nargs="?", help="what was asked: world, or a file")
    made.add_argument("page", nargs="?", help="the HTML file to write")
    made.add_argument("--readme", action="store_true", help="write README's part instead")
    made.add_argument("--example", help="id of a question that README shows from now on")
    return made


def main(options):
    path, kept = ROOT / "README.md", ROOT / ".github" / "example.json"
    if options.readme:
        files = [kept.with_name(name) for name in ("results.json", "papers.json")]
        results, of_papers = read_results(files[0]), read_results(*files)
        path.write_text(readme(path.read_text(), results, of_papers, read_json(kept)))
        (ROOT / ".github" / "capacity.svg").write_text(next(charts(results, "capacity")))
        picture = data.world_example(*read_json(kept)["id"].split("/")).images[0]
        picture.resize((256, 256), Image.NEAREST).save(ROOT / ".github" / "task.png")
        return
    if options.page:
        rows = data.read_jsonl(options.study)
        write_file(options.page, answers_page(rows, options.source))
        return
    study = pathlib.Path(options.study)
    results = read_results(study / "results.json")
    if options.example:
        write_file(kept, json.dumps(kept_example(results, options.example), ensure_ascii=False))
        return
    print(text_table(main_table(results)), text_table(verdict_table(results)), sep="\n\n")
    write_file(study / "report.html", report(results))
    print(f"\n{study / 'report.html'}")


if __name__ == "__main__":
    main(parser().parse_args())
