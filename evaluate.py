"""One grader for reward, evaluation and study, and the figures that are made from its verdicts.

    python evaluate.py --model runs/grpo      accuracy per split and family with 95 % intervals
    python evaluate.py study                  the whole comparison, as a list of commands

Right: what stands in the last <answer> tags or \\boxed{} equals the gold answer: numbers by value,
words and choices by text, boxes by IoU. Formatted: exactly <think>...</think> and such an answer.
Faithful, on the tabletop: right, with every step of the reasoning true; else lucky.
"""
import argparse
import ast
import base64
import html
import io
import json
import math
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import unicodedata
from dataclasses import dataclass, field, fields
from fractions import Fraction
from operator import add, mul, neg, pos, sub, truediv
from statistics import correlation, fmean as mean
from types import SimpleNamespace

import torch
from tqdm import tqdm

import data
from kernels import QUIET, RANK, WORLD, Sampler, pieces
from model import CheckpointError, load_checkpoint, read_json, write_file

# ----------------------------------------------------------------------------------- the grader
# What stands in the answer's tags or box is cleaned, then compared as the gold answer's kind asks:
# as a choice, a text, a box, or a number with a unit.
FORMATS = {"tags": re.compile(r"<think>(.+?)</think>\s*<answer>(.+?)</answer>", re.S),
           "boxed": re.compile(r"<think>(.+?)</think>\s*\\boxed\{(.+)\}", re.S)}
MAX_ANSWER = 400        # characters; a longer answer is wrong, a longer text no number
MAX_DEPTH = 100         # of a formula's syntax tree; the answers of Geometry3K reach 16
LARGEST = 10 ** 100     # a larger number is only a text, equal where it is written equally
SIGNS = str.maketrans("−–≈×·⋅÷⁄∘º“”‘’′", "--=***//°°\"\"'''")
SIGNS |= {ord("√"): "sqrt", ord("∛"): "cbrt", ord("π"): "pi"}
LATEX = dict(times="*", cdot="*", div="/", circ="°", degree="°", pi="pi", approx="=", pm="±",
             le="≤", leq="≤", ge="≥", geq="≥", ne="≠", neq="≠", infty="∞", angle="∠", perp="⊥")
# A rule: a pattern, what replaces it, an example, and how that reads then (a test of each rule).
# First, of every text: LaTeX becomes plain signs, and what means nothing goes.
PLAIN = [(re.compile(pattern), *rest) for pattern, *rest in (
    (r"[⁰¹²³⁴-⁹⁻]+", r"^{\g<0>}", "2¹⁰", "2^{10}"),
    (r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", "6½", "6 1/2"),
    (r"\\([a-z]+)", lambda found: LATEX.get(found[1], found[0]), r"x\perp y", "x⊥ y"),
    (r"(?<=\d)(?:\\,|\{,\}|,\\!)(?=\d{3})", ",", r"1\,234", "1,234"),
    (r"\\(?:text|math)[a-z]* ?\{([^{}]*)\}", r"\1", r"\text{Yes}", "yes"),
    (r"^\\?([$€£]) ?([\d.,]+)$|^\$([^$]+)\$$", r"\2\3 \1", "€ 5.50", "5.50 €"),
    (r"\\(?:left|right|[!,;:()\[\] ])|(?<!\d )\\?\$|~", " ", r"$\left(5\,cm\right)$", "(5 cm )"),
    (r"\\(?=[{}%])", "", r"\{5\%\}", "{5%}"),
    (r"(?<!\w)\*\*([^*]+)\*\*(?!\w)", r"\1", "it is **B**", "it is b"),
    (r"\^ ?(?:°|\{ ?° ?\})", "°", "12^{°}", "12°"),
    (r"arc(?=sin|cos|tan)", "a", "arcsin(2/3)", "asin(2/3)"),
    (r"\\[dt]?(?=frac|sqrt|a?(?:sin|cos|tan))", "", r"\dfrac{1}{2}", "frac{1}{2}"),
    (r"\^ ?\{(\w)\}", r"^\1", "5 cm^{2}", "5 cm^2"),
    (r"(?<![a-z])(?:square|sq\.?) +([a-z]+)", r"\1^2", "6 square cm", "6 cm^2"),
    (r"(?<![a-z])cubic +([a-z]+)", r"\1^3", "6 cubic cm", "6 cm^3"),
    (r"(?<=[A-Za-z]{2})!+ *$", "", "Yes!", "yes"))]
# Then, of what may be a number: it becomes Python's notation, but for the braces.
FORMULA = [(re.compile(pattern), *rest) for pattern, *rest in (
    (r"(?<=\d),(?=\d{3}(?!\d))", "", "1,234,567", "1234567"),
    (r"(?<=\d) ?x ?(?=10\^)", "*", "1.2 x 10^3", "1.2*10^3"),
    (r"(?<![\d.])0+(?=\d)", "", "007", "7"),
    (r"sqrt ?\[3\]", "cbrt", "sqrt[3]{8}", "cbrt{8}"),
    (r"((?:sin|cos|tan)[ ({]*)([\d.]+) ?°", r"\1(\2*pi/180)", "sin{61°}", "sin{(61*pi/180)}"),
    (r"frac ?(\d|pi)", r"frac{\1}", "frac1{20}", "frac{1,20}"),
    (r"(frac\{[^{}]*\}) ?(\d|pi)", r"\1{\2}", "frac{pi}2", "frac{pi,2}"),
    (r"\} ?\{", ",", "frac{9pi}{2}", "frac{9*pi,2}"),
    (r"(?<=\d) ?frac\{(\d+),(\d+)\}", r" \1/\2", "6frac{1,2}", "(6+1/2)"),
    (r"(?<![\d./^])(?<!/ )(\d+) (\d+/\d+)", r"(\1+\2)", "6 1/2", "(6+1/2)"),
    (r"(sin|cos|tan|sqrt|cbrt) ?([\d.]+|pi)", r"\1(\2)", "sqrt21", "sqrt(21)"),
    (r"(?<=[\d.)}i]) ?(?=[({]|pi|frac|sqrt|cbrt|a?(?:sin|cos|tan))", "*", "2 pi", "2*pi"))]
SPELLED = re.compile(r"(?:[\d.,+*/() -]|(?<=\d)e[+-]?\d\d?(?!\d)|pi|frac|sqrt|cbrt|"
                     r"a?(?:sin|cos|tan))+")            # else Python would also read 0x5, 5 or 6
OPERATIONS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv, ast.Pow: math.pow,
              ast.UAdd: pos, ast.USub: neg, "frac": truediv, "sqrt": math.sqrt, "cbrt": math.cbrt,
              "sin": math.sin, "cos": math.cos, "tan": math.tan, "asin": math.asin,
              "acos": math.acos, "atan": math.atan}
UNITS = {spelling: spellings.split()[0] for spellings in (
    "mm millimeter millimetre", "cm centimeter centimetre", "m meter metre", "mi mile", "unit",
    "km kilometer kilometre", "\" '' in inch inche", "' ft foot feet", "yd yard", "° degree deg",
    "% percent", "mg milligram", "g gram", "kg kilogram", "lb pound", "l liter litre",
    "ml milliliter", "s sec second", "min minute", "h hr hour", "day", "year", "m/s", "km/h kph",
    "mph", "$ dollar usd", "€ euro", "£ gbp") for spelling in spellings.split()}
UNIT = re.compile(rf"(.*?) ?(?:({'|'.join(map(re.escape, UNITS))})s?(\^[23])?)?", re.S)   # cm, ^2
ROUNDED = re.compile(r"(?:measured|given|shown|reads|are rounded|were rounded) to the nearest|"
                     r"nearest (tenth|hundredth|thousandth|whole|integer|degree|unit|\w*meter|"
                     r"inch|foot|yard|mile)|\b(one|two|three|[123]) decimal", re.I)
DECIMALS = dict(zip("tenth hundredth thousandth one two three 1 2 3".split(), [1, 2, 3] * 3))
NAMED = re.compile(r"(?:([{}∠a-z][{}∠a-z ]{,22}\d?)? ?= ?)?(.*)", re.S)      # m∠1 = 5: m∠1, 5
CHOICE = re.compile(r"(?:(?:the )?(?:final |correct )?(?:answer|option|choice)(?: is)?:? )?"
                    r"(?:[(\[{]?([a-z])(?:[\])}.: ]+|$))?(.*)")      # the answer is (C) 4: C, 4
BOX = re.compile(r"\[" + ",".join([r"\s*(-?\d+(?:\.\d+)?)\s*"] * 4) + r"\]")
BOX_2D = re.compile(r"(?:`*json)?\s*\[?\{\s*\"bbox_2d\":\s*(\[[^]]*\])[^]\[]*\}\]?\s*(?:```)?")


def rewrite(text, rules):
    """Applies each rule once, in order."""
    for pattern, new, _, _ in rules:
        text = pattern.sub(new, text)
    return text


def clean(text):
    """The answer in a text in one plain spelling, without LaTeX, case, quotes, end marks."""
    text = rewrite(data.extract_answer(text).translate(SIGNS), PLAIN)
    text = unicodedata.normalize("NFKC", " ".join(text.split())).translate(SIGNS)   # or 2³: 23
    text = re.sub(r"^([\"'`*]+)(.*)\1$", r"\2", text.casefold().rstrip(" .,:;?"))
    return text.rstrip(" .,:;?")


def value(node, depth=0):
    """The value of a syntax tree: a Fraction where it is exact, else a float. Raises ValueError
    for what no number has, and where two exact numbers are left for the grader to add, subtract
    or multiply: 2+3 is not the answer 5. Only a fraction may be added, for 6 1/2 is (6+1/2)."""
    match node:
        case ast.Constant():
            return Fraction(repr(node.value))           # of 0.1: 1/10, which the float is not
        case ast.Name("pi"):
            return math.pi
        case ast.UnaryOp(sign, operand):
            operation, operands = type(sign), [operand]
        case ast.BinOp(left, sign, right):
            operation, operands = type(sign), [left, right]
        case ast.Call(ast.Name(operation), operands, []):
            pass
        case _:
            raise ValueError("no part of a number")
    if depth == MAX_DEPTH or operation not in OPERATIONS:
        raise ValueError("too deep, or no operation of a number")
    values = [value(operand, depth + 1) for operand in operands]
    exact = all(isinstance(each, Fraction) for each in values)
    mixed = operation is ast.Add and 0 < values[1] < 1
    if exact and operation in (ast.Add, ast.Sub, ast.Mult) and not mixed:
        raise ValueError("not worked out")
    return OPERATIONS[operation](*values)


def number(text):
    """-> (value, unit) of a clean text that is one number and no more, else None."""
    formula, unit, power = UNIT.fullmatch(rewrite(text, FORMULA)).groups("")
    formula = formula.replace("{", "(").replace("}", ")").replace("^", "**")
    if len(text) > MAX_ANSWER or not SPELLED.fullmatch(formula):
        return None
    try:
        found = value(ast.parse(formula.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return None                                     # as of «5)», 2+3, sqrt(1, 2), 1/0, ((((
    if not abs(found) <= LARGEST:                       # nor infinity nor nan
        return None
    exact = found == int(found) and abs(found) < 2 ** 53            # sqrt(25) is the exact 5
    return Fraction(found) if exact else found, UNITS.get(unit, "") + power


def rounded(amount, decimals):
    """In units of the last decimal; a half goes up, as is taught at school."""
    return math.floor(amount * 10 ** decimals + 0.5)


def tolerance(given, wanted, gold):
    """How far an answer may lie from the value `wanted` of the clean text `gold`."""
    endless = isinstance(wanted, float) or 10 ** 99 % wanted.denominator != 0    # as a decimal
    if endless:
        return abs(wanted) / 1000
    decimals = re.search(r"\.(\d+)", gold)
    if decimals:                                        # half of the last; and 1/3 is 0.33
        return min(Fraction(1, 2 * 10 ** len(decimals[1])), abs(wanted) / 99)
    return abs(wanted) / 10 ** 13 if isinstance(given, float) else 0    # what floats lose


def same_number(answer, gold, question=""):
    """Whether clean texts are one number, as exactly as the question or the gold's form asks."""
    numbers = number(answer), number(gold)
    if None in numbers:
        return False
    (given, unit), (wanted, wanted_unit) = numbers
    if unit and wanted_unit and unit != wanted_unit:
        return False
    scale = {("%", ""): Fraction(1, 100), ("", "%"): 100}.get((unit, wanted_unit), 1)
    readings = [given, given * scale]                   # 50% may be meant as 50 or as 1/2
    asked = ["".join(found).lower() for found in ROUNDED.findall(question) if any(found)]
    if asked:
        decimals = DECIMALS.get(asked[0], 0)
        return rounded(wanted, decimals) in [rounded(each, decimals) for each in readings]
    return any(abs(each - wanted) <= tolerance(each, wanted, gold) for each in readings)


def area(box):
    """Of [x1, y1, x2, y2]; 0 where it is empty."""
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def same_box(answer, gold):
    """Whether two texts are boxes [x1, y1, x2, y2] with an intersection over union >= 0.5."""
    found = [BOX.fullmatch(BOX_2D.sub(r"\1", text)) for text in (answer, gold)]
    if None in found:
        return False
    a, b = ([float(corner) for corner in match.groups()] for match in found)
    shared = [max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])]
    union = area(a) + area(b) - area(shared)
    return union > 0 and area(shared) / union >= 0.5


def same(answer, gold, question="", box=False):
    """Whether two clean texts say the same: as a number, a box, a letter, or a text."""
    name, answer = NAMED.fullmatch(answer).groups()
    wanted_name, gold = NAMED.fullmatch(gold).groups()
    if name and wanted_name and name.replace(" ", "") != wanted_name.replace(" ", ""):
        return False
    if number(gold) or box:
        return same_box(answer, gold) if box else same_number(answer, gold, question)
    if re.fullmatch(r"\(?[a-h]\)?", gold):              # of a choice that stands in the question
        return CHOICE.fullmatch(answer).groups() == (gold.strip("()"), "")
    tight = [re.sub(r" ?([^\w ]) ?", r"\1", text) for text in (answer, gold)]
    return tight[0] == tight[1] != ""


def chosen(text, choices):
    """The place of the one choice that a letter, a text, both or a value speak of, or None."""
    if text in choices:
        return choices.index(text)
    letter, rest = CHOICE.fullmatch(NAMED.fullmatch(text)[2]).groups()
    meant = [place for place in range(len(choices)) if letter in (None, chr(ord("a") + place))]
    if rest or letter is None:
        meant = [i for i in meant if same(NAMED.fullmatch(text)[1] and text or rest, choices[i])]
    return meant[0] if len(meant) == 1 else None


def judge(answer, example):
    """Whether an answer equals the example's, by the kind of that: among choices, a box, a number,
    a text; None for what cannot be read as an answer of this kind."""
    if len(answer) > MAX_ANSWER:
        return None
    answer, gold, question = clean(answer), clean(example.answer), example.question
    choices = [clean(choice) for choice in example.choices or ()]
    place = chosen(gold, choices)
    if place is not None:
        meant = chosen(answer, choices)
        return None if meant is None else meant == place
    box = example.box or re.search("bounding.?box|bbox", question, re.I)
    if answer == gold != "" or same(answer, gold, question, box):
        return True
    kind = BOX.fullmatch if box else number if number(NAMED.fullmatch(gold)[2]) else bool
    return False if kind(BOX_2D.sub(r"\1", NAMED.fullmatch(answer)[2])) else None


def check_gold(example):
    """Raises a DataError for a gold answer that not even itself equals, or that is no choice."""
    gold, choices = example.answer, [clean(choice) for choice in example.choices or ()]
    if not judge(gold, example) or choices and chosen(clean(gold), choices) is None:
        raise data.DataError(f"answer {gold!r:.80}: expected one of the choices, if there are any, "
                             f"and 1 to {MAX_ANSWER} characters that mean something")


def grade(response, example, answer_format="tags"):
    """-> correct, parsed, formatted, faithful (None where no scene tells), steps, each with its
    truth."""
    answer = data.extract_answer(response)
    found = FORMATS[answer_format].fullmatch(response.strip())
    formatted = found is not None and not re.search(r"</?(think|answer)>", found[1] + found[2])
    if formatted and answer_format == "boxed":          # else two boxes, or a bracket too many
        formatted = answer == found[2].strip()
    right = judge(answer, example)
    correct, steps, faithful = right is True, [], None
    if example.scene:
        steps = data.check_steps(example.scene, found[1]) if formatted else []
        claims = [true for _, true in steps if true is not None]
        faithful = correct and bool(claims) and all(claims)
    return SimpleNamespace(correct=correct, parsed=right is not None, formatted=formatted,
                           faithful=faithful, steps=steps)


# ------------------------------------------------------------------------------------ statistics
def wilson(right, n, z=1.96):
    """95 % interval of a proportion (Wilson 1927)."""
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def pass_at_k(n, right, k):
    """Chance that one of k answers drawn from n, `right` of them right, is right."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def ranks(values):
    """Each value's place in order, twice; equal values share the mean of theirs."""
    return [sum((y < x) + (y <= x) for y in values) for x in values]


def spearman(a, b):
    """Rank correlation; None where one side never changes."""
    if len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
        return None
    return correlation(ranks(a), ranks(b))


def grouped(rows, key):
    """-> {value of the key: the rows that have it}"""
    groups = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def marks(rows):
    """-> for each question, whether each of its answers is right"""
    return [[row["correct"] for row in answers] for answers in grouped(rows, "index").values()]


def verdict(row):
    """What an answer on the tabletop world is worth, in a word."""
    if not row["correct"]:
        return "wrong"
    if not row["formatted"]:
        return "right"
    return "faithful" if row["faithful"] else "lucky"


def summary(rows):
    """Rows of one split -> figures. Intervals count questions, not samples."""
    asked = marks(rows)
    n, samples = len(asked), min(map(len, asked))
    accuracy = mean(map(mean, asked))
    figures = dict(n=n, accuracy=accuracy, interval=wilson(accuracy * n, n),
                   format=mean(row["formatted"] for row in rows),
                   parsed=mean(row["parsed"] for row in rows),
                   length=mean(len(row["response_ids"]) for row in rows),
                   truncated=mean(row["truncated"] for row in rows))
    if rows[0]["faithful"] is not None:
        figures |= {word: mean(verdict(row) == word for row in rows)
                    for word in ("faithful", "lucky")}
    if samples > 1:
        figures["pass_at"] = {k: mean(pass_at_k(len(some), sum(some), k) for some in asked)
                              for k in (2 ** i for i in range(samples.bit_length()))}
    return figures


def summaries(rows):
    """-> {split: figures, with the same figures per family under «families»}"""
    return {split: summary(part) | dict(families={
        family: summary(some) for family, some in grouped(part, "family").items()})
        for split, part in grouped(rows, "split").items()}


# ------------------------------------------------------------------------------------ evaluation
def evaluate(sampler, processor, examples, split="", samples=1, temperature=0.0, new_tokens=48,
             seed=0):
    """Answers and grades every example -> rows, one for each answer, in order."""
    rows, at_once = [], max(1, 256 * WORLD // samples)   # questions: some 256 answers a process
    batches = [range(*piece) for piece in pieces(0, len(examples), at_once)]
    prepared = processor.prefetch(examples, batches, sampler.device.type)
    for indices, (asked, prompts, _) in zip(tqdm(batches, split, leave=False, disable=QUIET),
                                            prepared):
        seeds = torch.tensor(indices) + seed * 1_000_003
        rollouts = sampler.generate(prompts, samples, new_tokens, temperature, seeds)
        logprobs, finished = rollouts.logprobs.tolist(), rollouts.finished.tolist()
        for r, ids in enumerate(rollouts.rows()):
            b = r // samples
            example, response = asked[b], processor.decode(ids)
            graded = grade(response, example, processor.style["answer_format"])
            rows.append(dict(
                id=example.id, split=split, index=indices[b], family=example.family,
                prompt=example.question,
                prompt_ids=prompts.ids[b, :prompts.lengths[b]].tolist(), response_ids=ids,
                logprobs=logprobs[r][:len(ids)], response=response, truncated=not finished[r],
                answer=example.answer, **vars(graded)))
    return rows


# ------------------------------------------------- the command line, and what every script asks
DEVICES = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)


def option(default, doc, choices=None, least=0, most=10 ** 9):
    """A field of a Config: its default, its line in --help, what it may be."""
    return field(default=default, metadata=dict(doc=doc, choices=choices, range=(least, most)))


def parse(Config, argv=None, doc=""):
    """Makes the command line of a dataclass, and the dataclass from a command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False, formatter_class=form)
    for f in fields(Config):
        kind = dict(type=f.type, default=f.default, choices=f.metadata["choices"])
        shown = "" if f.default in (None, "") else " (default: %(default)s)"
        if f.type is bool:
            kind, shown = dict(action="store_true"), ""
        parser.add_argument(f"--{f.name.replace('_', '-')}", help=f.metadata["doc"] + shown, **kind)
    args = parser.parse_args(argv)
    for f in fields(Config):
        value, (least, most) = getattr(args, f.name), f.metadata["range"]
        if type(value) in (int, float) and not least <= value <= most:        # nor is it nan
            parser.error(f"--{f.name.replace('_', '-')} {value}: expected {least} to {most}")
    return Config(**vars(args))


def run_script(main, Config, doc, argv=None):
    """Runs main(config); what the user can mend ends as one clear line, not as a traceback. Of
    several processes the first talks."""
    config = parse(Config, argv, doc)
    if WORLD > 1:
        torch.distributed.init_process_group()
    if config.device == "cuda":
        torch.cuda.set_device(RANK % torch.cuda.device_count())
    if RANK > 0:
        sys.stdout = io.StringIO()
    try:
        main(config)
    except (data.DataError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")


def run_command(command):
    """Prints a command and runs it with the script beside this file."""
    if WORLD > 1:
        sys.exit(f"error: first, as one process: {command}")
    print(f"\n$ {command}", flush=True)
    script, *options = shlex.split(command)[1:]
    process = subprocess.Popen([sys.executable, pathlib.Path(__file__).with_name(script), *options])
    signal.signal(signal.SIGINT, lambda *_: process.send_signal(signal.SIGINT))     # it may save
    if code := process.wait():
        sys.exit(f"error: that command ended with {code}; start again to go on here")


@dataclass
class CommonConfig:
    """Options of every script. What is not given of a prompt is as the checkpoint stores it."""
    max_pixels: int = option(data.MAX_PIXELS, "of a picture; a larger one is a bad row", least=1)
    data: str = option("world", "world, or a .jsonl or .json file")
    system: str = option(None, "system line of the prompt")
    instruction: str = option(None, "text after each question, e.g. to think first")
    answer_format: str = option(None, "tags: <answer>3</answer>; boxed: \\boxed{3}", tuple(FORMATS))
    longest_edge: int = option(None, "of a picture (default: a tile; Qwen: a root, 512)", least=1)
    max_new_tokens: int = option(48, "longest answer", least=1)
    seed: int = option(0, "seed of everything random")
    device: str = option(DEVICES[0], "cpu or cuda", DEVICES)
    skip_bad_rows: bool = option(False, "count and skip bad rows of a file instead of stopping")

    def prompt(self):
        """What is given of data.PROMPT."""
        return {name: value for name, value in vars(self).items()
                if name in data.PROMPT and value is not None}


@dataclass
class Config(CommonConfig):
    """Options of evaluate.py; study has its own."""
    model: str = option("runs/grpo", "directory: a run's, or a downloaded checkpoint's")
    split: str = option(None, "of the world: test,ood,text, train, val; of a file: all, train, val")
    limit: int = option(600, "questions per split", least=1)
    samples: int = option(1, "answers per question; above 1 also pass@k", least=1)
    temperature: float = option(None, "0 is greedy (default: 0 for one sample, else 1)")
    out: str = option(None, "file for one JSON row per answer")


def load_examples(c, split, limit=None):
    """The examples of a split of --data, as data.load_dataset."""
    data.MAX_PIXELS = c.max_pixels
    return data.load_dataset(c.data, split, limit, c.skip_bad_rows, check_gold)


def answer_all(directory, c):
    """Loads a model and answers every split that the options name; yields the rows."""
    dtype = torch.bfloat16 if c.device == "cuda" else torch.float32
    model, processor = load_checkpoint(directory, c.device, dtype, c.prompt(), may_differ=False)
    sampler = Sampler(model, processor.banned(model.vocabulary), processor.stop)
    temperature = float(c.samples > 1) if c.temperature is None else c.temperature
    for split in (c.split or ("test,ood,text" if c.data == "world" else "all")).split(","):
        examples = load_examples(c, split, c.limit)
        yield from evaluate(sampler, processor, examples, split, c.samples, temperature,
                            c.max_new_tokens, c.seed)


COLUMNS = ["accuracy", "faithful", "lucky", "format", "parsed", "tokens"]    # of the tables


def columns(figures):
    """The figures of a split or a family as cells under COLUMNS, shares in percent."""
    value, low, high = (100 * share for share in (figures["accuracy"], *figures["interval"]))
    shares = [f"{100 * figures[name]:.1f}" if name in figures else "" for name in COLUMNS[1:5]]
    return [f"{value:.1f} [{low:.0f}, {high:.0f}]", *shares, f"{figures['length']:.1f}"]


def text_table(rows):
    """In Markdown, aligned, so that it reads well on a terminal too."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def main(c):
    rows = list(answer_all(c.model, c))
    if c.out and RANK == 0:          # it may be a link or a pipe: written, not replaced
        pathlib.Path(c.out).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(c.out).write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = [["split", "family", *COLUMNS, "pass"]]
    for split, whole in summaries(rows).items():
        print(f"{split}: {whole['n']} of {len(load_examples(c, split))} questions")
        for family, figures in [("", whole), *whole["families"].items()]:
            passes = [f"pass@{k} {share:.1%}" for k, share in figures.get("pass_at", {}).items()]
            table.append([split, family, *columns(figures), " ".join(passes)])
    print(text_table(table))


# ----------------------------------------------------------------------------------- the study
@dataclass
class StudyConfig:
    preset: str = option("quick", "smoke: does it run; quick: the comparison", ("smoke", "quick"))
    out: str = option("runs/study", "directory of the study")
    seeds: int = option(1, "runs per cell, each from the same base", least=1)
    device: str = option(DEVICES[0], "cpu or cuda", DEVICES)


PRESETS = {
    "quick": dict(weak=600, limit=600, base="--keep 600", sft="--examples 2000",
                  grpo="--examples 2000 --steps 100 --eval-every 10"),
    "smoke": dict(weak=6, limit=24, base="--steps 12 --keep 6 --batch 32 --eval-examples 12",
                  sft="--examples 128 --epochs 1 --eval-examples 12", grpo="--examples 64 "
                  "--prompts 4 --steps 3 --eval-every 1 --eval-examples 12 --max-new-tokens 32")}
CURVES = {"held_out": "#0b6e4f", "reward": "#c1440e", "accuracy": "#7a7a7a", "format": "#3b6fb6"}


def study_cells(c):
    """Yields the study as commands to paste: `command` makes a model, `evaluation` tests it."""
    preset, out = PRESETS[c.preset], shlex.quote(c.out)

    def cell(strength, method, seed, name, model, command):
        evaluation = (f"python evaluate.py --model {out}/{model} --limit {preset['limit']} "
                      f"--device {c.device} --out {out}/answers/{name}.jsonl")
        return dict(name=name, strength=strength, method=method, seed=seed, command=command,
                    evaluation=evaluation, model=f"{c.out}/{model}",
                    answers=f"{c.out}/answers/{name}.jsonl")

    weak = f"base/step-{preset['weak']}"             # kept on the way to the strong base
    command = f"{preset['base']} --out {out}/base --device {c.device} --resume"
    yield cell("strong", "base", 0, "strong-base", "base", f"python sft.py --stage base {command}")
    yield cell("weak", "base", 0, "weak-base", weak, None)
    for seed in range(c.seeds):
        for strength, base in (("weak", weak), ("strong", "base")):
            for method, script, init in (("sft", "sft", base), ("grpo", "grpo", base),
                                         ("sft-grpo", "grpo", f"{strength}-sft-{seed}")):
                name = f"{strength}-{method}-{seed}"
                command = (f"python {script}.py --init {out}/{init} --seed {seed} {preset[script]} "
                           f"--out {out}/{name} --device {c.device} --resume")
                yield cell(strength, method, seed, name, name, command)


def reward_curve(model):
    """Points (mean reward and its parts since the evaluation before, held-out accuracy), Spearman
    ρ after the first third (below 0: the reward deceives), regret (best minus last accuracy)."""
    rows, points = data.read_jsonl(f"{model}/metrics.jsonl"), []
    evaluations = [i for i, row in enumerate(rows) if "val_accuracy" in row]
    for start, end in zip(evaluations, evaluations[1:]):         # between them, a row for each step
        means = {name: mean(row[name] for row in rows[start + 1:end])
                 for name in ("reward", "accuracy", "format")}
        points.append(dict(step=rows[end]["step"], held_out=rows[end]["val_accuracy"], **means))
    held_out, late = [rows[i]["val_accuracy"] for i in evaluations], points[len(points) // 3:]
    rho = spearman([point["reward"] for point in late], [point["held_out"] for point in late])
    return dict(points=points, spearman=rho, regret=max(held_out) - held_out[-1])


def results_of(cell):
    """A cell whose commands have run, with its figures."""
    steps = data.read_jsonl(f"{cell['model']}/metrics.jsonl") if cell["command"] else []
    return cell | dict(seconds=sum(row.get("seconds", 0) for row in steps),
                       splits=summaries(data.read_jsonl(cell["answers"])),
                       curve=reward_curve(cell["model"]) if "grpo" in cell["method"] else None)


def study(c):
    """Runs the cells that are not there yet, then writes the report."""
    path = pathlib.Path(c.out) / "results.json"
    machine = f"{c.device}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}"
    results = read_json(path) if path.exists() else dict(preset=c.preset, machine=machine, cells=[])
    done = {cell["name"]: cell for cell in results["cells"]}
    for cell in tqdm(list(study_cells(c)), "study", disable=None):
        before = done.get(cell["name"], {})
        if before != before | cell:                  # it was never run, or with other commands
            for command in filter(None, (cell["command"], cell["evaluation"])):
                run_command(command)
            done[cell["name"]] = results_of(cell)
            results["cells"] = list(done.values())
            write_file(path, json.dumps(results, indent=1))
    write_file(path.with_name("report.html"), report(**results))
    print(f"\n{text_table(main_table(results['cells']))}\n\nmore in {c.out}/report.html")


# ---------------------------------------------------------------------------------- the report
HEAD = """<!doctype html><meta charset="utf-8"><title>SFT and GRPO</title><style>body{margin:2em;
font:15px/1.5 sans-serif}td{padding:.2em .7em}tr:first-child{font-weight:bold}img{height:160px}
.True,.faithful{color:#0b6e4f}.lucky{color:#b36b00}.False,.wrong{color:#b3261e}</style>"""
NOTES = """Accuracy in percent, 95 % Wilson intervals; what follows is of the test. Faithful: right,
every step true; lucky: right, one false. Spearman: reward and held-out accuracy after the first
third; below 0, the reward deceives. Regret: best minus last. One seed proves little."""


def html_table(rows):
    return "<table>" + "".join("<tr><td>" + "<td>".join(row) for row in rows) + "</table>"


def main_table(cells):
    """A row for each model: its accuracy on every split; the other figures on the test split."""
    splits = list(cells[0]["splits"])
    rows = [["model", *splits, *COLUMNS[1:], "seconds", "spearman", "regret"]]
    for cell in sorted(cells, key=lambda cell: cell["strength"], reverse=True):
        of_splits = [columns(cell["splits"][split]) for split in splits]
        curve = cell["curve"] or {}
        last = [cell["seconds"], curve.get("spearman"), curve.get("regret")]
        rows.append([cell["name"], *(accuracy for accuracy, *_ in of_splits), *of_splits[0][1:],
                     *("" if figure is None else f"{figure:.2f}" for figure in last)])
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


def rollout_table(cells, rows):
    """One question put to every model, with each step marked; what a model wrote is escaped."""
    example, file = data.world_example(*rows[0]["id"].split("/")), io.BytesIO()
    example.images[0].save(file, "PNG")
    picture = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    table = [[f'<img src="{picture}">', example.question.removeprefix(data.IMAGE), example.answer]]
    for cell, row in zip(cells, rows):
        steps = grade(row["response"], example).steps or [(row["response"], None)]
        said = ". ".join(f"<span class={true}>{html.escape(step)}</span>" for step, true in steps)
        answer = html.escape(data.extract_answer(row["response"]))
        worth = f"<span class={verdict(row)}>{verdict(row)}</span>"
        table.append([cell["name"], f"{said} <b>{answer}</b>", worth])
    return html_table(table)


def report(preset, machine, cells):
    """-> the report, one page of HTML: table, curves, rollouts, commands."""
    title = f"SFT and GRPO, preset {preset}, on {machine}"
    charts = [chart(cell["name"], cell["curve"]["points"]) for cell in cells if cell["curve"]]
    answers = zip(*(data.read_jsonl(cell["answers"]) for cell in cells))       # by question
    tables = [rollout_table(cells, rows) for rows in list(answers)[:12]]
    commands = [cell[key] for cell in cells for key in ("command", "evaluation") if cell[key]]
    return (f"{HEAD}<h1>{title}</h1>{html_table(main_table(cells))}<p>{NOTES}</p>{''.join(charts)}"
            f"<h2>Rollouts (green: a true step, red: a false one)</h2>{''.join(tables)}"
            "<h2>Commands</h2><pre>" + html.escape("\n".join(commands)) + "</pre>")


if __name__ == "__main__":
    script, Options = (study, StudyConfig) if sys.argv[1:2] == ["study"] else (main, Config)
    run_script(script, Options, __doc__, sys.argv[1 + (script is study):])
