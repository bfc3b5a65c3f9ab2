"""python -m tests.gpu: all that only a GPU can tell, in one command of less than ten minutes.

The parts, in this order: tests that use a GPU; sampling by captured steps, by plain ones and by
transformers; whole steps of GRPO and SFT, against TRL where it is installed; peak memory beside the
README's table; the quick study.
Each part's rows are written when it is finished, and the next start does only what is not there.

Without a GPU the same code runs small, to test this script; then nothing is captured, and what
needs a captured step has no number.
"""
import argparse
import functools
import gc
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from unittest import mock

import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import data
import grpo
import kernels
import sft
import speed
from conftest import QWEN_TOKENS
from kernels import Sampler
from model import VLM, fresh, load_processor, read_json, save_checkpoint, write_file
from speed import CUDA, DEVICE, DTYPE, grpo_step, in_turn, run_of
from test_sft import PUBLISHED, memory, qwen, smolvlm

NOT_CAPTURED = "not captured"
TINY = {            # of the same families, for a CPU
    "SmolVLM-256M": smolvlm(64, 96, 2, 2, 1, 2100, 1e5, 0, 2, hidden_size=48, patch_size=16,
                            intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                            image_size=64),
    "Qwen2-VL-2B": qwen("qwen2_vl", 128, 128, 2, 1, 1, 2100, True, hidden_size=128, embed_dim=64,
                        depth=2, num_heads=2)}
if CUDA:
    MACHINE, SIZE, SHAPES = torch.cuda.get_device_name(), "m", {
        name: raw for name, (raw, _) in PUBLISHED.items()}
    ROWS, QWEN_ROWS, GROUP, TOKENS, TIMES, STEPS = (1, 64, 256, 1024), (64,), 8, 64, 2, 8
    PROMPTS, STEP_TOKENS, PIECE = 32, 48, 16                     # of a GRPO step
    CONTEXT, ANSWER = 384, 256                                   # tokens, as in the README's table
    CHOSEN = {"tests/test_kernels.py": "", "tests/test_speed.py": ""}
    PRESET = "quick"
else:
    MACHINE, SIZE, SHAPES = "cpu", "s", {f"{name}, tiny": raw for name, raw in TINY.items()}
    ROWS, QWEN_ROWS, GROUP, TOKENS, TIMES, STEPS = (1, 4), (4,), 2, 4, 1, 2
    PROMPTS, STEP_TOKENS, PIECE = 2, 4, 1
    CONTEXT, ANSWER = 24, 8
    CHOSEN = {"tests/test_kernels.py": "above_zero", "tests/test_speed.py": "operations"}
    PRESET = "smoke"
SMOLVLM, QWEN = (next(name for name in SHAPES if part in name) for part in ("256M", "Qwen2-VL-2B"))
GOALS = {           # what a row's name ends with (a regular expression): above or below what
    "size m, .* captured against plain": ">3", "[^,]*, 1 rows: captured against generate": ">4",
    "[^,]*, 256 rows: captured against generate": ">8",
    "SmolVLM-256M, 256 rows: of the copy's bandwidth": ">30",
    "SmolVLM-256M, 1,024 rows: of the copy's bandwidth": ">60",
    "Qwen2-VL-2B, 64 rows: of the copy's bandwidth": ">60",
    ".*: a GRPO step takes": "<10", "the study, preset quick": "<3", ".*: failed": "<1"}


class Part:
    """What a part has found. limit: seconds, after which it measures nothing more."""
    def __init__(self, name, limit):
        self.name, self.limit, self.begin, self.rows = name, limit, time.monotonic(), []

    def left(self):
        return self.limit + self.begin - time.monotonic()

    def row(self, name, value, unit="", note="", captured=False):
        """captured: of captured steps, which only a GPU has."""
        if captured and not CUDA:
            value, note = None, NOT_CAPTURED
        goal = next((goal for names, goal in GOALS.items() if re.fullmatch(names, name)), None)
        met = None
        if goal and value is not None:
            met = value > float(goal[1:]) if goal[0] == ">" else value < float(goal[1:])
        self.rows.append(dict(part=self.name, name=name, value=value, unit=unit, goal=goal, met=met,
                              device=MACHINE, note=note))
        print(as_text(self.rows[-1]), flush=True)

    def attempt(self, name, measure, *args):
        """measure(part, name, *args), or a row with its error."""
        free()
        try:
            if self.left() < 0:
                raise TimeoutError(f"the part's {self.limit} s are over")
            measure(self, name, *args)
        except Exception as error:
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}"
            self.row(name, None, note=f"error: {' '.join(said.split())[:300]}")


def failed(rows):
    return any(row["note"].startswith("error") for row in rows)


def as_text(row):
    value = "" if row["value"] is None else f"{row['value']:,.4g}"
    met = {True: "met", False: "NOT met", None: ""}[row["met"]]
    return (f"{row['part']:21} {row['name']:62} {value:>9} {row['unit']:12} {row['goal'] or '':>4} "
            f"{met:7} {row['note']}").rstrip()


def free():
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def child(words, limit):
    """Runs a command -> its exit status and what it said; with all that it started it is killed at
    its time limit, and where this process is stopped."""
    with subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.STDOUT, start_new_session=True) as process:
        try:
            said, _ = process.communicate(timeout=max(1, limit))
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, said


# ------------------------------------------------------------------------------------- models
def random_model(raw, directory, dtype):
    """-> a model of a public shape with random weights, its processor with our small tokenizer."""
    tokenizer = data.train_tokenizer([data.base_example(i) for i in range(300)])
    tokenizer.add_special_tokens(QWEN_TOKENS)
    image = data.QwenProcessor.IMAGE if "qwen" in raw["model_type"] else data.IMAGE
    raw = raw | dict(image_token_id=tokenizer.token_to_id(image))
    raw["dtype"] = str(dtype).removeprefix("torch.")
    with torch.device("meta"):
        model = VLM(raw)

    def made(weight):
        new = torch.empty(weight.shape, device=DEVICE, dtype=dtype)
        return new.normal_(std=0.02) if weight.ndim > 1 else new.fill_(1)

    model.load_state_dict({name: made(x) for name, x in model.state_dict().items()}, assign=True)
    model.tie()
    directory = pathlib.Path(directory)
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    return model.to(DEVICE), load_processor(model, directory, None, True)


def saved(label, directory):
    """Writes a model of size m, or of a public shape, for transformers too -> it, its processor."""
    if label in SHAPES:
        model, processor = random_model(SHAPES[label], directory, DTYPE)
    else:
        model, processor = fresh(SIZE, [data.base_example(i) for i in range(1000)], 0)
    save_checkpoint(model, processor, directory)
    path = pathlib.Path(directory) / "generation_config.json"    # else generate looks for each of
    write_file(path, json.dumps(read_json(path) | dict(suppress_tokens=None)))   # 47,000 words
    return model.to(DEVICE), processor


# ------------------------------------------------------------------------------------- parts
def gpu_tests(part):
    for path, chosen in CHOSEN.items():
        part.attempt(path, test_file, chosen)


def test_file(part, path, chosen):
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", path, "-k", chosen]
    _, said = child(words, part.left())
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", said)}
    if "passed" not in counts:
        raise RuntimeError(said[-300:])
    failures = ", ".join(re.findall(r"^(?:FAILED|ERROR) \S+::(\S+)", said, re.M))
    part.row(f"{path}: passed", counts["passed"], "tests")
    part.row(f"{path}: failed", counts.get("failed", 0) + counts.get("error", 0), "tests",
             failures[:300])
    part.row(f"{path}: skipped", counts.get("skipped", 0), "tests")


def decode(sampler):
    """All steps of an answer, once `generate` has read the prompts."""
    with torch.inference_mode():
        sampler.generated.zero_()
        for step in range(1, sampler.shape[2] + 1):
            sampler.advance(step)


def bytes_a_step(sampler, width):
    """What a step has to read, on average: the decoder's weights, and the slots in use."""
    groups, G, N, _ = sampler.shape
    weights = {p for name, p in sampler.model.decoder.named_parameters() if "embed" not in name}
    slot = sampler.cache.nbytes / groups / sampler.cache.shape[3]
    used = groups * (width + G * (N + 1) / 2)
    return sum(p.nbytes for p in weights | {sampler.model.lm_head.weight}) + used * slot


def sampling(part, label, counts, with_generate):
    moved = speed.copy_speed()
    part.row(f"{label}: a copy", moved / 1e9, "GB/s")
    with tempfile.TemporaryDirectory() as directory:
        loaded = saved(label, directory)
        for rows in counts:
            part.attempt(f"{label}, {rows:,} rows", sample_rows, rows, *loaded,
                         directory if with_generate else None, moved)


def sample_rows(part, name, rows, model, processor, directory, moved):
    group = GROUP if rows >= GROUP else 1
    prompts = processor.batch([data.world_example("train", 1)] * (rows // group))
    ask, banned = (prompts, group, TOKENS), processor.banned(model.vocabulary)
    with mock.patch.object(kernels, "CACHE_BYTES", 2 ** 40):     # all rows at once
        captured, plain = (Sampler(model, banned, -1, DTYPE, capture, rows)
                           for capture in (True, False))
        ways = dict(captured=functools.partial(captured.generate, *ask),
                    plain=functools.partial(plain.generate, *ask))
        if directory:
            ways["generate"] = speed.transformers_generate(directory, *ask)
        times = dict(zip(ways, in_turn(*ways.values(), times=TIMES)))
    for way, seconds in times.items():
        part.row(f"{name}: {way}", rows * TOKENS / seconds, "tokens/s", captured=way == "captured")
    for way in list(times)[1:]:
        part.row(f"{name}: captured against {way}", times[way] / times["captured"], "times",
                 captured=True)
    spent = in_turn(*(functools.partial(decode, sampler) for sampler in (captured, plain)))
    part.row(f"{name}: a captured step", 1e3 * spent[0] / TOKENS, "ms", captured=True)
    part.row(f"{name}: a plain step", 1e3 * spent[1] / TOKENS, "ms")
    rate = bytes_a_step(captured, prompts.ids.shape[1]) * TOKENS / spent[0]
    part.row(f"{name}: of the copy's bandwidth", 100 * rate / moved, "%", captured=True)


def imitate(run, *batch):
    return sft.imitate(run, 0, *batch)


def whole_steps(part):
    part.attempt(f"size {SIZE}", whole_steps_of, 0, True)
    part.attempt(SMOLVLM, whole_steps_of, PIECE, False)


def whole_steps_of(part, label, piece, with_trl):
    """piece: questions of a pass; 0: all."""
    rows, seconds = PROMPTS * GROUP, {}
    ways = dict(
        GRPO=(grpo, grpo_step, PROMPTS, f"--prompts {PROMPTS} --group {GROUP} --max-new-tokens "
                                        f"{STEP_TOKENS}"),
        SFT=(sft, imitate, rows, f"--batch {rows}"))
    with tempfile.TemporaryDirectory() as directory:
        saved(label, f"{directory}/model")
        for what, (script, one_step, size, options) in ways.items():
            free()
            run = run_of(script, f"{directory}/model", f"{directory}/{what}",
                         *f"--micro-batch {piece} {options}".split())
            run.sampler.stop = -1                                # every answer has full length
            step, name = functools.partial(one_step, run), f"{label}: {what} step, {rows} rows"
            seconds[what] = step_shares(part, name, run, step, size)
            if with_trl:
                part.attempt(f"{name} against TRL's", against_trl, run, step, size, directory)
            del run, step
    part.row(f"{label}: a GRPO step takes", seconds["GRPO"] / seconds["SFT"], "SFT steps")


def step_shares(part, name, run, step, size):
    """Some steps as `Run.train` makes them -> the seconds of one, without waiting."""
    indices = (sft.batch_indices(2000, size, i, 0) for i in range(STEPS))
    prepared = run.processor.prefetch(data.World("train", "canonical", 2000), indices, DEVICE)
    spent = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        batch = next(prepared)
        waited = time.perf_counter() - begin
        metrics = step(*batch)
        spent.append((waited, metrics.get("rollout_seconds", 0), time.perf_counter() - begin))
    waited, rollout, whole = (sum(column) for column in zip(*spent[STEPS // 2:]))    # warm
    part.row(name, whole / (STEPS - STEPS // 2), "s")
    if rollout:
        part.row(f"{name}: rollout", 100 * rollout / whole, "%")
    what = "rewards and update" if rollout else "update"
    part.row(f"{name}: {what}", 100 * (whole - waited - rollout) / whole, "%")
    part.row(f"{name}: waiting", 100 * waited / whole, "%")
    return (whole - waited) / (STEPS - STEPS // 2)


def against_trl(part, name, run, step, size, directory):
    if not importlib.util.find_spec("trl"):
        part.row(name, None, note="TRL is not installed")
        return
    model, examples = f"{directory}/model", [data.world_example("train", 1)] * size
    prepared = run.processor.prefetch(examples, itertools.repeat(range(size)), DEVICE)
    beside, more = (speed.trl_sft, ()) if run.reference is None else (
        speed.trl_grpo, (GROUP, STEP_TOKENS))
    mine, other = beside(lambda: step(*next(prepared)), model, examples, *more)
    part.row(name, other / mine, "times")


def peaks(part, label):
    room = torch.cuda.get_device_properties(0).total_memory / 1e9 if CUDA else math.inf
    for rank, script in itertools.product((0, 16 if CUDA else 2), (sft, grpo)):
        computed, _ = memory(SHAPES[label], script.__name__, rank)
        name = f"{label}: {script.__name__.upper()} step{', LoRA' if rank else ''}"
        if computed < room:
            part.attempt(name, peak_of, script, SHAPES[label], rank, computed)
        else:
            part.row(name, None, note=f"computed: {computed:.1f} GB, more than the card's")


def peak_of(part, name, *what):
    *shape, computed = what
    note = f"computed: {computed:.1f} GB, 0.6 of them CUDA's own"
    try:
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
            two_steps(*shape)
            held = torch.cuda.max_memory_allocated() / 1e9
        else:
            held = speed.peak(lambda: two_steps(*shape))
    except torch.cuda.OutOfMemoryError:
        held, note = None, f"out of memory; {note}"
    part.row(name, held, "GB", note)


def large_example(processor, tokens):
    """A picture of 512x512 and a prompt of so many tokens."""
    example = data.world_example("train", 1)
    example = replace(example, images=[example.pictures()[0].resize((512, 512))])
    missing = tokens - processor.batch([example]).ids.shape[1]
    return replace(example, question=example.question + " a" * missing)


def two_steps(script, raw, rank):
    """From making the model on, in the setting of the README's table."""
    options = f"--lora-rank {rank} --micro-batch 1 --recompute --max-new-tokens {ANSWER} "
    options += f"--prompts 8 --group {GROUP}" if script is grpo else "--batch 2"
    dtype = torch.bfloat16 if rank and CUDA else torch.float32   # as `starting_model` reads it
    with tempfile.TemporaryDirectory() as directory:
        loaded = model, processor = random_model(raw, directory, dtype)
        run = run_of(script, directory, f"{directory}/run", *options.split(), loaded=loaded)
    run.sampler.stop = -1
    some = [large_example(processor, CONTEXT)] * (8 if script is grpo else 2)
    answers = [processor.encode(" a" * ANSWER)[:ANSWER]] * len(some)
    one_step = grpo_step if script is grpo else imitate
    for _ in range(2):
        one_step(run, some, processor.batch(some), answers)


def study(part):
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as out:
        status, said = child(["evaluate.py", "study", "--preset", PRESET, "--out", out],
                             part.left())
    if status:
        raise RuntimeError(said[-300:])
    part.row(f"the study, preset {PRESET}", (time.monotonic() - begin) / 60, "minutes")


PARTS = {           # name: seconds after which it measures nothing more, what it does
    "tests": (110, gpu_tests),
    "sampling-m": (40, lambda part: sampling(part, f"size {SIZE}", ROWS, True)),
    "sampling-256M": (70, lambda part: sampling(part, SMOLVLM, ROWS, True)),
    "sampling-2B": (15, lambda part: sampling(part, QWEN, QWEN_ROWS, False)),
    "steps": (40, whole_steps),
    **{"memory-" + "-".join(re.findall(r"[\w.]+", label)): (
        10, functools.partial(peaks, label=label)) for label in SHAPES},
    "study": (240, study)}


def parser():
    made = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=pathlib.Path, default=ROOT / "runs" / "gpu.json",
                      help="file for the rows, read at the start (default: runs/gpu.json)")
    made.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", default=list(PARTS),
                      help=f"the parts to do, of {', '.join(PARTS)} (default: all)")
    made.add_argument("--again", nargs="+", choices=PARTS, metavar="PART", default=[],
                      help="parts to do again, though they are finished")
    return made


def main(words=None):
    args = parser().parse_args(words)
    print(f"{MACHINE}, torch {torch.__version__}" if CUDA else
          "No GPU here: the same code, small, on the CPU, where nothing is captured.", flush=True)
    kept = json.loads(args.json.read_text()) if args.json.exists() else []
    elsewhere = [row for row in kept if row["device"] != MACHINE]
    rows = {name: [row for row in kept if row["part"] == name and row["device"] == MACHINE]
            for name in PARTS}
    for name in args.parts:
        if rows[name] and not failed(rows[name]) and name not in args.again:
            continue
        limit, measure = PARTS[name]
        print(f"--- {name}", flush=True)
        part = Part(name, limit if CUDA else 10 * limit)         # a CPU may be busy
        part.attempt(name, lambda part, _: measure(part))
        rows[name] = part.rows
        write_file(args.json, json.dumps(elsewhere + sum(rows.values(), []), indent=1))
    print("\n" + "\n".join(as_text(row) for some in rows.values() for row in some))
    return int(any(failed(rows[name]) for name in args.parts))


if __name__ == "__main__":
    sys.exit(main())
