"""One grader for reward, evaluation and study, and the figures that are made from its verdicts.

    python evaluate.py --model runs/grpo      accuracy per split and family with 95 % intervals
    python evaluate.py study                  the whole comparison, as a list of commands

Right: what stands in the last <answer> tags equals the gold answer; numbers by value, words and
choices by text, boxes by IoU >= 0.5. Formatted: exactly <think>...</think><answer>...</answer>. In
the tabletop world also faithful: right, with every step of the reasoning true; else lucky.
"""
import argparse
import base64
import dataclasses
import difflib
import html
import io
import json
import math
import pathlib
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from fractions import Fraction

import torch
from tqdm import tqdm

import data
from kernels import Sampler
from model import CheckpointError, load, read_json, write_text

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def option(default, doc, choices=None, least=None):
    """A field of a Config: its default, its line in --help, what it may be."""
    return dataclasses.field(default=default,
                             metadata=dict(doc=doc, choices=choices, least=least))


def parse(Config, argv=None, doc=""):
    """Makes the command line of a dataclass, and the dataclass from a command line."""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(Config):
        name, meta, kind = "--" + f.name.replace("_", "-"), f.metadata, dict(action="store_true")
        if f.type is not bool:
            kind = dict(type=f.type, default=f.default, choices=meta["choices"], metavar=(
                None if meta["choices"] else f.type.__name__.upper()))
        shown = "" if f.default in (None, "", False) else f" (default: {f.default})"
        parser.add_argument(name, help=meta["doc"].replace("%", "%%") + shown, **kind)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions)
        hint = f"did you mean {near[0]}?" if near else "see --help"
        parser.error(f"unknown option {unknown[0]}; {hint}")
    for f in dataclasses.fields(Config):
        value, least = getattr(args, f.name), f.metadata["least"]
        if least is not None and value is not None and value < least:
            parser.error(f"--{f.name.replace('_', '-')} {value}: expected at least {least}")
    return Config(**vars(args))


def run_script(main, Config, doc, argv=None):
    """Runs main(config); what the user can mend ends as one clear line, not as a traceback."""
    config = parse(Config, argv, doc)
    try:
        main(config)
    except (data.DataError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")


# ----------------------------------------------------------------------------------- the grader

BOX = re.compile(r"\[\s*(-?\d+(?:\.\d+)?(?:\s*,\s*-?\d+(?:\.\d+)?){3})\s*\]")
FORMATS = {"tags": re.compile(r"<think>(.+?)</think>\s*<answer>(.+?)</answer>", re.S),
           "boxed": re.compile(r"<think>(.+?)</think>\s*\\boxed\{(.+)\}", re.S)}
MAX_ANSWER, MAX_DEPTH = 400, 20      # characters, brackets in brackets; more is no answer
LARGEST = 10 ** 12                   # a larger number is compared as text
LATEX = ((r"(?<=[0-9])(?:\\,|\{,\}|,\\!)(?=[0-9]{3})", ","),
         (r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 "),
         (r"\\(?:left|right|[!,;:()\[\] ])|\\?\$|~", " "))
SPELLINGS = ((r"\^ ?\{? ?\\circ ?\}?|\\degree|[∘º]", "°"), (r"\\times|\\cdot|[×·⋅]", "*"),
             (r"\\div|÷", "/"), ("[−–]", "-"), (r"\*\*", "^"), ("²", "^2"), ("³", "^3"),
             ("√", " sqrt"), ("π", " pi"), (r"\\[dt]?(?=frac|sqrt|pi|arc|sin|cos|tan|%)", " "),
             (r"\{", "("), (r"\}", ")"), (r"frac ?([0-9]) ?([0-9])", r"frac(\1)(\2)"),
             ("arc(?=sin|cos|tan)", "a"),
             (r"((?:sin|cos|tan) ?\(? ?)([0-9.]+) ?°", r"\1(\2*pi/180)"))
NAME = re.compile(r"(?:m? ?(?:∠|\\?(?:angle|overline|sin|cos|tan)\b)? ?\{?"
                  r"(?:[a-z]|\\[a-z]+|[A-Z](?: ?[A-Z]){0,3})\}?)? ?(?:=|≈|\\approx)")
LITERAL = (r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?(?:e[-+]?[0-9]{1,2})?"
           r"|\.[0-9]+")
WORD = r"sqrt|frac|pi\b|a?(?:sin|cos|tan)|\("
OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b,
              "/": lambda a, b: a / b, "^": pow, "^-": lambda a, b: pow(a, -b)}
UNIT = re.compile(r" ?(?:(square|sq|cubic)\.? ?)?([a-z]*|°|%)(?: ?\^ ?\(?([23])\)?)?[ .]*")
UNITS = {word + end: words.split()[0] for end in ("", "s") for words in (
    "mm millimeter millimetre,cm centimeter centimetre,m meter metre,km kilometer kilometre,"
    "in inch inche,ft foot feet,yd yard,mi mile,° degree deg,% percent,rad radian,dollar,cent,"
    "g gram,kg kilogram,lb pound,s second sec,min minute,h hour hr").split(",")
    for word in words.split()} | {"": "", "unit": "", "units": ""}
PLACES = dict(tenth=1, one=1, hundredth=2, two=2, thousandth=3, three=3) | dict.fromkeys(
    "whole integer number degree unit meter centimeter kilometer inch foot yard mile".split(), 0)


@dataclass
class Grade:
    correct: bool
    formatted: bool
    faithful: bool | None = None     # None where the truth of the steps is not known
    steps: list = ()


def combine(a, sign, b):
    """One operation, exact while both sides are and the result is short."""
    if "^" in sign and abs(b) > 20:
        raise ValueError
    value = OPERATIONS[sign](a, b)
    if isinstance(value, complex) or not abs(value) <= LARGEST:
        raise ValueError
    return float(value) if getattr(value, "denominator", 1) > LARGEST ** 2 else value


class Reader:
    """Reads a number by recursive descent, as far as it goes; ValueError where there is none."""

    def __init__(self, text):
        self.text, self.at, self.depth = text, 0, 0

    def take(self, pattern):
        """Passes over what the pattern matches here -> that text, or None."""
        found = re.compile(rf"\s*({pattern})").match(self.text, self.at)
        self.at = found.end() if found else self.at
        return found and found[1]

    def sum(self):
        value = self.product()
        while sign := self.take("[-+]"):
            value = combine(value, sign, self.product())
        return value

    def product(self):
        """Factors with * or / or nothing between them: 2√3, 3(1 + π)."""
        value = self.power()
        while (sign := self.take(f"[*/]|(?={WORD})")) is not None:
            value = combine(value, sign or "*", self.power())
        return value

    def power(self):
        sign, value = self.take("[-+]"), self.atom()
        if raised := self.take(r"\^-?"):
            value = combine(value, raised, self.atom())
        return combine(Fraction(0), sign or "+", value)

    def atom(self):
        """A literal, a bracket, π, or a word with its argument."""
        self.depth += 1
        word = self.take(f"{LITERAL}|{WORD}")
        if word is None or self.depth > MAX_DEPTH:
            raise ValueError
        if word == "(":
            value = self.sum()
            if not self.take(r"\)"):
                raise ValueError
        elif word == "frac":
            value = combine(self.atom(), "/", self.atom())
        elif word == "sqrt":
            order = self.take(r"\[[2-9]\]") or "[2]"
            value = combine(self.atom(), "^", Fraction(1, int(order[1])))
        elif word[0].isalpha():
            value = math.pi if word == "pi" else getattr(math, word)(self.atom())
        else:
            value = Fraction(word.replace(",", ""))
            mixed = word.isdigit() and self.take(r"frac\([0-9]+\)\([0-9]+\)|\s[0-9]+ ?/ ?[0-9]+")
            value += Fraction(*map(int, re.findall("[0-9]+", mixed))) if mixed else 0
        self.depth -= 1
        return value


def number(text):
    """-> (value, unit) of a text that is one number and no more, else None. The value is a
    Fraction where the text is exact (13/2, 6.5), a float where not (5√13)."""
    if not re.search("[0-9π]|pi", text):
        return None
    text = NAME.sub("", text, 1) if NAME.match(text) else text
    text = text.casefold()
    for pattern, new in SPELLINGS:
        text = re.sub(pattern, new, text)
    reader = Reader(text)
    try:
        value = reader.sum()
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    found = UNIT.fullmatch(text[reader.at:])
    unit = UNITS.get(found[2]) if found else None
    power = found and (found[3] or {"square": 2, "sq": 2, "cubic": 3}.get(found[1], ""))
    return None if unit is None else (value, unit and f"{unit}{power}")


def near(given, wanted, gold, question):
    """Whether a value is the gold one, as exactly as the question asks or the gold's form says."""
    asked = re.search(r"nearest (\w+)|(\w+) decimal place", question.casefold())
    places = asked and PLACES.get(asked[1] or asked[2])
    if places is not None:
        return len({math.floor(v * 10 ** places + Fraction(1, 2)) for v in (given, wanted)}) == 1
    decimals, slack = re.search(r"\.([0-9]+)", gold), abs(wanted) * 1e-13
    if isinstance(wanted, float) or pow(10, 99, wanted.denominator):
        slack = abs(wanted) / 1000
    elif decimals:
        slack = min(Fraction(1, 2 * 10 ** len(decimals[1])), max(abs(given), abs(wanted)) / 100)
    return abs(given - wanted) <= slack


def same_number(answer, gold, question=""):
    """Whether two texts are the same number; a unit may lack on one side, 50% is 50 and 0.5."""
    given, wanted = number(answer), number(gold)
    if not given or not wanted or given[1] and wanted[1] and given[1] != wanted[1]:
        return False
    units = given[1], wanted[1]
    scale = {("%", ""): Fraction(1, 100), ("", "%"): 100}.get(units, 1)
    return any(near(given[0] * by, wanted[0], gold, question) for by in {1, scale})


def box(text):
    found = BOX.fullmatch(text.strip())
    return [float(part) for part in found[1].split(",")] if found else None


def iou(a, b):
    """Intersection over union of two boxes x1, y1, x2, y2."""
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    common = max(wide, 0) * max(high, 0)
    areas = [max(c[2] - c[0], 0) * max(c[3] - c[1], 0) for c in (a, b)]
    return common / (sum(areas) - common) if common else 0.0


def clean(text):
    """The answer in a text, without the LaTeX around it, in one line."""
    text = data.strip_answer(text)
    for pattern, new in LATEX:
        text = re.sub(pattern, new, text)
    return " ".join(text.split())


def plain(text):
    """Words without case and outer punctuation."""
    return text.casefold().strip(" .,:;!?\"'`*")


def chosen(text, choices):
    """The choice that a letter, a text, both or a value speak of, or None."""
    texts = [plain(choice) for choice in choices]
    if plain(text) in texts:
        return texts.index(plain(text))
    if found := re.fullmatch(r"\(?([A-Za-z])(?:[).:]+ ?(.*)|)", text):
        place = ord(found[1].upper()) - 65
        fits = place < len(texts) and (not found[2] or chosen(found[2], choices) == place)
        return place if fits else None
    equal = [i for i, choice in enumerate(choices) if same_number(text, choice)]
    return equal[0] if len(equal) == 1 else None


def is_right(answer, gold, choices=None, question=""):
    """Whether an answer equals the gold answer, by the kind of the gold answer."""
    if len(answer) > MAX_ANSWER:
        return False
    answer, gold, *choices = [clean(text) for text in (answer, gold, *(choices or ()))]
    if choices:
        given = chosen(answer, choices)
        return given is not None and given == chosen(gold, choices)
    if box(gold):
        given = box(answer)
        return given is not None and iou(given, box(gold)) >= 0.5
    if number(gold):
        return same_number(answer, gold, question)
    return plain(answer) == plain(gold) != ""


def grade(response, example, answer_format="tags"):
    """response: text without its end mark."""
    found, answer = FORMATS[answer_format].fullmatch(response.strip()), data.strip_answer(response)
    formatted = found is not None and not re.search(r"</?(think|answer)>", found[1] + found[2])
    formatted = formatted and (answer_format == "tags" or answer == found[2].strip())
    correct = is_right(answer, example.answer, example.choices, example.question)
    if example.scene is None:
        return Grade(correct, formatted)
    steps = data.check_steps(example.scene, found[1]) if formatted else []
    claims = [true for _, true in steps if true is not None]
    return Grade(correct, formatted, correct and bool(claims) and all(claims), steps)


def wilson(right, n, z=1.96):
    """95 % interval of a proportion (Wilson 1927)."""
    share, spread = right / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_bootstrap(first, second, draws=2000, seed=0):
    """Mean difference of two models on the same questions, with its 95 % interval."""
    gaps = torch.tensor(first, dtype=torch.float64) - torch.tensor(second, dtype=torch.float64)
    pick = torch.Generator().manual_seed(seed)
    means = gaps[torch.randint(len(gaps), (draws, len(gaps)), generator=pick)].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return gaps.mean().item(), low, high


def pass_at_k(n, right, k):
    """Chance that one of k answers drawn from n, `right` of them right, is right."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def spearman(a, b):
    """Rank correlation, ties shared; None where one side never changes."""
    if len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
        return None
    ranks = [[sum(y < x for y in side) + sum(y == x for y in side) / 2 for x in side]
             for side in (a, b)]
    return torch.corrcoef(torch.tensor(ranks, dtype=torch.float64))[0, 1].item()


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def summary(rows):
    """Rows of one split -> figures. Intervals count questions, not samples."""
    by_id = {name: [row["correct"] for row in some] for name, some in grouped(rows, "id").items()}
    n, samples = len(by_id), min(len(marks) for marks in by_id.values())
    accuracy = mean(mean(marks) for marks in by_id.values())
    figures = dict(n=n, accuracy=accuracy, interval=wilson(accuracy * n, n),
                   format=mean(row["formatted"] for row in rows),
                   length=mean(len(row["response_ids"]) for row in rows),
                   truncated=mean(row["truncated"] for row in rows))
    if rows[0]["faithful"] is not None:
        figures |= dict(faithful=mean(r["faithful"] for r in rows), lucky=mean(
            r["correct"] and r["formatted"] and not r["faithful"] for r in rows))
    if samples > 1:
        figures["pass_at"] = {k: mean(pass_at_k(len(m), sum(m), k) for m in by_id.values())
                              for k in (2 ** i for i in range(samples.bit_length()))}
    return figures


def grouped(rows, key):
    """-> {value of the key: the rows that have it}"""
    groups = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def summaries(rows):
    """-> {split: figures, with the same figures per family under «families»}"""
    return {split: summary(part) | dict(families={
        family: summary(some) for family, some in grouped(part, "family").items()})
        for split, part in grouped(rows, "split").items()}


def evaluate(sampler, processor, examples, split="", samples=1, temperature=0.0, new_tokens=48,
             rows_at_once=256, seed=0):
    """Answers and grades every example -> rows, one for each answer, in the order of examples."""
    rows, at_once = [], max(1, rows_at_once // samples)
    starts = range(0, len(examples), at_once)
    for start in tqdm(starts, f"evaluate {split}", leave=False, disable=None):
        some = [examples[i] for i in range(start, min(start + at_once, len(examples)))]
        batch = processor.batch(some)
        seeds = torch.arange(start, start + len(some)) + seed * 1_000_003
        rollouts = sampler.generate(batch, samples, new_tokens, temperature, seeds)
        for r, (ids, logprobs) in enumerate(zip(rollouts.rows(), rollouts.logprobs)):
            example, response = some[r // samples], processor.decode(ids)
            prompt, verdict = batch.ids[r // samples], grade(response, example)
            rows.append(dict(
                id=example.id, split=split, family=example.family, prompt=example.question,
                prompt_ids=prompt[:batch.lengths[r // samples]].tolist(), response_ids=ids,
                logprobs=logprobs[:len(ids)].tolist(), response=response, answer=example.answer,
                correct=verdict.correct, formatted=verdict.formatted, faithful=verdict.faithful,
                truncated=not bool(rollouts.finished[r])))
    return rows


@dataclass
class Config:
    """Options of evaluate.py (without «study»)."""
    model: str = option(None, "directory: a run's, or a downloaded checkpoint's")
    against: str = option(None, "a second model on the same questions: paired bootstrap")
    data: str = option("world", "world, or a .jsonl or .json file")
    split: str = option("test,ood,text", "splits of the world: train, val, test, ood, text")
    limit: int = option(600, "questions per split", least=1)
    samples: int = option(1, "answers per question; above 1 also pass@k", least=1)
    temperature: float = option(None, "0 is greedy (default: 0 for one sample, else 1)", least=0)
    max_new_tokens: int = option(48, "longest answer", least=1)
    out: str = option(None, "file for one JSON row per answer")
    seed: int = option(0, "seed of sampled answers", least=0)
    device: str = option(DEVICE, "cpu or cuda", ("cpu", "cuda"))
    skip_bad_rows: bool = option(False, "count and skip bad rows of a file instead of stopping")


def answer_all(directory, c):
    """Loads a model and answers every split that the options name."""
    model, processor = load(directory, c.device)
    sampler = Sampler(model, processor.banned(model.vocabulary), processor.stop,
                      torch.bfloat16 if c.device == "cuda" else None)
    temperature = c.temperature if c.temperature is not None else float(c.samples > 1)
    rows = []
    for split in c.split.split(",") if c.data == "world" else ["all"]:
        examples = data.load_dataset(c.data, split, skip_bad_rows=c.skip_bad_rows)
        some = [examples[i] for i in range(min(c.limit, len(examples)))]
        rows += evaluate(sampler, processor, some, split, c.samples, temperature,
                         c.max_new_tokens, seed=c.seed)
    return rows


def percent(value, interval=None):
    around = f" [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]" if interval else ""
    return f"{100 * value:.1f}{around}"


def markdown_table(rows):
    """Aligned, so that it reads well on a terminal too."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join("| " + " | ".join(t.ljust(w) for t, w in zip(row, widths)) + " |"
                     for row in rows)


def figures_table(figures):
    """Per split and family, in percent, with 95 % intervals."""
    table = [["", "accuracy", "format", "tokens", "faithful", "lucky", ""]]
    lines = [(name, f) for split, whole in figures.items() for name, f in
             [(split, whole), *((f"- {family}", f) for family, f in whole["families"].items())]]
    for name, f in lines:
        known = [percent(f[key]) if key in f else "" for key in ("faithful", "lucky")]
        passes = " ".join(f"pass@{k} {v:.1%}" for k, v in f.get("pass_at", {}).items())
        table.append([name, percent(f["accuracy"], f["interval"]), percent(f["format"]),
                      f"{f['length']:.1f}", *known, passes])
    return markdown_table(table)


def main(c):
    if c.model is None:
        raise CheckpointError("--model: which directory? e.g. --model runs/grpo")
    rows = answer_all(c.model, c)
    if c.out:
        pathlib.Path(c.out).parent.mkdir(parents=True, exist_ok=True)
        write_text(c.out, "".join(json.dumps(row) + "\n" for row in rows))
    print(figures_table(summaries(rows)))
    if c.against:
        other = answer_all(c.against, c)
        for split in grouped(rows, "split"):
            marks = [[r["correct"] for r in some if r["split"] == split] for some in (rows, other)]
            gap, low, high = paired_bootstrap(*marks)
            print(f"{split}: {c.model} minus {c.against}: {gap:+.1%} [{low:+.1%}, {high:+.1%}]")


# ----------------------------------------------------------------------------------- the study

@dataclass
class StudyConfig:
    """Options of evaluate.py study."""
    preset: str = option("quick", "smoke: does it run; quick: the comparison", ("smoke", "quick"))
    out: str = option("runs/study", "directory of the study")
    seeds: int = option(1, "runs per cell, each from the same base", least=1)
    device: str = option(DEVICE, "cpu or cuda", ("cpu", "cuda"))


PRESETS = {
    "quick": dict(base="--keep 600", weak=600, sft="--examples 2000", limit=600,
                  grpo="--examples 2000 --steps 100 --eval-every 10"),
    "smoke": dict(base="--steps 12 --keep 6 --batch 32 --eval-examples 12", weak=6, limit=24,
                  sft="--examples 128 --epochs 1 --eval-examples 12",
                  grpo="--examples 64 --prompts 4 --steps 3 --eval-every 1 --eval-examples 12 "
                       "--max-new-tokens 32"),
}
METHODS = {"base": "base", "sft": "SFT", "grpo": "GRPO", "sft-grpo": "SFT → GRPO"}
SPLITS = {"test": "test", "ood": "out of distribution", "text": "text only"}


def study_cells(c):
    """The study as a list of commands to paste: `command` makes a model, `evaluation` tests it."""
    preset, out, cells = PRESETS[c.preset], pathlib.Path(c.out), []

    def add(strength, method, seed, model, command):
        name = f"{strength}-{method}" + (f"-{seed}" if method != "base" else "")
        evaluation = (f"python evaluate.py --model {model} --limit {preset['limit']} --device "
                      f"{c.device} --out {out / 'answers' / name}.jsonl")
        command = command and f"{command} --out {model} --device {c.device} --resume"
        cells.append(dict(name=name, strength=strength, method=method, seed=seed, model=str(model),
                          command=command, evaluation=evaluation))

    add("strong", "base", 0, out / "base", f"python sft.py --stage base {preset['base']}")
    add("weak", "base", 0, out / "base" / f"step-{preset['weak']}", "")
    for seed in range(c.seeds):
        for base in cells[1], cells[0]:
            models = {method: out / f"{base['strength']}-{method}-{seed}" for method in METHODS}
            for method, init in ("sft", base["model"]), ("grpo", base["model"]), \
                    ("sft-grpo", models["sft"]):
                script = method.split("-")[-1]
                add(base["strength"], method, seed, models[method],
                    f"python {script}.py --init {init} --seed {seed} {preset[script]}")
    return cells


def run_command(command, log):
    """Prints a command, runs it beside this file, keeps what it says -> seconds."""
    if not command:
        return 0.0
    print(f"\n$ {command}", flush=True)
    words = shlex.split(command)
    words[:2] = [sys.executable, str(pathlib.Path(__file__).parent / words[1])]
    begin = time.perf_counter()
    with open(log, "a") as file:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
        finally:                     # Ctrl-C reaches the command too: let it save
            process.wait()
        if process.returncode:
            sys.exit(f"error: that command ended with {process.returncode}; mend the cause and "
                     "start the study again: it goes on here")
    return time.perf_counter() - begin


def read_rows(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def reward_curve(model):
    """Points (mean reward and its parts since the evaluation before, held-out accuracy), Spearman
    ρ after the first third (below 0: the reward deceives), regret (best minus last accuracy)."""
    points, since = [], []
    for row in read_rows(pathlib.Path(model) / "metrics.jsonl"):
        if "reward" in row:
            since.append(row)
        elif "val_accuracy" in row and since:
            points.append(dict(step=row["step"], held_out=row["val_accuracy"], **{
                name: mean(r[name] for r in since)
                for name in ("reward", "accuracy", "format", "length")}))
            since = []
    late = points[len(points) // 3:]
    held_out = [p["held_out"] for p in points]
    return dict(points=points, regret=max(held_out) - held_out[-1],
                spearman=spearman([p["reward"] for p in late], [p["held_out"] for p in late]))


def run_cell(cell, out):
    """Trains and evaluates one cell -> its row of results.json."""
    answers = out / "answers" / f"{cell['name']}.jsonl"
    seconds = [round(run_command(cell[key], answers.with_suffix(".log")), 1)
               for key in ("command", "evaluation")]
    return cell | dict(
        seconds=seconds[0], evaluation_seconds=seconds[1], splits=summaries(read_rows(answers)),
        curve=reward_curve(cell["model"]) if cell["method"].endswith("grpo") else None)


def study(c):
    """Runs the cells that are not there yet, then writes the reports."""
    out, cells, done = pathlib.Path(c.out), study_cells(c), {}
    (out / "answers").mkdir(parents=True, exist_ok=True)
    path = out / "results.json"
    if path.exists():
        done = {cell["name"]: cell for cell in read_json(path)["cells"]}
    machine = f"{c.device}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}"
    for cell in tqdm(cells, "study", disable=None):
        known = done.get(cell["name"], {})
        if any(known.get(key) != cell[key] for key in ("command", "evaluation")):
            done[cell["name"]] = run_cell(cell, out)
            write_text(path, json.dumps(dict(preset=c.preset, machine=machine, cells=[
                done[some["name"]] for some in cells if some["name"] in done]), indent=1))
    results = read_json(path)
    write_text(out / "report.md", report_markdown(results))
    write_text(out / "report.html", report_html(results, out))
    print(f"\n{markdown_table(table_rows(results))}\n\n{out / 'report.md'}, {out / 'report.html'}")


def table_rows(results):
    """The main table as lists of text, its header first."""
    rows = [["base", "method", *SPLITS.values(), "faithful", "format", "tokens", "seconds"]]
    for cell in sorted(results["cells"], key=lambda cell: cell["strength"] == "strong"):
        test, seed = cell["splits"]["test"], f" (seed {cell['seed']})" if cell["seed"] else ""
        rows.append([cell["strength"], METHODS[cell["method"]] + seed,
                     *(percent(cell["splits"][s]["accuracy"], cell["splits"][s]["interval"])
                       for s in SPLITS),
                     percent(test["faithful"]), percent(test["format"]), f"{test['length']:.0f}",
                     f"{cell['seconds']:.0f}"])
    return rows


def curve_rows(results):
    rows = [["base", "run", "reward first → last", "accuracy part", "format part",
             "held-out first → best → last", "ρ", "regret"]]
    for cell in results["cells"]:
        if cell["curve"]:
            points = cell["curve"]["points"]
            held_out, rho = [p["held_out"] for p in points], cell["curve"]["spearman"]
            rows.append([cell["strength"], METHODS[cell["method"]], *(
                f"{points[0][name]:.2f} → {points[-1][name]:.2f}"
                for name in ("reward", "accuracy", "format")),
                f"{held_out[0]:.1%} → {max(held_out):.1%} → {held_out[-1]:.1%}",
                "–" if rho is None else f"{rho:+.2f}", percent(cell["curve"]["regret"])])
    return rows


CAPTION = ("Accuracy in percent, greedy, with 95 % Wilson intervals over the questions. Faithful: "
           "right, and every step of the reasoning true. One seed is not evidence.")
DECEPTION = ("ρ: Spearman correlation of training reward and held-out accuracy after a run's first "
             "third; below 0, the reward deceives. Regret: best minus last held-out accuracy.")


def commands(results):
    return "\n".join(text for cell in results["cells"]
                     for text in (cell["command"], cell["evaluation"]) if text)


def report_markdown(results):
    return "\n\n".join([
        f"# SFT against GRPO, preset {results['preset']}", f"Measured on {results['machine']}.",
        markdown_table(table_rows(results)), CAPTION, "## Reward against held-out accuracy",
        markdown_table(curve_rows(results)), DECEPTION, f"## Commands\n\n```\n{commands(results)}",
        "```\n"])


CURVES = {"held_out": "#0b6e4f", "reward": "#c1440e", "accuracy": "#7a7a7a", "format": "#3b6fb6"}


def chart(title, points):
    """A self-contained SVG: CURVES over the steps of a run, between 0 and 1.1."""
    last, parts = points[-1]["step"], []

    def at(step, value):
        return f"{45 + 360 * step / last:.1f},{186 - 145 * value:.1f}"

    for value in (0, 0.5, 1):
        parts.append(f'<path d="M{at(0, value)} L{at(last, value)}" stroke="#ddd"/>'
                     f'<text x="38" y="{190 - 145 * value}" text-anchor="end">{value}</text>')
    for i, (name, colour) in enumerate(CURVES.items()):
        line = " ".join(at(point["step"], point[name]) for point in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
                     f'<text x="{45 + 95 * i}" y="224" fill="{colour}">{name}</text>')
    return ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 420 232" width="420" '
            'font-family="sans-serif" font-size="12"><rect width="420" height="232" fill="#fff"/>'
            f'<text x="45" y="18" font-weight="bold">{html.escape(title)}</text>{"".join(parts)}'
            f'<text x="45" y="204">0</text><text x="405" y="204" text-anchor="end">{last} steps'
            "</text></svg>")


def html_table(rows):
    cells = ["".join(f"<td>{html.escape(text)}</td>" for text in row) for row in rows]
    return "<table><tr>" + "<tr>".join([cells[0].replace("td>", "th>"), *cells[1:]]) + "</table>"


def rollout_html(cell, row):
    """One answer, everything that the model wrote escaped, each step marked."""
    verdict = grade(row["response"], data.world_example_of(row["id"]))
    said = "".join(f"<span class={true}>{html.escape(text)}.</span> "
                   for text, true in verdict.steps)
    said += f"<b>{html.escape(data.strip_answer(row['response'])[:MAX_ANSWER])}</b>"
    if not verdict.formatted:
        said = html.escape(row["response"][:600])
    kind = ("faithful" if verdict.faithful else "lucky" if verdict.correct and verdict.formatted
            else "right" if verdict.correct else "wrong")
    return (f"<tr><td>{cell['strength']} {METHODS[cell['method']]}<td>{said}<td class={kind}>{kind}"
            f"<td>{verdict.correct + 0.1 * verdict.formatted:.1f}")


def rollouts_html(results, out, count=12):
    """The same questions put to every model: picture, question, reasoning, reward."""
    answers, parts = [(cell, read_rows(out / "answers" / f"{cell['name']}.jsonl"))
                      for cell in results["cells"]], []
    for index in range(min(count, *(len(rows) for _, rows in answers))):
        example, buffer = data.world_example("test", index), io.BytesIO()
        example.images[0].save(buffer, "PNG")
        picture = base64.b64encode(buffer.getvalue()).decode()
        rows = "".join(rollout_html(cell, rows[index]) for cell, rows in answers)
        question = html.escape(example.question.replace(data.IMAGE, ""))
        parts.append(f'<section><img src="data:image/png;base64,{picture}" alt=""><div><h3>'
                     f"{question}</h3>right answer: <b>{html.escape(example.answer)}</b><table>"
                     f"{rows}</table></div></section>")
    return "".join(parts)


STYLE = """body{font:15px/1.5 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.6em 0}td,th{padding:.25em .7em;border-bottom:1px solid #ddd;
text-align:left;vertical-align:top}pre{background:#f5f5f5;padding:1em;overflow-x:auto}
section{display:flex;gap:1.2em;margin:1.6em 0;border-top:2px solid #ddd;padding-top:1em}
section img{width:192px;height:192px;image-rendering:pixelated}h3{margin:0}svg{margin:.4em}
.True,.faithful{color:#0b6e4f}.False,.wrong{color:#b3261e}.False{text-decoration:underline wavy}
.None{color:#777}.lucky{color:#b36b00}"""


def report_html(results, out):
    charts = "".join(chart(f"{cell['strength']} base, {METHODS[cell['method']]}",
                           cell["curve"]["points"]) for cell in results["cells"] if cell["curve"])
    parts = [
        f"<h1>SFT against GRPO</h1>{results['preset']}, on {html.escape(results['machine'])}",
        html_table(table_rows(results)), CAPTION, "<h2>Reward and held-out accuracy</h2>", charts,
        html_table(curve_rows(results)), DECEPTION, "<h2>Rollouts</h2>Green steps are true, red "
        "ones false; lucky is right with a false step. The last column is the reward.",
        rollouts_html(results, out), "<h2>Commands</h2><pre>", html.escape(commands(results))]
    return ('<!doctype html><html lang="en"><meta charset="utf-8"><title>SFT against GRPO</title>'
            f"<style>{STYLE}</style>{''.join(parts)}</html>")


if __name__ == "__main__":
    if sys.argv[1:2] == ["study"]:
        run_script(study, StudyConfig, "Every cell of the comparison, one command after the other.",
                   sys.argv[2:])
    else:
        run_script(main, Config, __doc__)
