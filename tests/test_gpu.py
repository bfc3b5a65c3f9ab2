"""The script for the first minutes on a GPU has to run there at once: here it runs small."""
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import gpu
import pytest
import torch

import data
import kernels

ROOT = pathlib.Path(__file__).parents[1]
SHORT = [name for name in gpu.PARTS if name not in ("tests", "study")]
ENVIRONMENT = dict(os.environ, CUDA_VISIBLE_DEVICES="", PYTHONUNBUFFERED="1")
only_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU run the script itself")


def start(path, *words):
    return subprocess.Popen([sys.executable, "-m", "tests.gpu", "--json", str(path), *words],
                            cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the parts but tests and study that is killed after its first, and goes on.
    -> what it said at last, its file, the rows that were there when it was killed"""
    path = tmp_path_factory.mktemp("gpu") / "deeper" / "gpu.json"
    with start(path, "--parts", *SHORT) as killed:
        while not path.exists() and killed.poll() is None:
            time.sleep(0.01)
        killed.kill()
    before = json.loads(path.read_text())
    with start(path, "--parts", *SHORT) as resumed:
        said, _ = resumed.communicate()
    assert resumed.returncode == 0, said
    return said, path, before


@only_cpu
def test_every_row_of_a_small_run(run):
    """A part that measures nothing is noticed; what nobody captured has no number."""
    said, path, _ = run
    rows = json.loads(path.read_text())
    assert said.splitlines()[0].startswith("No GPU here")
    assert list(dict.fromkeys(row["part"] for row in rows)) == SHORT
    table = said.split("\n\n")[-1].splitlines()
    assert len(table) == len(rows)
    for row, line in zip(rows, table):
        assert list(row) == ["part", "name", "value", "unit", "goal", "met", "device", "note"]
        assert row["device"] == "cpu" and row["name"] in line and row["part"] in line
        captured = re.search(r"captured|bandwidth", row["name"])
        if captured:
            assert (row["value"], row["met"], row["note"]) == (None, None, gpu.NOT_CAPTURED)
        elif row["note"] != "TRL is not installed":
            assert row["value"] > 0
        assert (row["goal"] is None) <= (row["met"] is None)
    names = " ".join(row["name"] for row in rows)
    for label in (f"size {gpu.SIZE}", gpu.SMOLVLM):
        assert all(f"{label}, {n} rows: {way}" in names for n in gpu.ROWS
                   for way in ("captured", "plain", "generate"))
    assert all(f"{gpu.QWEN}, {n} rows: captured" in names for n in gpu.QWEN_ROWS)
    shares = [row["value"] for row in rows
              if re.search(r"size s: GRPO .*(rollout|update|waiting)$", row["name"])]
    assert len(shares) == 3 and sum(shares) == pytest.approx(100)


@only_cpu
def test_an_interrupted_run_goes_on(run):
    """Minutes on a GPU are spent once: a part in the file is not measured again, unless asked."""
    said, path, before = run
    assert {row["part"] for row in before} == {SHORT[0]}
    assert f"--- {SHORT[0]}\n" not in said and all(f"--- {name}\n" in said for name in SHORT[1:])
    rows = json.loads(path.read_text())
    assert rows[:len(before)] == before
    other = dict(rows[0], device="another card", value=1.0)      # nobody's to be skipped, nor lost
    path.write_text(json.dumps([other, *rows]))
    with start(path, "--parts", *SHORT, "--again", "sampling-2B") as again:
        said, _ = again.communicate()
    assert again.returncode == 0
    assert re.findall("^--- (.*)", said, re.M) == ["sampling-2B"]
    after = json.loads(path.read_text())
    assert after[0] == other and "another card" not in said

    def but(part, rows):
        return [row for row in rows if row["part"] != part]

    assert but("sampling-2B", after[1:]) == but("sampling-2B", rows)
    assert after[1:] != rows and len(after) == len(rows) + 1


def test_a_part_that_fails(tmp_path, monkeypatch, capsys):
    """The rest goes on; the exit status tells; the next start tries it again."""
    done, path = [], tmp_path / "gpu.json"

    def good(part):
        done.append(part.name)
        part.row("size m: a GRPO step takes", 7.0, "SFT steps")

    def bad(part):
        part.row("half of it", 1.0)
        raise ValueError("no\nmemory")

    monkeypatch.setattr(gpu, "PARTS", dict(first=(9, bad), second=(9, good), third=(-1, good)))
    words = ["--json", str(path), "--parts", "first", "second"]
    assert gpu.main(words) == 1 and done == ["second"]
    rows = json.loads(path.read_text())
    assert [row["note"] for row in rows] == ["", "error: ValueError: no memory", ""]
    assert [row["met"] for row in rows] == [None, None, True]
    assert "error: ValueError: no memory" in capsys.readouterr().out
    assert gpu.main([*words, "--parts", "second"]) == 0 and done == ["second"]
    gpu.PARTS["first"] = 9, good
    assert gpu.main(words) == 0 and done == ["second", "first"]
    assert [row["value"] for row in json.loads(path.read_text())] == [7.0] * 2
    assert gpu.main([*words, "--parts", "third"]) == 1 and len(done) == 2      # no time left
    assert "s are over" in capsys.readouterr().out


def test_the_command_takes_ten_minutes():
    assert sum(limit for limit, _ in gpu.PARTS.values()) <= 600


@pytest.mark.parametrize("name, value, met", [
    ("size m, 64 rows: captured against plain", 3.1, True),
    ("size m, 64 rows: captured against plain", 2.9, False),
    ("SmolVLM-256M, 64 rows: captured against plain", 2.9, None),
    ("SmolVLM-256M, 1 rows: captured against generate", 3.9, False),
    ("size m, 256 rows: captured against generate", 7.9, False),
    ("size m, 64 rows: captured against generate", 1.0, None),
    ("SmolVLM-256M, 256 rows: of the copy's bandwidth", 31, True),
    ("SmolVLM-256M, 1,024 rows: of the copy's bandwidth", 59, False),
    ("SmolVLM-256M, 64 rows: of the copy's bandwidth", 1, None),
    ("Qwen2-VL-2B, 64 rows: of the copy's bandwidth", 59, False),
    ("size m: a GRPO step takes", 11, False), ("size m: a GRPO step takes", None, None),
    ("the study, preset quick", 2.9, True), ("the study, preset smoke", 9, None)])
def test_goals(name, value, met):
    """Those of the issue, each for the rows that it speaks of."""
    part = gpu.Part("part", 1)
    part.row(name, value, "x")
    assert part.rows[0]["met"] is met
    assert ("NOT met" in gpu.as_text(part.rows[0])) == (met is False)


def test_a_child_that_takes_too_long_dies_with_its_children(tmp_path):
    """A study that was given up went on training beside what was measured next."""
    path = tmp_path / "alive"
    inner = f"import time; time.sleep(1.5); open({str(path)!r}, 'w')"
    words = ["-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"]
    with pytest.raises(subprocess.TimeoutExpired):
        gpu.child(words, 1)
    time.sleep(1.5)
    assert not path.exists()
    status, said = gpu.child(["-c", "print('here'); exit(3)"], 60)
    assert (status, said) == (3, "here\n")


def test_a_failing_test_is_named(tmp_path):
    """A file whose tests cannot even be collected is no file without failures."""
    path = tmp_path / "test_some.py"
    path.write_text("def test_good(): pass\ndef test_bad(): assert 0\ndef test_no(): assert 0\n")
    part = gpu.Part("tests", 60)
    gpu.test_file(part, str(path), "good or bad")
    assert [row["value"] for row in part.rows] == [1, 1, 0]
    assert part.rows[1]["met"] is False and part.rows[1]["note"].startswith("test_bad")
    path.write_text("import nothing_of_that_name")
    with pytest.raises(RuntimeError, match="nothing_of_that_name|error"):
        gpu.test_file(part, str(path), "")


@pytest.mark.parametrize("label", [f"size {gpu.SIZE}", gpu.SMOLVLM, gpu.QWEN])
def test_bytes_of_a_step(tmp_path, label):
    """Of the model's shape: layers and head once, and each step one more slot a row."""
    model, processor = gpu.saved(label, tmp_path)
    sampler = kernels.Sampler(model, processor.banned(model.vocabulary), -1, gpu.DTYPE)
    prompts = processor.batch([data.world_example("train", 1)] * 3)
    N, T, c = 5, prompts.ids.shape[1], model.config.text
    sampler.generate(prompts, 2, N)
    size, D = sampler.model.lm_head.weight.element_size(), c.hidden_size
    wide, narrow = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
    bias = (wide + 2 * narrow) * ("Qwen" in label)
    layer = 2 * D * (wide + narrow) + 3 * D * c.intermediate_size + 2 * D + bias
    weights = c.num_hidden_layers * layer + D + c.vocab_size * D
    slots = sum(3 * (T + 2 * step) for step in range(1, N + 1)) / N
    cache = slots * 2 * narrow * c.num_hidden_layers
    assert gpu.bytes_a_step(sampler, T) == pytest.approx(size * (weights + cache))


def test_decoding_makes_the_same_steps(tmp_path):
    """What is timed as a step is what `generate` does after reading the prompts."""
    model, processor = gpu.saved(gpu.SMOLVLM, tmp_path)
    sampler = kernels.Sampler(model, processor.banned(model.vocabulary), -1, gpu.DTYPE)
    prompts = processor.batch([data.world_example("train", i) for i in range(3)])
    rollouts = sampler.generate(prompts, 2, 6)
    with torch.inference_mode():
        sampler.admit(prompts, slice(0, 3), torch.arange(3))     # the first tokens, anew
        sampler.ids.zero_()
    gpu.decode(sampler)
    assert sampler.ids.movedim(0, 2).flatten(0, 1).tolist() == rollouts.rows()


@pytest.mark.parametrize("label", [gpu.SMOLVLM, gpu.QWEN])
def test_memory_is_measured_where_it_was_computed(tmp_path, label):
    """The README's table is of a picture of 512x512 and a prompt of so many tokens."""
    _, processor = gpu.random_model(gpu.SHAPES[label], tmp_path, gpu.DTYPE)
    batch = processor.batch([gpu.large_example(processor, 384)])
    assert batch.ids.shape == (1, 384)
    assert len(batch.pixels) == (4 * 18 * 18 if "Qwen" in label else 1)
    assert len(processor.encode(" a" * 256)) >= 256
