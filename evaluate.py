"""One grader for reward, evaluation and study, and the figures that are made from its verdicts.

    python evaluate.py --model runs/grpo      accuracy per split and family with 95 % intervals
    python evaluate.py study                  the whole comparison, as a list of commands

Right: what stands in the last <answer> tags or \\boxed{} equals the gold answer: numbers by value,
words and choices by text, boxes by IoU. Formatted: exactly <think>...</think> and such an answer.
Faithful, on the tabletop: right, with every step of the reasoning true; lucky: right after others.
"""
import argparse
import ast
import io
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import unicodedata
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, fields
from fractions import Fraction
from operator import add, mul, neg, pos, sub, truediv
from statistics import correlation, fmean as mean
from types import SimpleNamespace
from typing import NamedTuple

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
    """Whether two texts are boxes [x1, y1, x2, y2] with an intersection over union > 0.5."""
    found = [BOX.fullmatch(BOX_2D.sub(r"\1", text)) for text in (answer, gold)]
    if None in found:
        return False
    a, b = ([float(corner) for corner in match.groups()] for match in found)
    shared = [max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])]
    union = area(a) + area(b) - area(shared)
    return union > 0 and area(shared) / union > 0.5


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


def verdict(row):
    """What an answer is worth, in a word. Right after reasons: faithful, or lucky where not all of
    them are true; wrong after them: misseen where a count or place is false, else misreasoned."""
    if not row["steps"]:             # no reasons were given, or there is no scene to hold them to
        return "right" if row["correct"] else "wrong"
    if row["correct"]:
        return "faithful" if row["faithful"] else "lucky"
    seen = [true for sentence, true in row["steps"] if "a" in data.claim_of(sentence)[2]]
    return "misreasoned" if all(seen) else "misseen"


def summary(rows):
    """Rows of one split -> figures. Intervals count questions, not samples."""
    asked = [[row["correct"] for row in answers] for answers in grouped(rows, "index").values()]
    n, samples = len(asked), min(map(len, asked))
    accuracy = mean(map(mean, asked))
    figures = dict(n=n, accuracy=accuracy, interval=wilson(accuracy * n, n),
                   format=mean(row["formatted"] for row in rows),
                   parsed=mean(row["parsed"] for row in rows),
                   length=mean(len(row["response_ids"]) for row in rows),
                   truncated=mean(row["truncated"] for row in rows))
    if rows[0]["faithful"] is not None:
        figures |= {word: mean(verdict(row) == word for row in rows)
                    for word in ("faithful", "lucky", "misseen", "misreasoned")}
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
        torch.distributed.init_process_group("cpu:gloo" + ",cuda:nccl" * (config.device == "cuda"))
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
    words, here = shlex.split(command)[1:], pathlib.Path(__file__).parent
    if words[0] != "-m":
        words[0] = here / words[0]
    process = subprocess.Popen([sys.executable, *words], env=os.environ | {"PYTHONPATH": str(here)})
    try:
        code = process.wait()
    except KeyboardInterrupt:        # a terminal has told it, too; it may save
        process.send_signal(signal.SIGINT)
        code = process.wait()
    if code:
        sys.exit(f"error: that command ended with {code}; start again to go on here")


@dataclass
class CommonConfig:
    """Options of every script. What is not given of a prompt is as the checkpoint stores it."""
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
    page: str = option(None, "HTML file that shows pictures, questions, answers, verdicts")


def load_examples(c, split, limit=None):
    """The examples of a split of --data, as data.load_dataset."""
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


COLUMNS = ["accuracy", "faithful", "lucky", "misseen", "misreasoned", "format", "parsed", "tokens"]


def columns(figures):
    """The figures of a split or a family as cells under COLUMNS, shares in percent."""
    value, low, high = (100 * share for share in (figures["accuracy"], *figures["interval"]))
    shares = [f"{100 * figures[name]:.1f}" if name in figures else "" for name in COLUMNS[1:-1]]
    return [f"{value:.1f} [{low:.0f}, {high:.0f}]", *shares, f"{figures['length']:.1f}"]


def text_table(rows):
    """In Markdown, aligned, so that it reads well on a terminal too."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def main(c):
    rows = list(answer_all(c.model, c))
    c.out = c.out or c.page and f"{c.page}.jsonl"
    if c.out and RANK == 0:          # it may be a link or a pipe: written, not replaced
        pathlib.Path(c.out).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(c.out).write_text(data.jsonl_text(rows))
    table = [["split", "family", *COLUMNS, "pass"]]
    for split, whole in summaries(rows).items():
        print(f"{split}: {whole['n']} of {len(load_examples(c, split))} questions")
        for family, figures in [("", whole), *whole["families"].items()]:
            passes = [f"pass@{k} {share:.1%}" for k, share in figures.get("pass_at", {}).items()]
            table.append([split, family, *columns(figures), " ".join(passes)])
    print(text_table(table))
    if c.page:
        run_command(shlex.join(["python", "tests/report.py", c.out, c.data, c.page]))


# ----------------------------------------------------------------------------------- the study
# A cell is a model, named by the way to it: «weak/sft/grpo --algorithm dapo» is DAPO after SFT of
# the weak base; «@strong» stands for the strong base's own answers to the training questions, as
# «@weak+grpo» for those of weak/grpo.
# Seed k has its own base, where its cells start; weak and middle are that base's youth, and small
# is another one of fewer parameters.
AGES = {"small": "small", "weak": "base/step-800", "middle": "base/step-1200", "strong": "base"}
BASES = {"base": "--keep 800,1200", "small": "--size xs"}
YOUNG = ("weak", "middle", "strong")
GRID = [f"middle/sft --lr {lr} --epochs {n}" for lr in ("1e-3", "3e-3", "1e-2") for n in (3, 6)]
GRID += [f"middle/grpo --lr {lr} --steps {n}00" for lr in ("2e-4", "5e-4", "1e-3") for n in (1, 2)]


class Finding(NamedTuple):
    """A question of the paper: the cells that it compares, and what it says of them."""
    question: str
    axis: str                        # of its figures
    ticks: tuple                     # along that
    splits: tuple                    # whose accuracy they show
    series: dict                     # {name: cell, with {} for a tick}
    claims: dict                     # {sentence: difference in points, above 0 where it holds}

    def cells(self):
        """-> {name of a series: its cell at each tick}; the scripts take 2,000 by themselves"""
        return {name: [cell.format(tick).removesuffix(" --examples 2000") for tick in self.ticks]
                for name, cell in self.series.items()}


def likely_traces(a):
    """Spearman's ρ, times 100, over the traces from the middle base: how likely they were to it
    (log-prob per token), and accuracy out of distribution after learning them."""
    cells = [cells[0] for cells in FINDINGS["traces"].cells().values()]
    return 100 * spearman([a(cell, "trace_logprob") for cell in cells],
                          [a(cell, "ood") for cell in cells])


FINDINGS = {
    "capacity": Finding(
        "What does each way make of a base, by age and size?", "base", (*AGES,), ("test", "ood"),
        {"base": "{}", "SFT": "{}/sft", "GRPO": "{}/grpo", "DAPO": "{}/grpo --algorithm dapo",
         "SFT → GRPO": "{}/sft/grpo"},
        {"from the weak base, SFT leads GRPO": lambda a: a("weak/sft") - a("weak/grpo"),
         "SFT's lead over GRPO is smaller from the strong base":
            lambda a: a("weak/sft") - a("weak/grpo") - a("strong/sft") + a("strong/grpo"),
         "together, SFT → GRPO, they beat the better of the two (strong base)":
            lambda a: a("strong/sft/grpo") - max(a("strong/sft"), a("strong/grpo"))}),
    "data": Finding(
        "How many questions does it take?", "questions (strong base)",
        (125, 500, 2000, 8000, 20000), ("test", "ood"),
        {"SFT": "strong/sft --examples {}", "GRPO": "strong/grpo --examples {}"},
        {"SFT on 2,000 traces is at most 2 points behind GRPO on 20,000 questions":
            lambda a: a("strong/sft") - a("strong/grpo --examples 20000") + 2}),
    "transfer": Finding(
        "Trained before pictures: what is it worth in words?", "base", YOUNG, ("text",),
        {"base": "{}", "SFT": "{}/sft", "GRPO": "{}/grpo"},
        {"SFT gains in words (strong)": lambda a: a("strong/sft", "text") - a("strong", "text"),
         "SFT leads GRPO in words": lambda a: a("strong/sft", "text") - a("strong/grpo", "text")}),
    "rewards": Finding(
        "Is a model of higher reward a better one?", "base", YOUNG, ("test",),
        {"GRPO": "{}/grpo", "SFT → GRPO": "{}/sft/grpo", "lenient": "{}/grpo --grader lenient",
         "SFT → lenient": "{}/sft/grpo --grader lenient"},
        {"while GRPO's reward rises, held-out accuracy falls (weak base)":
            lambda a: min(a("weak/grpo", "reward_gain"), -a("weak/grpo", "held_out_gain")),
         "SFT first makes the regret of GRPO smaller (weak base)":
            lambda a: a("weak/grpo", "regret") - a("weak/sft/grpo", "regret"),
         "a lenient reward is worth less (strong base)":
            lambda a: a("strong/grpo") - a("strong/grpo --grader lenient")}),
    "traces": Finding(
        "Which traces are worth learning?", "base", ("middle", "strong"), ("test", "ood", "text"),
        {"short": "{}/sft", "hesitant": "{}/sft --traces hesitant",
         "verbose": "{}/sft --traces verbose", "answers alone": "{}/sft --traces answer",
         "its own": "{0}/sft --traces @{0}", "the strong's": "{}/sft --traces @strong"},
        {"short traces gain ood (strong)": lambda a: a("strong/sft", "ood") - a("strong", "ood"),
         "hesitant traces lose ood (strong)":
            lambda a: a("strong", "ood") - a("strong/sft --traces hesitant", "ood"),
         "the likelier the traces, the better ood (middle, 100 ρ)": likely_traces})}
# Of each: its cells, the evaluation's options, and what the commands of a script end with.
PRESETS = {
    "quick": dict(cells=[age + way for age in ("weak", "strong")
                         for way in ("", "/sft", "/grpo", "/sft/grpo")], test="--limit 600"),
    "paper": dict(cells=[*YOUNG, *(cell for finding in FINDINGS.values()
                                   for cells in finding.cells().values() for cell in cells)],
                  test="--limit 1000"),
    "tune": dict(cells=GRID, test="--limit 1000 --split val"),
    "smoke": dict(cells=["strong", "strong/sft", "strong/grpo"],
                  test="--limit 60 --split test,text",
                  base=" --steps 150 --eval-examples 12", sft=" --examples 1280 --eval-examples 12",
                  grpo=" --prompts 8 --steps 10 --eval-every 5 --eval-examples 12")}
# {name of a training in a cell: its script, how often it evaluates}
TRAININGS = dict(sft=("sft.py", "--eval-every 30"), grpo=("grpo.py", "--eval-every 10"))


@dataclass
class StudyConfig:
    """Options of evaluate.py study."""
    preset: str = option("quick", "paper: all; tune: rates; smoke: does it run", tuple(PRESETS))
    finding: str = option(None, "of the cells, those of one finding", tuple(FINDINGS))
    out: str = option("runs/study", "directory of the study")
    first_seed: int = option(0, "the first of the seeds")
    seeds: int = option(1, "how many; each has a base of its own", least=1)
    jobs: int = option(1, "commands at a time; they share the cores", least=1)
    device: str = option(DEVICES[0], "cpu or cuda", DEVICES)


def way_to(cell, c, seed):
    """-> the directory of a cell's model, {what is made on the way there: its command}"""
    home, preset = shlex.quote(f"{c.out}/seed-{seed}"), PRESETS[c.preset]
    before, _, training = cell.rpartition("/")
    last = f"--seed {seed} --device {c.device} --resume"
    if not before:
        base = AGES[cell].partition("/")[0]
        command = f"python sft.py --stage base {BASES[base]} --out {home}/{base} {last}"
        return f"{home}/{AGES[cell]}", {f"{home}/{base}": command + preset.get("base", "")}
    init, way = way_to(before, c, seed)
    name, _, options = training.partition(" ")
    script, evaluations = TRAININGS[name]
    for writer in re.findall(r"@(\S+)", options):
        teacher, teachers_way = way_to(writer.replace("+", "/"), c, seed)
        rollouts = f"{teacher}/rollouts.jsonl"
        options = options.replace(f"@{writer}", rollouts)
        way |= teachers_way | {rollouts: f"python evaluate.py --model {teacher} --split train "
                               f"--limit 2000 --temperature 1 --out {rollouts} --device {c.device}"}
    model = f"{home}/{re.sub('[^a-z0-9+]+', '-', cell)}"
    command = f"python {script} --init {init} {evaluations} {options}".rstrip()
    return model, way | {model: f"{command} --out {model} {last}" + preset.get(name, "")}


def commands_of(cell, c, seed):
    """-> what makes a cell, and the evaluation of its model."""
    model, way = way_to(cell, c, seed)
    test = f"python evaluate.py --model {model} {PRESETS[c.preset]['test']} --device {c.device}"
    return [*way.values(), f"{test} --out {model}/answers.jsonl"]


def unquoted(name):
    """What the shell would make of it."""
    return pathlib.Path(*shlex.split(name))


def make(made, commands):
    """Runs the last of these commands, unless what it makes is there and came by all of them."""
    path = unquoted(made)
    came_by = path.with_name(f"{path.name}.commands")
    if came_by.exists() and came_by.read_text() != "\n".join(commands):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    write_file(came_by, "\n".join(commands))
    run = path / "run.json"
    if not (path.is_file() or run.exists() and read_json(run).get("finished")):
        run_command(commands[-1])


def flops(row, parameters):
    """Of a training step, roughly: 2 a parameter and token for a pass forward, twice that for the
    one backward (Kaplan et al. 2020). GRPO samples first, and may ask the initial model."""
    passes = 3 + ("kl" in row)
    sampled = row["sampled"] + ("reward" in row) * row["prompt_tokens"]
    return 2 * parameters * (passes * (row["prompt_tokens"] + row["tokens"]) + sampled)


COSTS = ("seconds", "flops", "trained", "sampled")       # the last two in tokens


def course(rows, parameters, spent):
    """metrics.jsonl -> a point for each evaluation: step, held-out accuracy, COSTS so far (`spent`
    before the run), and the means since the point before of the reward and its parts."""
    spent, points, since = Counter(spent), [], []
    for row in rows:
        if "val_accuracy" not in row:
            row = dict(sampled=row["tokens"] * ("reward" in row)) | row      # unless it is told
            spent.update(seconds=row["seconds"], flops=flops(row, parameters),
                         trained=row["tokens"], sampled=row["sampled"])
            since.append(row)
            continue
        parts = [name for name in ("reward", "accuracy", "format") if since and name in since[0]]
        points.append(dict(spent, step=row["step"], held_out=row["val_accuracy"])
                      | {name: mean(step[name] for step in since if name in step)
                         for name in parts})
        since = []
    return points


def run_cell(cell, c, seed, locks):
    """Makes a cell's model and lets it answer -> the cell, with its commands and figures. It costs
    what all trainings on the way to it cost, but for the base."""
    model, way = way_to(cell, c, seed)
    commands = commands_of(cell, c, seed)
    for i, made in enumerate(way):
        with locks[made]:            # cells share their beginnings
            make(made, commands[:i + 1])
    run_command(commands[-1])
    figures, spent = {}, dict.fromkeys(COSTS, 0)
    for run in map(unquoted, list(way)[1:]):
        # of a training that has several, the parts first
        for path in [*sorted(run.glob("*/metrics.jsonl")), *run.glob("metrics.jsonl")]:
            rows = data.read_jsonl(path)
            points = course(rows, (run / "model.safetensors").stat().st_size / 4, spent)
            spent = {name: points[-1][name] for name in COSTS}
            figures = dict(trace_logprob=rows[1]["logprob"]) if "logprob" in rows[1] else {}
            figures |= dict(points=points, labels=read_json(run / "run.json")["examples"]) | spent
    splits = summaries(data.read_jsonl(unquoted(f"{model}/answers.jsonl")))
    for whole in splits.values():
        whole["families"] = {name: one["accuracy"] for name, one in whole["families"].items()}
    return dict(cell=cell, seed=seed, commands=commands, splits=splits, **figures)


def study(c):
    """Runs the cells that are not there yet, then writes the report. What fails stops alone."""
    if c.jobs > 1:                   # else each waits for the threads of the others
        os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // c.jobs))
    path, cells = pathlib.Path(c.out) / "results.json", PRESETS[c.preset]["cells"]
    if c.finding:
        cells = [*YOUNG, *sum(FINDINGS[c.finding].cells().values(), [])]
    known = read_json(path)["cells"] if path.exists() else []
    done = {(cell["cell"], cell["seed"]): cell for cell in known}
    wanted = dict.fromkeys(itertools.product(cells, range(c.first_seed, c.first_seed + c.seeds)))
    missing = [(cell, seed) for cell, seed in wanted
               if done.get((cell, seed), {}).get("commands") != commands_of(cell, c, seed)]
    locks, failed = defaultdict(threading.Lock), []
    with ThreadPoolExecutor(c.jobs) as pool:
        running = {pool.submit(run_cell, cell, c, seed, locks): (cell, seed)
                   for cell, seed in missing}
        try:
            for future in tqdm(as_completed(running), "study", len(running), disable=None):
                if future.exception():
                    failed.append("{} of seed {}".format(*running[future]))
                    continue
                done[running[future]] = future.result()
                results = json.dumps(dict(cells=[done[key] for key in sorted(done)]))
                short = json.loads(results, parse_float=lambda text: round(float(text), 4))
                write_file(path, json.dumps(short))
        except KeyboardInterrupt:    # those that run have been told, too, and save
            pool.shutdown(cancel_futures=True)
            raise
    if done:
        run_command(f"python tests/report.py {shlex.quote(c.out)}")
    if failed:
        sys.exit(f"error: these cells failed, start again to go on: {', '.join(failed)}")


if __name__ == "__main__":
    script, Options = (study, StudyConfig) if sys.argv[1:2] == ["study"] else (main, Config)
    run_script(script, Options, __doc__, sys.argv[1 + (script is study):])
