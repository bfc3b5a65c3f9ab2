"""The pictures, the questions and the tokens that both ways of training share.

The tabletop world, of which every step of reasoning can be checked; JSONL files; tokens, pixels.
"""
import base64
import io
import json
import math
import os
import random
import re
import zlib
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageDraw, ImageOps
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")             # a thread prepares a batch
Image.MAX_IMAGE_PIXELS = None        # `open_image` looks at the size itself
IMAGE = "<image>"


class DataError(ValueError):
    """A row, a picture or a path that cannot be used; the message says where and what to do."""


@dataclass
class Example:
    """One question. `<image>` in `question` stands where each of `images` goes."""
    id: str
    question: str
    answer: str
    response: str = ""               # what imitation learns
    images: list = field(default_factory=list)          # PIL images, bytes, or paths
    choices: list | None = None
    system: str = ""
    family: str = "all"
    scene: list | None = None        # the truth, in the tabletop world
    box: bool = False                # the answer is [x1, y1, x2, y2], compared by its overlap
    sampled: tuple = ()              # ids and log-probs of the response, where a model wrote it

    def pictures(self):
        return [one if isinstance(one, Image.Image) else open_image(one) for one in self.images]


# ------------------------------------------------------------------------ the form of an answer
def tagged(answer, rationale=""):
    """The form that the format reward asks for (R1's); without a rationale the answer alone."""
    return (f"<think>{rationale}</think>" if rationale else "") + f"<answer>{answer}</answer>"


def extract_answer(text):
    """What stands in the last <answer> tags after all thought, else all that follows it; where that
    has a \\boxed{...}, what stands in the last one. A template may have written the <think>."""
    _, _, text = text.rpartition("</think>")
    tags = re.findall(r"<answer>(.*?)</answer>", text, re.S)
    text = tags[-1] if tags else text.partition("<think>")[0]
    _, box, inside = text.rpartition("\\boxed{")
    heads = (inside[:brace.start()] for brace in re.finditer("}", inside if box else ""))
    whole = (head for head in heads if head.count("{") == head.count("}"))     # as \frac{1}{2} is
    return next(whole, text).strip()


# ------------------------------------------------------------------ the tabletop world: scenes
CELL, SIDE = 16, 4                   # 4 x 4 cells of 16 pixels: one image token sees one cell
COLOURS = dict(red=(214, 40, 40), green=(44, 160, 70), blue=(40, 90, 220), yellow=(235, 200, 30))
SHAPES = ("circle", "square", "triangle")
HELD_OUT = {("red", "triangle"), ("blue", "circle")}        # never seen in training
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
KNOWN = [pair for pair in PAIRS if pair not in HELD_OUT]
SPLITS = dict(train=range(2, 8), val=[1], test=[0], ood=range(8), text=[0])     # their buckets
# row and column: 1..4 from the top left; box: x1, y1, x2, y2 in pixels
Thing = namedtuple("Thing", "colour shape row column box")


def kind_of(thing):
    """«red circle»"""
    return f"{thing.colour} {thing.shape}"


def bucket(things):
    """Which split may hold these things (in these places): a checksum modulo 8."""
    return zlib.crc32(repr(sorted(thing[:4] for thing in things)).encode()) % 8


def make_thing(rng, cell, pairs):
    """A thing of one of these pairs, a little off the middle of its cell but inside it."""
    row, column = divmod(cell, SIDE)
    size = rng.randint(10, 13)
    x, y = (at * CELL + (CELL - size) // 2 + rng.randint(-1, 1) for at in (column, row))
    return Thing(*rng.choice(pairs), row + 1, column + 1, (x, y, x + size, y + size))


def make_scene(rng, split, family):
    """Redraws until the scene has an answer and is this split's: no two splits share a scene."""
    fewest, most, pairs = (7, 9, PAIRS) if split == "ood" else (2, 6, KNOWN)
    while True:
        cells = rng.sample(range(SIDE * SIDE), rng.randint(fewest, most))
        things = [make_thing(rng, cell, pairs) for cell in cells]
        has_held_out = any(thing[:2] in HELD_OUT for thing in things)
        has_answer = family != "location" or singles(things)
        if has_held_out == (split == "ood") and has_answer and bucket(things) in SPLITS[split]:
            return things


def paint(things):
    """The scene as a 64x64 RGB picture."""
    image = Image.new("RGB", (SIDE * CELL, SIDE * CELL), (245, 240, 230))
    pen = ImageDraw.Draw(image)
    draw = dict(circle=pen.ellipse, square=pen.rectangle, triangle=pen.polygon)
    for colour, shape, _, _, (x1, y1, x2, y2) in things:
        corners = [(x1 + x2) / 2, y1, x2, y2, x1, y2] if shape == "triangle" else [x1, y1, x2, y2]
        draw[shape](corners, COLOURS[colour])
    return image


def describe(things):
    """The scene in words: «(1,2) red circle. (3,4) blue square.»"""
    in_order = sorted(things, key=lambda thing: (thing.row, thing.column))
    return " ".join(f"{cell_of(one)} {kind_of(one)}." for one in in_order)


def cell_of(thing):
    """«(3,2)»: column and row"""
    return f"({thing.column},{thing.row})"


def grid_box(thing):
    """The answer to where it is: the box of its cell, between the lines 1 to 5 of the grid."""
    return f"[{thing.column},{thing.row},{thing.column + 1},{thing.row + 1}]"


# ------------------------------------------------ the tabletop world: questions and rationales
def matching(things, phrase):
    """The things that a phrase like «red circles», «squares» or «blue shape» speaks of."""
    *colour, shape = phrase.removesuffix("s").split()
    return [one for one in things if colour in ([], [one.colour]) and shape in ("shape", one.shape)]


def singles(things):
    """The things that are the only ones of their kind."""
    return [thing for thing in things if len(matching(things, kind_of(thing))) == 1]


def pick_phrase(rng, things, kind):
    """A noun phrase, four times in five one that the table holds."""
    thing = rng.choice(things)
    colour, shape = rng.choice(KNOWN) if rng.random() < 0.2 else thing[:2]
    return {"shape": shape, "colour": f"{colour} shape", "pair": f"{colour} {shape}"}[kind]


def ask(rng, things, family):
    """-> what fills the wording (see FAMILIES), the steps (see CLAIMS), the answer."""
    if family == "location":
        thing = rng.choice(singles(things))
        return dict(a=kind_of(thing)), [f"{kind_of(thing)}: {cell_of(thing)}"], grid_box(thing)
    if family == "count":
        phrase = pick_phrase(rng, things, rng.choice(("shape", "colour", "pair"))) + "s"
        count = len(matching(things, phrase))
        return dict(a=phrase), [f"{phrase}: {count}"], str(count)
    return ask_about_two(rng, things, family)


def ask_about_two(rng, things, family):
    """`ask` about n of one kind, each at the price x, and m of another at y; none is of both."""
    kind = rng.choice(("shape", "colour"))
    one = other = None
    while one == other:
        one, other = pick_phrase(rng, things, kind), pick_phrase(rng, things, kind)
    n, m = len(matching(things, one)), len(matching(things, other))
    x, y = rng.randint(2, 5), rng.randint(2, 5)      # drawn even where nothing is bought
    swap = n < m if family == "difference" else rng.random() < 0.5
    if swap:
        one, other, n, m = other, one, m, n
    words = dict(a=one + "s", b=other + "s", one=one, other=other, x=x, y=y)
    steps = [f"{one}s: {n}", f"{other}s: {m}"]
    if family == "difference":
        return words, [*steps, f"{n} - {m} = {n - m}"], str(n - m)
    if family == "cost":
        steps += [f"{n} * {x} = {n * x}", f"{m} * {y} = {m * y}"]
        n, m = n * x, m * y
    if family in ("sum", "cost"):
        return words, [*steps, f"{n} + {m} = {n + m}"], str(n + m)
    if n > m:
        return words, [*steps, f"{n} > {m}"], "yes"
    return words, [*steps, f"{n} < {m}" if n < m else f"{n} = {m}"], "no"


# a, b: `one` and `other` in the plural
FAMILIES = dict(     # two wordings of training, one for ood: known words, but never together so
    count=("How many {a} are there?", "How many {a} do you see?", "How many {a} do you see there?"),
    sum=("How many {a} and {b} are there together?", "What do {a} and {b} add up to?",
         "What do {a} and {b} together add up to?"),
    cost=("Each {one} costs {x} and each {other} costs {y}. What do they cost together?",
          "Price of a {one}: {x}, of a {other}: {y}. What does everything cost?",
          "Each {one} costs {x} and each {other} costs {y}. What does everything cost?"),
    difference=("How many more {a} than {b} are there?", "By how many do {a} outnumber {b}?",
                "By how many more do {a} outnumber {b}?"),
    comparison=("Are there more {a} than {b}?", "Do {a} outnumber {b}?", "Are {a} more than {b}?"),
    location=("Where is the {a}?", "Find the {a}.", "Where do you see the {a}?"))
# what a step may say: a pattern of it, its verbose words, when it is true
CLAIMS = [("{a}: {n}", "I count {n} {a}", lambda a, n: len(a) == n),
          (r"{a}: \({column},{row}\)", "I see the {a} in column {column} and row {row}",
           lambda a, column, row: (row, column) in [thing[2:4] for thing in a]),
          (r"{x} \+ {y} = {n}", "{x} plus {y} makes {n}", lambda x, y, n: x + y == n),
          (r"{x} - {y} = {n}", "{x} minus {y} makes {n}", lambda x, y, n: x - y == n),
          (r"{x} \* {y} = {n}", "{x} times {y} makes {n}", lambda x, y, n: x * y == n),
          ("{x} > {y}", "{x} is more than {y}", lambda x, y: x > y),
          ("{x} < {y}", "{x} is fewer than {y}", lambda x, y: x < y),
          ("{x} = {y}", "{x} is as many as {y}", lambda x, y: x == y)]
# What the fields of CLAIMS match; `a` is a phrase, the others are numbers. Python refuses to read
# an endless one, so their length has a limit.
GROUPS = {name: f"(?P<{name}>[0-9]{{1,99}})" for name in ("n", "x", "y", "row", "column")}
GROUPS["a"] = rf"(?P<a>(?:(?:{'|'.join(COLOURS)}) )?(?:{'|'.join(SHAPES)}|shape)s?)"
STYLES = "canonical", "hesitant", "verbose", "answer"                # of traces
FILLERS = ("Okay, let me look at the table", "Hmm, let me think about this",
           "Wait, I should check that again", "Let me look once more to be safe",
           "Alright, that seems right", "So now I am sure")


def claim_of(sentence):
    """-> of the claim that a sentence makes, in either wording: how to say it verbosely, when it
    holds, {field: text}. A sentence that makes none of CLAIMS never holds."""
    for plain, verbose, holds in CLAIMS:
        for wording in (plain, verbose):
            found = re.fullmatch(wording.format(**GROUPS), sentence)
            if found:
                return verbose.format(**found.groupdict()), holds, found.groupdict()
    return "", lambda: False, {}


def hesitate(rng, steps, style):
    """The steps R1-style, hesitating and checking twice; verbose ones also in words of their own,
    which a base never saw."""
    sentences = [rng.choice(FILLERS[:2])]
    for step in steps:
        said = claim_of(step)[0] if style == "verbose" else step
        sentences += [said, rng.choice(FILLERS[2:4]), said] if rng.random() < 0.4 else [said]
    return [*sentences, rng.choice(FILLERS[4:])]


def is_true(scene, sentence):
    """Whether a sentence makes one of the CLAIMS, in either wording, and the scene bears it out."""
    _, holds, said = claim_of(sentence)
    values = {key: matching(scene, text) if key == "a" else int(text) for key, text in said.items()}
    return holds(**values)


def check_steps(scene, text):
    """[(sentence, whether it says something true)]; None for a filler, which claims nothing."""
    parts = [part.strip() for part in re.split(r"\.(?:\s|$)", text)]
    return [(part, None if part in FILLERS else is_true(scene, part)) for part in parts if part]


def world_example(split, index, style="canonical", words=False):
    """The same on every machine, whatever else was drawn. words: described instead of painted."""
    name = f"{split}/{index}"
    if split not in SPLITS or not str(index).isdecimal():
        raise DataError(f"{name}: expected a number and one of {', '.join(SPLITS)}")
    rng = random.Random(name.replace("text", "test"))    # text: the test's questions, in words
    family = list(FAMILIES)[int(index) % len(FAMILIES)]
    scene = make_scene(rng, split, family)
    values, steps, answer = ask(rng, scene, family)
    *known, new = FAMILIES[family]
    question = (new if split == "ood" else rng.choice(known)).format(**values)
    sentences = hesitate(rng, steps, style) if style in ("hesitant", "verbose") else steps
    response = tagged(answer, "" if style == "answer" else ". ".join(sentences) + ".")
    images = [] if words or split == "text" else [paint(scene)]
    question = IMAGE + question if images else f"The table: {describe(scene)} {question}"
    return Example(name, question, answer, response, images, family=family, scene=scene,
                   box=family == "location")


# Kinds of pretraining example and their shares in percent, of pictures and of tables in words.
BASE_MIX = {"caption": 16, "counts": 20, "places": 14, "question": 16, "caption in words": 4,
            "counts in words": 8, "places in words": 8, "question in words": 14}


def base_example(index):
    """Pretraining for a model that can reason and mostly answers at once, as instruct models do. A
    rationale is the likelier the more steps it has, and likelier in words than before a picture."""
    rng = random.Random(f"base/{index}")
    kind, _, words = rng.choices(list(BASE_MIX), list(BASE_MIX.values()))[0].partition(" in ")
    example = world_example("train", 10_000_000 + index, words=bool(words))
    things, alone = example.scene, singles(example.scene)
    question, response = "Describe the table.", describe(things)
    if kind == "question":
        chance = (0.25 if words else 0.12) * example.response.count(".")      # for each step
        shown = example.response if rng.random() < chance else tagged(example.answer)
        return replace(example, response=shown)
    if kind == "counts":
        question, response = "Count everything.", count_everything(rng, things)
    elif kind == "places" and alone:
        some = rng.sample(alone, min(3, len(alone)))
        verb, place = rng.choice((("Box", grid_box), ("Locate", cell_of)))
        question = f"{verb} {', '.join(map(kind_of, some))}."
        response = " ".join(f"{kind_of(thing)}: {place(thing)}." for thing in some)
    seen = f"The table: {describe(things)} " if words else IMAGE
    return replace(example, question=seen + question, response=response)


def count_everything(rng, things):
    """Counts, mostly of some phrases in any order, half of the time of pairs alone: where a small
    model learns to count, and to know a thing by colour and shape, which it needs to find one."""
    phrases = [*SHAPES, *(f"{colour} shape" for colour in COLOURS)]
    if rng.random() < 0.85:
        rng.shuffle(phrases)
        alike = rng.choice((0, 4))
        phrases[alike:] = [pick_phrase(rng, things, "pair") for _ in range(alike, 6)]
    return " ".join(f"{phrase}s: {len(matching(things, phrase))}." for phrase in phrases)


class World:
    """A split of the tabletop world as a sequence: `World("train")[7]`."""
    def __init__(self, split, style="canonical", size=20_000):
        self.make = base_example if split == "base" else partial(world_example, split, style=style)
        self.indices = range(size)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return self.make(self.indices[index])        # an IndexError ends a `for`


# ------------------------------------------------------------------------------- JSONL files
def read_jsonl(path, convert=None, skip_bad_rows=False):
    """The rows of a .jsonl file, or of a .json file that is a list; blank lines are none.

    convert(row, where) makes of a row what is kept; `where` is file:line, or file:place in a list.
    A row is bad if it is not JSON or if `convert` raises a DataError: the first one ends the
    reading with a DataError, or with skip_bad_rows all are left out and counted."""
    try:
        content = Path(path).read_bytes()        # one line in another encoding is one bad row
        is_list = content.lstrip(b"\xef\xbb\xbf\r\n\t ").startswith(b"[")
        lines = map(json.dumps, json.loads(content)) if is_list else content.split(b"\n")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a readable .jsonl or .json file ({error})") from None
    places = {f"{path}:{number}": line for number, line in enumerate(lines, 1) if line.strip()}
    rows, bad = [], []
    for where, line in places.items():
        try:
            row = json.loads(line)
            rows.append(convert(row, where) if convert else row)
        except (LookupError, RecursionError, TypeError, ValueError) as error:
            what = "not JSON: " if isinstance(error, ValueError) else "a missing or wrong field: "
            bad.append(f"{where}: {'' if isinstance(error, DataError) else what}{error}")
            if not skip_bad_rows:
                raise DataError(f"{bad[0]}; mend the row, or --skip-bad-rows") from None
    if bad:
        print(f"{path}: skipped {len(bad)} bad rows of {len(bad) + len(rows)}; first: {bad[0]}")
    return rows


def jsonl_text(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# What tools call the same part of an example; under several names a row has to say the same.
NAMES = dict(question=("problem", "question", "prompt"), images=("images", "image", "image_path"),
             answer=("answer", "ground_truth", "solution"), choices=("choices", "options"),
             response=("completion", "output", "response"), rationale=("rationale", "thinking"))
EMPTY = (None, "", [], {})           # the values of a field that is not there
# Names of fields, and marks in a question, that speak of what is missing if nobody reads them.
UNREAD = re.compile(r"(?!(num|n|has|is)_)([a-z]+_)*(img|image|picture|photo|video|file_?name|label|"
                    r"option|choice|answer|target|truth)s?(_?(\d|[a-j](?![a-z])|url|src|path|file|"
                    r"name|list|data|bytes|base64|text|key|index|idx)s?)*|[A-J]|messages|"
                    r"conversations?|instruction", re.I)
STRAY = re.compile(r"<[|/]*\w*?(?:img|image|picture|video|vision)[^<>]*>|!\[[\w ]*\]\(", re.I)


def field_of(convert, row, part, *more):
    """What `convert` makes of this part of the row; None if absent. It raises for another value
    than its docstring speaks of."""
    found = {name: row[name] for name in NAMES.get(part, [part]) if name in row}
    try:
        values = [convert(value, *more) for value in found.values()]
    except (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError):
        raise DataError(f"field {found!r:.100}: expected {convert.__doc__}") from None
    if any(value != values[0] for value in values):
        raise DataError(f"fields {found!r:.100} differ: expected one {part}")
    return values[0] if values else None


def as_text(text):
    """text (tests/convert.py converts chats)"""
    return str.encode(text).decode()         # fails for half a character, which only JSON can hold


def as_answer(value):
    """one text or finite number, or a box of four numbers"""
    numbers = value if isinstance(value, list) and len(value) == 4 else [value]
    if all(type(one) in (int, float) and abs(one) < math.inf for one in numbers):
        return str(value)
    return extract_answer(as_text(value).rpartition("####")[2])      # GSM8K's, after the solution


def as_choices(value):
    """a list of 2 to 26 texts or numbers"""
    if not isinstance(value, list) or not 2 <= len(value) <= 26:
        raise ValueError
    return [as_answer(choice) for choice in value]


def as_images(value, root):
    """a path that never leaves the data directory, base64 bytes, or a list of these"""
    images = []
    for item in value if isinstance(value, list) else [value]:
        image = item if isinstance(item, dict) else dict(path=item)
        if image.get("bytes"):
            images.append(base64.b64decode(image["bytes"], validate=True))
        else:                        # relative_to fails for what lies elsewhere
            images.append(root / (root / image["path"]).resolve().relative_to(root))
    return images


def read_row(row, where, root, check):
    """One row -> Example, its pictures looked at, its answer checked: bad ones show before
    training. A row that has no answer has it in its response."""
    if not isinstance(row, dict):
        raise DataError(f"expected an object, got {row!r:.80}")
    row = {name: value for name, value in row.items() if value not in EMPTY}
    for name in filter(UNREAD.fullmatch, row.keys() - sum(NAMES.values(), ())):
        raise DataError(f"field {name} is not read: a row has {', '.join(NAMES)}, system, id; name "
                        "it so, drop it, or convert it once (tests/convert.py converts chats)")
    text = partial(field_of, as_text, row)
    question, said = text("question") or "", text("response") or ""
    answer = field_of(as_answer, row, "answer") or extract_answer(said)
    for part, value in (("question", question), ("answer", answer)):
        if not value.strip():
            raise DataError(f"no {part}: expected {NAMES[part]}; got {[*row]!r:.200}")
    choices = field_of(as_choices, row, "choices")
    question += "".join(f"\n({chr(ord('A') + i)}) {one}" for i, one in enumerate(choices or []))
    longest = max((str(row[name]) for name in NAMES["answer"] if name in row), key=len, default="")
    solved = re.match(r"(?s).*(?=####)|\W*(?!boxed)\w.*\\boxed.*", longest)     # GSM8K's, MATH's
    rationale = text("rationale") or solved and solved[0] or ""
    response = said or tagged(answer, re.sub("</?think>", "", rationale).strip())
    system = text("system") or ""
    images = field_of(as_images, row, "images", root) or []
    if IMAGE not in question:
        question = IMAGE * len(images) + question
    stray = STRAY.findall(question.replace(IMAGE, ""))
    if stray or question.count(IMAGE) != len(images) or IMAGE in system + response:
        raise DataError(f"{question.count(IMAGE)} {IMAGE} in the question, {len(images)} images, "
                        f"other marks {stray}: write one for each, or none to put all images first")
    example = Example(str(row.get("id", where)), question, answer, response, images, choices,
                      system, box=any(isinstance(row.get(n), list) for n in NAMES["answer"]))
    example.pictures()
    check(example)
    return example


MAX_PIXELS = 32_000_000              # of a picture that is opened


@lru_cache(maxsize=4)                # questions about one picture mostly follow one another
def open_image(source):
    """Bytes or a path -> RGB picture, upright, on white; or a DataError."""
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        image = Image.open(file, formats=("PNG", "JPEG", "WEBP", "GIF", "BMP"))    # EPS: a program
        if image.width * image.height > MAX_PIXELS or max(image.size) > 200 * min(image.size):
            raise ValueError(f"{image.size} is over {MAX_PIXELS} pixels, or of ratio 200")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):                           # grey in 16 bits
            image = Image.fromarray((numpy.asarray(image) // 257).astype(numpy.uint8))
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    except Exception as error:       # Pillow's readers raise anything over a broken file
        raise DataError(f"{source!s:.200} is not a readable image: {error}") from None


@cache
def read_examples(path, skip_bad_rows=False, check=lambda example: None):
    """A .jsonl or .json file -> [Example]; image paths are relative to the file. `check` raises a
    DataError for an example that is of no use."""
    convert = partial(read_row, root=Path(path).parent.resolve(), check=check)
    examples = read_jsonl(path, convert, skip_bad_rows)
    if not examples:
        raise DataError(f"{path}: no usable row")
    return examples


def load_dataset(data, split="train", limit=None, *reading):
    """The first of «world», or of a file; the last twentieth (1 to 200 rows) of that is val.
    reading: as of `read_examples`."""
    if data == "world":
        return World(split, size=limit or 20_000)
    examples = read_examples(data, *reading)
    kept = len(examples) - max(1, min(200, len(examples) // 20))
    parts = dict(train=examples[:kept] or examples, val=examples[kept:], all=examples)
    if split not in parts:
        raise DataError(f"{split!r} is no split of a file: expected {', '.join(parts)}")
    return parts[split][:limit]


# ---------------------------------------------------------------------- tokens, prompts, tiles
START, STOP, AROUND, GLOBAL, PAD = ("<|im_start|>", "<end_of_utterance>",
                                    "<fake_token_around_image>", "<global-img>", "<pad>")
CHAT_TEMPLATE = ("<|im_start|>{% for message in messages %}{{ message.role | capitalize }}:"
    "{{ '' if message.content[0].type == 'image' else ' ' }}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}")


def train_tokenizer(examples, vocabulary=2048):
    """Byte-level BPE with single digits; the tags of an answer are one token each."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r" ?\d"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(False)])
    tokenizer.decoder = decoders.ByteLevel()
    texts = [f"{example.question} {example.response}" for example in examples]
    texts = [re.sub("</?(image|think|answer)>", "\n", text) for text in texts]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, min_frequency=8, show_progress=False,
                                  special_tokens=[PAD, START, STOP, AROUND, GLOBAL, IMAGE],
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(texts + ["User:", "Assistant:"] * 20, trainer)
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    tokenizer.add_tokens([AddedToken(tag, lstrip=True, normalized=False) for tag in tags])
    return tokenizer


def resize_longer(image, longer, step):
    """The longer side to `longer`, the shorter to a multiple of `step`, as transformers rounds."""
    ratio = image.width / image.height
    shorter = int(longer / ratio if ratio >= 1 else longer * ratio)
    shorter = max(math.ceil(shorter / step) * step, 1)
    return image.resize((longer, shorter) if ratio >= 1 else (shorter, longer), Image.LANCZOS)


def image_tiles(image, tile, longest_edge):
    """Idefics3's preprocessing -> [tiles, then the global view], rows, columns (0, 0: one tile)."""
    image = resize_longer(image, longest_edge, 2)
    rows = columns = 0
    if longest_edge > tile:
        image = resize_longer(image, math.ceil(max(image.size) / tile) * tile, tile)
        columns, rows = image.width // tile, image.height // tile
    tiles = [image.crop((left, top, left + tile, top + tile))
             for top in range(0, rows * tile, tile) for left in range(0, columns * tile, tile)]
    return [*tiles, image.resize((tile, tile), Image.LANCZOS)], rows, columns


def smart_resize(width, height, factor, most):
    """Qwen2-VL: both sides to multiples of factor, the area between 4 factor² and `most`."""
    least = 4 * factor ** 2
    sides = [round(side / factor) * factor for side in (width, height)]
    if sides[0] * sides[1] > most:
        scale = math.sqrt(width * height / most)
        sides = [max(1, math.floor(side / scale / factor)) * factor for side in (width, height)]
    elif sides[0] * sides[1] < least:
        scale = math.sqrt(least / (width * height))
        sides = [math.ceil(side * scale / factor) * factor for side in (width, height)]
    return sides


def pixel_array(image, mean, std):
    """PIL -> (3, H, W); transformers' arithmetic: /255 in fp64, then (x - mean) / std in fp32."""
    values = (numpy.arange(256) * (1 / 255)).astype(numpy.float32)[:, None]
    table = (values - numpy.float32(mean)) / numpy.float32(std)               # (256, 3)
    return table[numpy.asarray(image), numpy.arange(3)].transpose(2, 0, 1)


@dataclass
class Batch:
    """B prompts, padded on the right, and all their pictures in reading order."""
    ids: torch.Tensor                # (B, T)
    lengths: torch.Tensor            # (B,)
    positions: torch.Tensor          # (B, T, 3) time, row, column: alike but in Qwen's pictures
    pixels: torch.Tensor             # tiles (N, 3, S, S), or Qwen's patches (N, 3 * 2 * 14 * 14)
    grids: torch.Tensor              # (pictures, 2) rows and columns of image tokens, Qwen's alone
    counts: torch.Tensor             # (B, 2) rows of pixels and of grids that belong to a prompt

    def to(self, device):
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def part(self, start, stop):
        """Prompts start to stop - 1, with their pictures."""
        first_pixel, first_grid = self.counts[:start].sum(0).tolist()
        end_pixel, end_grid = self.counts[:stop].sum(0).tolist()
        return Batch(self.ids[start:stop], self.lengths[start:stop], self.positions[start:stop],
                     self.pixels[first_pixel:end_pixel], self.grids[first_grid:end_grid],
                     self.counts[start:stop])


def pad_rows(rows, pad):
    """[[id]] -> (B, T) padded on the right, (B,) lengths."""
    lengths = [len(row) for row in rows]
    padded = [row + [pad] * (max(lengths) - len(row)) for row in rows]
    return torch.tensor(padded), torch.tensor(lengths)


def rope_positions(ids, grids, image):
    """M-RoPE (Qwen2-VL, section 2.1): text counts on in all three; the tokens of a picture share a
    time and have its rows and columns; what follows starts at the largest. (T,) -> (T, 3)"""
    positions = torch.arange(len(ids))[:, None].repeat(1, 3)                  # (T, 3)
    in_picture = ids == image                                                 # (T,)
    starts = (in_picture & ~in_picture.roll(1)).nonzero()[:, 0].tolist()
    for start, (rows, columns) in zip(starts, grids):
        stop = start + rows * columns
        inside = torch.ones(1, rows, columns).nonzero()      # (stop - start, 3) in reading order
        positions[start:stop] = positions[start] + inside
        positions[stop:] += max(rows, columns) - rows * columns
    return positions


# What a run says around a question and how finely it looks; stored with its checkpoint. Answers in
# tags or boxed; longest edge in pixels (Qwen: the root of the area), 0: one tile (Qwen: 512).
PROMPT = dict(system="", instruction="", answer_format="tags", longest_edge=0)


class Processor:
    """All that stands between text and ids for one checkpoint; here SmolVLM's and Idefics3's.
    files: {name: text}, what other programs read of it; kept as it came."""
    # LEAD: between prompt and response; EDGE: pixels, for a longest_edge of 0, or None: one tile
    IMAGE, STOP, PAD, LEAD, EDGE = IMAGE, STOP, PAD, " ", None
    MEAN = STD = (0.5, 0.5, 0.5)

    def __init__(self, tokenizer, tile, image_tokens, prompt=None, files=None):
        self.tokenizer, self.tile, self.image_tokens = tokenizer, tile, image_tokens
        self.style, self.files = PROMPT | (prompt or {}), files or {}
        self.stop, self.image, pad = map(tokenizer.token_to_id, (self.STOP, self.IMAGE, self.PAD))
        self.pad = 2 if pad is None else pad
        self.longest_edge = self.style["longest_edge"] or self.EDGE or tile
        special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
        self.special = re.compile("|".join(map(re.escape, [*special, self.IMAGE])))

    def preprocessing(self):
        """What preprocessor_config.json has to say of the size of pictures."""
        return dict(size={"longest_edge": self.longest_edge},
                    do_image_splitting=self.longest_edge > self.tile)

    def picture(self, image):
        """-> its place in the prompt, [pixels (1, 3, S, S)], [its grid, where positions need it]"""
        tiles, rows, columns = image_tiles(image, self.tile, self.longest_edge)
        tokens, place = self.IMAGE * self.image_tokens, ""
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                place += f"{AROUND}<row_{row}_col_{column}>{tokens}"
            place += "\n"
        blank = "\n" if rows else ""
        place += f"{blank}{AROUND}{GLOBAL}{tokens}{AROUND}"
        return place, [pixel_array(tile, self.MEAN, self.STD)[None] for tile in tiles], []

    def template(self, system, text):
        system = f"System: {system}{STOP}\n" if system else ""
        space = "" if text.startswith(AROUND) else " "
        return f"{START}{system}User:{space}{text}{STOP}\nAssistant:"

    def prompt(self, example):
        """-> (prompt text with expanded pictures, their pixels, their grids)."""
        text, *parts = map(self.plain, example.question.split(IMAGE))
        pixels, grids = [], []
        for image, part in zip(example.pictures(), parts):
            place, own_pixels, own_grids = self.picture(image)
            text += place + part
            pixels += own_pixels
            grids += own_grids
        if self.style["instruction"]:
            text += self.plain(f"\n{self.style['instruction']}")
        system = self.plain(example.system or self.style["system"])
        return self.template(system, text), pixels, grids

    def plain(self, text):
        """What somebody's text spells like a special token stays text: by a space of no width."""
        return self.special.sub(lambda found: found[0][0] + "\u200b" + found[0][1:], text)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """The text of a response, without its end mark."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def response_ids(self, text):
        """What a model should say, its end mark included: the last token that counts."""
        if self.style["answer_format"] == "boxed":
            text = re.sub(r"<answer>(.*?)</answer>", r"\\boxed{\1}", text, flags=re.S)
        return self.encode(self.LEAD + self.plain(text)) + [self.stop]

    def batch(self, examples):
        """-> Batch of the prompts of these examples."""
        texts, pixels, grids = zip(*(self.prompt(example) for example in examples))
        ids, lengths = pad_rows([self.encode(text) for text in texts], self.pad)
        positions = [rope_positions(row, own, self.image) for row, own in zip(ids, grids)]
        counts = [[sum(map(len, arrays)), len(own)] for arrays, own in zip(pixels, grids)]
        pixels = [array for own in pixels for array in own]
        pixels = torch.from_numpy(numpy.concatenate(pixels)) if pixels else torch.zeros(0)
        grids = torch.tensor([grid for own in grids for grid in own]).long().view(-1, 2)
        return Batch(ids, lengths, torch.stack(positions), pixels, grids, torch.tensor(counts))

    def prepare(self, examples, indices):
        """What a step needs of some examples: themselves, their prompts, their responses' ids."""
        some = [examples[index] for index in indices]
        return some, self.batch(some), [self.response_ids(one.response) for one in some]

    def prefetch(self, examples, batches, device):
        """Yields `prepare` of each batch of indices; for a GPU, threads make some ahead of time."""
        ahead, waiting = 3 if device == "cuda" else 0, deque()
        with ThreadPoolExecutor(ahead or 1) as threads:
            for batch in batches:
                waiting.append(threads.submit(self.prepare, examples, batch))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            yield from (prepared.result() for prepared in waiting)

    def banned(self, vocabulary):
        """(V,) True for ids that only prompts may hold, and for ids without a token."""
        added, size = self.tokenizer.get_added_tokens_decoder(), self.tokenizer.get_vocab_size()
        banned = {self.image, *(i for i, token in added.items() if token.special)} - {self.stop}
        return torch.tensor([i in banned or i >= size for i in range(vocabulary)])


class QwenProcessor(Processor):
    """Qwen2-VL's and Qwen2.5-VL's: a picture keeps its shape, one token sees 28x28 pixels."""
    IMAGE, STOP, PAD, LEAD, EDGE = "<|image_pad|>", "<|im_end|>", "<|endoftext|>", "", 512
    MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def preprocessing(self):
        return dict(min_pixels=4 * self.tile ** 2, max_pixels=self.longest_edge ** 2)

    def picture(self, image):
        """Patches in 2x2 blocks, one for each image token; a still picture is two equal frames."""
        width, height = smart_resize(*image.size, self.tile, self.longest_edge ** 2)
        rows, columns, patch = height // self.tile, width // self.tile, self.tile // 2
        pixels = pixel_array(image.resize((width, height), Image.BICUBIC), self.MEAN, self.STD)
        frames = pixels.reshape(3, 1, rows, 2, patch, columns, 2, patch).repeat(2, 1)
        patches = frames.transpose(2, 5, 3, 6, 0, 1, 4, 7).reshape(rows * columns * 4, -1)
        place = f"<|vision_start|>{self.IMAGE * (rows * columns)}<|vision_end|>"
        return place, [patches], [(rows, columns)]

    def template(self, system, text):
        return (f"<|im_start|>system\n{system or 'You are a helpful assistant.'}<|im_end|>\n"
                f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
