"""The world is a function of (split, index); files of other tools are read or refused; prompts
and pixels are transformers' own."""
import base64
import collections
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import random
import re
import runpy
import struct
import subprocess
import sys
import time
import zlib

import numpy
import pytest
import torch
from conftest import QWEN_TEMPLATE
from PIL import Image, ImageChops
from tokenizers import Tokenizer

import data
import evaluate

ROOT = pathlib.Path(__file__).parents[1]
REAL = pathlib.Path(__file__).parents[2] / "shared" / "data"
NOUNS = re.compile(f"(?:({'|'.join(data.COLOURS)}) )?({'|'.join(data.SHAPES)}|shape)s?")
TABLE = re.compile(r"\((\d),(\d)\) (\w+) (\w+)\.")     # (column,row) colour shape.
BASE = [data.base_example(i) for i in range(4000)]


def digest(split, indices):
    """A checksum of everything that these examples hold, the pixels included."""
    examples = {i: data.world_example(split, i, "verbose") for i in indices}
    rows = [(e.id, e.question, e.answer, e.response, e.scene, [im.tobytes() for im in e.images])
            for _, e in sorted(examples.items())]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def places(scene):
    return frozenset((t.colour, t.shape, t.row, t.column) for t in scene)


def worth(question, family, scene):
    """The answer, read off the words and the scene by other code than data.ask's."""
    text = TABLE.sub("", question).lower()
    found = [[t for t in scene if colour in ("", t.colour) and shape in ("shape", t.shape)]
             for colour, shape in NOUNS.findall(text)]
    if family == "location":
        (thing,), = found
        return "[{1},{0},{3},{2}]".format(*thing[2:4], thing.row + 1, thing.column + 1)
    a, b = [*map(len, found), 0][:2]
    x, y = [*map(int, re.findall(r"\d+", text)), 0, 0][:2]
    return {"count": str(a), "sum": str(a + b), "cost": str(a * x + b * y),
            "difference": str(a - b), "comparison": "yes" if a > b else "no"}[family]


def test_example_is_a_function_of_its_name():
    """A generator with state, or the order of a set, shows two runs two data sets."""
    code = "import data, test_data as t; print([t.digest(s, range(40)) for s in data.SPLITS])"
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                           env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "7"})
    here = [digest(split, reversed(range(40))) for split in data.SPLITS]
    assert fresh.stdout.strip() == str(here), fresh.stderr
    assert data.world_example("test", "7").question == data.world_example("test", 7).question
    for name in ("nowhere/3", "test/-1", "test/", "test", "test/1.5", ""):
        with pytest.raises(data.DataError):
            data.world_example(*name.partition("/")[::2])


def test_budgets_are_nested_and_end():
    """2,000 prompts begin 20,000 prompts, whatever the traces; and a `for` over a World ends."""
    small, large = data.World("train", "canonical", 20), data.World("train", "verbose", 200)
    for a, b in ((small[i], large[i]) for i in range(20)):
        assert (a.question, a.answer, a.scene) == (b.question, b.answer, b.scene)
    assert len(list(itertools.islice(small, 25))) == len(small) == 20


def test_splits():
    """Scenes, pairs and wordings that training has seen measure memory; ood differs in all."""
    seen = {split: [data.world_example(split, i) for i in range(600)]
            for split in ("train", "val", "test", "ood")}
    wordings = {split: {NOUNS.sub("_", re.sub(r"\d", "#", e.question.lower())) for e in examples}
                for split, examples in seen.items()}
    assert len(wordings["train"]) == 12 and len(wordings["ood"]) == 6
    assert not wordings["train"] & wordings["ood"]
    seen["train"] += BASE[:400]
    sizes = set(), set()
    for split, scene in ((split, e.scene) for split in seen for e in seen[split]):
        assert len({(t.row, t.column) for t in scene}) == len(scene)
        sizes[split == "ood"].add(len(scene))
        assert any((t.colour, t.shape) in data.HELD_OUT for t in scene) == (split == "ood")
    assert max(sizes[0]) < min(sizes[1]) and min(map(len, sizes)) >= 3
    assert data.bucket(scene[::-1]) == data.bucket([t._replace(box=()) for t in scene])
    for a, b in itertools.combinations(("train", "val", "test"), 2):
        assert not {data.bucket(e.scene) for e in seen[a]} & {data.bucket(e.scene) for e in seen[b]}


def test_text_is_test_in_words():
    """The same question without a picture, of a table that the words determine."""
    for i in range(200):
        words, seen = data.world_example("text", i), data.world_example("test", i)
        asked = seen.question.removeprefix(data.IMAGE)
        assert words.images == [] and words.question.endswith(". " + asked)
        assert (words.answer, words.response) == (seen.answer, seen.response)
        assert words.scene == seen.scene
        assert places(seen.scene) == {(colour, shape, int(row), int(column)) for
                                      column, row, colour, shape in TABLE.findall(words.question)}


def test_a_box_on_the_grid_is_of_one_cell():
    """A box of two cells overlaps each by exactly a half, and was right for both: a reward could
    have taught to answer so."""
    things = [data.Thing("red", "circle", row, column, ()) for row in range(1, 5)
              for column in range(1, 5)]
    boxes = [data.grid_box(thing) for thing in things]
    for i, j in itertools.product(range(16), range(16)):
        example = data.Example("", "Where?", boxes[i], box=True)
        assert (evaluate.judge(boxes[j], example) is True) == (i == j)
        two = data.Thing("red", "circle", things[i].row, things[i].column, ())
        for wide in (f"[{two.column},{two.row},{two.column + 2},{two.row + 1}]",
                     f"[{two.column},{two.row},{two.column + 1},{two.row + 2}]"):
            assert evaluate.judge(wide, example) is False
    assert boxes[1] == "[2,1,3,2]"               # x before y, as in every box
    assert evaluate.judge("[2, 1, 3, 2]", data.Example("", "Where?", boxes[1], box=True)) is True


@pytest.mark.parametrize("split", ["train", "test", "ood"])
def test_answers_are_right(split):
    """Recomputed from the words of the question and the scene, for every family."""
    families = collections.Counter()
    for example in (data.world_example(split, i) for i in range(600)):
        assert example.answer == worth(example.question, example.family, example.scene), example
        assert example.response.endswith(f"</think><answer>{example.answer}</answer>")
        families[example.family] += 1
    assert families == dict.fromkeys(data.FAMILIES, 100)


def test_base_tells_the_truth():
    """A base that learned false counts cannot be told from one that cannot see."""
    claims = 0
    for e in BASE[:400]:
        assert e.question.count(data.IMAGE) == len(e.images)
        if "<answer>" in e.response:
            assert data.extract_answer(e.response) == worth(e.question, e.family, e.scene)
        if "Describe" in e.question:
            assert len(TABLE.findall(e.response)) == len(e.scene)
            assert e.response == data.describe(e.scene)
        if "Box" in e.question:
            for kind, box in re.findall(r"(\w+ \w+): (\S+)\.", e.response):
                assert box == worth(f"Where is the {kind}?", "location", e.scene)
        for sentence, verdict in data.check_steps(e.scene, e.response):
            if re.fullmatch("[a-z ]+: ([0-9]+|\\(.*\\))", sentence):
                assert verdict, (e.question, sentence)
                claims += 1
    assert claims > 200


def test_base_mix():
    """Shares of the kinds; it can reason, and mostly does not: the rather, the more steps there
    are, and more in words than before a picture."""
    kinds, thinks = collections.Counter(), collections.defaultdict(list)
    for i, e in enumerate(BASE):
        words = "" if e.images else " in words"
        kind = {"Describe": "caption", "Count": "counts", "Box": "places", "Locate": "places"}.get(
            e.question.removeprefix(data.IMAGE).split(". ")[-1].split()[0], "question")
        kinds[("question" if "<answer>" in e.response else kind) + words] += 1
        if "<answer>" in e.response:
            shown = data.world_example("train", 10_000_000 + i).response
            assert e.response in (shown, data.tagged(e.answer))
            thinks[shown.count("."), words].append(e.response == shown)
    for kind, share in data.BASE_MIX.items():
        assert abs(kinds[kind] - 40 * share) < 4 * (40 * share) ** 0.5, kind
    shares = {key: sum(some) / len(some) for key, some in thinks.items()}
    for words in ("", " in words"):
        assert shares[1, words] < shares[3, words] < shares[5, words]
    assert all(shares[steps, ""] < shares[steps, " in words"] for steps in (1, 3, 5))


def corrupt(sentence):
    for old, new in ((">", "<"), ("<", ">"), ("more", "fewer"), ("fewer", "more")):
        if old in sentence:
            return sentence.replace(old, new)
    return re.sub(r"\d+(?=\D*$)", lambda number: str(int(number[0]) + 1), sentence)


def test_pairs_are_counted_often():
    """Where two of six phrases named colour and shape, a base could count either, and one seed of
    three learned to find a thing by both."""
    phrases = [re.findall(r"([a-z ]+)s: \d", e.response) for e in BASE if "Count" in e.question]
    pairs = [sum(tuple(one.split()) in data.KNOWN for one in some) for some in phrases]
    shares = [pairs.count(number) / len(pairs) for number in (0, 2, 6)]
    assert shares == pytest.approx([0.15, 0.425, 0.425], abs=0.04)


def test_the_base_has_seen_no_scene_of_the_other_splits():
    """Nor a question that is trained on later: its own are those of train from far behind."""
    reserved = {data.bucket(data.world_example(split, i).scene)
                for split in ("val", "test") for i in range(200)}
    examples = [*BASE[:1000], *map(data.base_example, range(150_000, 150_500))]
    assert len({example.id for example in examples}) == len(examples)
    assert not {data.bucket(example.scene) for example in examples} & reserved
    for example in examples:
        split, _, index = example.id.partition("/")
        assert split == "train" and int(index) >= 10_000_000
        assert not {thing[:2] for thing in example.scene} & data.HELD_OUT


def test_training_never_names_held_out_pairs():
    """Pictures never showed them, but two base examples in a hundred counted «red triangles: 0»:
    a model so taught to answer 0 cannot be asked about them out of distribution."""
    names = {f"{colour} {shape}" for colour, shape in data.HELD_OUT}
    for example in [data.base_example(i) for i in range(1500)] + list(data.World("train"))[:600]:
        assert not any(name in example.question + example.response for name in names)
        boxed = re.findall(r"\w+ \w+(?=[,.])", example.question.partition("Box ")[2])
        assert len(set(boxed)) == len(boxed)


@pytest.mark.parametrize("style", ["canonical", "hesitant", "verbose"])
@pytest.mark.parametrize("split", ["train", "ood"])
def test_rationales_are_true_and_lies_are_found(style, split):
    """A checker that says True to all rewards any text; one that errs punishes the truth."""
    for i in range(300):
        example, short = data.world_example(split, i, style), data.world_example(split, i)
        thought = re.fullmatch("<think>(.*)</think><answer>.*</answer>", example.response)[1]
        sentences, verdicts = zip(*data.check_steps(example.scene, thought))
        assert ". ".join(sentences) + "." == thought
        assert list(verdicts) == [None if s in data.FILLERS else True for s in sentences]
        assert (None in verdicts) == (style != "canonical")
        assert {*re.findall(r"\d+", example.response)} == {*re.findall(r"\d+", short.response)}
        for k in (k for k, verdict in enumerate(verdicts) if verdict):
            lie = ". ".join((*sentences[:k], corrupt(sentences[k]), *sentences[k + 1:])) + "."
            assert [v for _, v in data.check_steps(example.scene, lie)] == [
                *verdicts[:k], False, *verdicts[k + 1:]]


def test_hesitant_traces_say_the_short_ones_steps():
    """In their words and order, some of them twice, between fillers: longer, and nothing new. The
    verbose ones hesitate in the same places."""
    lengths = collections.Counter()
    for i in range(200):
        said = {}
        for style in ("canonical", "hesitant", "verbose"):
            example = data.world_example("train", i, style)
            thought = re.fullmatch("<think>(.*)[.]</think><answer>.*</answer>", example.response)[1]
            said[style] = thought.split(". ")
            lengths[style] += len(said[style])
        new = [part for part in said["hesitant"] if part not in data.FILLERS]
        assert [*dict.fromkeys(new)] == [*dict.fromkeys(said["canonical"])]
        fillers = [[part if part in data.FILLERS else "" for part in said[style]]
                   for style in ("hesitant", "verbose")]
        assert fillers[0] == fillers[1] and fillers[0][0] and fillers[0][-1]
    assert lengths["hesitant"] == lengths["verbose"] > 2 * lengths["canonical"] > 0


@pytest.mark.parametrize("text", [
    "banana", "circles", "circles: many", "Circles: 1", "circles: -1", "circles: ١", "1 + 1 = 3",
    "1 - 2 = 1", "2 is plus 2", "3 plus 3", "2 > 2", "3 as many as 3 makes 3", "I count 1", "1",
    "pink circles: 0", "x" * 200, "circles: 1, squares: 0", "circles: " + "0" * 99 + "1", "!?",
    "1 > 0 = 1", "the answer is 4", "red circle: (1,2)", "red circle: (1 1)", "..",
    "circles: 1 squares: 0",
    "circles: 1\nsquares: 0", "Okay", "circles: 1; circles: 1", "squares: 0 circles", "\0"])
def test_what_cannot_be_checked_is_false(text):
    """Prose that says nothing must not pass as a step that holds."""
    scene = [data.Thing("red", "circle", 1, 1, (3, 3, 13, 13))]
    assert data.check_steps(scene, "circles: 1.") == [("circles: 1", True)]
    assert [v for _, v in data.check_steps(scene, text)] == [False]


def test_boxes_bound_what_is_drawn():
    """A box one pixel off, or a shape that leaves its cell, would be a wrong answer."""
    for example in (data.world_example("ood", i) for i in range(150)):
        for thing in example.scene:
            x1, y1, x2, y2 = thing.box
            cell = (thing.row - 1, thing.column - 1)
            assert (y1 // 16, x1 // 16) == (y2 // 16, x2 // 16) == cell
            drawn = ImageChops.difference(data.paint([thing]), data.paint([])).getbbox()
            inside = numpy.subtract(drawn, (x1, y1, x2 + 1, y2 + 1)) * (1, 1, -1, -1)
            assert inside.min() >= 0 and inside.max() <= 1
            middle = example.images[0].getpixel(((x1 + x2) // 2, (y1 + y2) // 2))
            assert middle == data.COLOURS[thing.colour]


# ---------------------------------------------------------------------------------- the files

def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PNG = saved(data.world_example("test", 0).images[0])
PICTURES = {"a.png": PNG, "b.png": PNG, "../outside.png": PNG, "cut.png": PNG[:80],
            "words.png": b"hello", "large.png": saved(Image.new("1", (6000, 6000)))[:80],
            "wide.png": saved(Image.new("L", (401, 2))),
            "tall.png": saved(Image.new("L", (2, 401)))}


@pytest.fixture
def read(tmp_path):
    """read(*rows) -> [Example] from a file beside PICTURES."""
    folder, number = tmp_path / "in", itertools.count()
    folder.mkdir()
    for name, content in PICTURES.items():
        (folder / name).write_bytes(content)
    (folder / "link.png").symlink_to(tmp_path / "outside.png")

    def read(*rows, raw=None, kind="jsonl", load=data.read_examples, **options):
        text = "\n".join(map(json.dumps, rows)).replace("ABSOLUTE", str(tmp_path))
        path = folder / f"{next(number)}-rows.{kind}"      # a new one: what was read is kept
        path.write_bytes(text.encode() if raw is None else raw)
        return load(path, **options)
    return read


def row(**fields):
    return dict(question="q", answer="a") | fields


def told(content, role="user"):
    return dict(role=role, content=content)


def human(*texts):
    return [{"from": who, "value": text} for who, text in zip(("human", "gpt"), texts)]


NAN = math.nan
Q, PLAIN, SPACED = "<image>How many?", "How many?", "<answer> 3 </answer>"
THREE, COT, ENCODED = "<answer>3</answer>", "<think>1, 2</think>", base64.b64encode(PNG).decode()
USER, PARTS = told(PLAIN), told([dict(type="image"), dict(type="text", text=PLAIN)])
LAYOUTS = {     # tool: row, question, answer, response
    "easyr1": (dict(problem=Q, answer="3", images=["a.png"]), Q, "3", THREE),
    "bytes": (dict(problem=Q, answer="3", images=[{"bytes": ENCODED}]), Q, "3", THREE),
    "r1v": (dict(image="a.png", problem=PLAIN, solution=SPACED), Q, "3", THREE),
    "r1v thought": (dict(problem="?", thinking="1, 2", solution=SPACED), "?", "3", COT + THREE),
    "r1v tags": (dict(problem="?", thinking=COT, solution=SPACED), "?", "3", COT + THREE),
    "r1v eval": (dict(image_path="a.png", question=PLAIN, ground_truth="3"), Q, "3", THREE),
    "two pictures": (dict(id=1, image=["a.png", "b.png"], question="Same?", output="no"),
                     "<image><image>Same?", "no", "no"),
    "trl text": (dict(prompt="1 + 2?", completion=THREE), "1 + 2?", "3", THREE),
    "trl twice": (dict(prompt="?", completion=f"{SPACED}? 4. <answer>4</answer>"), "?", "4",
                  f"{SPACED}? 4. <answer>4</answer>"),
    "several names": (dict(problem="?", question="?", prompt="?", answer=3, ground_truth="3",
                           solution=SPACED, completion=COT + "5", output=COT + "5",
                           images=["a.png"], image="a.png", image_path="./a.png"),
                      "<image>?", "3", COT + "5"),
    "empty names": (dict(messages=[], conversations=None, instruction="", problem=None,
                         question=PLAIN, answer="", ground_truth=[], solution="3", images=[],
                         image={}, image_path="a.png", options=[], image_1=None, img="",
                         choice_a={}, completion=""), Q, "3", THREE),
    "mmmu": (dict(question=PLAIN, options=["2", "3"], image="a.png", image_2=None, answer="B",
                  img_type=["Plots"], question_type="multiple-choice"),
             Q + "\n(A) 2\n(B) 3", "B", "<answer>B</answer>"),
    "gsm8k": (dict(question="?", answer="1 + 2 = <<1+2=3>>3\n#### 3"), "?", "3",
              "<think>1 + 2 = <<1+2=3>>3</think>" + THREE),
    "gsm8k thousands": (dict(question="?", answer="#### 1,800"), "?", "1,800",
                        "<answer>1,800</answer>"),
    "math": (dict(problem="?", level="Level 5", type="Algebra",
                  solution="So $x = \\boxed{\\frac{1}{2}}$."), "?", "\\frac{1}{2}",
             "<think>So $x = \\boxed{\\frac{1}{2}}$.</think><answer>\\frac{1}{2}</answer>"),
    "numina": (dict(problem="?", solution="2 and 1: \\boxed{3}", answer="3"), "?", "3",
               "<think>2 and 1: \\boxed{3}</think>" + THREE),
    "boxed": (dict(problem="?", answer="$\\boxed{3}$."), "?", "3", THREE),
    "a solution": (dict(question="?", solution="2 + 1 = 3 #### 3"), "?", "3",
                   "<think>2 + 1 = 3</think>" + THREE),
    "vlm-r1": (dict(image="a.png", problem="Where?", solution=[74.0, 302.0, 181.0, 500.0],
                    normalized_solution=[0.1, 0.2, 0.3, 0.4]), "<image>Where?",
               "[74.0, 302.0, 181.0, 500.0]", "<answer>[74.0, 302.0, 181.0, 500.0]</answer>"),
    "ours": (dict(id="x", image="a.png", question=PLAIN, answer="3", rationale="1, 2",
                  choices=["2", 3]), Q + "\n(A) 2\n(B) 3", "3", COT + THREE),
    "zero": (dict(question="?", answer=0, choices=None), "?", "0", "<answer>0</answer>"),
    "half": (dict(question="?", answer=-0.5, rationale=None), "?", "-0.5", "<answer>-0.5</answer>"),
    "unicode": (dict(question="«Où» 漢字?", answer="é"), "«Où» 漢字?", "é",
                "<answer>é</answer>")}


@pytest.mark.parametrize("tool", LAYOUTS)
def test_layouts(read, tool):
    """Flat fields by their names in the common tools; R1-V's `thinking` brings its own `<think>`.
    An empty `images` once hid a full `image`, and GSM8K's whole solution was the answer, so that
    nothing could equal it."""
    whole, *expected = LAYOUTS[tool]
    for kind, text in (("jsonl", json.dumps(whole) + "\r\n\n"), ("json", json.dumps([whole]))):
        example, = read(raw=text.encode(), kind=kind)
        assert [example.question, example.answer, example.response] == expected
        assert example.system == whole.get("system", "")
        assert [p.size for p in example.pictures()] == [(64, 64)] * expected[0].count("<image>")


BAD = {     # what the message says: rows
    "object": [[], None, 5, "text"],
    "question": [{}, dict(answer="a"), *(row(question=q) for q in (" ", ["q"], 5, "\ud800"))],
    # layouts that are to be converted first
    "field (messages|conversations|instruction) is not read: a row has question, images, answer, "
    "choices, response, rationale, system, id; .* once \\(tests/convert.py converts chats": [
        dict(messages=[USER], answer="a"), row(messages="hello"), row(messages=5),
        dict(image="a.png", messages=[USER, told("3", "assistant")]),
        dict(id=1, image="a.png", conversations=human(Q, "0")),
        dict(images=["a.png"], system="Be brief.", conversations=human(Q, COT + "3")),
        dict(instruction="Add.", input="1, 2", output="3"), row(instruction="Add.")],
    "field {'prompt': .*'role'.*: expected text .tests/convert.py converts chats": [
        dict(images=["a.png"], prompt=[USER], completion=[told(THREE, "assistant")]),
        dict(prompt=[PARTS], image="a.png", solution="3")],
    "field {'completion': .*'role'.*: expected text .tests/convert.py": [
        dict(prompt="?", completion=[told(THREE, "assistant")])],
    "no answer": [dict(question="q"), *(row(answer=answer) for answer in (
        "", " ", None, [], {}, "<answer> </answer>", "\\boxed{}", "Nothing is left.\n#### "))],
    "expected one text or finite number, or a box of four numbers": [row(answer=gold) for gold in (
        True, False, NAN, math.inf, -math.inf, ["a"], ["18", "18.0"], [1, 2, 3], [1, 2, 3, 4, 5],
        ["1", "2", "3", "4"], [1, 2, 3, True], [1, 2, 3, NAN], [[1, 2, 3, 4]], {"x": 1}, "\ud800")],
    "fields .* differ: expected one question": [dict(problem="p", question="q", answer="a"),
                                                dict(question="q", prompt="p", answer="a")],
    "fields .* differ: expected one answer": [row(solution="b"), row(ground_truth="A"),
                                              row(answer="x\n#### 18", solution="19")],
    "fields .* differ: expected one response": [row(completion="a", output="b")],
    "fields .* differ: expected one rationale": [row(rationale="a", thinking="b")],
    "fields .* differ: expected one images": [row(images=["a.png"], image="b.png"),
                                              row(image="a.png", image_path="b.png")],
    "fields .* differ: expected one choices": [row(choices=["a", "b"], options=["b", "a"])],
    "no.png is not a readable image: .*No such file": [row(image="no.png")],
    "is not a readable image": [row(image=name) for name in ("cut.png", "words.png", ".")],
    # before it is found to be cut off, too
    r"\(6000, 6000\) is over 32000000 pixels": [row(image="large.png")],
    r"\((401, 2|2, 401)\) is .* of ratio 200": [row(image="wide.png"), row(image="tall.png"),
                                                row(images=["a.png", "tall.png"])],
    "image": [*(row(image=i) for i in (5, False, [None], {"bytes": 5}, {"bytes": "é"},
                                       {"bytes": "AAAA"}, "\ud800", "a\0.png", "x" * 5000)),
              row(images=[["a.png"]])],
    "leaves the data directory": [row(image=name) for name in ("../outside.png", "link.png",
                                                               "ABSOLUTE/outside.png")],
    "2 <image> .* 1 image": [row(question="<image><image>?", image="a.png")],
    "1 <image> .* 0 images": [row(question="<image>?")],
    "1 <image> .* 2 images": [row(question="<image>?", images=["a.png", "b.png"])],
    "<image>": [row(choices=["<image>", "b"]), row(system="<image>"), row(rationale="<image>"),
                dict(question="q", completion="<image>")],
    "(choices|options)'.*: expected a list of 2 to 26": [row(**{name: value}) for name, value in (
        *(("choices", c) for c in ("ab", ["a"], ["a"] * 27, [None, {}], [["a"], ["b"]])),
        ("options", "['a', 'b']"), ("options", {"A": "a", "B": "b"}), ("choices", [True, False]))],
    "rationale|thinking": [row(rationale=["x"]), row(thinking=5)], "system": [row(system=5)]}


@pytest.mark.parametrize("message, bad", [(m, bad) for m, rows in BAD.items() for bad in rows],
                         ids=lambda value: repr(value)[:60])
def test_bad_rows(read, message, bad):
    """The file, the line and the field; never a traceback, a wrong guess, a file from outside."""
    with pytest.raises(data.DataError) as error:
        read(row(), bad)
    assert re.search(rf"rows\.jsonl:2\b.*?({message})", str(error.value), re.S), error.value


@pytest.mark.parametrize("name, value", [
    *((name, "a.png") for name in (
        "img", "imgs", "Image", "IMAGE", "image_url", "imageUrl", "image_file", "image_paths",
        "img_path", "image_1", "image1", "image_2_path", "image_a", "picture", "pictures", "photo",
        "image_name", "imgname", "image_filename", "image_bytes", "image_data", "decoded_image",
        "input_image", "file_name", "videos")),
    *((name, ["a", "b"]) for name in (
        "option", "choice", "Choices", "choice_text", "answer_options", "multiple_choices")),
    *((name, "b") for name in (
        "A", "B", "J", "a", "option_a", "optionB", "option1", "choice_c", "choice_a_text", "Answer",
        "answers", "answer_text", "answerKey", "answer_key", "answer_index", "correct_answer",
        "correct_choice", "gold_answer", "ground_truths", "label", "target", "final_answer",
        "expected_answer", "reference_answer")),
    *((name, [{"role": "user", "content": "q"}]) for name in (
        "messages", "Messages", "conversation", "conversations")), ("instruction", "Add.")])
def test_what_would_be_dropped_is_named(read, name, value):
    """A picture under `image_url` or `image_1` (MMMU), choices under A, B, C (MMBench) or
    `choice_a` (SEED-Bench), an answer under `correct_answer` were dropped without a word: models
    were trained to guess. So would be a chat beside other fields. Empty ones are not there."""
    for empty in (None, "", [], {}):
        assert read(row(**{name: empty}))[0].images == []
    for fields in ({}, dict(image="a.png", choices=["a", "b"])):
        with pytest.raises(data.DataError, match=rf"rows\.jsonl:2: field {name} is not read"):
            read(row(), row(**fields, **{name: value}))
    assert len(read(row(), row(**{name: value}), skip_bad_rows=True)) == 1


@pytest.mark.parametrize("name", [
    "image_id", "img_id", "imageId", "answer_value", "answer_type", "img_height", "image_width",
    "img_type", "image_size", "image_source", "image_classes", "question_id", "index", "category",
    "normalized_solution", "level", "type", "explanation", "K", "split", "source", "imagined"])
def test_harmless_fields(read, name):
    """Most fields of a set speak of its rows, and do not make them bad."""
    for value in (7, "x", ["x"], 0.5):
        assert read(row(image="a.png", **{name: value}))[0].answer == "a"


@pytest.mark.parametrize("name", ["image" + "1" * 22 + "x", "image_" * 40 + "x", "a_" * 40 + "x",
                                  "option" + "a_1" * 30 + "x", "images" * 40])
def test_a_field_of_any_name_is_read_at_once(read, name):
    """A hash in the name of a field, image111...x, kept the reader busy until it was killed: each
    digit doubled the time."""
    read(row())
    start = time.process_time()
    read(row(**{name: "x"}))
    assert time.process_time() - start < 0.2


@pytest.mark.parametrize("mark", [
    "<image 1>", "<image1>", "<image_1>", "<Image>", "<IMAGE>", "<image/>", "</image>", "<img>",
    '<img src="a.png">', "<img src='a.png' />", "<Img>a.png</Img>", "<ImageHere>", "<|image|>",
    "<|image_1|>", "<|image_pad|>", "<|vision_start|>", "<image_placeholder>", "<IMG_CONTEXT>",
    "<picture 2>", "<video>", "<|video_pad|>", "![](a.png)", "![a picture](https://x.org/a.png)"])
def test_other_marks_of_pictures(read, mark):
    """MMMU's <image 1>, Qwen's own tokens or Markdown in a question stayed text: the picture was
    missing, or stood somewhere else than the question says."""
    for fields in (dict(question=f"What is {mark}?"), dict(question="q", choices=[mark, "a"]),
                   dict(question=f"<image> or {mark}?", image="a.png"),
                   dict(question=f"{mark} What?", images=["a.png"]),
                   dict(prompt=f"What is {mark}?", image="a.png")):
        with pytest.raises(data.DataError, match=r"rows\.jsonl:2.*other marks \[.+\]: write one"):
            read(row(), dict(answer="a") | fields)


@pytest.mark.parametrize("text", [
    "if a <b and c> d", "x<image", "imagine that", "5! (of 3)", "[a](b)", "wow![a]", "<b>image</b>",
    "the image> of f", "2 < 3 > 1", "«image»", "[image]"])
def test_text_that_is_no_mark(read, text):
    """What only looks a little like a mark stays as it is written."""
    assert read(row(question=text))[0].question == text


# ------------------------------------------------------------------ chats, converted once
SAID, IMAGE_PART, TEXT_PART = told("3", "assistant"), dict(type="image"), PARTS["content"][1]
NULLS = [dict(type="image", text=None), dict(type="text", text=PLAIN, image=None)]
CHATS = {       # tool: row, question, answer, response, system
    "chat": (dict(messages=[USER, SAID], image="a.png"), Q, "3", "3", ""),
    "chat parts": (dict(image={"path": "a.png"}, messages=[
        PARTS, told([dict(type="text", text=THREE)], "assistant")]), Q, "3", THREE, ""),
    "chat of a question": (dict(messages=[PARTS], image="a.png", solution="3"),
                           Q, "3", THREE, ""),
    "chat, system": (dict(messages=[told("Be brief.", "system"), USER, SAID]),
                     PLAIN, "3", "3", "Be brief."),
    "chat, empty system": (dict(messages=[told("", "system"), USER, SAID]), PLAIN, "3", "3", ""),
    "chat of Arrow's": (dict(messages=[told(NULLS) | dict(name=None)], images=["a.png"],
                             conversations=None, answer="3"), Q, "3", THREE, ""),
    "openai": (dict(messages=[told([TEXT_PART, dict(
        type="image_url", image_url=dict(url="a.png", detail="high"))]), SAID]),
               PLAIN + "<image>", "3", "3", ""),
    "qwen": (dict(messages=[told([dict(type="image", image="a.png"), TEXT_PART]), SAID]),
             Q, "3", "3", ""),
    "bytes": (dict(messages=[told([dict(type="image", image={"bytes": ENCODED, "path": None}),
                                   TEXT_PART]), SAID]), Q, "3", "3", ""),
    "two pictures": (dict(messages=[told([IMAGE_PART, TEXT_PART, IMAGE_PART]), SAID],
                          images=["a.png", "b.png"]), Q + "<image>", "3", "3", ""),
    "sharegpt": (dict(image="a.png", conversations=human(Q, "0")), Q, "0", "0", ""),
    "sharegpt, system": (dict(images=["a.png"], system="Be brief.",
                              conversations=human(Q, COT + "3")), Q, "3", COT + "3", "Be brief."),
    "sharegpt, system's turn": (dict(conversations=[
        {"from": "system", "value": "Be brief."}, *human(PLAIN, "3")]),
                                PLAIN, "3", "3", "Be brief."),
    "trl": (dict(image="a.png", prompt=[PARTS], completion=[told(THREE, "assistant")]),
            Q, "3", THREE, ""),
    "trl, question": (dict(prompt=[USER], solution="3"), PLAIN, "3", THREE, ""),
    "trl, null": (dict(prompt=[USER], completion=None, answer=3), PLAIN, "3", THREE, ""),
    "alpaca": (dict(instruction="Add.", input="1, 2", output="3"), "Add.\n1, 2", "3", "3", ""),
    "alpaca bare": (dict(instruction="Add.", input="", output=COT + "3"),
                    "Add.", "3", COT + "3", "")}


@pytest.fixture
def convert(tmp_path, capsys, monkeypatch):
    """convert(*rows) -> the rows that tests/convert.py makes of them."""
    def convert(*rows):
        path = tmp_path / "theirs.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        monkeypatch.setattr(sys, "argv", ["convert.py", str(path)])
        runpy.run_path(str(ROOT / "tests" / "convert.py"), run_name="__main__")
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return convert


@pytest.mark.parametrize("tool", CHATS)
def test_chats_are_converted(read, convert, tool):
    """Layouts that are not read are converted once, with their pictures, nulls and system turns."""
    whole, *expected = CHATS[tool]
    with pytest.raises(data.DataError, match="tests/convert.py converts"):
        read(whole)
    example, = read(*convert(whole))
    assert [example.question, example.answer, example.response, example.system] == expected
    assert [p.size for p in example.pictures()] == [(64, 64)] * expected[0].count("<image>")


def test_what_is_flat_stays(convert):
    """A file may hold both kinds of rows, and fields that the converter knows nothing of."""
    flat = [dict(prompt="1 + 2?", completion=THREE, id=7), row(image="a.png", source="x")]
    assert convert(*flat) == flat
    assert convert(dict(messages=[USER], answer="3", id=7)) == [
        dict(question=PLAIN, answer="3", id=7, images=None)]


@pytest.mark.parametrize("fields", [
    *(dict(messages=value) for value in (
        "hello", 5, USER, ["hello"], [None], [[]], [told(5)], [told("q", ["user"])],
        [told(["q"])], [told("q", "tool")], [USER, USER], [USER, SAID, USER, SAID], [SAID],
        [told([dict(type="text", text=None)])], [USER | dict(images=["a.png"])],
        [USER | dict(image="a.png")], [dict(role="user")], [told(None)], [told("")],
        [told([dict(type="image_url", image_url=dict(url="https://x.org/a.png"))])],
        [told([dict(type="input_image", file_id="file-7")])], [told([dict(type="image")])])),
    dict(messages=[USER], question="2?"), dict(messages=[USER], problem="2?"),
    dict(messages=[USER, SAID], completion="4"), dict(messages=[USER], conversations=human("q")),
    dict(messages=[told("Be brief.", "system"), USER], system="Look."),
    *(dict(images=["a.png"], messages=[told(parts)]) for parts in (
        [dict(type="image", image="b.png"), TEXT_PART],
        [dict(type="image", path="b.png"), TEXT_PART],
        [dict(type="image", url="https://x.org/b.png"), TEXT_PART],
        [IMAGE_PART, dict(type="text", text="q", image="b.png")],
        [IMAGE_PART, dict(type="image_url", text="q", image_url=dict(url="b.png"))],
        [IMAGE_PART, dict(type="video", text="q", video="a.mp4")]))], ids=repr)
def test_chats_that_would_be_misread(read, convert, fields):
    """Of two user turns the last was asked alone; a part that brings its own picture was read
    without it, or as the row's first one. Each stops the converter, or is a bad row after it."""
    with pytest.raises((SystemExit, AttributeError, LookupError, TypeError, data.DataError)):
        read(*convert(dict(answer="a") | fields))


# ---------------------------------------------------------------------------------- golds

@pytest.mark.parametrize("fields, box", [
    (dict(answer=[1, 2, 3, 4]), True), (dict(solution=[0.5, -1, 2e3, 4]), True),
    (dict(ground_truth=[1, 2, 3, 4]), True), (dict(answer=[], solution=[1, 2, 3, 4]), True),
    (dict(answer="[1, 2, 3, 4]"), False), (dict(answer=3), False), (dict(answer="3"), False),
    (dict(answer=[], solution="3"), False), (dict(answer=None, ground_truth=-0.5), False)])
def test_a_list_of_four_numbers_is_a_box(read, fields, box):
    """VLM-R1's boxes were refused; and any text of four numbers was compared by its overlap, which
    calls [1, 2, 3, 5] the set [1, 2, 3, 4]."""
    example, = read(dict(question="q") | fields, check=evaluate.check_gold)
    value, = (value for value in fields.values() if value not in (None, []))
    assert example.box is box and example.answer == str(value)
    if box:
        near = str([value[0] + 0.01, *value[1:]])
        assert evaluate.grade(f"<answer>{near}</answer>", example).correct


@pytest.mark.parametrize("answer", ["...", "$$", "?", "**", "x" * 401, "<answer>.</answer>",
                                    "thus\n#### .", "\\boxed{ $ $ }"])
def test_golds_that_nothing_can_equal(read, answer):
    """Cleaned, nothing is left of them, or they are longer than an answer may be: every answer was
    wrong, and the reward flat, for the whole run."""
    with pytest.raises(data.DataError, match=r"rows\.jsonl:2: answer .*: expected .* 400 char"):
        read(row(), row(answer=answer), check=evaluate.check_gold)
    assert len(read(row(), row(answer=answer), check=evaluate.check_gold, skip_bad_rows=True)) == 1


@pytest.mark.parametrize("answer, choices", [
    ("c", ["a", "b"]), ("C", ["red", "blue"]), (0, ["red", "blue"]), (1, ["red", "blue"]),
    ("2", ["red", "blue", "green"]), ("yes", ["red", "blue"]), ("green", ["red", "blue"]),
    ("(C)", ["red", "blue"]), (3, ["1", "2"]), ("red and blue", ["red", "blue"]),
    ([1, 2, 3, 4], ["a", "b"]), ("A, B", ["red", "blue"]), ("3 cm", ["3 kg", "4 kg"])])
def test_golds_that_are_no_choice(read, answer, choices):
    """ScienceQA's and AI2D's golds are the index of a choice: every right answer was wrong."""
    for name in ("choices", "options"):
        with pytest.raises(data.DataError, match=r"rows\.jsonl:2: answer .* one of the choices"):
            read(row(), row(answer=answer, **{name: choices}), check=evaluate.check_gold)
    path = read(row(), load=lambda path: path)
    path.write_text(json.dumps(row(answer=answer, choices=choices)))
    with pytest.raises(data.DataError, match="one of the choices"):      # so do all the scripts
        evaluate.load_examples(evaluate.Config(data=path), "all")


@pytest.mark.parametrize("answer, choices, said", [
    ("B", ["red", "blue"], "blue"), ("b", ["red", "blue"], "(B)"), ("(B)", ["red", "blue"], "blue"),
    ("Blue.", ["red", "blue"], "B"), (3, ["2", 3], "B"), ("0.5", ["1/3", "1/2"], "1/2"),
    ("B. blue", ["red", "blue"], "b"), ("B", ["B", "A"], "A) B"), ("x" * 400, None, "x" * 400),
    ("$18$", None, "18"), (0, None, "0"), (-0.5, None, "-1/2"), (10 ** 20, None, "1" + "0" * 20)])
def test_golds_that_can_be_right(read, answer, choices, said):
    """The check refuses no gold that an answer can equal: a letter, a text, a value."""
    example, = read(row(answer=answer, choices=choices), check=evaluate.check_gold)
    assert evaluate.grade(f"<answer>{said}</answer>", example).correct
    assert not evaluate.grade("<answer>7777</answer>", example).correct


@pytest.mark.parametrize("raw, message", [
    (b"", "no usable row"), (b"\n \n", "no usable row"), (b"[]", "no usable row"),
    (b'{"question": "q", "answer": "a"}\n{"question":', "jsonl:2: not JSON"),
    (b'[{"question": "q", "answer": "a"}, ', "not a readable .json"),
    (b"[1]", ":1: expected an object"),
    (b"\xff\xfe\x00", "rows.jsonl"), (b'{"question": "\xe9", "answer": "a"}', "rows.jsonl"),
    (b'{"a": ' + b"[" * 99_999, "rows.jsonl"),
    (b'{"question": "q", "answer": ' + b"9" * 5000 + b"}", "rows.jsonl")], ids=range(10))
def test_bad_files(read, tmp_path, raw, message):
    """Empty, cut off, of another encoding, nested without end, absent: each is a DataError."""
    with pytest.raises(data.DataError, match=message):
        read(raw=raw)
    with pytest.raises(data.DataError, match="No such file"):
        data.load_dataset(tmp_path / "none.jsonl")


def test_skip_bad_rows(read, capsys):
    """Skipping is asked for, counted, and never silent."""
    rows = map(json.dumps, [row(), {}, row(image="no.png"), row(image="a.png")])
    assert len(read(raw="\n".join(["{", *rows]).encode(), skip_bad_rows=True)) == 2
    said = capsys.readouterr().out
    assert "skipped 3 bad rows of 5" in said and "rows.jsonl:1" in said
    with pytest.raises(data.DataError, match="no usable row"):
        read({}, {}, skip_bad_rows=True)


@pytest.mark.parametrize("line", [
    json.dumps(row(question="\xe9"), ensure_ascii=False).encode("latin-1"),
    json.dumps(row(question="\u20ac"), ensure_ascii=False).encode("cp1252"),
    json.dumps(row(question="\u6f22"), ensure_ascii=False).encode("gb18030"),
    json.dumps(row(question="\xe9"), ensure_ascii=False).encode()[:-20], b"\xff\xfe\x00\x00",
    b"\x00", b'{"question": "q", "answer": 18\x80}'])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
def test_a_line_in_another_encoding(read, capsys, line, mark):
    """One such line, pasted in from an old table, refused the whole file, and could not be
    skipped."""
    good = json.dumps(row(question="\xe9"), ensure_ascii=False).encode()
    raw = mark + b"\n".join([good, line, b"", good])
    with pytest.raises(data.DataError, match=r"rows\.jsonl:2: not JSON"):
        read(raw=raw)
    assert [e.question for e in read(raw=raw, skip_bad_rows=True)] == ["\xe9", "\xe9"]
    said = capsys.readouterr().out
    assert "skipped 1 bad rows of 3; first: " in said and "rows.jsonl:2" in said


def test_rows_of_any_file(tmp_path, capsys):
    """What runs write themselves is read by the same reader: rows as they are, an empty file too;
    the line that a killed run left half is named, or skipped and counted."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\n[2]\n"three"\n')
    assert data.read_jsonl(path) == [{"step": 1}, [2], "three"]
    places = [f"{path}:{number}" for number in (1, 3, 4)]
    assert data.read_jsonl(path, lambda row, where: where) == places
    for before in ("", " ", "\r\n\t", "\ufeff", "\ufeff\n"):     # the mark of UTF-8 too
        path.write_text(before + '[{"step": 1},\n {"step": 2}]', encoding="utf-8")
        assert data.read_jsonl(str(path)) == [{"step": 1}, {"step": 2}]
    path.write_text("")
    assert data.read_jsonl(path) == [] and capsys.readouterr().out == ""
    path.write_text('{"step": 1}\n{"step"')
    with pytest.raises(data.DataError, match=r"metrics\.jsonl:2: not JSON: .*; mend the row"):
        data.read_jsonl(path)
    assert data.read_jsonl(path, skip_bad_rows=True) == [{"step": 1}]
    assert "skipped 1 bad rows of 2; first: " in capsys.readouterr().out


@pytest.mark.parametrize("count, of_val", [(2, 1), (39, 1), (40, 2), (100, 5), (5000, 200)])
def test_splits_of_a_file(read, count, of_val):
    """The rows of val are not among those of train: evaluation once scored what was trained on,
    whatever --split said."""
    rows = [row(question=f"q{i}") for i in range(count)]
    path = read(*rows, load=lambda path: path)
    train, val, whole = (data.load_dataset(path, split) for split in ("train", "val", "all"))
    assert train + val == whole and [e.question for e in whole] == [r["question"] for r in rows]
    assert len(val) == of_val and data.load_dataset(path, "all", 2) == whole[:2]
    assert data.load_dataset(path, "val", 1) == val[:1]
    for split in ("test", "ood", "base", "Train", "", "train,val"):
        with pytest.raises(data.DataError, match=f"'{split}' is no split of a file: .*train, val"):
            data.load_dataset(path, split)


def test_splits_of_one_row(read):
    """A file of one row trains on it and says what it gives."""
    for split in ("train", "val", "all"):
        assert len(read(row(), load=data.load_dataset, split=split)) == 1


ODD = [None, True, 0, 1.5, -1, 10**400, NAN, "", " ", "a", "a.png", "../x", "/", "a\0b",
       "\ud800", "<image>", "<answer>", "user", THREE, COT, ENCODED, [], {}, [[]], ["a", None],
       [{}], {"a": []}, USER, PARTS, [USER], [PARTS], [told(None)], [told(["text"])],
       {"type": "image"}, {"type": "text"}, {"text": 5}, {"bytes": "="}, {"path": 5}]


def disturbed(rng, value):
    """The value with something inside it exchanged or doubled."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.75:
        value = value.copy()
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value[key] = disturbed(rng, value[key])
        return value
    return [value, value] if rng.random() < 0.1 else rng.choice(ODD)


def test_fuzz_rows(read, processor):
    """Whatever a row holds: DataError, or an example that can be trained on."""
    rng, kept = random.Random(0), 0
    fields = sorted({name for whole, *_ in LAYOUTS.values() for name in whole})
    for _ in range(1500):
        bad = disturbed(rng, rng.choice(list(LAYOUTS.values()))[0])
        if isinstance(bad, dict) and rng.random() < 0.5:
            bad = bad | {rng.choice(fields): rng.choice(ODD)}
        try:
            example = read(bad)[-1]
        except data.DataError:
            continue
        text, tiles, _ = processor.prompt(example)
        assert processor.encode(text).count(processor.image) == 16 * len(tiles), bad
        assert processor.image not in processor.response_ids(example.response), bad
        assert example.answer.strip() and len(tiles) == len(example.images), bad
        kept += 1
    assert kept > 150


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "AVIF"])
def test_fuzz_pictures(kind):
    """Pillow's plugins answer a broken file with RuntimeError too (AVIF), not only OSError."""
    rng = random.Random(0)
    try:
        whole = saved(data.world_example("test", 0).images[0], kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow does not write {kind}")
    for _ in range(100):
        broken = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            broken[rng.randrange(min(len(broken), rng.choice((200, 9999))))] = rng.randrange(256)
        try:
            data.open_image(bytes(broken))
        except data.DataError as error:
            assert "is not a readable image" in str(error)


# --------------------------------------------------------------------- one way to open a picture
TURNS = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM,
         5: Image.TRANSPOSE, 6: Image.ROTATE_90, 7: Image.TRANSVERSE, 8: Image.ROTATE_270}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(read, kind, orientation):
    """Telephones store a picture as the sensor lay and say how to turn it: models saw it on its
    side, and questions about left and right had the wrong answer."""
    upright = Image.new("RGB", (32, 48), (250, 250, 250))
    upright.paste((200, 0, 0), (0, 0, 16, 16))
    upright.paste((0, 0, 200), (16, 0, 32, 16))
    stored = upright.transpose(TURNS[orientation]) if orientation in TURNS else upright
    exif = Image.Exif()
    exif[0x112] = orientation
    turned = base64.b64encode(saved(stored, kind, exif=exif)).decode()
    seen, = read(row(image={"bytes": turned}))[0].pictures()
    assert seen.size == (32, 48) and seen.mode == "RGB"
    gaps = numpy.abs(numpy.asarray(seen, int) - numpy.asarray(upright, int))
    assert gaps.mean() < 8                       # a wrong turn differs by 15 at least


def noise(mode, seed=0):
    """40 x 30 pixels of an 8-bit mode; the left half of its alpha is 0, hiding black."""
    shape = (30, 40, len(Image.new(mode, (1, 1)).getbands()))
    pixels = numpy.random.default_rng(seed).integers(0, 256, shape).astype(numpy.uint8)
    if mode in ("RGBA", "LA"):
        pixels[:, :20] = 0
    return Image.frombytes(mode, (40, 30), pixels.tobytes())


FEW = noise("RGB").quantize(8)
CLEAR = {       # a picture whose left half or colour 3 is transparent
    "RGBA": saved(noise("RGBA")), "LA": saved(noise("LA")),
    "webp": saved(noise("RGBA"), "WEBP", lossless=True, exact=True),
    "P, one clear colour": saved(FEW, transparency=3), "gif": saved(FEW, "GIF", transparency=3),
    "P, an alpha for each": saved(FEW, transparency=bytes([255, 200, 100, 0, 50])),
    "gif, moving": saved(FEW, "GIF", transparency=3, save_all=True, append_images=[noise("L")]),
    "RGB, one clear colour": saved(Image.new("RGB", (40, 30), (7, 8, 9)), transparency=(7, 8, 9)),
    "L, one clear grey": saved(Image.new("L", (40, 30), 7), transparency=7)}
OPAQUE = {
    "RGB": saved(noise("RGB")), "L": saved(noise("L")), "1": saved(noise("L").convert("1")),
    "P": saved(FEW), "bmp": saved(noise("RGB"), "BMP"), "bmp, 1": saved(noise("L").convert("1"),
                                                                      "BMP"),
    "jpeg": saved(noise("RGB"), "JPEG"), "jpeg, grey": saved(noise("L"), "JPEG"),
    "jpeg, CMYK": saved(noise("CMYK"), "JPEG")}


@pytest.mark.parametrize("name", CLEAR)
def test_transparency_is_white(name):
    """It turned into whatever lay beneath, mostly black: black lines on black."""
    alpha = numpy.asarray(Image.open(io.BytesIO(CLEAR[name])).convert("RGBA"))[:, :, 3]
    seen = numpy.asarray(data.open_image(CLEAR[name]))
    assert seen.shape == (30, 40, 3) and (alpha == 0).sum() > 50
    assert (seen[alpha == 0] == 255).all()


@pytest.mark.parametrize("name", [*CLEAR, *OPAQUE])
def test_modes_are_opened_as_by_transformers(tokenizer, name):
    """Bit for bit what Idefics3's and Qwen2-VL's own processors make of the same file."""
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    source = (CLEAR | OPAQUE)[name]
    idefics = their_images(32)(Image.open(io.BytesIO(source)), return_tensors="pt")
    _, tiles, _ = data.Processor(tokenizer, 32, 16).picture(data.open_image(source))
    assert numpy.array_equal(idefics["pixel_values"][0].numpy(), numpy.concatenate(tiles))
    qwen = module.Qwen2VLImageProcessorPil(size=dict(shortest_edge=3136, longest_edge=84 ** 2))
    ours = data.QwenProcessor(tokenizer, 28, 1, dict(longest_edge=84))
    _, (patches,), _ = ours.picture(data.open_image(source))
    expected = qwen(Image.open(io.BytesIO(source)), return_tensors="pt")["pixel_values"]
    assert numpy.array_equal(expected.numpy(), patches)


def ramp(depth, channels=1, kind=0):
    """A PNG, written by hand: 16 columns from black to white, opaque, in samples of `depth`."""
    most, alpha = 2 ** depth - 1, kind in (4, 6)
    line = [sample for column in range(16) for sample in
            [round(column / 15 * most)] * (channels - alpha) + [most] * alpha]
    bits = "".join(f"{sample:0{depth}b}" for sample in line)
    packed = int(bits, 2).to_bytes(len(bits) // 8, "big")

    def chunk(name, content):
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, depth, kind, 0, 0,
                                                                0))
            + chunk(b"IDAT", zlib.compress((b"\0" + packed) * 16)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("depth, channels, kind", [
    (1, 1, 0), (2, 1, 0), (4, 1, 0), (8, 1, 0), (16, 1, 0), (8, 2, 4), (16, 2, 4), (8, 3, 2),
    (16, 3, 2), (8, 4, 6), (16, 4, 6)])
def test_depths(depth, channels, kind):
    """Of grey in 16 bits, as scanners and X-rays have it, all that is not black became white."""
    seen = numpy.asarray(data.open_image(ramp(depth, channels, kind)), int)
    steps = numpy.round(numpy.arange(16) / 15 * (2 ** depth - 1)) / (2 ** depth - 1) * 255
    assert seen.shape == (16, 16, 3)
    assert (numpy.abs(seen - steps[None, :, None]) <= 1).all()
    assert seen[0, 0, 0] == 0 and seen[0, 15, 0] == 255


def test_a_limit_on_pixels(read, monkeypatch):
    """A larger picture stopped in mid-training; Pillow's own limit could not be changed."""
    monkeypatch.setattr(data, "MAX_PIXELS", 64 * 64 - 1)
    path = read(row(), row(image="a.png"), load=lambda path: path)
    with pytest.raises(data.DataError, match=r"rows\.jsonl:2: .*a\.png .* over 4095 pixels"):
        data.read_examples(path)
    assert len(data.read_examples(path, True)) == 1
    monkeypatch.setattr(data, "MAX_PIXELS", 64 * 64)
    data.read_examples.cache_clear()
    assert len(data.read_examples(path)) == 2 and Image.MAX_IMAGE_PIXELS is None


@pytest.mark.parametrize("size", [(400, 2), (2, 400), (1, 200), (1, 1)])
def test_the_longest_pictures_that_are_read(tokenizer, size):
    """Sides of 200 to 1 are the most that Qwen takes; a row with more is refused when it is read
    (see BAD), not after hours, in the step that happens to draw it."""
    image = data.open_image(saved(Image.new("RGB", size)))
    for ours in (data.Processor(tokenizer, 32, 16), data.QwenProcessor(tokenizer, 28, 1)):
        _, pixels, _ = ours.picture(image)
        assert all(numpy.isfinite(array).all() and len(array) for array in pixels)


@pytest.mark.parametrize("name, count", [
    ("easyvqa/test", 4868), ("geometry3k/val", 280), ("geometry3k/test_clean", 400),
    ("puzzlevqa/val", 161), ("puzzlevqa/test", 161)])
def test_real_data(name, count):
    """Every row of the real sets, and every picture of them."""
    if not REAL.is_dir():
        pytest.skip("the real data sets do not lie beside the repository, in ../shared/data")
    examples = data.read_examples(REAL / f"{name}.jsonl")
    assert len(examples) == count == len({example.id for example in examples})
    for example in examples:
        assert example.answer.strip() and example.question.count(data.IMAGE) == 1
        assert example.response.endswith(data.tagged(example.answer))


# ------------------------------------------------------------ the tokens; as in transformers

@pytest.fixture(scope="module")
def processor():
    return data.Processor(data.train_tokenizer(BASE), 32, 16)


def test_any_text_survives(processor):
    """A byte has a token, whatever it is; tags that decode to nothing would earn no reward."""
    rng = random.Random(0)
    for _ in range(300):
        ranges = rng.choices(((0, 127), (0, 0x7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)), k=12)
        text = "".join(chr(rng.randint(*r)) for r in ranges) + rng.choice(("", " ", "12 3", "\n"))
        ids = processor.encode(text)
        assert processor.tokenizer.decode(ids, skip_special_tokens=False) == text
        assert processor.decode(ids) == text.strip()
    for i, style in itertools.product(range(60), ("canonical", "verbose", "answer")):
        response = data.world_example("train", i, style).response
        ids = processor.response_ids(response)
        assert processor.decode(ids) == response and ids.index(processor.stop) == len(ids) - 1


def test_tokenizer(processor):
    """«12» as one token hides from the model that it is more than 9; a tag is one decision."""
    vocabulary = processor.tokenizer.get_vocab()
    assert all(re.fullmatch("Ġ?[0-9]", t) for t in vocabulary if re.search("[0-9]", t))
    assert {*"0123456789", *(f"Ġ{i}" for i in range(6))} <= set(vocabulary)
    for tag, space in itertools.product(("think", "/think", "answer", "/answer"), ("", " ", "\n")):
        assert processor.encode(f"{space}<{tag}>") == [vocabulary[f"<{tag}>"]]
    assert data.train_tokenizer(BASE).to_str() == processor.tokenizer.to_str()


def test_banned(processor):
    """A sampled placeholder breaks re-scoring; a banned end mark never ends."""
    size, vocabulary = processor.tokenizer.get_vocab_size(), processor.tokenizer.get_vocab()
    special = {vocabulary[t] for t in (data.PAD, data.START, data.AROUND, data.GLOBAL, data.IMAGE)}
    assert processor.stop == vocabulary[data.STOP] and processor.stop not in special
    assert processor.banned(size + 10).tolist() == [i >= size or i in special
                                                    for i in range(size + 10)]


def test_batch_is_its_prompts(processor):
    """Padded on the right; the tiles of all pictures follow in reading order."""
    examples = [data.world_example(split, i) for i in range(4) for split in ("test", "text")]
    batch, single = processor.batch(examples), [processor.batch([e]) for e in examples]
    assert torch.equal(batch.pixels, torch.cat([one.pixels for one in single]))
    for ids, length, one in zip(batch.ids, batch.lengths, single):
        assert torch.equal(ids[:length], one.ids[0]) and (ids[length:] == processor.pad).all()


@pytest.mark.parametrize("kind, sizes", [(data.Processor, (32, 16)), (data.QwenProcessor, (28, 1))])
def test_special_tokens_in_a_text_are_text(tokenizer, kind, sizes):
    """A row that speaks of `<|im_end|>` or `<|image_pad|>` had a second end mark in its response,
    an image token without a picture (a traceback in mid-training), or closed the user's turn."""
    special = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()
               if token.special}
    assert {data.STOP, data.IMAGE, "<|im_end|>", "<|image_pad|>", "<row_1_col_1>"} <= set(special)

    def marks(ids):
        return [i for i in ids if i in special.values()]

    def ask(text):
        style = dict(system=f"Be {text} brief.", instruction=f"Think {text}.")
        ours, own = kind(tokenizer, *sizes, style), text.replace(data.IMAGE, "")
        example = data.Example("x", f"{own}<image>{own} or{own}<image>?{own}", "3",
                               images=[picture(0, 56, 30), picture(1, 40, 40)])
        return [ours.batch([example]) for example.system in ("", f"{text}Look{text}{text}")], ours
    plain, processor = ask("x")
    for text in [*special, "".join(special), "<<|im_end|>|im_end|>", "<|im_end|><|im_end|>"]:
        batches, ours = ask(text)
        for one, other in zip(batches, plain):
            assert marks(one.ids[0].tolist()) == marks(other.ids[0].tolist()), text
            assert torch.equal(one.pixels, other.pixels)
        for response in (text, f"so {text} it is{text}", data.tagged("3", text)):
            ids = ours.response_ids(response)
            assert marks(ids) == [ours.stop] and ids[-1] == ours.stop, text
            assert ours.decode(ids).replace("\u200b", "") == response.strip()
    for text in ("a < b |> c", "x\u200by", "<think>1</think><answer>2</answer>", "<|im_end", ""):
        assert processor.plain(text) == text


@pytest.mark.parametrize("mark", ["<|im_end|>", "<|endoftext|>", "<pad>", "<end_of_utterance>"])
def test_rows_that_speak_of_special_tokens(read, tokenizer, mark):
    """They are read, and keep their one end mark, in every field."""
    example, = read(row(question=f"What is {mark}?", rationale=f"It is {mark}.", answer=mark,
                        choices=[mark, "a"], system=f"Say {mark}"))
    for ours in (data.Processor(tokenizer, 32, 16), data.QwenProcessor(tokenizer, 28, 1)):
        _, batch, (response,) = ours.prepare([example], [0])
        assert response.count(tokenizer.token_to_id(mark)) == (mark == ours.STOP)
        system = data.Example("x", "q", "a", system="Say")
        assert (batch.ids == ours.stop).sum() == (ours.batch([system]).ids == ours.stop).sum()


def picture(seed, width, height):
    pixels = numpy.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(numpy.uint8))


def their_images(longest_edge):
    module = pytest.importorskip("transformers.models.idefics3.image_processing_pil_idefics3")
    return module.Idefics3ImageProcessorPil(
        do_image_splitting=longest_edge > 32, size={"longest_edge": longest_edge},
        max_image_size={"longest_edge": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


@pytest.mark.parametrize("longest_edge", [32, 64, 97, 100])
def test_pixels_are_those_of_transformers(longest_edge):
    """Pixels that differ between training and another's evaluation look like forgetting."""
    rng, theirs = random.Random(0), their_images(longest_edge)
    sizes = [(2, 2), (32, 32), (33, 32), (64, 64), (96, 32), (97, 96), (300, 2), (2, 300), (5, 200)]
    for size in sizes + [(rng.randint(4, 250), rng.randint(4, 250)) for _ in range(60)]:
        image = picture(0, *size)
        tiles, rows, columns = data.image_tiles(image, 32, longest_edge)
        expected = theirs(image, return_tensors="pt", return_row_col_info=True)
        assert (expected["rows"], expected["cols"]) == ([[rows]], [[columns]]), size
        ours = [data.pixel_array(tile, (0.5,) * 3, (0.5,) * 3) for tile in tiles]
        assert numpy.array_equal(expected["pixel_values"][0].numpy(), ours), size
    for size in ((1, 1), (1, 3000), (3000, 1), (3, 1)):     # transformers takes these for channels
        tiles, _, _ = data.image_tiles(Image.new("RGB", size), 32, longest_edge)
        assert {tile.size for tile in tiles} == {(32, 32)}


@pytest.mark.parametrize("longest_edge", [32, 96])
@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("question, sizes", [
    ("How many? 12 × 3", []), (" two  words\n", []), ("<image>How many?", [(64, 64)]),
    ("<image> spaced", [(40, 90)]), ("<image><image>Same?", [(90, 40), (50, 60)]),
    ("What is in <image> and not in\n<image>?", [(32, 32), (200, 30)])])
def test_prompts_are_those_of_transformers(processor, question, sizes, longest_edge, system):
    """The same characters, ids and tiles: with a system turn, with several pictures."""
    transformers = pytest.importorskip("transformers")
    tokens = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(processor.tokenizer.to_str()), pad_token=data.PAD,
        bos_token=data.START, eos_token=data.STOP)
    theirs = transformers.Idefics3Processor(their_images(longest_edge), tokens, image_seq_len=16,
                                            chat_template=data.CHAT_TEMPLATE)
    images = [picture(i, *size) for i, size in enumerate(sizes)]
    content = [dict(type="image") if part == data.IMAGE else dict(type="text", text=part)
               for part in re.split(f"({data.IMAGE})", question) if part]
    turns = [told([dict(type="text", text=system)], "system")] * bool(system) + [told(content)]
    template = theirs.apply_chat_template(turns, add_generation_prompt=True)
    expected = theirs(text=template, images=images or None, return_tensors="pt",
                      add_special_tokens=False)
    ours = data.Processor(processor.tokenizer, 32, 16, dict(longest_edge=longest_edge))
    example = data.Example("x", question, "a", images=images, system=system)
    batch, ids = ours.batch([example]), expected["input_ids"]
    assert ours.prompt(example)[0] == tokens.decode(ids[0], skip_special_tokens=False)
    assert torch.equal(batch.ids, ids) and batch.lengths.tolist() == [ids.shape[1]]
    assert torch.equal(batch.pixels, expected.get("pixel_values", [batch.pixels[:0]])[0])


@pytest.mark.parametrize("edge", [84, 200, 512])
def test_qwen_pixels_are_those_of_transformers(tokenizer, edge):
    """Bit for bit, on some 200 sizes; a cap on the area, whatever the shape."""
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    theirs = module.Qwen2VLImageProcessorPil(size=dict(shortest_edge=3136, longest_edge=edge ** 2))
    ours = data.QwenProcessor(tokenizer, 28, 1, dict(longest_edge=edge))
    rng = random.Random(edge)
    sizes = [(28, 28), (2, 2), (400, 2), (2, 399), (512, 512), (513, 511), (14, 42), (300, 1000)]
    for size in sizes + [(rng.randint(2, 400), rng.randint(2, 400)) for _ in range(60)]:
        expected = theirs(picture(0, *size), return_tensors="pt")
        _, (patches,), (grid,) = ours.picture(picture(0, *size))
        assert expected["image_grid_thw"].tolist() == [[1, 2 * grid[0], 2 * grid[1]]], size
        assert numpy.array_equal(expected["pixel_values"].numpy(), patches), size
        assert 784 * grid[0] * grid[1] <= max(edge ** 2, 784 * max(grid))


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("question, sizes", [
    ("How many? 12 × 3", []), ("<image>How many?", [(64, 64)]),
    ("What is in <image> and not in\n<image>?", [(32, 32), (200, 60)])])
def test_qwen_prompts_are_those_of_its_template(tokenizer, question, sizes, system):
    """The public chat template, its one pad repeated for each piece of picture; M-RoPE as the
    paper draws it: a picture's tokens share a time, text goes on from the largest position."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.to_str()), chat_template=QWEN_TEMPLATE)
    ours = data.QwenProcessor(tokenizer, 28, 1)
    content = [dict(type="image") if part == data.IMAGE else dict(type="text", text=part)
               for part in re.split(f"({data.IMAGE})", question) if part]
    turns = [dict(role="system", content=system)] * bool(system)
    text = theirs.apply_chat_template(turns + [dict(role="user", content=content)], tokenize=False,
                                      add_generation_prompt=True)
    example = data.Example("x", question, "1", system=system,
                           images=[picture(i, *size) for i, size in enumerate(sizes)])
    batch = ours.batch([example])
    for rows, columns in batch.grids.tolist():
        text = text.replace("<|image_pad|>", "<pad here>" * rows * columns, 1)
    text = text.replace("<pad here>", "<|image_pad|>")
    assert theirs(text, add_special_tokens=False)["input_ids"] == batch.ids[0].tolist()
    after = 0
    for token, place in zip(batch.ids[0], batch.positions[0].tolist()):
        if token != ours.image:
            assert place == [after + 1] * 3 or after == 0 and place == [0, 0, 0]
        after = max(place)


@pytest.mark.parametrize("family", [None, "qwen2_vl"])
def test_a_part_of_a_batch_is_the_batch_of_the_part(family, checkpoint, start):
    """Steps once decoded every picture again for each of their parts; now they cut the batch."""
    import model as models
    processor = models.load_checkpoint(checkpoint(family)[0] if family else start)[1]
    examples = [data.world_example(split, i) for i, split in enumerate(("test", "text", "ood"))]
    examples[0].images, examples[0].question = examples[0].images * 2, "<image>" * 2 + "Which?"
    batch = processor.batch(examples)
    for first, last in ((0, 1), (1, 2), (1, 3), (0, 3)):
        part, alone = batch.part(first, last), processor.batch(examples[first:last])
        width = alone.ids.shape[1]
        assert torch.equal(part.lengths, alone.lengths) and torch.equal(part.counts, alone.counts)
        assert torch.equal(part.ids[:, :width], alone.ids)
        assert torch.equal(part.positions[:, :width], alone.positions)
        assert part.pixels.tolist() == alone.pixels.tolist()
        assert part.grids.tolist() == alone.grids.tolist()


def test_threads_prepare_what_a_step_would(start):
    """With a GPU, threads make the batches ahead: the same, in the same order, errors included.
    Forked workers did once: not on Windows, after CUDA had started, through a container's small
    /dev/shm, by batches of a gigabyte."""
    import model as models
    processor, world = models.load_checkpoint(start)[1], data.World("train", size=40)
    batches = [[7, 3, 30], [1], [2, 39]]
    for loader in (processor.prefetch(world, batches, device) for device in ("cuda", "cpu")):
        for indices, (some, batch, rows) in zip(batches, loader, strict=True):
            mine, expected, responses = processor.prepare(world, indices)
            assert [e.id for e in some] == [e.id for e in mine] and rows == responses
            assert all(torch.equal(a, b) for a, b in zip(vars(batch).values(),
                                                         vars(expected).values()))
    assert not list(processor.prefetch(world, [], "cuda"))
    with pytest.raises(IndexError):
        list(processor.prefetch(world, [[0], [40]], "cuda"))
    asked = []
    ahead = processor.prefetch(world, (asked.append(i) or [i] for i in range(40)), "cuda")
    next(ahead)
    assert asked == [0, 1, 2, 3]                 # three ahead, not all there are


def test_an_error_in_a_thread_is_one_clear_line(start, monkeypatch):
    """A DataLoader handed it on with the whole traceback of the worker."""
    import model as models
    processor, world = models.load_checkpoint(start)[1], data.World("nowhere", size=1)
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    with pytest.raises(SystemExit) as stopped:
        evaluate.run_script(lambda c: list(processor.prefetch(world, [[0]], "cuda")),
                            evaluate.Config, "")
    assert str(stopped.value).startswith("error: nowhere/0: expected") and "\n" not in str(
        stopped.value)
