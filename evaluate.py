"""One grader for reward, evaluation and study, and the figures that are made from its verdicts.

    python evaluate.py --model runs/grpo      accuracy per split and family with 95 % intervals
    python evaluate.py study                  the whole comparison, as a list of commands

Right: what stands in the last <answer> tags or \\boxed{} equals the gold answer: numbers by value,
words and choices by text, boxes by IoU. Formatted: exactly <think>...</think> and such an answer.
Faithful, on the tabletop: right, with every step of the reasoning true; else lucky.
"""
import argparse
import base64
import difflib
import html
import io
import json
import math
import pathlib
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field, fields
from fractions import Fraction
from operator import add, mul, sub, truediv
from statistics import correlation, fmean as mean
from types import SimpleNamespace

import torch
from tqdm import tqdm

import data
from kernels import Sampler
from model import CheckpointError, load, read_json, write

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COLUMNS = ["accuracy", "faithful", "lucky", "format", "tokens"]          # of the tables


def option(default, doc, choices=None, least=None):
    """A field of a Config: its default, its line in --help, what it may be."""
    return field(default=default, metadata=dict(doc=doc, choices=choices, least=least))


def parse(Config, argv=None, doc=""):
    """Makes the command line of a dataclass, and the dataclass from a command line."""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        kind = dict(action="store_true") if f.type is bool else dict(
            type=f.type, default=f.default, choices=f.metadata["choices"])
        shown = " (default: %(default)s)" * (f.type is not bool and f.default not in (None, ""))
        parser.add_argument("--" + f.name.replace("_", "-"), help=f.metadata["doc"] + shown, **kind)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions)
        parser.error(f"unknown option {unknown[0]}; did you mean {(near or ['--help'])[0]}?")
    for f in fields(Config):
        value, least = getattr(args, f.name), f.metadata["least"]
        if least is not None and value is not None and value < least:
            parser.error(f"--{f.name.replace('_', '-')} {value}: expected at least {least}")
    return Config(**vars(args))


def run_script(main, Config, doc, argv=None):
    """Runs main(config); what the user can mend ends as one clear line, not as a traceback."""
    try:
        main(parse(Config, argv, doc))
    except (data.DataError, CheckpointError, OSError) as error:
        sys.exit(f"error: {str(error).strip().rpartition('DataError: ')[2]}")      # of a worker too
    except KeyboardInterrupt:
        sys.exit("stopped")


# ----------------------------------------------------------------------------------- the grader
BOX = re.compile(r"\[" + ",".join([r"\s*(-?\d+(?:\.\d+)?)\s*"] * 4) + r"\]")
FORMATS = {"tags": re.compile(r"<think>(.+?)</think>\s*<answer>(.+?)</answer>", re.S),
           "boxed": re.compile(r"<think>(.+?)</think>\s*\\boxed\{(.+)\}", re.S)}
MAX_ANSWER, LARGEST = 400, 10 ** 12  # a longer answer is none, a larger number is only text
SIGNS = str.maketrans(dict(zip("²³√π−–≈×·⋅÷∘º", "^2 ^3 sqrt pi - - = * * * / ° °".split())))
SPELLINGS = [(re.compile(pattern), new) for pattern, new in (
    (r"(?<=\d)(?:\\,|\{,\}|,\\!)(?=\d{3})", ","), (r"\\(?:text|math)[a-z]* ?\{([^{}]*)\}", r"\1"),
    (r"\\(?:left|right|[!,;:()\[\] ])| ?\\?\$ ?|~", " "), (r"\\times|\\cdot", "*"), (r"\\div", "/"),
    (r"^ ?(?:[\\{}∠A-Za-z][\\{}∠A-Za-z ]{,22}\d?)? ?(?:=|\\approx) ?", ""),   # x =, m∠1 =
    (r"\^ ?\{ ?\\circ ?\}|\^ ?\\circ|\\degree", "°"), (r"arc(?=sin|cos|tan)", "a"),
    (r"\\[dt]?(?=frac|sqrt|pi|a?sin|a?cos|a?tan|%)", ""), (r"frac ?(\d) ?", r"frac{\1}/"),
    (r"\} ?(?=\{)", "}/"), (r"\{", "("), (r"\}", ")"), (r"\^ ?\((\d)\)", r"^\1"),
    (r"sqrt ?\[3\]", "cbrt"), (r"((?:sin|cos|tan) ?\(? ?)([\d.]+) ?°", r"\1(\2*pi/180)"),
    (r"(?<![\d.,/])(?<!/ )(\d+)(?: ?frac\((\d+)\)/\(?(\d+)\)?| (\d+)/(\d+))", r"(\1+\2\4/\3\5)"),
    (r"(?<![/^nst])(?<![/^nst] )frac", ""), (r"(?<=[\di)]) *(?:square|sq\.?) ([a-z]+)", r"\1^2"))]
NEEDLESS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))|(?<![\d.,])0+(?=\d)")        # in 1,234 and in 05
FORMULA = re.compile(r"((?:[\d.+*/^() -]|(?<=\d)e[-+]?\d|a?(?:sin|cos|tan)|sqrt|cbrt|pi)*)(.*)")
TIMES = re.compile(r"(?<=[\d.)i]) ?(?=\(|[acpst])")               # in 2√3, which has no sign
TOKEN = re.compile(r" *(\d+\.?\d*(?:e[-+]?\d+)?|\.\d+|a?(?:sin|cos|tan)|sqrt|cbrt|pi|\S)")
OPERATORS = dict(zip("+-*/^", (add, sub, mul, truediv, math.pow)))
UNITS = {word + plural + power: words.split()[0] + power for words in (       # spelling -> unit
    "mm millimeter millimetre,cm centimeter centimetre,m meter metre,km kilometer kilometre,"
    "in inch inche,ft foot feet,yd yard,mi mile,° degree deg,% percent,unit").split(",")
    for word in words.split() for plural in ("", "s") for power in ("", "^2", "^3")} | {"": ""}
ROUNDED = re.compile(r"nearest (?:(tenth)|(hundredth)|(thousandth)|whole|integer|degree|unit|"
                     r"\w*meter|inch|foot|yard|mile)", re.I)      # group: how many decimals


def clean(text):
    """The answer in a text in one plain spelling, without LaTeX, case and outer punctuation."""
    text = " ".join(data.strip_answer(text).translate(SIGNS).split())
    for pattern, new in SPELLINGS:
        text = pattern.sub(new, text)
    return text.casefold().lstrip(" \"'`*").rstrip(" .,:;!?\"'`*")


def value(tokens, level=0):
    """Takes a sum, at level 1 a product, 2 a power, 3 an atom from the end of tokens -> a Fraction
    where it is exact; nan where 2 + 3 is not worked out."""
    if level == 3:
        word = tokens.pop()
        if word == "(":
            return value(tokens) * (1 if tokens.pop() == ")" else math.nan)
        if word in "+-":
            return value(tokens, 2) * (-1 if word == "-" else 1)
        if word.isalpha():
            return math.pi if word == "pi" else getattr(math, word)(value(tokens, 3))
        return Fraction(word)
    left = value(tokens, level + 1)
    while tokens and tokens[-1] in ("+-", "*/", "^")[level]:
        sign, right = tokens.pop(), value(tokens, min(level + 1, 2))         # 2^3^2 is 2^(3^2)
        exact = sign in "+-*" and type(left) is type(right) is Fraction
        left = math.nan if exact and not 0 < right < 1 else OPERATORS[sign](left, right)
    return left


def number(text):
    """-> (value, unit) of a clean text that is one number and no more, else None."""
    formula, unit = FORMULA.fullmatch(NEEDLESS.sub("", text)).groups()
    tokens = TOKEN.findall(TIMES.sub("*", formula).replace("**", "^"))[::-1]
    try:
        found = value(tokens)
        found = Fraction(found) if found == int(found) else found
    except (ArithmeticError, AttributeError, IndexError, RecursionError, TypeError, ValueError):
        return None
    return (found, UNITS[unit]) if not tokens and unit in UNITS and abs(found) <= LARGEST else None


def same_number(answer, gold, question=""):
    """Whether clean texts are one number, as exactly as the question or the gold's form asks."""
    given, wanted = number(answer), number(gold)
    if not given or not wanted or given[1] and wanted[1] and given[1] != wanted[1]:
        return False
    scale = {("%", ""): Fraction(1, 100), ("", "%"): 100}.get((given[1], wanted[1]), 1)
    values, wanted = [given[0], given[0] * scale], wanted[0]
    if asked := ROUNDED.search(question):
        tens = 10 ** (asked.lastindex or 0)
        return math.floor(wanted * tens + 0.5) in [math.floor(each * tens + 0.5) for each in values]
    endless = isinstance(wanted, float) or pow(10, 99, wanted.denominator)        # as a decimal
    slack = abs(wanted) / (1000 if endless else 10 ** 13)
    if not endless and (decimals := re.search(r"\.(\d+)", gold)):
        slack = min(Fraction(1, 2 * 10 ** len(decimals[1])), abs(wanted) / 99)    # 1/3 is 0.33
    return any(abs(each - wanted) <= slack for each in values)


def same_box(answer, gold):
    """Whether two texts are boxes [x1, y1, x2, y2] with an intersection over union >= 0.5."""
    found = BOX.fullmatch(answer), BOX.fullmatch(gold)
    if None in found:
        return False
    a, b = (list(map(float, match.groups())) for match in found)
    shared = [*map(max, a[:2], b[:2]), *map(min, a[2:], b[2:])]
    common, *areas = [max(c[2] - c[0], 0) * max(c[3] - c[1], 0) for c in (shared, a, b)]
    return 3 * common >= sum(areas) > 0


def chosen(text, choices):
    """The choice that a letter, a text, both or a value speak of, or None."""
    if text in choices:
        return choices.index(text)
    pattern = r"(?:(?:option |choice )?[(\[]?([a-z])(?:[\]).: ]+|$))?(.*)"
    letter, rest = re.fullmatch(pattern, text).groups()
    equal = [i for i, choice in enumerate(choices) if letter in (None, chr(97 + i))
             and (letter and not rest or rest == choice or same_number(rest, choice))]
    return equal[0] if len(equal) == 1 else None


def is_right(answer, gold, choices=None, question=""):
    """Whether an answer equals the gold answer, by the kind of the gold answer."""
    if len(answer) > MAX_ANSWER:
        return False
    answer, gold, *choices = map(clean, (answer, gold, *(choices or ())))
    if choices and (wanted := chosen(gold, choices)) is not None:
        return chosen(answer, choices) == wanted
    return answer == gold != "" or same_box(answer, gold) or same_number(answer, gold, question)


def grade(response, example, answer_format="tags"):
    """-> correct, formatted, faithful (None where no scene tells), steps with their truth."""
    found, answer = FORMATS[answer_format].fullmatch(response.strip()), data.strip_answer(response)
    formatted = found is not None and not re.search(r"</?(think|answer)>", found[1] + found[2])
    formatted = formatted and (answer_format == "tags" or answer == found[2].strip())
    correct = is_right(answer, example.answer, example.choices, example.question)
    steps = data.check_steps(example.scene, found[1]) if formatted and example.scene else []
    claims = [true for _, true in steps if true is not None]
    faithful = correct and bool(claims) and all(claims) if example.scene else None
    return SimpleNamespace(correct=correct, formatted=formatted, faithful=faithful, steps=steps)


def wilson(right, n, z=1.96):
    """95 % interval of a proportion (Wilson 1927)."""
    share, spread = right / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_bootstrap(first, second, draws=2000, seed=0):
    """Mean difference of two models' marks on the same questions, with its 95 % interval."""
    gaps = (torch.tensor(first).float() - torch.tensor(second).float()).view(len(first), -1).mean(1)
    pick = torch.Generator().manual_seed(seed)
    means = gaps[torch.randint(len(gaps), (draws, len(gaps)), generator=pick)].mean(1)
    return gaps.mean().item(), means.quantile(0.025).item(), means.quantile(0.975).item()


def pass_at_k(n, right, k):
    """Chance that one of k answers drawn from n, `right` of them right, is right."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def spearman(a, b):
    """Rank correlation, ties shared; None where one side never changes."""
    if len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
        return None
    return correlation(*([sum((y < x) + (y <= x) for y in side) for x in side] for side in (a, b)))


def grouped(rows, key):
    """-> {value of the key: the rows that have it}"""
    groups = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def marks(rows):
    """-> for each question, whether each of its answers is right"""
    return [[row["correct"] for row in some] for some in grouped(rows, "id").values()]


def kind(row):
    """What an answer on the tabletop world is worth, in a word."""
    right = ("faithful" if row["faithful"] else "lucky") if row["formatted"] else "right"
    return right if row["correct"] else "wrong"


def summary(rows):
    """Rows of one split -> figures. Intervals count questions, not samples."""
    asked = marks(rows)
    n, samples, accuracy = len(asked), min(map(len, asked)), mean(map(mean, asked))
    figures = dict(n=n, accuracy=accuracy, interval=wilson(accuracy * n, n),
                   format=mean(row["formatted"] for row in rows),
                   length=mean(len(row["response_ids"]) for row in rows),
                   truncated=mean(row["truncated"] for row in rows))
    if rows[0]["faithful"] is not None:
        figures |= {name: mean(kind(row) == name for row in rows) for name in ("faithful", "lucky")}
    if samples > 1:
        figures["pass_at"] = {2 ** i: mean(pass_at_k(len(some), sum(some), 2 ** i)
                                           for some in asked) for i in range(samples.bit_length())}
    return figures


def summaries(rows):
    """-> {split: figures, with the same figures per family under «families»}"""
    return {split: summary(part) | dict(families={
        family: summary(some) for family, some in grouped(part, "family").items()})
        for split, part in grouped(rows, "split").items()}


def pieces(start, stop, size):
    """[(first, last + 1)] of the passes over start..stop, `size` at a time; 0: all at once."""
    return [(i, min(i + (size or stop), stop)) for i in range(start, stop, size or stop)]


def evaluate(sampler, processor, examples, split="", samples=1, temperature=0.0, new_tokens=48,
             seed=0):
    """Answers and grades every example -> rows, one for each answer, in order."""
    rows, size = [], max(1, 256 // samples)
    batches = [range(*piece) for piece in pieces(0, len(examples), size)]
    ahead = processor.ahead(examples, batches, sampler.device.type)
    for places, (some, batch, _) in zip(tqdm(batches, split, leave=False, disable=None), ahead):
        seeds = torch.tensor(places) + seed * 1_000_003
        rollouts = sampler.generate(batch, samples, new_tokens, temperature, seeds)
        for r, ids in enumerate(rollouts.rows()):
            example, response = some[r // samples], processor.decode(ids)
            rows.append(dict(
                id=example.id, split=split, family=example.family, prompt=example.question,
                prompt_ids=batch.ids[r // samples, :batch.lengths[r // samples]].tolist(),
                response_ids=ids, logprobs=rollouts.logprobs[r, :len(ids)].tolist(),
                response=response, truncated=not rollouts.finished[r].item(), answer=example.answer,
                **vars(grade(response, example, processor.style["answer_format"]))))
    return rows


@dataclass
class AskConfig:
    """Options of every script. What is not given of a prompt is as the checkpoint stores it."""
    data: str = option("world", "world, or a .jsonl or .json file")
    system: str = option(None, "system line of the prompt")
    instruction: str = option(None, "text after each question, e.g. to think first")
    answer_format: str = option(None, "tags: <answer>3</answer>; boxed: \\boxed{3}", tuple(FORMATS))
    longest_edge: int = option(None, "of a picture (default: a tile; Qwen: 512² as area)", least=1)
    max_new_tokens: int = option(48, "longest answer", least=1)
    seed: int = option(0, "seed of everything random", least=0)
    device: str = option(DEVICE, "cpu or cuda", ("cpu", "cuda"))
    skip_bad_rows: bool = option(False, "count and skip bad rows of a file instead of stopping")

    def prompt(self):
        return {name: value for name in data.PROMPT if (value := getattr(self, name)) is not None}


@dataclass
class Config(AskConfig):
    """Options of evaluate.py; study has its own."""
    model: str = option("runs/grpo", "directory: a run's, or a downloaded checkpoint's")
    against: str = option(None, "a second model on the same questions: paired bootstrap")
    split: str = option("test,ood,text", "splits of the world: train, val, test, ood, text")
    limit: int = option(600, "questions per split", least=1)
    samples: int = option(1, "answers per question; above 1 also pass@k", least=1)
    temperature: float = option(None, "0 is greedy (default: 0 for one sample, else 1)", least=0)
    out: str = option(None, "file for one JSON row per answer")


def answer_all(directory, c):
    """Loads a model and answers every split that the options name; yields the rows."""
    dtype = torch.bfloat16 if c.device == "cuda" else torch.float32
    model, processor = load(directory, c.device, dtype, c.prompt(), may_differ=False)
    sampler = Sampler(model, processor.banned(model.vocabulary), processor.stop)
    heat = c.temperature if c.temperature is not None else float(c.samples > 1)
    for split in c.split.split(",") if c.data == "world" else ["all"]:
        some = data.load_dataset(c.data, split, c.limit, c.skip_bad_rows)
        yield from evaluate(sampler, processor, some, split, c.samples, heat, c.max_new_tokens,
                            c.seed)


def columns(figures):
    """The figures of a split or a family as cells under COLUMNS, shares in percent."""
    value, low, high = (100 * share for share in (figures["accuracy"], *figures["interval"]))
    shares = [f"{100 * figures[name]:.1f}" if name in figures else "" for name in COLUMNS[1:4]]
    return [f"{value:.1f} [{low:.0f}, {high:.0f}]", *shares, f"{figures['length']:.1f}"]


def markdown_table(rows):
    """Aligned, so that it reads well on a terminal too."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def main(c):
    rows, table = list(answer_all(c.model, c)), [["split", "family", *COLUMNS, "pass"]]
    if c.out:
        write(c.out, "".join(json.dumps(row) + "\n" for row in rows))
    for split, whole in summaries(rows).items():
        for family, figures in [("", whole), *whole["families"].items()]:
            passes = " ".join(f"pass@{k} {v:.1%}" for k, v in figures.get("pass_at", {}).items())
            table.append([split, family, *columns(figures), passes])
    print(markdown_table(table))
    if c.against:
        others = grouped(answer_all(c.against, c), "split")
        for split, mine in grouped(rows, "split").items():
            gap, low, high = paired_bootstrap(marks(mine), marks(others[split]))
            print(f"{split}: {c.model} minus {c.against}: {gap:+.1%} [{low:+.1%}, {high:+.1%}]")


# ----------------------------------------------------------------------------------- the study
@dataclass
class StudyConfig:
    preset: str = option("quick", "smoke: does it run; quick: the comparison", ("smoke", "quick"))
    out: str = option("runs/study", "directory of the study")
    seeds: int = option(1, "runs per cell, each from the same base", least=1)
    device: str = option(DEVICE, "cpu or cuda", ("cpu", "cuda"))


PRESETS = {"quick": dict(weak=600, limit=600, base="--keep 600", sft="--examples 2000",
                         grpo="--examples 2000 --steps 100 --eval-every 10"),
           "smoke": dict(weak=6, limit=24, base="--steps 12 --keep 6 --batch 32 --eval-examples 12",
                         sft="--examples 128 --epochs 1 --eval-examples 12",
                         grpo="--examples 64 --prompts 4 --steps 3 --eval-every 1 "
                              "--eval-examples 12 --max-new-tokens 32")}
CURVES = {"held_out": "#0b6e4f", "reward": "#c1440e", "accuracy": "#7a7a7a", "format": "#3b6fb6"}


def study_cells(c):
    """Yields the study as commands to paste: `command` makes a model, `evaluation` tests it."""
    preset, out = PRESETS[c.preset], pathlib.Path(c.out)
    bases = dict(strong=f"{out}/base", weak=f"{out}/base/step-{preset['weak']}")
    trained = [(seed, strength, method) for seed in range(c.seeds)
               for strength in ("weak", "strong") for method in ("sft", "grpo", "sft-grpo")]
    for seed, strength, method in [(0, "strong", "base"), (0, "weak", "base"), *trained]:
        name, script = f"{strength}-{method}-{seed}", method.split("-")[-1]
        init = f"{out}/{strength}-sft-{seed}" if method == "sft-grpo" else bases[strength]
        model, start = f"{out}/{name}", f"{script}.py --init {init} --seed {seed}"
        if method == "base":
            name, model, start = f"{strength}-base", bases[strength], "sft.py --stage base"
        command = f"python {start} {preset[script]} --out {model} --device {c.device} --resume"
        answers = f"{out}/answers/{name}.jsonl"
        evaluation = (f"python evaluate.py --model {model} --limit {preset['limit']} "
                      f"--device {c.device} --out {answers}")
        yield dict(name=name, strength=strength, method=method, seed=seed, model=model,
                   command=command * (name != "weak-base"), evaluation=evaluation, answers=answers)


def run_command(command):
    """Prints a command and runs it with the script beside this file."""
    print(f"\n$ {command}", flush=True)
    script, *options = command.split()[1:]
    process = subprocess.Popen([sys.executable, pathlib.Path(__file__).with_name(script), *options])
    signal.signal(signal.SIGINT, lambda *_: process.send_signal(signal.SIGINT))     # it may save
    if code := process.wait():
        sys.exit(f"error: that command ended with {code}; start again to go on here")


def read_rows(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def reward_curve(model):
    """Points (mean reward and its parts since the evaluation before, held-out accuracy), Spearman
    ρ after the first third (below 0: the reward deceives), regret (best minus last accuracy)."""
    rows, points = read_rows(pathlib.Path(model) / "metrics.jsonl"), []
    ends = [i for i, row in enumerate(rows) if "val_accuracy" in row]
    for start, end in zip(ends, ends[1:]):
        parts = {name: mean(row[name] for row in rows[start + 1:end]) for name in list(CURVES)[1:]}
        points.append(dict(step=rows[end]["step"], held_out=rows[end]["val_accuracy"], **parts))
    held_out, late = [point["held_out"] for point in points], len(points) // 3
    return dict(points=points, regret=max(rows[i]["val_accuracy"] for i in ends) - held_out[-1],
                spearman=spearman([point["reward"] for point in points[late:]], held_out[late:]))


def study(c):
    """Runs the cells that are not there yet, then writes the reports."""
    path = pathlib.Path(c.out) / "results.json"
    machine = f"{c.device}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}"
    results = read_json(path) if path.exists() else dict(preset=c.preset, machine=machine, cells=[])
    done = {cell["name"]: cell for cell in results["cells"]}
    for cell in tqdm(list(study_cells(c)), "study", disable=None):
        if not cell.items() <= done.get(cell["name"], {}).items():
            for command in filter(None, (cell["command"], cell["evaluation"])):
                run_command(command)
            steps = read_rows(f"{cell['model']}/metrics.jsonl") if cell["command"] else []
            seconds = sum(row.get("seconds", 0) for row in steps)
            curve = reward_curve(cell["model"]) if "grpo" in cell["method"] else None
            splits = summaries(read_rows(cell["answers"]))
            done[cell["name"]] = cell | dict(seconds=seconds, splits=splits, curve=curve)
            results["cells"] = list(done.values())
            write(path, json.dumps(results, indent=1))
    for name, text in zip(("report.md", "report.html"), report(**results)):
        write(path.with_name(name), text)
    print(f"\n{markdown_table(main_table(results['cells']))}\n\nmore in {c.out}/report.html")


# ---------------------------------------------------------------------------------- the report
HEAD = """<!doctype html><meta charset="utf-8"><title>SFT and GRPO</title><style>body{margin:2em;
font:15px/1.5 sans-serif}td{padding:.2em .7em}tr:first-child{font-weight:bold}img{height:160px}
.True,.faithful{color:#0b6e4f}.lucky{color:#b36b00}.False,.wrong{color:#b3261e}</style>"""
NOTES = """Accuracy in percent with 95 % Wilson intervals; what follows is of the test. Faithful:
right, every step true; lucky: right, one false. Spearman: of reward and held-out accuracy after a
run's first third; below 0, the reward deceives. Regret: best minus last. One seed proves little."""


def html_table(rows):
    return "<table>" + "".join("<tr><td>" + "<td>".join(row) for row in rows) + "</table>"


def main_table(cells):
    rows = [["model", *cells[0]["splits"], *COLUMNS[1:], "seconds", "spearman", "regret"]]
    for cell in sorted(cells, key=lambda cell: cell["strength"], reverse=True):
        accuracy, *more = zip(*map(columns, cell["splits"].values()))         # of each split
        figures = map((cell | (cell["curve"] or {})).get, rows[0][-3:])
        last = ["" if figure is None else f"{figure:.2f}" for figure in figures]
        rows.append([cell["name"], *accuracy, *(part[0] for part in more), *last])
    return rows


def chart(title, points):
    """A self-contained SVG: CURVES over the steps of a run, between 0 and 1.1."""
    last, drawn = points[-1]["step"], ""
    for i, (name, colour) in enumerate(CURVES.items()):
        line = " ".join(f"{360 * p['step'] / last:.0f},{145 - 145 * p[name]:.1f}" for p in points)
        drawn += (f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
                  f'<text x="{95 * i}" y="175" fill="{colour}">{name}</text>')
    return ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="-30 -41 420 232" width="420" '
            'style="background:#fff;font:14px sans-serif"><path d="M0 0h360M0 72h360M0 145h360" '
            'stroke="#ddd"/><text x="-17" y="5">1</text><text x="-17" y="150">0</text>'
            f'<text y="-20">{title}, {last} steps</text>{drawn}</svg>')


def rollouts(cells, rows):
    """One question put to every model, with each step marked; what a model wrote is escaped."""
    example, file = data.world_example(*rows[0]["id"].split("/")), io.BytesIO()
    example.images[0].save(file, "PNG")
    picture = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    table = [[f'<img src="{picture}">', example.question.removeprefix(data.IMAGE), example.answer]]
    for cell, row in zip(cells, rows):
        steps = grade(row["response"], example).steps or [(row["response"], None)]
        said = ". ".join(f"<span class={true}>{html.escape(step)}</span>" for step, true in steps)
        answer, reward = data.strip_answer(row["response"]), row["correct"] + 0.1 * row["formatted"]
        table.append([cell["name"], f"{said} <b>{html.escape(answer)}</b>",
                      f"<span class={kind(row)}>{kind(row)}</span>, reward {reward:.1f}"])
    return html_table(table)


def report(preset, machine, cells):
    """-> the report in Markdown, and in HTML with curves and rollouts."""
    table, title = main_table(cells), f"SFT and GRPO, preset {preset}, on {machine}"
    commands = "\n".join(cell[key] for cell in cells for key in ("command", "evaluation"))
    charts = [chart(cell["name"], cell["curve"]["points"]) for cell in cells if cell["curve"]]
    answers = list(zip(*(read_rows(cell["answers"]) for cell in cells)))
    asked = [rollouts(cells, rows) for rows in answers[:12]]
    return (f"# {title}\n\n{markdown_table(table)}\n\n{NOTES}\n\n```\n{commands}\n```\n",
            f"{HEAD}<h1>{title}</h1>{html_table(table)}<p>{NOTES}</p>{''.join(charts)}"
            f"<h2>Rollouts (green: a true step, red: a false one)</h2>{''.join(asked)}"
            f"<h2>Commands</h2><pre>{html.escape(commands)}</pre>")


if __name__ == "__main__":
    script, Options = (study, StudyConfig) if sys.argv[1:2] == ["study"] else (main, Config)
    run_script(script, Options, __doc__, sys.argv[1 + (script is study):])
