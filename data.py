"""The pictures, the questions and the tokens that both ways of training share.

1. The tabletop world: scenes on a 4x4 table, six families of questions, rationales of which every
   step can be checked; all a pure function of (split, index): 2,000 prompts begin 20,000 prompts.
2. JSONL files: one function brings the rows of the common tools into one form, or says why not.
3. Tokens: a byte-level BPE, the Idefics3 prompt, image tiles, and `Batch`.
"""
import base64
import functools
import io
import json
import math
import pathlib
import random
import re
import zlib
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy
import torch
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

MAX_PIXELS = 32_000_000              # a larger image is refused before it is decoded
CHECKED = set()                      # image files and bytes that were decoded without error
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")      # Pillow's EPS would start Ghostscript
IMAGE = "<image>"
LANCZOS = Image.Resampling.LANCZOS


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

    def pictures(self):
        return [open_image(image, self.id) for image in self.images]


def reasoned(rationale, answer):
    """The form that the format reward asks for (R1's)."""
    return f"<think>{rationale}</think>{bare(answer)}"


def bare(answer):
    return f"<answer>{answer}</answer>"


# ------------------------------------------------------------------ the tabletop world: scenes

CELL, SIDE = 16, 4                   # 4 x 4 cells of 16 pixels: one image token sees one cell
COLOURS = dict(red=(214, 40, 40), green=(44, 160, 70), blue=(40, 90, 220), yellow=(235, 200, 30))
SHAPES = ("circle", "square", "triangle")
HELD_OUT = {("red", "triangle"), ("blue", "circle")}        # never seen in training
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
KNOWN = [pair for pair in PAIRS if pair not in HELD_OUT]
SPLITS = ("train", "val", "test", "ood", "text")


class Thing(NamedTuple):
    colour: str
    shape: str
    row: int                         # 1..4 from the top
    column: int                      # 1..4 from the left
    box: tuple                       # x1, y1, x2, y2 in pixels


def bucket(things):
    """Which split may hold these things (in these places): a checksum modulo 8."""
    return zlib.crc32(repr(sorted(thing[:4] for thing in things)).encode()) % 8


def make_scene(rng, split):
    """Redraws until the scene belongs to this split, so that no two splits share a scene."""
    buckets = {"test": (0,), "text": (0,), "val": (1,), "ood": range(8)}.get(split, range(2, 8))
    low, high, pairs = (7, 9, PAIRS) if split == "ood" else (2, 6, KNOWN)
    while True:
        things = []
        for cell in rng.sample(range(SIDE * SIDE), rng.randint(low, high)):
            (row, column), size = divmod(cell, SIDE), rng.randint(10, 13)
            x, y = (at * CELL + (CELL - size) // 2 + rng.randint(-1, 1) for at in (column, row))
            box = (x, y, x + size, y + size)
            things.append(Thing(*rng.choice(pairs), row + 1, column + 1, box))
        novel = any((thing.colour, thing.shape) in HELD_OUT for thing in things)
        if novel == (split == "ood") and bucket(things) in buckets:
            return things


def paint(things):
    """The scene as a 64x64 RGB picture."""
    image = Image.new("RGB", (SIDE * CELL, SIDE * CELL), (245, 240, 230))
    pen = ImageDraw.Draw(image)
    for thing in things:
        (x1, y1, x2, y2), fill = thing.box, COLOURS[thing.colour]
        if thing.shape == "circle":
            pen.ellipse(thing.box, fill)
        elif thing.shape == "square":
            pen.rectangle(thing.box, fill)
        else:
            pen.polygon([((x1 + x2) / 2, y1), (x2, y2), (x1, y2)], fill)
    return image


def describe(things):
    """The scene in words: «row 1: red circle 2, blue square 4. row 3: ...» (the columns)."""
    rows = {}
    for thing in sorted(things, key=lambda thing: (thing.row, thing.column)):
        rows.setdefault(thing.row, []).append(f"{thing.colour} {thing.shape} {thing.column}")
    return " ".join(f"row {row}: {', '.join(names)}." for row, names in rows.items())


# ------------------------------------------------ the tabletop world: questions and rationales

def matching(things, phrase):
    """The things that a phrase like «red circles», «squares» or «blue shape» speaks of."""
    *colour, shape = phrase.split()
    shape = shape.removesuffix("s")
    return [t for t in things if colour in ([], [t.colour]) and shape in (t.shape, "shape")]


def pick_phrase(rng, things, kind):
    """A noun phrase, four times in five one that the table holds."""
    colour, shape, *_ = rng.choice(things)
    if rng.random() < 0.2:
        colour, shape = rng.choice(KNOWN)
    return {"shape": shape, "colour": f"{colour} shape", "pair": f"{colour} {shape}"}[kind]


def count_step(phrase, count):
    return "count", dict(a=phrase + "s", n=count)


def arithmetic(x, sign, y):
    return "arithmetic", dict(x=x, sign=sign, y=y, n={"+": x + y, "-": x - y, "*": x * y}[sign])


# Each ask_* returns what the wording needs, the claims (see CLAIMS) that lead there, the answer.
def ask_count(rng, things, family):
    phrase = pick_phrase(rng, things, rng.choice(("shape", "colour", "pair")))
    count = len(matching(things, phrase))
    return dict(a=phrase + "s"), [count_step(phrase, count)], str(count)


def ask_pair(rng, things, family):
    """The four families that count two phrases; no thing can match both of them."""
    kind, a, b = rng.choice(("shape", "colour")), None, None
    while a == b:
        a, b = pick_phrase(rng, things, kind), pick_phrase(rng, things, kind)
    n, m = len(matching(things, a)), len(matching(things, b))
    x, y = rng.randint(2, 5), rng.randint(2, 5)
    if n < m if family == "difference" else rng.random() < 0.5:
        a, b, n, m = b, a, m, n
    sign = ">" if n > m else "<" if n < m else "="
    end = {"sum": [arithmetic(n, "+", m)], "difference": [arithmetic(n, "-", m)],
           "cost": [arithmetic(n, "*", x), arithmetic(m, "*", y), arithmetic(n * x, "+", m * y)],
           "comparison": [("compare", dict(x=n, sign=sign, y=m))]}[family]
    answer = end[-1][1].get("n", "yes" if n > m else "no")
    fill = dict(a=a, b=b, x=x, y=y) if family == "cost" else dict(a=a + "s", b=b + "s")
    return fill, [count_step(a, n), count_step(b, m), *end], str(answer)


def singles(things):
    """The things that are the only ones of their kind."""
    return [t for t in things if len(matching(things, f"{t.colour} {t.shape}")) == 1]


def ask_location(rng, things, family):
    """None where nothing on the table is the only one of its kind."""
    single = singles(things)
    if not single:
        return None
    thing = rng.choice(single)
    name = f"{thing.colour} {thing.shape}"
    steps = [("place", dict(a=name, row=thing.row, column=thing.column))]
    return dict(a=name), steps, str(list(thing.box))


# family: (how to ask, two wordings of training, one for ood: known words, but never together so)
FAMILIES = {
    "count": (ask_count, "How many {a} are there?", "How many {a} do you see?",
              "How many {a} do you see there?"),
    "sum": (ask_pair, "How many {a} and {b} are there together?", "What do {a} and {b} add up to?",
            "What do {a} and {b} together add up to?"),
    "cost": (ask_pair, "Each {a} costs {x} and each {b} costs {y}. What do they cost together?",
             "Price of a {a}: {x}, of a {b}: {y}. What does everything cost?",
             "Each {a} costs {x} and each {b} costs {y}. What does everything cost?"),
    "difference": (ask_pair, "How many more {a} than {b} are there?",
                   "By how many do {a} outnumber {b}?",
                   "By how many more do {a} outnumber {b}?"),
    "comparison": (ask_pair, "Are there more {a} than {b}?", "Do {a} outnumber {b}?",
                   "Are {a} more than {b}?"),
    "location": (ask_location, "Where is the {a}?", "Find the {a}.", "Where do you see the {a}?")}
CLAIMS = {      # kind: (canonical wording, verbose wording); both spoken and parsed by these
    "count": ("{a}: {n}", "I count {n} {a}"),
    "arithmetic": ("{x} {sign} {y} = {n}", "{x} {word} {y} makes {n}"),
    "compare": ("{x} {sign} {y}", "{x} is {word} {y}"),
    "place": ("{a}: row {row}, column {column}", "I see the {a} in row {row} and column {column}")}
WORDS = dict(zip("+-*><=", ("plus", "minus", "times", "more than", "fewer than", "as many as")))
NOUN = rf"(?:(?:{'|'.join(COLOURS)}) )?(?:{'|'.join(SHAPES)}|shape)s?"
FIELDS = dict(a=NOUN, sign=r"[-+*<>=]", word="|".join(WORDS.values()))      # the others: numbers
PATTERNS = [(kind, re.sub(r"{(\w+)}", lambda f: f"(?P<{f[1]}>{FIELDS.get(f[1], '[0-9]+')})", text))
            for kind, wordings in CLAIMS.items() for text in wordings]
FILLERS = ("Okay, let me look at the table", "Hmm, let me think about this",
           "Wait, I should check that again", "Let me look once more to be safe",
           "Alright, that seems right", "So now I am sure")


def say(kind, values, verbose=False):
    return CLAIMS[kind][verbose].format(**values, word=WORDS.get(values.get("sign")))


def rationale(steps, style, rng=None):
    """canonical: the claims. verbose: the same claims R1-style, hesitating and checking twice."""
    if style == "canonical":
        return ". ".join(say(*step) for step in steps) + "."
    sentences = [rng.choice(FILLERS[:2])]
    for step in steps:
        sentences.append(say(*step, verbose=True))
        if rng.random() < 0.4:
            sentences += [rng.choice(FILLERS[2:4]), say(*step, verbose=True)]
    return ". ".join(sentences + [rng.choice(FILLERS[4:])]) + "."


def is_true(scene, sentence):
    """Whether a sentence makes one of the CLAIMS and the scene bears it out."""
    matches = ((kind, re.fullmatch(pattern, sentence)) for kind, pattern in PATTERNS)
    kind, found = next(((kind, match) for kind, match in matches if match), (None, None))
    if found is None:
        return False
    if kind in ("count", "place"):
        things = matching(scene, found["a"])
        if kind == "count":
            return len(things) == int(found["n"])
        return (int(found["row"]), int(found["column"])) in [(t.row, t.column) for t in things]
    sign = next(s for s, word in WORDS.items() if {s, word} & {*found.groups()})
    x, y = int(found["x"]), int(found["y"])
    if kind == "compare":
        return {">": x > y, "<": x < y, "=": x == y}.get(sign, False)
    return {"+": x + y, "-": x - y, "*": x * y}.get(sign) == int(found["n"])


def check_steps(scene, text):
    """[(sentence, whether it says something true)]; None for a filler, which claims nothing."""
    sentences = filter(None, (part.strip() for part in re.split(r"\.(?:\s|$)", text)))
    return [(s, None if s in FILLERS else len(s) < 100 and is_true(scene, s)) for s in sentences]


def world_example(split, index, style="canonical"):
    """Example `index` of a split: the same on every machine, whatever else was drawn before."""
    if split not in SPLITS:
        raise DataError(f"split {split!r}: the tabletop world has {', '.join(SPLITS)}")
    rng = random.Random(f"{'test' if split == 'text' else split}/{index}")
    family, question = list(FAMILIES)[index % len(FAMILIES)], None
    ask, *wordings = FAMILIES[family]
    while question is None:
        scene = make_scene(rng, split)
        question = ask(rng, scene, family)
    wording = wordings[-1] if split == "ood" else rng.choice(wordings[:-1])
    fill, steps, answer = question
    text = wording.format(**fill)
    text = text[0].upper() + text[1:]
    images = [] if split == "text" else [paint(scene)]
    text = IMAGE + text if images else f"The table: {describe(scene)} {text}"
    response = bare(answer) if style == "answer" else reasoned(rationale(steps, style, rng), answer)
    return Example(f"{split}/{index}", text, answer, response, images, family=family, scene=scene)


def world_example_of(name):
    """The example whose id is `name`, like «test/7»."""
    split, _, index = name.partition("/")
    if not index.isdecimal():
        raise DataError(f"id {name!r}: expected SPLIT/INDEX of the tabletop world, like test/7")
    return world_example(split, int(index))


# kinds of pretraining example and their shares in percent
BASE_MIX = {"caption": 6, "counts": 34, "boxes": 8, "answer": 28, "reasoned": 13, "text": 11}


def list_counts(rng, things):
    """Many counts for one picture, mostly in any order: where a small model learns to count."""
    phrases = [*SHAPES, *(f"{colour} shape" for colour in COLOURS)]
    if rng.random() < 0.85:
        rng.shuffle(phrases)
        phrases[4:] = [pick_phrase(rng, things, "pair") for _ in range(2)]
    steps = [count_step(phrase, len(matching(things, phrase))) for phrase in phrases]
    return "Count everything.", rationale(steps, "canonical")


def base_example(index):
    """Pretraining for a model that can reason but mostly answers at once, as instruct models do."""
    rng = random.Random(f"base/{index}")
    kind, = rng.choices(list(BASE_MIX), list(BASE_MIX.values()))
    style = "canonical" if kind == "reasoned" else "answer"
    example = world_example("train", 10_000_000 + index, style)
    question, response = example.question.removeprefix(IMAGE), example.response
    scene, images = example.scene, [] if kind == "text" else example.images
    if kind == "text":
        question = f"The table: {describe(scene)} {question}"
    elif kind == "counts":
        question, response = list_counts(rng, scene)
    elif kind == "caption" or kind == "boxes" and not singles(scene):
        question, response = "Describe the table.", describe(scene)
    elif kind == "boxes":
        single = singles(scene)
        some = [(f"{t.colour} {t.shape}", t.box) for t in rng.sample(single, min(3, len(single)))]
        question = f"Box {', '.join(name for name, _ in some)}."
        response = " ".join(f"{name}: {list(box)}." for name, box in some)
    question = IMAGE * len(images) + question
    return replace(example, question=question, response=response, images=images)


class World:
    """A split of the tabletop world as a sequence: `World("train")[7]`."""

    def __init__(self, split, style="canonical", size=20_000):
        world = functools.partial(world_example, split, style=style)
        self.make, self.size = base_example if split == "base" else world, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)      # what ends a `for`
        return self.make(index)


# ------------------------------------------------------------------------------- JSONL files

def open_image(source, where):
    """PIL image, bytes or path -> RGB picture; refuses what is not one, or is too large."""
    if isinstance(source, Image.Image):
        return source
    name = "embedded image" if isinstance(source, bytes) else source
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        image = Image.open(file, formats=FORMATS)
        if image.width * image.height <= MAX_PIXELS:
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{where}: image {name} does not exist") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: {name} is not a readable image ({error})") from None
    raise DataError(f"{where}: {name} has {image.width}x{image.height} pixels, more than "
                    f"{MAX_PIXELS:,}; make it smaller or remove the row")


def image_source(value, root, where):
    """A path inside `root`, or the bytes of an embedded image."""
    if isinstance(value, dict) and value.get("bytes"):
        try:
            return base64.b64decode(value["bytes"], validate=True)
        except (ValueError, TypeError) as error:
            raise DataError(f"{where}: field image: bytes are not base64 ({error})") from None
    value = value.get("path") if isinstance(value, dict) else value
    try:                               # fails for what is no text, "\0", "\ud800", circular links
        path = (root / value).resolve()
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"{where}: field image: expected a path, got {value!r}") from None
    if not path.is_relative_to(root.resolve()):
        raise DataError(f"{where}: field image: {value!r} leaves the data directory {root}")
    return path


def first(row, *names):
    return next((row[name] for name in names if row.get(name) is not None), None)


def message_turns(messages, where):
    """Chat messages -> {"system" | "user" | "assistant": text}; one question, one answer."""
    turns = {}
    names = dict(human="user", gpt="assistant", system="system", user="user", assistant="assistant")
    for message in messages:
        message = message if isinstance(message, dict) else {}
        role, content = first(message, "role", "from"), first(message, "content", "value")
        role = names.get(role) if isinstance(role, str) else None
        if isinstance(content, list) and all(isinstance(part, dict) for part in content):
            texts = [IMAGE if part.get("type") == "image" else part.get("text") for part in content]
            content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
        if role is None or role in turns or not isinstance(content, str):
            raise DataError(f"{where}: field messages: expected one user turn and at most one "
                            f"system and one assistant turn with text, got {message!r:.80}")
        turns[role] = content
    return turns


def row_turns(row, where):
    """The turns of a row in any layout: messages, or fields for question and response."""
    messages = first(row, "messages", "conversations")
    if messages is None and isinstance(row.get("prompt"), list):
        completion = row.get("completion")
        messages = row["prompt"] + (completion if isinstance(completion, list) else [])
    if isinstance(messages, list):
        turns = message_turns(messages, where)
    else:
        user = first(row, "problem", "question", "prompt")
        if user is None and isinstance(row.get("instruction"), str):
            user = row["instruction"] + (f"\n{row['input']}" if row.get("input") else "")
        turns = dict(user=user, assistant=first(row, "completion", "output"))
    if isinstance(row.get("system"), str):
        turns["system"] = row["system"]
    if not isinstance(turns.get("user"), str) or not turns["user"].strip():
        raise DataError(f"{where}: no question: expected text in one of the fields question, "
                        f"problem, prompt, instruction, messages, conversations; got "
                        f"{', '.join(map(str, row))}")
    return turns


def strip_answer(text):
    """What stands in the last <answer> tags, else the text without its <think> part; where that
    has a \\boxed{...}, what stands in the last one."""
    found = re.findall(r"<answer>(.*?)</answer>", text, re.S)
    text = found[-1] if found else re.sub(r"<think>.*?(?:</think>|$)", "", text, flags=re.S)
    inside, depth = text.rpartition("\\boxed{")[2] if "\\boxed{" in text else "", 1
    for i, letter in enumerate(inside):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return inside[:i].strip()
    return text.strip()


def row_answer(row, response, where):
    """-> (answer that the grader compares with, response that imitation learns)."""
    response = response if isinstance(response, str) else None
    answer = first(row | {"turn": response}, "answer", "ground_truth", "solution", "turn")
    if type(answer) not in (str, int, float) or not strip_answer(str(answer)):
        raise DataError(f"{where}: no answer: expected text or a number in answer, ground_truth, "
                        f"solution or an assistant turn; got {answer!r:.80}")
    answer, thought = strip_answer(str(answer)), first(row, "rationale", "thinking")
    thought = re.sub("</?think>", "", thought or "").strip()       # R1-V's `thinking` has them
    return answer, response or (reasoned(thought, answer) if thought else bare(answer))


def read_row(row, root, where):
    """One row of any layout -> Example, its pictures looked at: bad ones show before training."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {type(row).__name__}")
    for name in ("system", "instruction", "input", "output", "rationale", "thinking"):
        if not isinstance(row.get(name) or "", str):
            raise DataError(f"{where}: field {name}: expected text, got {row[name]!r:.80}")
    turns, images = row_turns(row, where), first(row, "images", "image", "image_path")
    images = [] if images is None else images if isinstance(images, list) else [images]
    images = [image_source(item, root, where) for item in images]
    question, system, choices = turns["user"], turns.get("system", ""), row.get("choices")
    if choices is not None:
        if (not isinstance(choices, list) or not 2 <= len(choices) <= 26
                or not all(isinstance(choice, (str, int, float)) for choice in choices)):
            raise DataError(f"{where}: field choices: expected a list of 2 to 26, got {choices!r}")
        choices = [str(choice) for choice in choices]
        question += "".join(f"\n({chr(65 + i)}) {choice}" for i, choice in enumerate(choices))
    if IMAGE not in question:
        question = IMAGE * len(images) + question
    answer, response = row_answer(row, turns.get("assistant"), where)
    if question.count(IMAGE) != len(images) or IMAGE in system + response:
        raise DataError(f"{where}: {question.count(IMAGE)} {IMAGE} in the text but {len(images)} "
                        "images; write one for each, or none to put all images first, and none "
                        f"({IMAGE}) in the system turn or the response")
    if re.search("[\ud800-\udfff]", question + response + system):
        raise DataError(f"{where}: half a character (a lone surrogate) in question or answer")
    for image in set(images) - CHECKED:
        open_image(image, where)
        CHECKED.add(image)
    return Example(str(where if row.get("id") is None else row["id"]), question, answer, response,
                   images, choices, system)


def parsed(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from None


@functools.cache
def read_examples(path, skip_bad_rows=False):
    """A .jsonl or .json file of any layout -> [Example]; image paths are relative to the file."""
    path, examples, bad = pathlib.Path(path), [], []
    if not path.is_file():
        raise DataError(f"{path}: no such file; --data takes «world» or a .jsonl or .json file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error})") from None
    listed = text.lstrip().startswith("[")
    rows = [json.dumps(row) for row in parsed(text, path)] if listed else text.split("\n")
    for number, line in enumerate(rows, 1):
        where = f"{path}: row {number}" if listed else f"{path}:{number}"
        try:
            if line.strip():
                examples.append(read_row(parsed(line, where), path.parent, where))
        except DataError as error:
            if not skip_bad_rows:
                raise
            bad.append(str(error))
    if bad:
        print(f"{path}: skipped {len(bad)} bad rows of {len(bad) + len(examples)}; first: {bad[0]}")
    if not examples:
        raise DataError(f"{path}: no usable row")
    return examples


def load_dataset(data, split="train", style="canonical", skip_bad_rows=False):
    """«world», or a file. Of a file, the last twentieth (at most 200 rows) is the split val."""
    if data == "world":
        return World(split, style)
    examples = read_examples(data, skip_bad_rows)
    kept = len(examples) - min(200, len(examples) // 20)
    return {"train": examples[:kept], "val": examples[kept:]}.get(split, examples)


# ---------------------------------------------------------------------- tokens, prompts, tiles

START, STOP, AROUND, GLOBAL, PAD = ("<|im_start|>", "<end_of_utterance>",
                                    "<fake_token_around_image>", "<global-img>", "<pad>")
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")


def train_tokenizer(examples, vocabulary=2048):
    """Byte-level BPE with single digits; the tags of an answer are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?\d"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    texts = (f"{example.question} {example.response}" for example in examples)
    texts = [re.sub("</?(image|think|answer)>", "\n", text) for text in texts]
    tokenizer.train_from_iterator(texts + ["User:", "Assistant:"] * 20, trainers.BpeTrainer(
        vocab_size=vocabulary, min_frequency=8, show_progress=False,
        special_tokens=[PAD, START, STOP, AROUND, GLOBAL, IMAGE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tokenizer.add_tokens([AddedToken(tag, lstrip=True, normalized=False)
                          for tag in ("<think>", "</think>", "<answer>", "</answer>")])
    return tokenizer


def shorter_side(size, longer):
    """The shorter side once the longer one is `longer`, in the arithmetic of transformers."""
    ratio = size[0] / size[1]
    return int(longer / ratio if ratio >= 1 else longer * ratio)


def image_tiles(image, tile, longest_edge):
    """Idefics3's preprocessing -> [tiles, then the global view], rows, columns (0, 0: one tile)."""
    short = shorter_side(image.size, longest_edge)
    short = max(short + short % 2, 1)
    size = (longest_edge, short) if image.width >= image.height else (short, longest_edge)
    image = image.resize(size, LANCZOS)
    long = math.ceil(max(size) / tile)
    short = math.ceil(shorter_side(size, long * tile) / tile)
    rows, columns = (short, long) if image.width >= image.height else (long, short)
    if longest_edge <= tile or rows * columns == 1:
        return [image.resize((tile, tile), LANCZOS)], 0, 0
    image = image.resize((columns * tile, rows * tile), LANCZOS)
    tiles = [image.crop((c * tile, r * tile, (c + 1) * tile, (r + 1) * tile))
             for r in range(rows) for c in range(columns)]
    return tiles + [image.resize((tile, tile), LANCZOS)], rows, columns


def smart_resize(width, height, factor, most):
    """Qwen2-VL: both sides to multiples of factor, the area between 4 factor² and `most`."""
    if max(width, height) > 200 * min(width, height):
        raise DataError(f"a picture of {width}x{height}: Qwen2-VL takes no side over 200 times "
                        "the other; crop it or remove the row")
    sides, least = [round(side / factor) * factor for side in (width, height)], 4 * factor ** 2
    if sides[0] * sides[1] > most:
        scale = math.sqrt(width * height / most)
        sides = [max(factor, math.floor(s / scale / factor) * factor) for s in (width, height)]
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

    def to(self, device):
        return Batch(*(value.to(device) for value in vars(self).values()))

    def widen(self, extra):
        """The same with room for more tokens in every row; positions count on."""
        more = torch.arange(1, extra + 1, device=self.ids.device)[:, None]
        positions = torch.cat([self.positions, self.positions[:, -1:] + more], 1)
        return replace(self, ids=torch.nn.functional.pad(self.ids, (0, extra)), positions=positions)


def pad_rows(rows, pad):
    """[[id]] -> (B, T) padded on the right, (B,) lengths."""
    lengths = [len(row) for row in rows]
    padded = [row + [pad] * (max(lengths) - len(row)) for row in rows]
    return torch.tensor(padded), torch.tensor(lengths)


def rope_positions(ids, grids, image):
    """M-RoPE (Qwen2-VL, section 2.1): text counts on in all three; the tokens of a picture share a
    time and have its rows and columns; what follows starts at the largest. (T,) -> (T, 3)"""
    positions = torch.arange(len(ids))[:, None].repeat(1, 3)
    starts = ((ids == image) & (ids.roll(1) != image)).nonzero()[:, 0].tolist()
    for start, (rows, columns) in zip(starts, grids):
        step = torch.arange(rows * columns)
        inside = torch.stack([step * 0, step // columns, step % columns], 1)
        positions[start + len(step):] += max(rows, columns) - len(step)
        positions[start:start + len(step)] = positions[start] + inside
    return positions


# What a run says around a question and how finely it looks; stored with its checkpoint. The
# answer format: tags or boxed. The longest edge of a picture in pixels; 0: what the model takes.
PROMPT = dict(system="", instruction="", answer_format="tags", longest_edge=0)


class Processor:
    """All that stands between text and ids for one checkpoint; here SmolVLM's and Idefics3's.
    files: {name: text}, what other programs read of it; kept as it came."""
    IMAGE, STOP, PAD, LEAD, EDGE = IMAGE, STOP, PAD, " ", None
    MEAN = STD = (0.5, 0.5, 0.5)

    def __init__(self, tokenizer, tile, image_tokens, prompt=None, files=None):
        self.tokenizer, self.tile, self.image_tokens = tokenizer, tile, image_tokens
        self.style, self.files = PROMPT | (prompt or {}), files or {}
        self.stop, self.image, pad = map(tokenizer.token_to_id, (self.STOP, self.IMAGE, self.PAD))
        self.pad = 2 if pad is None else pad
        self.longest_edge = self.style["longest_edge"] or self.EDGE or tile

    def preprocessing(self):
        """What preprocessor_config.json has to say of the size of pictures."""
        return dict(size={"longest_edge": self.longest_edge},
                    do_image_splitting=self.longest_edge > self.tile)

    def picture(self, image):
        """-> its place in the prompt, [pixels (1, 3, S, S)], [its grid, where positions need it]"""
        tiles, rows, columns = image_tiles(image, self.tile, self.longest_edge)
        one, text = self.IMAGE * self.image_tokens, ""
        for row in range(1, rows + 1):
            text += "".join(f"{AROUND}<row_{row}_col_{column}>{one}"
                            for column in range(1, columns + 1)) + "\n"
        text += "\n" * (rows > 0) + f"{AROUND}{GLOBAL}{one}{AROUND}"
        return text, [pixel_array(tile, self.MEAN, self.STD)[None] for tile in tiles], []

    def template(self, system, text):
        system = f"System: {system}{STOP}\n" if system else ""
        return f"{START}{system}User:{'' if text.startswith(AROUND) else ' '}{text}{STOP}\nAssistant:"

    def prompt(self, example):
        """-> (prompt text with expanded pictures, their pixels, their grids)."""
        (text, *parts), pixels, grids = example.question.split(IMAGE), [], []
        for image, part in zip(example.pictures(), parts):
            place, some, grid = self.picture(image)
            text += place + part
            pixels += some
            grids += grid
        text += f"\n{self.style['instruction']}" if self.style["instruction"] else ""
        return self.template(example.system or self.style["system"], text), pixels, grids

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """The text of a response, without its end mark."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def response_ids(self, text):
        """What a model should say, its end mark included: the last token that counts."""
        if self.style["answer_format"] == "boxed":
            text = re.sub(r"<answer>(.*?)</answer>", r"\\boxed{\1}", text, flags=re.S)
        return self.encode(self.LEAD + text) + [self.stop]

    def batch(self, examples):
        texts, pixels, grids = zip(*(self.prompt(example) for example in examples))
        ids, lengths = pad_rows([self.encode(text) for text in texts], self.pad)
        positions = torch.stack([rope_positions(*row, self.image) for row in zip(ids, grids)])
        arrays = [array for some in pixels for array in some]
        pixels = torch.from_numpy(numpy.concatenate(arrays)) if arrays else torch.zeros(0)
        grids = torch.tensor([grid for some in grids for grid in some]).long().view(-1, 2)
        return Batch(ids, lengths, positions, pixels, grids)

    def banned(self, vocabulary):
        """(V,) True for ids that only prompts may hold, and for ids without a token."""
        added, size = self.tokenizer.get_added_tokens_decoder(), self.tokenizer.get_vocab_size()
        special = {i for i, token in added.items() if token.special} | {self.image}
        return torch.tensor([i != self.stop and (i in special or i >= size)
                             for i in range(vocabulary)])


class QwenProcessor(Processor):
    """Qwen2-VL's and Qwen2.5-VL's: a picture keeps its shape, one token sees 28x28 pixels."""
    IMAGE, STOP, PAD, LEAD, EDGE = "<|image_pad|>", "<|im_end|>", "<|endoftext|>", "", 512
    MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def preprocessing(self):
        least, most = 4 * self.tile ** 2, self.longest_edge ** 2
        return dict(size=dict(shortest_edge=least, longest_edge=most), min_pixels=least,
                    max_pixels=most)

    def picture(self, image):
        """Patches in 2x2 blocks, one for each image token; a still picture is two equal frames."""
        width, height = smart_resize(*image.size, self.tile, self.longest_edge ** 2)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        rows, columns, patch = height // self.tile, width // self.tile, self.tile // 2
        patches = pixel_array(image, self.MEAN, self.STD).reshape(
            3, 1, rows, 2, patch, columns, 2, patch).repeat(2, 1)
        patches = patches.transpose(2, 5, 3, 6, 0, 1, 4, 7).reshape(rows * columns * 4, -1)
        place = f"<|vision_start|>{self.IMAGE * (rows * columns)}<|vision_end|>"
        return place, [patches], [(rows, columns)]

    def template(self, system, text):
        turns = dict(system=system or "You are a helpful assistant.", user=text)
        return "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n"
                       for role, said in turns.items()) + "<|im_start|>assistant\n"
