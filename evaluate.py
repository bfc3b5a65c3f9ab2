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
from kernels import Sampler
from model import CheckpointError, load_checkpoint, read_json, write_file

# ----------------------------------------------------------------------------------- the grader
FORMATS = {"tags": re.compile(r"<think>(.+?)</think>\s*<answer>(.+?)</answer>", re.S),
           "boxed": re.compile(r"<think>(.+?)</think>\s*\\boxed\{(.+)\}", re.S)}
BOX = re.compile(r"\[" + ",".join([r"\s*-?\d+(?:\.\d+)?\s*"] * 4) + r"\]")
LETTERED = re.compile(r"(?:(?:option |choice )?[(\[]?([a-z])(?:[\]).: ]+|$))?(.*)")      # (B) 24
MAX_ANSWER, MAX_DEPTH, LARGEST = 400, 50, 10 ** 12   # what is longer, deeper, larger is no number
SIGNS = str.maketrans(dict(zip("√∛π−–‐≈×·⋅÷⁄∘º", "sqrt cbrt pi - - - = * * * / / ° °".split())))
RULES = [(re.compile(pattern), new, example, cleaned) for pattern, new, example, cleaned in (
    (r"(?<=\d)(?:\\,|\{,\}|,\\!)(?=\d{3})", ",", r"1\,234", "1,234"),
    (r"\\(?:text|math)[a-z]* ?\{([^{}]*)\}", r"\1", r"5\text{ cm}", "5 cm"),
    (r"\\(?:left|right|[!,;:()\[\] ])| ?\\?\$ ?|~", " ", r"$\left[1, 2\right]$", "[1, 2 ]"),
    (r"\\times|\\cdot", "*", r"2\cdot\pi", "2*pi"),
    (r"\\div", "/", r"1\div2", "1/2"),
    (r"^ ?(?:[\\{}∠A-Za-z][\\{}∠A-Za-z ]{,22}\d?)? ?(?:=|\\approx) ?", "", "m∠1 = 35", "35"),
    (r"\^ ?\{ ?\\circ ?\}|\^ ?\\circ|\\degree", "°", r"35^\circ", "35°"),
    (r"arc(?=sin|cos|tan)", "a", r"\arcsin(1)", "asin(1)"),
    (r"\\[dt]?(?=frac|sqrt|pi|a?sin|a?cos|a?tan|%)", "", r"50\%", "50%"),
    (r"frac ?(\d) ?", r"frac{\1}/", r"\frac12", "(1)/2"),
    (r"\} ?(?=\{)", "}/", r"\frac{1}{2}", "(1)/(2)"),
    (r"\{", "(", r"\sqrt{5", "sqrt(5"),
    (r"\}", ")", "5}", "5)"),
    (r"\^ ?\((\d)\)", r"^\1", "cm^{2}", "cm^2"),
    (r"sqrt ?\[3\]", "cbrt", r"\sqrt[3]{8}", "cbrt(8)"),
    (r"((?:sin|cos|tan) ?\(? ?)([\d.]+) ?°", r"\1(\2*pi/180)", "sin 61°", "sin (61*pi/180)"),
    (r"(?<![\d.,/])(?<!/ )(\d+)(?: ?frac\((\d+)\)/\(?(\d+)\)?| (\d+)/(\d+))", r"(\1+\2\4/\3\5)",
     "6 1/2", "(6+1/2)"),
    (r"(?<![/^nst])(?<![/^nst] )frac", "", r"\frac{x}{2}", "(x)/(2)"),      # not in sin\frac12
    (r"(?<=[\di)]) *(?:square|sq\.?) ([a-z]+)", r"\1^2", "60 sq. cm", "60cm^2"))]
NEEDLESS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))|(?<![\d.,])0+(?=\d)")        # in 1,234 and in 05
FORMULA = re.compile(r"((?:[\d.+*/^() -]|(?<=\d)e[-+]?\d|a?(?:sin|cos|tan)|sqrt|cbrt|pi)*)(.*)")
TIMES = re.compile(r"(?<=[\d.)i]) ?(?=\(|[acpst])")          # where 2√3 has no sign
BARE = re.compile(r"(sin|cos|tan|sqrt|cbrt) ?([\d.]+|pi)")   # √3: an argument without parentheses
UNITS = {word + plural + power: words.split()[0] + power for words in (       # spelling -> unit
    "mm millimeter millimetre,cm centimeter centimetre,m meter metre,km kilometer kilometre,"
    "in inch inche,ft foot feet,yd yard,mi mile,° degree deg,% percent,unit").split(",")
    for word in words.split() for plural in ("", "s") for power in ("", "^2", "^3")} | {"": ""}
FUNCTIONS = {name: getattr(math, name) for name in "sqrt cbrt sin cos tan asin acos atan".split()}
OPERATORS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv, ast.Pow: math.pow,
             ast.USub: neg, ast.UAdd: pos}
PLACES = {"tenth": 1, "hundredth": 2, "thousandth": 3}
ROUNDED = re.compile(r"nearest (tenth|hundredth|thousandth|whole|integer|degree|unit|\w*meter|inch|"
                     r"foot|yard|mile)", re.I)


def clean(text):
    """The answer in a text in one plain spelling: Unicode NFKC, signs and LaTeX as plain signs,
    needless spaces, case and outer punctuation away."""
    text = data.extract_answer(text).translate(SIGNS)
    text = re.sub("[⁻⁰¹²³⁴-⁹]+", r"^\g<0>", text)               # 10¹² is 10^12,
    text = re.sub("[¼-¾⅐-⅞]", r" \g<0> ", text)                # and 6½ is 6 1/2
    text = " ".join(unicodedata.normalize("NFKC", text).translate(SIGNS).split())
    for pattern, new, *_ in RULES:
        text = pattern.sub(new, text)
    return text.casefold().lstrip(" \"'`*").rstrip(" .,:;!?\"'`*")


def value(tree, depth=0):
    """The number that a syntax tree stands for: a Fraction where it is exact. ValueError where it
    is none, or where a sum or product is left to the reader, as in 2 + 3."""
    if depth > MAX_DEPTH:
        raise ValueError(f"deeper than {MAX_DEPTH}")
    match tree:
        case ast.Constant(value=int() | float() as constant) if abs(constant) <= LARGEST:
            return Fraction(repr(constant))          # 0.1 is 1/10
        case ast.Name(id="pi"):
            return math.pi
        case ast.Call(func=ast.Name(id=name), args=[argument]) if name in FUNCTIONS:
            return FUNCTIONS[name](value(argument, depth + 1))
        case ast.UnaryOp(op=sign) if type(sign) in OPERATORS:
            return OPERATORS[type(sign)](value(tree.operand, depth + 1))
        case ast.BinOp(op=sign) if type(sign) in OPERATORS:
            left, right = (value(side, depth + 1) for side in (tree.left, tree.right))
            exact = isinstance(left, Fraction) and isinstance(right, Fraction)
            if exact and type(sign) in (ast.Add, ast.Sub, ast.Mult) and not 0 < right < 1:
                raise ValueError("not worked out")               # but 6 + 1/2 is
            return OPERATORS[type(sign)](left, right)
    raise ValueError(f"no number: {ast.dump(tree):.80}")


def number(text):
    """-> (value, unit) of a clean text that is one number and no more, else None."""
    formula, unit = FORMULA.fullmatch(NEEDLESS.sub("", text[:MAX_ANSWER + 1])).groups()
    if len(text) > MAX_ANSWER or unit not in UNITS:
        return None
    formula = BARE.sub(r"\1(\2)", TIMES.sub("*", formula)).replace("^", "**").strip()
    try:
        found = value(ast.parse(formula, mode="eval").body)
        found = Fraction(found) if found == int(found) else found
    except (ArithmeticError, RecursionError, SyntaxError, ValueError):
        return None
    return (found, UNITS[unit]) if abs(found) <= LARGEST else None


def tolerance(wanted, gold):
    """How far from the gold's value an answer may be, by how the gold is written."""
    if isinstance(wanted, float) or 10 ** 99 % wanted.denominator:           # pi, 1/3: no end
        return abs(wanted) / 1000
    decimals = re.search(r"\.(\d+)", gold)
    if decimals:                     # half a unit of the last place, but 1 % at most: 1/3 is 0.33
        return min(Fraction(1, 2 * 10 ** len(decimals[1])), abs(wanted) / 99)
    return abs(wanted) / 10 ** 13


def same_number(answer, gold, question=""):
    """Whether clean texts are one number, as exactly as the question or the gold's form asks."""
    given, wanted = number(answer), number(gold)
    if not given or not wanted or given[1] and wanted[1] and given[1] != wanted[1]:
        return False
    (found, unit), (wanted, gold_unit) = given, wanted
    candidates = [found]             # 50% is 50, and 0.5 too
    if "%" in (unit, gold_unit) and unit != gold_unit:
        candidates.append(found / 100 if unit == "%" else found * 100)
    if asked := ROUNDED.search(question):
        tens = 10 ** PLACES.get(asked[1].lower(), 0)
        candidates = [math.floor(each * tens + 0.5) for each in candidates]
        return math.floor(wanted * tens + 0.5) in candidates
    return any(abs(each - wanted) <= tolerance(wanted, gold) for each in candidates)


def area(x1, y1, x2, y2):
    return max(x2 - x1, 0) * max(y2 - y1, 0)


def same_box(answer, gold):
    """Whether two texts are boxes [x1, y1, x2, y2] with an intersection over union >= 0.5."""
    if not BOX.fullmatch(answer) or not BOX.fullmatch(gold):
        return False
    a, b = (list(map(float, text.strip("[]").split(","))) for text in (answer, gold))
    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - shared
    return union > 0 and shared / union >= 0.5


def chosen(text, choices):
    """The choice that a text names, by letter, text, value, or letter and one of these; or None."""
    if text in choices:
        return choices.index(text)
    letter, rest = LETTERED.fullmatch(text).groups()
    fits = [i for i, choice in enumerate(choices) if letter in (None, chr(ord("a") + i))
            and (letter and not rest or rest == choice or same_number(rest, choice))]
    return fits[0] if len(fits) == 1 else None


def is_right(answer, gold, choices=None, question=""):
    """Whether an answer equals the gold answer: as a choice, text, box, or number with unit."""
    if len(answer) > MAX_ANSWER:
        return False
    answer, gold, *choices = map(clean, (answer, gold, *(choices or ())))
    wanted = chosen(gold, choices)
    if wanted is not None:
        return chosen(answer, choices) == wanted
    return answer == gold != "" or same_box(answer, gold) or same_number(answer, gold, question)


def grade(response, example, answer_format="tags"):
    """-> correct, formatted, faithful (None where no scene tells), steps with their truth."""
    found = FORMATS[answer_format].fullmatch(response.strip())
    answer = data.extract_answer(response)
    correct = is_right(answer, example.answer, example.choices, example.question)
    formatted = found is not None and not re.search(r"</?(think|answer)>", found[1] + found[2])
    if formatted and answer_format == "boxed":
        formatted = answer == found[2].strip()       # one box, and no more
    steps = data.check_steps(example.scene, found[1]) if formatted and example.scene else []
    claims = [true for _, true in steps if true is not None]
    faithful = correct and bool(claims) and all(claims) if example.scene else None
    return SimpleNamespace(correct=correct, formatted=formatted, faithful=faithful, steps=steps)


# ------------------------------------------------------------------------------------ statistics
def wilson(right, n, z=1.96):
    """95 % interval of a proportion (Wilson 1927)."""
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_bootstrap(first, second, draws=2000, seed=0):
    """Mean difference of two models' marks on the same questions, with its 95 % interval."""
    gaps = torch.tensor(first).float() - torch.tensor(second).float()
    gaps = gaps.view(len(first), -1).mean(1)                                   # a question each
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(gaps), (draws, len(gaps)), generator=generator)
    means = gaps[drawn].mean(1)
    return gaps.mean().item(), means.quantile(0.025).item(), means.quantile(0.975).item()


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
    return [[row["correct"] for row in answers] for answers in grouped(rows, "id").values()]


def verdict(row):
    """What an answer on the tabletop world is worth, in a word."""
    if not row["correct"] or not row["formatted"]:
        return "right" if row["correct"] else "wrong"
    return "faithful" if row["faithful"] else "lucky"


def summary(rows):
    """Rows of one split -> figures. Intervals count questions, not samples."""
    asked = marks(rows)
    n, samples = len(asked), min(map(len, asked))
    accuracy = mean(map(mean, asked))
    figures = dict(n=n, accuracy=accuracy, interval=wilson(accuracy * n, n),
                   format=mean(row["formatted"] for row in rows),
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
    rows = []
    batches = [range(*piece) for piece in data.pieces(0, len(examples), max(1, 256 // samples))]
    prepared = processor.prefetch(examples, batches, sampler.device.type)
    for indices, (asked, prompts, _) in zip(tqdm(batches, split, leave=False, disable=None),
                                            prepared):
        seeds = torch.tensor(indices) + seed * 1_000_003
        rollouts = sampler.generate(prompts, samples, new_tokens, temperature, seeds)
        for r, ids in enumerate(rollouts.rows()):
            b = r // samples
            example, response = asked[b], processor.decode(ids)
            graded = grade(response, example, processor.style["answer_format"])
            rows.append(dict(
                id=example.id, split=split, family=example.family, prompt=example.question,
                prompt_ids=prompts.ids[b, :prompts.lengths[b]].tolist(), response_ids=ids,
                logprobs=rollouts.logprobs[r, :len(ids)].tolist(), response=response,
                truncated=not rollouts.finished[r].item(), answer=example.answer, **vars(graded)))
    return rows


# ------------------------------------------------- the command line, and what every script asks
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def option(default, doc, choices=None, least=None):
    """A field of a Config: its default, its line in --help, what it may be."""
    return field(default=default, metadata=dict(doc=doc, choices=choices, least=least))


def parse(Config, argv=None, doc=""):
    """Makes the command line of a dataclass, and the dataclass from a command line."""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        kind = dict(type=f.type, default=f.default, choices=f.metadata["choices"])
        shown = "" if f.default in (None, "") else " (default: %(default)s)"
        if f.type is bool:
            kind, shown = dict(action="store_true"), ""
        parser.add_argument(f"--{f.name.replace('_', '-')}", help=f.metadata["doc"] + shown, **kind)
    args = parser.parse_args(argv)
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
        _, _, told = str(error).rpartition("DataError: ")        # a worker's ends with its own
        sys.exit(f"error: {told.strip()}")
    except KeyboardInterrupt:
        sys.exit("stopped")


def run_command(command):
    """Prints a command and runs it with the script beside this file."""
    print(f"\n$ {command}", flush=True)
    script, *options = command.split()[1:]
    process = subprocess.Popen([sys.executable, pathlib.Path(__file__).with_name(script), *options])
    signal.signal(signal.SIGINT, lambda *_: process.send_signal(signal.SIGINT))     # it may save
    if code := process.wait():
        sys.exit(f"error: that command ended with {code}; start again to go on here")


@dataclass
class CommonConfig:
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
        """What is given of data.PROMPT."""
        return {name: value for name, value in vars(self).items()
                if name in data.PROMPT and value is not None}


@dataclass
class Config(CommonConfig):
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
    model, processor = load_checkpoint(directory, c.device, dtype, c.prompt(), may_differ=False)
    sampler = Sampler(model, processor.banned(model.vocabulary), processor.stop)
    temperature = float(c.samples > 1) if c.temperature is None else c.temperature
    for split in c.split.split(",") if c.data == "world" else ["all"]:
        examples = data.load_dataset(c.data, split, c.limit, c.skip_bad_rows)
        yield from evaluate(sampler, processor, examples, split, c.samples, temperature,
                            c.max_new_tokens, c.seed)


COLUMNS = ["accuracy", "faithful", "lucky", "format", "tokens"]          # of the tables


def columns(figures):
    """The figures of a split or a family as cells under COLUMNS, shares in percent."""
    value, low, high = (100 * share for share in (figures["accuracy"], *figures["interval"]))
    shares = [f"{100 * figures[name]:.1f}" if name in figures else "" for name in COLUMNS[1:4]]
    return [f"{value:.1f} [{low:.0f}, {high:.0f}]", *shares, f"{figures['length']:.1f}"]


def text_table(rows):
    """In Markdown, aligned, so that it reads well on a terminal too."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def main(c):
    rows = list(answer_all(c.model, c))
    if c.out:
        write_file(c.out, "".join(json.dumps(row) + "\n" for row in rows))
    table = [["split", "family", *COLUMNS, "pass"]]
    for split, whole in summaries(rows).items():
        for family, figures in [("", whole), *whole["families"].items()]:
            passes = [f"pass@{k} {share:.1%}" for k, share in figures.get("pass_at", {}).items()]
            table.append([split, family, *columns(figures), " ".join(passes)])
    print(text_table(table))
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


PRESETS = {
    "quick": dict(weak=600, limit=600, base="--keep 600", sft="--examples 2000",
                  grpo="--examples 2000 --steps 100 --eval-every 10"),
    "smoke": dict(weak=6, limit=24, base="--steps 12 --keep 6 --batch 32 --eval-examples 12",
                  sft="--examples 128 --epochs 1 --eval-examples 12", grpo="--examples 64 "
                  "--prompts 4 --steps 3 --eval-every 1 --eval-examples 12 --max-new-tokens 32")}
CURVES = {"held_out": "#0b6e4f", "reward": "#c1440e", "accuracy": "#7a7a7a", "format": "#3b6fb6"}


def study_cells(c):
    """Yields the study as commands to paste: `command` makes a model, `evaluation` tests it."""
    preset = PRESETS[c.preset]

    def cell(strength, method, seed, name, model, command):
        answers = f"{c.out}/answers/{name}.jsonl"
        evaluation = (f"python evaluate.py --model {model} --limit {preset['limit']} "
                      f"--device {c.device} --out {answers}")
        return dict(name=name, strength=strength, method=method, seed=seed, model=model,
                    command=command, evaluation=evaluation, answers=answers)

    strong = f"{c.out}/base"
    weak = f"{strong}/step-{preset['weak']}"         # kept on the way to the strong base
    command = f"{preset['base']} --out {strong} --device {c.device} --resume"
    yield cell("strong", "base", 0, "strong-base", strong, f"python sft.py --stage base {command}")
    yield cell("weak", "base", 0, "weak-base", weak, None)
    for seed in range(c.seeds):
        for strength, base in (("weak", weak), ("strong", strong)):
            after_sft = f"{c.out}/{strength}-sft-{seed}"
            for method, script, init in (("sft", "sft", base), ("grpo", "grpo", base),
                                         ("sft-grpo", "grpo", after_sft)):
                name = f"{strength}-{method}-{seed}"
                command = (f"python {script}.py --init {init} --seed {seed} {preset[script]} "
                           f"--out {c.out}/{name} --device {c.device} --resume")
                yield cell(strength, method, seed, name, f"{c.out}/{name}", command)


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
NOTES = """Accuracy in percent with 95 % Wilson intervals; what follows is of the test. Faithful:
right, every step true; lucky: right, one false. Spearman: of reward and held-out accuracy after a
run's first third; below 0, the reward deceives. Regret: best minus last. One seed proves little."""


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
