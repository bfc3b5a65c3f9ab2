"""The pictures, the questions and the tokens that both ways of training share.

1. The tabletop world: scenes on a 4x4 table, drawn with Pillow, six families of questions, and
   rationales of which every step can be checked against the scene. Everything is a pure function
   of (split, index), so a budget of 2,000 prompts is the beginning of a budget of 20,000.
2. JSONL files: one function brings the rows of the common tools into one form, or says why not.
3. Tokens: a byte-level BPE, the Idefics3 prompt, image tiles, and `Batch`.

This file imports nothing else of this project.
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

    def pictures(self):
        return [open_image(image, self.id) for image in self.images]


def reasoned(rationale, answer):
    """The form that the format reward asks for (R1's)."""
    return f"<think>{rationale}</think>{bare(answer)}"


def bare(answer):
    return f"<answer>{answer}</answer>"


# ------------------------------------------------------------------ the tabletop world: scenes

CELL, SIDE = 16, 4                   # 4 x 4 cells of 16 pixels: one image token sees one cell
COLOURS = {"red": (214, 40, 40), "green": (44, 160, 70), "blue": (40, 90, 220),
           "yellow": (235, 200, 30)}
SHAPES = ("circle", "square", "triangle")
HELD_OUT = {("red", "triangle"), ("blue", "circle")}        # never seen in training
SPLITS = ("train", "val", "test", "ood", "text")
OBJECTS = {"ood": (7, 9)}            # how many objects; everywhere else (2, 6)


class Thing(NamedTuple):
    colour: str
    shape: str
    row: int                         # 1..4 from the top
    column: int                      # 1..4 from the left
    box: tuple                       # x1, y1, x2, y2 in pixels


def bucket(things):
    """Which split may hold these things (in these places): a checksum modulo 8."""
    key = sorted((t.colour, t.shape, t.row, t.column) for t in things)
    return zlib.crc32(repr(key).encode()) % 8


def draw_things(rng, low, high, pairs):
    things = []
    for cell in rng.sample(range(SIDE * SIDE), rng.randint(low, high)):
        row, column = divmod(cell, SIDE)
        size = rng.randint(10, 13)
        x = column * CELL + (CELL - size) // 2 + rng.randint(-1, 1)
        y = row * CELL + (CELL - size) // 2 + rng.randint(-1, 1)
        things.append(Thing(*rng.choice(pairs), row + 1, column + 1, (x, y, x + size, y + size)))
    return things


@functools.cache
def allowed_pairs(held_out):
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    return pairs if held_out else [pair for pair in pairs if pair not in HELD_OUT]


def make_scene(rng, split):
    """Redraws until the scene belongs to this split, so that no two splits share a scene."""
    low, high = OBJECTS.get(split, (2, 6))
    while True:
        things = draw_things(rng, low, high, allowed_pairs(split == "ood"))
        if split == "ood":
            if any((t.colour, t.shape) in HELD_OUT for t in things):
                return things
        elif bucket(things) in {"test": (0,), "text": (0,), "val": (1,)}.get(split, range(2, 8)):
            return things


def paint(things):
    """The scene as a 64x64 RGB picture."""
    image = Image.new("RGB", (SIDE * CELL, SIDE * CELL), (245, 240, 230))
    pen = ImageDraw.Draw(image)
    for thing in things:
        x1, y1, x2, y2 = thing.box
        middle_x, fill = (x1 + x2) / 2, COLOURS[thing.colour]
        if thing.shape == "circle":
            pen.ellipse(thing.box, fill)
        elif thing.shape == "square":
            pen.rectangle(thing.box, fill)
        else:
            pen.polygon([(middle_x, y1), (x2, y2), (x1, y2)], fill)
    return image


def describe(things):
    """The scene in words: «row 1: red circle 2, blue square 4. row 3: ...» (the columns)."""
    rows = {}
    for thing in sorted(things, key=lambda thing: (thing.row, thing.column)):
        rows.setdefault(thing.row, []).append(f"{thing.colour} {thing.shape} {thing.column}")
    return " ".join(f"row {row}: {', '.join(names)}." for row, names in rows.items())


# --------------------------------------------------------------- the tabletop world: questions

def plural(phrase):
    return phrase + "s"


def matching(things, phrase):
    """The things that a phrase like «red circles», «squares» or «blue shape» speaks of."""
    *colour, shape = phrase.split()
    shape = shape.removesuffix("s")
    return [t for t in things if (not colour or t.colour == colour[0])
            and shape in (t.shape, "shape")]


def pick_phrase(rng, things, kind):
    """A noun phrase, four times in five one that the table holds."""
    thing = rng.choice(things)
    if rng.random() < 0.2:
        thing = Thing(rng.choice(list(COLOURS)), rng.choice(SHAPES), 0, 0, ())
    return {"shape": thing.shape, "colour": f"{thing.colour} shape",
            "pair": f"{thing.colour} {thing.shape}"}[kind]


def pick_two(rng, things):
    """Two noun phrases that no thing can match both of, and how many match each."""
    kind, first, second = rng.choice(("shape", "colour")), None, None
    while first == second:
        first, second = pick_phrase(rng, things, kind), pick_phrase(rng, things, kind)
    return first, second, len(matching(things, first)), len(matching(things, second))


def count_step(phrase, count):
    return "count", dict(a=plural(phrase), n=count)


def arithmetic_step(x, sign, y):
    return "arithmetic", dict(x=x, sign=sign, y=y, n={"+": x + y, "-": x - y, "*": x * y}[sign])


# Each ask_* returns what the wording needs, the claims (see CLAIMS) that lead there, the answer.

def ask_count(rng, things, family):
    phrase = pick_phrase(rng, things, rng.choice(("shape", "colour", "pair")))
    count = len(matching(things, phrase))
    return (dict(a=plural(phrase)), [count_step(phrase, count)], str(count))


def ask_pair(rng, things, family):
    """The four families that count two phrases and do something with the counts."""
    a, b, n, m = pick_two(rng, things)
    x, y = rng.randint(2, 5), rng.randint(2, 5)
    if n < m if family == "difference" else rng.random() < 0.5:
        a, b, n, m = b, a, m, n
    sign = ">" if n > m else "<" if n < m else "="
    end, answer = {
        "sum": ([arithmetic_step(n, "+", m)], n + m),
        "cost": ([arithmetic_step(n, "*", x), arithmetic_step(m, "*", y),
                  arithmetic_step(n * x, "+", m * y)], n * x + m * y),
        "difference": ([arithmetic_step(n, "-", m)], n - m),
        "comparison": ([("compare", dict(x=n, sign=sign, y=m))], "yes" if n > m else "no")}[family]
    fill = dict(a=a, b=b, x=x, y=y) if family == "cost" else dict(a=plural(a), b=plural(b))
    return (fill, [count_step(a, n), count_step(b, m), *end], str(answer))


def ask_location(rng, things, family):
    """None where nothing on the table is the only one of its kind."""
    single = [t for t in things if len(matching(things, f"{t.colour} {t.shape}")) == 1]
    if not single:
        return None
    thing = rng.choice(single)
    name = f"{thing.colour} {thing.shape}"
    steps = [("place", dict(a=name, row=thing.row, column=thing.column))]
    return (dict(a=name), steps, str(list(thing.box)))


# family: (how to ask, wordings in training; the last wording is held out for the split ood)
FAMILIES = {
    "count": (ask_count, ("How many {a} are there?", "How many {a} do you see?",
                          "What is the number of {a}?")),
    "sum": (ask_pair, ("How many {a} and {b} are there together?",
                      "What do {a} and {b} add up to?", "{a} plus {b}: how many in total?")),
    "cost": (ask_pair, ("Each {a} costs {x} and each {b} costs {y}. What do they cost together?",
                        "Price of a {a}: {x}, of a {b}: {y}. What does everything cost?",
                        "For {x} per {a} and {y} per {b}, what is the total?")),
    "difference": (ask_pair, ("How many more {a} than {b} are there?",
                                    "By how many do {a} outnumber {b}?",
                                    "Take the number of {b} from the number of {a}. What is left?")),
    "comparison": (ask_pair, ("Are there more {a} than {b}?",
                                    "Do {a} outnumber {b}?", "Is the number of {a} above that of {b}?")),
    "location": (ask_location, ("Where is the {a}?", "Find the {a}.", "Which box holds the {a}?")),
}

# -------------------------------------------------------------- the tabletop world: rationales

CLAIMS = {      # kind: (canonical wording, verbose wording); both spoken and parsed by these
    "count": ("{a}: {n}", "I count {n} {a}"),
    "arithmetic": ("{x} {sign} {y} = {n}", "{x} {word} {y} makes {n}"),
    "compare": ("{x} {sign} {y}", "{x} is {word} {y}"),
    "place": ("{a}: row {row}, column {column}", "I see the {a} in row {row} and column {column}"),
}
WORDS = {"+": "plus", "-": "minus", "*": "times", ">": "more than", "<": "fewer than",
         "=": "as many as"}
NOUN = rf"(?:(?:{'|'.join(COLOURS)}) )?(?:{'|'.join(SHAPES)}|shape)s?"
FIELDS = dict(a=NOUN, sign=r"[-+*<>=]", word="|".join(WORDS.values()))      # the others: numbers
PATTERNS = [(kind, re.sub(r"\{(\w+)\}", lambda f: f"(?P<{f[1]}>{FIELDS.get(f[1], '[0-9]+')})", text))
            for kind, wordings in CLAIMS.items() for text in wordings]
FILLERS = ("Okay, let me look at the table", "Hmm, let me think about this",
           "Wait, I should check that again", "Let me look once more to be safe",
           "Alright, that seems right", "So now I am sure")


def say(step, verbose=False):
    kind, values = step
    return CLAIMS[kind][verbose].format(**values, word=WORDS.get(values.get("sign")))


def rationale(steps, style, rng=None):
    """canonical: the claims. verbose: the same claims R1-style, hesitating and checking twice."""
    if style == "canonical":
        return ". ".join(say(step) for step in steps) + "."
    sentences = [rng.choice(FILLERS[:2])]
    for step in steps:
        sentences.append(say(step, verbose=True))
        if rng.random() < 0.4:
            sentences += [rng.choice(FILLERS[2:4]), say(step, verbose=True)]
    return ". ".join(sentences + [rng.choice(FILLERS[4:])]) + "."


def is_true(scene, sentence):
    """Whether a sentence makes one of the CLAIMS and the scene bears it out."""
    matches = ((kind, re.fullmatch(pattern, sentence)) for kind, pattern in PATTERNS)
    kind, found = next(((kind, match) for kind, match in matches if match), (None, None))
    if found is None:
        return False
    values = found.groupdict()
    if kind in ("count", "place"):
        things = matching(scene, values["a"])
        if kind == "count":
            return len(things) == int(values["n"])
        return (int(values["row"]), int(values["column"])) in [(t.row, t.column) for t in things]
    sign = values.get("sign") or next(s for s, word in WORDS.items() if word == values["word"])
    x, y = int(values["x"]), int(values["y"])
    if kind == "compare":
        return {">": x > y, "<": x < y, "=": x == y}.get(sign, False)
    return {"+": x + y, "-": x - y, "*": x * y}.get(sign) == int(values["n"])


def check_steps(scene, text):
    """Every sentence of a rationale against the scene: [(sentence, True | False | None)].

    None is a known filler, which claims nothing. A sentence that says nothing checkable is False.
    """
    sentences = filter(None, (part.strip() for part in re.split(r"\.(?:\s|$)", text)))
    return [(s, None if s in FILLERS else len(s) < 100 and is_true(scene, s)) for s in sentences]


# ---------------------------------------------------------------- the tabletop world: examples

def world_example(split, index, style="canonical"):
    """Example `index` of a split: the same on every machine, whatever else was drawn before."""
    if split not in SPLITS:
        raise DataError(f"split {split!r}: the tabletop world has {', '.join(SPLITS)}")
    rng = random.Random(f"{'test' if split == 'text' else split}/{index}")
    family = list(FAMILIES)[index % len(FAMILIES)]
    ask, wordings = FAMILIES[family]
    question = None
    while question is None:
        scene = make_scene(rng, split)
        question = ask(rng, scene, family)
    wording = wordings[-1] if split == "ood" else rng.choice(wordings[:-1])
    fill, steps, answer = question
    text = wording.format(**fill)
    text = text[0].upper() + text[1:]
    if split == "text":
        text, images = f"The table: {describe(scene)} {text}", []
    else:
        text, images = IMAGE + text, [paint(scene)]
    response = bare(answer) if style == "answer" else reasoned(rationale(steps, style, rng), answer)
    return Example(f"{split}/{index}", text, answer, response, images, family=family, scene=scene)


def world_example_of(name):
    """The example whose id is `name`, like «test/7»."""
    split, _, index = name.partition("/")
    if not index.isdecimal():
        raise DataError(f"id {name!r}: expected SPLIT/INDEX of the tabletop world, like test/7")
    return world_example(split, int(index))


SEEING = 16_000                      # examples of the base in which captions and lists prevail
BASE_MIX = {  # kind of pretraining example: (share while it learns to see, share afterwards)
    "caption": (20, 4), "counts": (45, 32), "boxes": (10, 8), "answer": (10, 30),
    "reasoned": (8, 14), "text": (7, 12)}


def list_counts(rng, things, shuffled):
    """Every shape and colour: where a small model learns to count, then to count what is named."""
    phrases = [*SHAPES, *(f"{colour} shape" for colour in COLOURS)]
    if shuffled:
        rng.shuffle(phrases)
        phrases[4:] = [pick_phrase(rng, things, "pair") for _ in range(2)]
    steps = [count_step(phrase, len(matching(things, phrase))) for phrase in phrases]
    return "Count everything.", rationale(steps, "canonical")


def list_boxes(rng, things):
    some = rng.sample(things, min(3, len(things)))
    question = "Box " + ", ".join(f"{t.colour} {t.shape}" for t in some) + "."
    return question, " ".join(f"{t.colour} {t.shape}: {list(t.box)}." for t in some)


def base_example(index):
    """Pretraining: captions, counts, boxes, bare answers, some reasoned ones, tables in words.

    In the end the base model can reason, but mostly answers at once, as instruct models do.
    """
    rng = random.Random(f"base/{index}")
    kind, = rng.choices(list(BASE_MIX), [mix[index >= SEEING] for mix in BASE_MIX.values()])
    example = world_example("train", 10_000_000 + index,
                            "canonical" if kind == "reasoned" else "answer")
    question, response, images = example.question, example.response, example.images
    if kind == "text":
        question = f"The table: {describe(example.scene)} {question.removeprefix(IMAGE)}"
        images = []
    elif kind == "caption":
        question, response = "Describe the table.", describe(example.scene)
    elif kind == "counts":
        question, response = list_counts(rng, example.scene, index >= SEEING)
    elif kind == "boxes":
        question, response = list_boxes(rng, example.scene)
    if images and not question.startswith(IMAGE):
        question = IMAGE + question
    return replace(example, question=question, response=response, images=images)


class World:
    """A split of the tabletop world as a sequence: `World("train")[7]`."""

    def __init__(self, split, style="canonical", size=20_000):
        self.make, self.size = functools.partial(world_example, split, style=style), size
        if split == "base":
            self.make = base_example

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return self.make(index)


# ------------------------------------------------------------------------------- JSONL files

def open_image(source, where):
    """PIL image, bytes or path -> RGB picture; refuses what is not one, or is too large."""
    if isinstance(source, Image.Image):
        return source
    name = "embedded image" if isinstance(source, bytes) else source
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
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
    if not isinstance(value, str) or "\0" in value:
        raise DataError(f"{where}: field image: expected a path, got {value!r}")
    path = (root / value).resolve()
    if not path.is_relative_to(root.resolve()):
        raise DataError(f"{where}: field image: {value!r} leaves the data directory {root}")
    return path


def first(row, *names):
    return next((row[name] for name in names if row.get(name) is not None), None)


def message_turns(messages, where):
    """Chat messages -> {"system" | "user" | "assistant": text}; one question, one answer."""
    names, turns = {"human": "user", "gpt": "assistant"}, {}
    for message in messages:
        message = message if isinstance(message, dict) else {}
        role, content = first(message, "role", "from"), first(message, "content", "value")
        role = names.get(role, role) if isinstance(role, str) else role
        if isinstance(content, list) and all(isinstance(part, dict) for part in content):
            content = "".join(IMAGE if part.get("type") == "image" else str(part.get("text", ""))
                              for part in content)
        if role not in ("system", "user", "assistant") or role in turns or \
                not isinstance(content, str):
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
    """What stands in the last <answer> tags, else the text without its <think> part."""
    found = re.findall(r"<answer>(.*?)</answer>", text, re.S)
    return (found[-1] if found else re.sub(r"<think>.*?</think>", "", text, flags=re.S)).strip()


def row_answer(row, response, where):
    """-> (answer that the grader compares with, response that imitation learns)."""
    answer = first(row, "answer", "ground_truth", "solution")
    response = response if isinstance(response, str) else None
    answer = response if answer is None else answer
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) \
            or not strip_answer(str(answer)):
        raise DataError(f"{where}: no answer: expected text or a number in answer, ground_truth, "
                        f"solution or an assistant turn; got {answer!r:.80}")
    answer, thought = strip_answer(str(answer)), first(row, "rationale", "thinking")
    return answer, response or (reasoned(thought, answer) if thought else bare(answer))


def read_row(row, root, where):
    """One row of any layout -> Example, its pictures looked at: bad ones show before training."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {type(row).__name__}")
    turns, images = row_turns(row, where), first(row, "images", "image", "image_path")
    images = [] if images is None else images if isinstance(images, list) else [images]
    images = [image_source(item, root, where) for item in images]
    question, choices = turns["user"], row.get("choices")
    if IMAGE not in question:
        question = IMAGE * len(images) + question
    if question.count(IMAGE) != len(images):
        raise DataError(f"{where}: {question.count(IMAGE)} {IMAGE} in the text but {len(images)} "
                        "images; write one for each, or none to put all images first")
    if choices is not None:
        if not isinstance(choices, list) or not 2 <= len(choices) <= 26:
            raise DataError(f"{where}: field choices: expected a list of 2 to 26, got {choices!r}")
        choices = [str(choice) for choice in choices]
        question += "".join(f"\n({chr(65 + i)}) {choice}" for i, choice in enumerate(choices))
    answer, response = row_answer(row, turns.get("assistant"), where)
    for image in set(images) - CHECKED:
        open_image(image, where)
        CHECKED.add(image)
    return Example(str(row.get("id", where)), question, answer, response, images, choices,
                   turns.get("system", ""))


def json_rows(path):
    """(place, text of one row) of a .jsonl file or a .json list."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if text.lstrip().startswith("["):
        try:
            return [(f"{path}: row {i}", json.dumps(row)) for i, row in
                    enumerate(json.loads(text), 1)]
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON ({error})") from None
    return [(f"{path}:{i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


@functools.cache
def read_examples(path, skip_bad_rows=False):
    """A .jsonl or .json file of any layout -> [Example]. Image paths are relative to the file.

    Raises DataError at the first bad row, or counts and skips with `skip_bad_rows`.
    """
    path, examples, bad = pathlib.Path(path), [], []
    if not path.is_file():
        raise DataError(f"{path}: no such file; --data takes «world» or a .jsonl or .json file")
    for where, line in json_rows(path):
        try:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON ({error})") from None
            examples.append(read_row(row, path.parent, where))
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
    held = min(200, len(examples) // 20)
    return {"train": examples[:len(examples) - held],
            "val": examples[len(examples) - held:]}.get(split, examples)


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
    texts = [example.question + " " + example.response for example in examples]
    texts = [re.sub(r"</?(image|think|answer)>", "\n", text) for text in texts]
    tokenizer.train_from_iterator(texts + ["User:", "Assistant:"] * 20, trainers.BpeTrainer(
        vocab_size=vocabulary, min_frequency=8, show_progress=False,
        special_tokens=[PAD, START, STOP, AROUND, GLOBAL, IMAGE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tokenizer.add_tokens([AddedToken(tag, lstrip=True, normalized=False)
                          for tag in ("<think>", "</think>", "<answer>", "</answer>")])
    return tokenizer


def resized(image, width, height):
    size = (width, height)
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def image_tiles(image, tile, longest_edge):
    """Idefics3's preprocessing -> (tiles [row-major, then the global view], rows, columns).

    `longest_edge` equal to `tile` gives one tile and rows = columns = 0.
    """
    width, height = image.size
    if width >= height:
        width, height = longest_edge, int(longest_edge / (width / height))
        height += height % 2
    else:
        width, height = int(longest_edge * (width / height)), longest_edge
        width += width % 2
    image = resized(image, max(width, 1), max(height, 1))
    width, height = image.size
    if width >= height:
        columns = math.ceil(width / tile)
        rows = math.ceil(int(columns * tile / (width / height)) / tile)
    else:
        rows = math.ceil(height / tile)
        columns = math.ceil(int(rows * tile * (width / height)) / tile)
    if longest_edge <= tile or rows * columns == 1:
        return [resized(image, tile, tile)], 0, 0
    image = resized(image, columns * tile, rows * tile)
    tiles = [image.crop((c * tile, r * tile, (c + 1) * tile, (r + 1) * tile))
             for r in range(rows) for c in range(columns)]
    return tiles + [resized(image, tile, tile)], rows, columns


# transformers' arithmetic, for each of the 256 values: /255 in fp64, then fp32 (x - 0.5) / 0.5
PIXEL = ((numpy.arange(256) * (1 / 255)).astype(numpy.float32) - numpy.float32(0.5)) / 0.5


def pixel_tensor(tiles):
    """[PIL] -> (N, 3, S, S) in -1..1."""
    array = numpy.stack([numpy.asarray(tile) for tile in tiles]).transpose(0, 3, 1, 2)
    return torch.from_numpy(PIXEL.astype(numpy.float32)[array])


@dataclass
class Batch:
    """B prompts, padded on the right, and the tiles of all their pictures in reading order."""
    ids: torch.Tensor                # (B, T)
    lengths: torch.Tensor            # (B,)
    pixels: torch.Tensor             # (N, 3, S, S)

    def to(self, device):
        return Batch(*(value.to(device) for value in vars(self).values()))


def pad_rows(rows, pad, width=None):
    """[[id]] -> (B, T) padded on the right, (B,) lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), width or max(1, int(lengths.max()))), pad)
    for i, row in enumerate(rows):
        ids[i, :len(row)] = torch.tensor(row, dtype=torch.long)
    return ids, lengths


class Processor:
    """Tokenizer and picture geometry of one checkpoint: all that stands between text and ids."""

    def __init__(self, tokenizer, tile, image_tokens, longest_edge=None):
        self.tokenizer, self.tile, self.image_tokens = tokenizer, tile, image_tokens
        self.longest_edge = longest_edge or tile
        self.stop = tokenizer.token_to_id(STOP)
        self.image = tokenizer.token_to_id(IMAGE)
        self.pad = tokenizer.token_to_id(PAD) if tokenizer.token_to_id(PAD) is not None else 2

    def placeholder(self, rows, columns):
        """The text that one picture becomes."""
        one = IMAGE * self.image_tokens
        grid = "".join("".join(f"{AROUND}<row_{r + 1}_col_{c + 1}>{one}" for c in range(columns))
                       + "\n" for r in range(rows))
        return grid + ("\n" if rows else "") + f"{AROUND}{GLOBAL}{one}{AROUND}"

    def prompt(self, example):
        """-> (prompt text with expanded pictures, tiles)."""
        parts, tiles = example.question.split(IMAGE), []
        text = parts[0]
        for picture, part in zip(example.pictures(), parts[1:]):
            some, rows, columns = image_tiles(picture, self.tile, self.longest_edge)
            tiles += some
            text += self.placeholder(rows, columns) + part
        system = f"System: {example.system}{STOP}\n" if example.system else ""
        space = "" if example.question.startswith(IMAGE) else " "
        return f"{START}{system}User:{space}{text}{STOP}\nAssistant:", tiles

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """The text of a response, without its end mark."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def response_ids(self, text):
        """What a model should say, its end mark included: the last token that counts."""
        return self.encode(" " + text) + [self.stop]

    def batch(self, examples):
        texts, tiles = zip(*(self.prompt(example) for example in examples))
        tiles = [tile for some in tiles for tile in some]
        ids, lengths = pad_rows([self.encode(text) for text in texts], self.pad)
        pixels = pixel_tensor(tiles) if tiles else torch.zeros(0, 3, self.tile, self.tile)
        return Batch(ids, lengths, pixels)

    def banned(self, vocabulary):
        """(V,) True for ids that only prompts may hold, and for ids without a token."""
        special = [i for i, token in self.tokenizer.get_added_tokens_decoder().items()
                   if token.special and i != self.stop]
        banned = torch.arange(vocabulary) >= self.tokenizer.get_vocab_size()
        banned[[i for i in special if i < vocabulary]] = True
        return banned
