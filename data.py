"""The pictures, the questions and the tokens that both ways of training share.

The tabletop world, of which every step of reasoning can be checked; JSONL files; tokens, pixels.
"""
import base64
import functools
import io
import json
import math
import os
import pathlib
import random
import re
import zlib
from collections import namedtuple
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy
import torch
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")             # its threads would not fork
Image.MAX_IMAGE_PIXELS = 16_000_000  # Pillow refuses to decode more than twice as many
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
        return [one if isinstance(one, Image.Image) else open_image(one) for one in self.images]


def tagged(answer, rationale=""):
    """The form that the format reward asks for (R1's); without a rationale the answer alone."""
    return f"<think>{rationale}</think>" * bool(rationale) + f"<answer>{answer}</answer>"


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


def named(thing):
    return f"{thing.colour} {thing.shape}"


def bucket(things):
    """Which split may hold these things (in these places): a checksum modulo 8."""
    return zlib.crc32(repr(sorted(thing[:4] for thing in things)).encode()) % 8


def make_scene(rng, split, family):
    """Redraws until the scene has an answer and is this split's: no two splits share a scene."""
    low, high, pairs = (7, 9, PAIRS) if split == "ood" else (2, 6, KNOWN)
    while True:
        things = []
        for cell in rng.sample(range(SIDE * SIDE), rng.randint(low, high)):
            (row, column), size = divmod(cell, SIDE), rng.randint(10, 13)
            x, y = (at * CELL + (CELL - size) // 2 + rng.randint(-1, 1) for at in (column, row))
            things += [Thing(*rng.choice(pairs), row + 1, column + 1, (x, y, x + size, y + size))]
        apt = any(thing[:2] in HELD_OUT for thing in things) == (split == "ood")
        if apt and bucket(things) in SPLITS[split] and (singles(things) or family != "location"):
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
    """The scene in words: «row 1: red circle 2, blue square 4. row 3: ...» (the columns)."""
    things = sorted(things, key=lambda thing: (thing.row, thing.column))
    rows = {t.row: [f"{named(s)} {s.column}" for s in things if s.row == t.row] for t in things}
    return " ".join(f"row {row}: {', '.join(names)}." for row, names in rows.items())


# ------------------------------------------------ the tabletop world: questions and rationales
def matching(things, phrase):
    """The things that a phrase like «red circles», «squares» or «blue shape» speaks of."""
    *colour, shape = phrase.removesuffix("s").split()
    return [t for t in things if colour in ([], [t.colour]) and shape in (t.shape, "shape")]


def singles(things):
    """The things that are the only ones of their kind."""
    return [thing for thing in things if len(matching(things, named(thing))) == 1]


def pick_phrase(rng, things, kind):
    """A noun phrase, four times in five one that the table holds."""
    thing = rng.choice(things)
    colour, shape = rng.choice(KNOWN) if rng.random() < 0.2 else thing[:2]
    return {"shape": shape, "colour": f"{colour} shape", "pair": f"{colour} {shape}"}[kind]


def ask(rng, things, family):
    """-> what the wording needs, the steps (see CLAIMS), the answer. No thing matches a and b."""
    if family == "location":
        thing = rng.choice(singles(things))
        place = f"{named(thing)}: row {thing.row}, column {thing.column}"
        return dict(a=named(thing)), [place], str(list(thing.box))
    if family == "count":
        phrase = pick_phrase(rng, things, rng.choice(("shape", "colour", "pair"))) + "s"
        count = len(matching(things, phrase))
        return dict(a=phrase), [f"{phrase}: {count}"], str(count)
    kind, a, b = rng.choice(("shape", "colour")), None, None
    while a == b:
        a, b = pick_phrase(rng, things, kind), pick_phrase(rng, things, kind)
    n, m = len(matching(things, a)), len(matching(things, b))
    x, y = rng.randint(2, 5), rng.randint(2, 5)
    if n < m if family == "difference" else rng.random() < 0.5:
        a, b, n, m = b, a, m, n
    p, q, sign = n * x, m * y, ">" if n > m else "<" if n < m else "="
    end = dict(sum=[f"{n} + {m} = {n + m}"], difference=[f"{n} - {m} = {n - m}"],
               cost=[f"{n} * {x} = {p}", f"{m} * {y} = {q}", f"{p} + {q} = {p + q}"],
               comparison=[f"{n} {sign} {m}"])[family]
    answer = end[-1].split()[-1] if family != "comparison" else "yes" if n > m else "no"
    values = dict(a=a + "s", b=b + "s", one=a, other=b, x=x, y=y)
    return values, [f"{a}s: {n}", f"{b}s: {m}", *end], answer


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
CLAIMS = [           # what a step may say: a pattern of it, its verbose words, when it is true
    ("{a}: {n}", "I count {n} {a}", lambda a, n: len(a) == n),
    ("{a}: row {row}, column {column}", "I see the {a} in row {row} and column {column}",
     lambda a, row, column: (row, column) in [thing[2:4] for thing in a]),
    (r"{x} \+ {y} = {n}", "{x} plus {y} makes {n}", lambda x, y, n: x + y == n),
    (r"{x} - {y} = {n}", "{x} minus {y} makes {n}", lambda x, y, n: x - y == n),
    (r"{x} \* {y} = {n}", "{x} times {y} makes {n}", lambda x, y, n: x * y == n),
    ("{x} > {y}", "{x} is more than {y}", lambda x, y: x > y),
    ("{x} < {y}", "{x} is fewer than {y}", lambda x, y: x < y),
    ("{x} = {y}", "{x} is as many as {y}", lambda x, y: x == y)]
# what the fields of CLAIMS match; `a` is a phrase, the others are numbers
GROUPS = {name: f"(?P<{name}>[0-9]+)" for name in ("n", "x", "y", "row", "column")}
GROUPS["a"] = rf"(?P<a>(?:(?:{'|'.join(COLOURS)}) )?(?:{'|'.join(SHAPES)}|shape)s?)"
FILLERS = ("Okay, let me look at the table", "Hmm, let me think about this",
           "Wait, I should check that again", "Let me look once more to be safe",
           "Alright, that seems right", "So now I am sure")


def hesitate(rng, steps):
    """The sentences of the verbose style: the steps R1-style, hesitating and checking twice."""
    yield rng.choice(FILLERS[:2])
    for step in steps:
        found = ((re.fullmatch(plain.format(**GROUPS), step), words) for plain, words, _ in CLAIMS)
        said = next(words.format(**match.groupdict()) for match, words in found if match)
        yield said
        if rng.random() < 0.4:
            yield from (rng.choice(FILLERS[2:4]), said)
    yield rng.choice(FILLERS[4:])


def is_true(scene, sentence):
    """Whether a sentence makes one of the CLAIMS, in either wording, and the scene bears it out."""
    return any(holds(**{name: matching(scene, value) if name == "a" else int(value)
                        for name, value in found.groupdict().items()})
               for *wordings, holds in CLAIMS for wording in wordings
               if (found := re.fullmatch(wording.format(**GROUPS), sentence)))


def check_steps(scene, text):
    """[(sentence, whether it says something true)]; None for a filler, which claims nothing."""
    sentences = filter(None, (part.strip() for part in re.split(r"\.(?:\s|$)", text)))
    return [(s, None if s in FILLERS else len(s) < 100 and is_true(scene, s)) for s in sentences]


def world_example(split, index, style="canonical", words=False):
    """The same on every machine, whatever else was drawn. words: described instead of painted."""
    if split not in SPLITS or not str(index).isdecimal():
        raise DataError(f"{split}/{index}: expected a number and one of {', '.join(SPLITS)}")
    rng = random.Random(f"{'test' if split == 'text' else split}/{index}")
    family = list(FAMILIES)[int(index) % len(FAMILIES)]
    scene = make_scene(rng, split, family)
    values, steps, answer = ask(rng, scene, family)
    *known, new = FAMILIES[family]
    text = (new if split == "ood" else rng.choice(known)).format(**values)
    sentences = hesitate(rng, steps) if style == "verbose" else steps
    response = tagged(answer, ". ".join(sentences) + "." if style != "answer" else "")
    images = [] if words or split == "text" else [paint(scene)]
    text = IMAGE + text if images else f"The table: {describe(scene)} {text}"
    return Example(f"{split}/{index}", text, answer, response, images, family=family, scene=scene)


# kinds of pretraining example and their shares in percent
BASE_MIX = {"caption": 6, "counts": 34, "boxes": 8, "answer": 28, "reasoned": 13, "text": 11}


def base_example(index):
    """Pretraining for a model that can reason but mostly answers at once, as instruct models do."""
    rng = random.Random(f"base/{index}")
    kind, = rng.choices(list(BASE_MIX), list(BASE_MIX.values()))
    style = "canonical" if kind == "reasoned" else "answer"
    example = world_example("train", 10_000_000 + index, style, words=kind == "text")
    things, single = example.scene, singles(example.scene)
    if kind == "counts":             # mostly in any order: where a small model learns to count
        phrases = [*SHAPES, *(f"{colour} shape" for colour in COLOURS)]
        if rng.random() < 0.85:
            rng.shuffle(phrases)
            phrases[4:] = [pick_phrase(rng, things, "pair") for _ in range(2)]
        said = [f"{phrase}s: {len(matching(things, phrase))}." for phrase in phrases]
        question = "Count everything."
    elif kind == "boxes" and single:
        some = rng.sample(single, min(3, len(single)))
        question = f"Box {', '.join(map(named, some))}."
        said = [f"{named(thing)}: {list(thing.box)}." for thing in some]
    elif kind in ("caption", "boxes"):
        question, said = "Describe the table.", [describe(things)]
    else:
        return example
    return replace(example, question=IMAGE + question, response=" ".join(said))


class World:
    """A split of the tabletop world as a sequence: `World("train")[7]`."""
    def __init__(self, split, style="canonical", size=20_000):
        world = functools.partial(world_example, split, style=style)
        self.make, self.indices = base_example if split == "base" else world, range(size)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return self.make(self.indices[index])        # an IndexError ends a `for`


# ------------------------------------------------------------------------------- JSONL files
ROLES = dict(human="user", gpt="assistant", system="system", user="user", assistant="assistant")


@functools.lru_cache(maxsize=4)      # questions about one picture mostly follow one another
def open_image(source):
    """Bytes or a path -> RGB picture, or a DataError."""
    try:                             # not every format of Pillow's: EPS would start Ghostscript
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        return Image.open(file, formats=("PNG", "JPEG", "WEBP", "GIF", "BMP")).convert("RGB")
    except Exception as error:       # Pillow's readers raise anything over a broken file
        raise DataError(f"{source!s:.200} is not a readable image: {error}") from None


def take(row, convert, *names, **options):
    """What `convert` makes of the first of these fields that the row has; None if it has none."""
    name = next((name for name in names if row.get(name) is not None), None)
    try:
        return name and convert(row[name], **options)
    except (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError):
        raise DataError(f"field {name}: expected {convert.__doc__}, got {row[name]!r:.80}")


# What `take` converts with; each fails, one way or another, for what its docstring does not name.
def text(value):
    """text"""
    return value.encode().decode()               # fails for half a character (a lone surrogate)


def number_or_text(value):
    """text or a number"""
    return str(value) if type(value) in (int, float) else text(value)


def options(value):
    """2 to 26 texts or numbers"""
    if not isinstance(value, list) or not 2 <= len(value) <= 26:
        raise ValueError
    return [number_or_text(item) for item in value]


def image_sources(value, root):
    """a path that never leaves the data directory, base64 bytes, or a list of these"""
    items = value if isinstance(value, list) else [value]
    items = [item if isinstance(item, dict) else dict(path=item) for item in items]
    return [base64.b64decode(item["bytes"], validate=True) if item.get("bytes")
            else root / (root / item["path"]).resolve().relative_to(root) for item in items]


def spoken(messages):
    """messages with text, at most one of a role"""
    turns = {}
    for message in messages if isinstance(messages, list) else []:
        name = ROLES[message.get("role", message.get("from"))] + " message"
        content = message.get("content", message.get("value"))
        parts = [dict(text=content)] if isinstance(content, str) else content
        texts = [IMAGE if part.get("type") == "image" else text(part["text"]) for part in parts]
        turns = dict(**turns, **{name: "".join(texts)})          # fails for a second one
    return turns


def extract_answer(text):
    """What stands in the last <answer> tags, else the text without its <think> part; where that
    has a \\boxed{...}, what stands in the last one."""
    found = re.findall(r"<answer>(.*?)</answer>", text, re.S)
    text = found[-1] if found else re.sub(r"<think>.*?(?:</think>|$)", "", text, flags=re.S)
    inside = text.rpartition("\\boxed{")[2] if "\\boxed{" in text else ""
    depths = list(accumulate((letter == "{") - (letter == "}") for letter in inside))
    return (inside[:depths.index(-1)] if -1 in depths else text).strip()


def read_row(row, root, where):
    """One row of any layout -> Example, its pictures looked at: bad ones show before training."""
    if not isinstance(row, dict):
        raise DataError(f"expected an object, got {row!r:.80}")
    for name in ("messages", "conversations", "prompt", "completion"):
        row = (take(row, spoken, name) or {}) | row
    asked = ("user message", "problem", "question", "prompt")
    said = ("assistant message", "completion", "output")
    answers = ("answer", "ground_truth", "solution", *said)
    lines = [take(row, text, name) for name in ("instruction", "input")]
    question = take(row, text, *asked) or "\n".join(filter(None, lines))
    answer = extract_answer(take(row, number_or_text, *answers) or "")
    for part, value, names in (("question", question, (*asked, "instruction")),
                               ("answer", answer, answers)):
        if not value.strip():
            raise DataError(f"no {part}: expected text in one of the fields {', '.join(names)}; "
                            f"got the fields {list(row)!r:.200}")
    thought = re.sub("</?think>", "", take(row, text, "rationale", "thinking") or "").strip()
    system = take(row, text, "system", "system message") or ""
    response = take(row, text, *said) or tagged(answer, thought)         # what imitation learns
    images = take(row, image_sources, "images", "image", "image_path", root=root) or []
    choices = take(row, options, "choices")
    question += "".join(f"\n({chr(65 + i)}) {choice}" for i, choice in enumerate(choices or ()))
    question = question if IMAGE in question else IMAGE * len(images) + question
    if question.count(IMAGE) != len(images) or IMAGE in system + response:
        raise DataError(f"{question.count(IMAGE)} {IMAGE} in the question, {len(images)} images: "
                        "write one for each, or none to put all images first; elsewhere none")
    name = str(where if row.get("id") is None else row["id"])
    example = Example(name, question, answer, response, images, choices, system)
    example.pictures()
    return example


@functools.cache
def read_examples(path, skip_bad_rows=False):
    """A .jsonl or .json file of any layout -> [Example]; image paths are relative to the file."""
    path, examples, bad = pathlib.Path(path), [], []
    try:
        content = path.read_text(encoding="utf-8-sig")
        listed = content.lstrip().startswith("[")
        lines = [json.dumps(row) for row in json.loads(content)] if listed else content.split("\n")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: neither «world» nor a .jsonl or .json file ({error})") from None
    rows = {f"{path}:{number}": line for number, line in enumerate(lines, 1) if line.strip()}
    for where, line in rows.items():                 # its line, or its place in the list
        try:
            examples.append(read_row(json.loads(line), path.parent.resolve(), where))
        except (ValueError, RecursionError) as error:
            bad.append(f"{where}: {'' if isinstance(error, DataError) else 'not JSON: '}{error}")
            if not skip_bad_rows:
                raise DataError(f"{bad[0]}; mend the row, or --skip-bad-rows") from None
    if bad:
        print(f"{path}: skipped {len(bad)} bad rows of {len(bad) + len(examples)}; first: {bad[0]}")
    if not examples:
        raise DataError(f"{path}: no usable row")
    return examples


def load_dataset(data, split="train", limit=None, skip_bad_rows=False):
    """The first of «world», or of a file; the last twentieth (1 to 200 rows) of that is val."""
    if data == "world":
        return World(split, size=limit or 20_000)
    examples = read_examples(data, skip_bad_rows)
    kept = len(examples) - max(1, min(200, len(examples) // 20))
    parts = {"train": examples[:kept] or examples, "val": examples[kept:]}
    return parts.get(split, examples)[:limit]


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
    texts = (f"{example.question} {example.response}" for example in examples)
    texts = [re.sub("</?(image|think|answer)>", "\n", text) for text in texts]
    tokenizer.train_from_iterator(texts + ["User:", "Assistant:"] * 20, trainers.BpeTrainer(
        vocab_size=vocabulary, min_frequency=8, show_progress=False,
        special_tokens=[PAD, START, STOP, AROUND, GLOBAL, IMAGE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tokenizer.add_tokens([AddedToken(tag, lstrip=True, normalized=False)
                          for tag in ("<think>", "</think>", "<answer>", "</answer>")])
    return tokenizer


def image_tiles(image, tile, longest_edge):
    """Idefics3's preprocessing -> [tiles, then the global view], rows, columns (0, 0: one tile)."""
    def scaled(image, longer, step):
        """The shorter side a multiple of `step`, in the arithmetic of transformers."""
        ratio = image.width / image.height
        short = int(longer / ratio if ratio >= 1 else longer * ratio)
        short = max(short + -short % step, 1)
        return image.resize((longer, short) if ratio >= 1 else (short, longer), Image.LANCZOS)

    image, rows, columns = scaled(image, longest_edge, 2), 0, 0
    if longest_edge > tile:
        image = scaled(image, math.ceil(max(image.size) / tile) * tile, tile)
        columns, rows = (side // tile for side in image.size)
    tiles = [image.crop((c * tile, r * tile, (c + 1) * tile, (r + 1) * tile))
             for r in range(rows) for c in range(columns)]
    return tiles + [image.resize((tile, tile), Image.LANCZOS)], rows, columns


def smart_resize(width, height, factor, most):
    """Qwen2-VL: both sides to multiples of factor, the area between 4 factor² and `most`."""
    if max(width, height) > 200 * min(width, height):
        raise DataError(f"a picture of {width}x{height}: one side is over 200 times the other")
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
    counts: torch.Tensor             # (B, 2) rows of pixels and of grids that belong to a prompt

    def to(self, device):
        return Batch(*(value.to(device) for value in vars(self).values()))

    def part(self, start, stop):
        """Prompts start to stop - 1, with their pictures."""
        pixels, grids = (slice(n[:start].sum(), n[:stop].sum()) for n in self.counts.T)
        rows = slice(start, stop)
        return Batch(self.ids[rows], self.lengths[rows], self.positions[rows], self.pixels[pixels],
                     self.grids[grids], self.counts[rows])


def pad_rows(rows, pad):
    """[[id]] -> (B, T) padded on the right, (B,) lengths."""
    lengths = [len(row) for row in rows]
    padded = [row + [pad] * (max(lengths) - len(row)) for row in rows]
    return torch.tensor(padded), torch.tensor(lengths)


def rope_positions(ids, grids, image):
    """M-RoPE (Qwen2-VL, section 2.1): text counts on in all three; the tokens of a picture share a
    time and have its rows and columns; what follows starts at the largest. (T,) -> (T, 3)"""
    positions = torch.arange(len(ids))[:, None].repeat(1, 3)
    starts = grids and ((ids == image) & (ids.roll(1) != image)).nonzero()[:, 0].tolist()
    for start, (rows, columns) in zip(starts, grids):
        step = torch.arange(rows * columns)
        inside = torch.stack([step * 0, step // columns, step % columns], 1)
        positions[start + len(step):] += max(rows, columns) - len(step)
        positions[start:start + len(step)] = positions[start] + inside
    return positions


# What a run says around a question and how finely it looks; stored with its checkpoint. Answers in
# tags or boxed; longest edge in pixels (Qwen: the root of the area), 0: one tile (Qwen: 512).
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
            names = [f"<row_{row}_col_{column}>" for column in range(1, columns + 1)]
            text += "".join(f"{AROUND}{name}{one}" for name in names) + "\n"
        text += "\n" * (rows > 0) + f"{AROUND}{GLOBAL}{one}{AROUND}"
        return text, [pixel_array(tile, self.MEAN, self.STD)[None] for tile in tiles], []

    def template(self, system, text):
        system = f"System: {system}{STOP}\n" if system else ""
        space = "" if text.startswith(AROUND) else " "
        return f"{START}{system}User:{space}{text}{STOP}\nAssistant:"

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
        counts = [[sum(map(len, some)), len(grid)] for some, grid in zip(pixels, grids)]
        arrays = [array for some in pixels for array in some]
        pixels = torch.from_numpy(numpy.concatenate(arrays)) if arrays else torch.zeros(0)
        grids = torch.tensor([grid for some in grids for grid in some]).long().view(-1, 2)
        return Batch(ids, lengths, positions, pixels, grids, torch.tensor(counts))

    def prepare(self, examples):
        """What a step needs of its examples: themselves, their prompts, their responses' ids."""
        return examples, self.batch(examples), [self.response_ids(e.response) for e in examples]

    def prefetch(self, examples, batches, device):
        """Yields `prepare` of each batch of indices; for a GPU workers make it ahead of time."""
        workers = max(1, min(4, os.cpu_count() // 2)) if device == "cuda" else 0
        return DataLoader(examples, batch_sampler=batches, collate_fn=self.prepare,
                          num_workers=workers, multiprocessing_context="fork" if workers else None)

    def banned(self, vocabulary):
        """(V,) True for ids that only prompts may hold, and for ids without a token."""
        added, size = self.tokenizer.get_added_tokens_decoder(), self.tokenizer.get_vocab_size()
        banned = {self.image, *range(size, vocabulary), *(i for i in added if added[i].special)}
        return torch.tensor([i in banned and i != self.stop for i in range(vocabulary)])


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
        patches = pixels.reshape(3, 1, rows, 2, patch, columns, 2, patch).repeat(2, 1)
        patches = patches.transpose(2, 5, 3, 6, 0, 1, 4, 7).reshape(rows * columns * 4, -1)
        place = f"<|vision_start|>{self.IMAGE * (rows * columns)}<|vision_end|>"
        return place, [patches], [(rows, columns)]

    def template(self, system, text):
        return (f"<|im_start|>system\n{system or 'You are a helpful assistant.'}<|im_end|>\n"
                f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")


def pieces(start, stop, size):
    return [(i, min(i + (size or stop), stop)) for i in range(start, stop, size or stop)]


def read_jsonl(path, convert=None, skip_bad_rows=False):
    return [json.loads(line) for line in open(path, encoding="utf-8")]
