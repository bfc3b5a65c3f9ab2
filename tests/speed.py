"""python -m tests.speed: how long each thing that has to be fast takes on this machine.

Beside it stands the floor, which no code can beat: its operations at the rate of a large product of
matrices, or what sampling reads (weights and cache) at the rate of a large copy. (On a GPU
captured steps count no operations: there the first floor is too low.) With --against the same is
done with transformers and TRL, on the same checkpoint, prompts and lengths, in the same run; these
libraries are in tests/requirements.txt, and none of them is needed otherwise.
"""
import argparse
import copy
import functools
import itertools
import json
import pathlib
import statistics
import tempfile
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import grpo
import sft
from evaluate import parse
from kernels import Sampler, token_logprobs
from model import fresh, save_checkpoint

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)


def seconds(run):
    """Wall time of run() with all that it started."""
    begin = time.perf_counter()
    run()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def in_turn(*runs, times=9):
    """Median seconds of each, warm, in turn: a machine that slows down slows all of them."""
    rounds = [[seconds(run) for run in runs] for _ in range(times + 1)]
    return [statistics.median(column) for column in zip(*rounds[1:])]


def operations(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def peak(run):
    """The most memory that run() holds at a time beyond what was there before, in GB."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    return max(itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]")) / 1e9


def loss_ways(words, width, tokens):
    """-> the gradients of log-probs in chunks, and with whole logits."""
    hidden, weight = (torch.randn(n, width, device=DEVICE) / 5 for n in (tokens, words))
    targets, inputs = torch.arange(tokens, device=DEVICE), (hidden, weight)

    def whole():
        logp = (hidden @ weight.T).log_softmax(-1)
        entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
        return logp.gather(1, targets[:, None]), entropy

    for x in inputs:
        x.requires_grad_()
    return [lambda way=way: torch.autograd.grad(way()[0].sum(), inputs)
            for way in (lambda: token_logprobs(hidden, weight, targets), whole)]


# ---------------------------------------------------------------------------------- their way
def transformers_generate(directory, batch, group, new_tokens):
    """-> a function that samples as many tokens with transformers."""
    from transformers import AutoModelForImageTextToText
    theirs = AutoModelForImageTextToText.from_pretrained(directory).to(DEVICE, DTYPE)
    batch = batch.to(DEVICE)
    return functools.partial(
        theirs.generate, input_ids=batch.ids, attention_mask=torch.ones_like(batch.ids),
        pixel_values=batch.pixels[:, None].to(DTYPE), num_return_sequences=group, do_sample=True,
        top_k=0, min_new_tokens=new_tokens, max_new_tokens=new_tokens)


def trl_steps(mine, Trainer, Config, directory, rows, reward=None, **options):
    """Median seconds of a step of mine() and of TRL's, loading of data included, in turn."""
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
    times, more = [], dict(reward_funcs=reward) if reward else {}

    class Turns(TrainerCallback):
        def on_step_end(self, *_, **__):
            if CUDA:
                torch.cuda.synchronize()
            now = time.perf_counter()
            if times:
                times[-1].append(now - self.begin)
            times.append([seconds(mine)])
            self.begin = time.perf_counter()

    with tempfile.TemporaryDirectory() as out:
        config = Config(out, max_steps=12, report_to="none", save_strategy="no", use_cpu=not CUDA,
                        bf16=CUDA, disable_tqdm=True, logging_strategy="no",
                        gradient_checkpointing=False, **options)
        Trainer(AutoModelForImageTextToText.from_pretrained(directory), args=config,
                train_dataset=Dataset.from_list(rows), callbacks=[Turns()],
                processing_class=AutoProcessor.from_pretrained(directory), **more).train()
    return [statistics.median(column) for column in zip(*times[1:-1])]


def trl_grpo(mine, directory, examples, group, new_tokens):
    """A GRPO step; the reward counts a letter, which takes no time."""
    from trl import GRPOConfig, GRPOTrainer
    rows = [dict(prompt=[dict(role="user", content=e.question.removeprefix(data.IMAGE))],
                 image=e.images[0]) for e in examples]
    return trl_steps(
        mine, GRPOTrainer, GRPOConfig, directory, rows, num_generations=group, beta=0.01,
        per_device_train_batch_size=len(examples) * group, max_completion_length=new_tokens,
        generation_kwargs=dict(min_new_tokens=new_tokens),
        reward=lambda completions, **_: [letters(c[0]["content"])["reward"] for c in completions])


def trl_sft(mine, directory, examples):
    """An SFT step on these rows."""
    from trl import SFTConfig, SFTTrainer
    rows = [dict(images=e.images, prompt=[dict(role="user", content=[dict(type="image"), dict(
        type="text", text=e.question.removeprefix(data.IMAGE))])], completion=[dict(
            role="assistant", content=[dict(type="text", text=e.response)])]) for e in examples]
    return trl_steps(mine, SFTTrainer, SFTConfig, directory, rows, max_length=None,
                     per_device_train_batch_size=len(examples))


# ------------------------------------------------------------------------------------ our way
def run_of(script, model, out, *options, loaded=None):
    """A run whose steps can be called by hand; its learning rate changes nothing. loaded: the model
    and its processor, where they are not read from the directory `model`."""
    words = f"--init {model} --device {DEVICE} --steps 99 --lr 1e-9 --out {out}".split()
    config = parse(script.Config, [*words, *options])
    model, processor = loaded or sft.starting_model(config, None, None)
    reference = None
    if script is grpo:
        reference = model if config.lora_rank else copy.deepcopy(model).requires_grad_(False)
    return sft.Run(config, model, processor, decay=False, reference=reference)


def letters(response, *_):
    """A reward that takes no time and differs: where all are equal, as with a random model and the
    real one, a step leaves its optimizer out."""
    return dict(reward=float(response.count("a")))


def grpo_step(run, examples, prompts, responses=None):
    rollout = functools.partial(grpo.rollout, reward=letters)
    return grpo.explore(run, 0, examples, prompts, responses, rollout)


def copy_speed():
    """Bytes a second that a copy reads and writes, of more than a GPU's cache holds."""
    source = torch.zeros(2 ** 30 if CUDA else 2 ** 26, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / in_turn(lambda: target.copy_(source))[0]


def machine():
    """-> operations a second of a large product, bytes a second that a large copy moves."""
    x = torch.randn(4096, 4096, device=DEVICE, dtype=DTYPE)
    return 2 * 4096 ** 3 / in_turn(lambda: x @ x)[0], copy_speed()


def measure_losses(row, rate, tokens=1024):
    """Calls row(what, (its value, a rival's), its floor, the rival), as do all that measure."""
    for words, width in ((49_280, 576), (151_936, 1536)):        # SmolVLM-256M's, Qwen2-VL-2B's
        chunks, whole = loss_ways(words, width, tokens)
        name, floor = f"loss of {tokens:,} tokens, {words:,} words", operations(whole) / rate
        row(name, in_turn(chunks, whole, times=3), floor, "whole logits")
        row(name, [peak(chunks), peak(whole)], 4 * words * width / 1e9, "whole logits", "GB")


def measure_steps(c, row, rate, speed):
    shape, ask = f"{c.prompts} x {c.group} x {c.new_tokens}", (c.group, c.new_tokens)
    with tempfile.TemporaryDirectory() as directory:
        if not c.model:
            c.model = f"{directory}/m"
            save_checkpoint(*fresh("m", [data.base_example(i) for i in range(1000)], 0), c.model)
        run = run_of(grpo, c.model, f"{directory}/grpo", *f"--prompts {c.prompts} --group "
                     f"{c.group} --max-new-tokens {c.new_tokens}".split())
        some = [data.world_example("train", 1)] * c.prompts      # all alike, so that nothing pads
        prompts = run.processor.batch(some)
        plain = Sampler(run.model, run.sampler.banned, -1, DTYPE, capture=False)
        run.sampler.stop = -1                                    # and every answer has full length

        def sample(sampler):
            return lambda: sampler.generate(prompts, *ask)

        work, read = operations(sample(plain)) / rate, plain.cache.nbytes / 2
        read += sum(p.nbytes for p in plain.model.decoder.parameters())
        read *= c.new_tokens / speed
        rivals = {"transformers generate": transformers_generate(c.model, prompts, *ask)
                  } if "transformers" in c.against else {}
        rivals |= {"the step not captured": sample(plain)} if CUDA else {}
        for than, rival in rivals.items() or [("", None)]:
            ways = [sample(run.sampler), rival][:1 + bool(rival)]
            row(f"sampler, {shape}", in_turn(*ways), max(work, read), than)

        step = functools.partial(grpo_step, run, some, prompts)
        row(f"GRPO step, {shape}", trl_grpo(step, c.model, some, *ask) if "trl" in c.against
            else in_turn(step), operations(step) / rate, "TRL's GRPOTrainer")
        run = run_of(sft, c.model, f"{directory}/sft")
        some = [data.world_example("train", i) for i in range(64)]
        prepared = iter(run.processor.prefetch(some, itertools.repeat(range(64)), DEVICE))

        def sft_step():
            sft.imitate(run, 0, *next(prepared))

        row("SFT step, 64 rows", trl_sft(sft_step, c.model, some) if "trl" in c.against
            else in_turn(sft_step), operations(sft_step) / rate, "TRL's SFTTrainer")


def parser():
    made = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", help="an Idefics3 or SmolVLM (default: random, size m)")
    made.add_argument("--against", nargs="*", choices=("transformers", "trl"), default=[],
                      help="libraries to compare with, which have to be installed")
    for option, default, doc in (("prompts", 32, "questions of a GRPO step"),
                                 ("group", 8, "rollouts of a question"),
                                 ("new-tokens", 48, "tokens of a rollout")):
        made.add_argument(f"--{option}", type=int, default=default,
                          help=f"{doc} (default: %(default)s)")
    made.add_argument("--json", type=pathlib.Path, help="file for the rows")
    return made


def main():
    args, rows = parser().parse_args(), []

    def row(name, values, floor, than, unit="s"):
        mine, *rival = values
        rows.append(dict(name=name, value=mine, unit=unit, floor=floor, rival=rival, than=than))
        compared = f"{rival[0] / mine:8.2f} x less than {than}" if rival else ""
        print(f"{name:38}{mine:9.3f} {unit:2}  floor {floor:7.3f} {compared}", flush=True)

    rate, speed = machine()
    print(f"{DEVICE}: {rate / 1e12:.2f} TFLOP/s in a product, {speed / 1e9:.0f} GB/s in a copy")
    measure_losses(row, rate)
    measure_steps(args, row, rate, speed)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
