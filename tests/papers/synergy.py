"""The synergy dilemma (arXiv 2507.07562): ways to have SFT and RL in one training.

Its sentence: interleaved, progressive and mixed trainings, and merged models, do not add up: each
lies between SFT and RL, or behind SFT then RL.

    interleaved   a step of SFT, a step of RL, in turn
    progressive   rollouts begin with a share 1 - 2 step / steps of the trace, later without
    mixed         one rollout of each group is the trace, with weight 1 on its tokens, as in SFT
    merged        theta = (1 - lambda) theta_SFT + lambda theta_RL, both from one base

Buckets of difficulty L1 to L5: questions that the base solves in at least 12, 8, 5, 2 of 16 tries,
or seldomer. Given tokens of progressive rollouts have no weight, so without a second half that is
free the first ones would hardly be learnt. Rates of the two kinds of steps, and lambda, were not
found: GRPO's rate; one half. All mixtures, and SFT → GRPO beside them, are without KL, and take as
many steps as cost what 100 steps of GRPO do, about 2.0e12 FLOP. `reward` in metrics.jsonl counts
rollouts that were helped, too.
"""
import functools
import pathlib
import shlex
from dataclasses import dataclass

import torch

import data
import grpo
import sft
from evaluate import Finding, grouped, mean, option, run_command
from model import load_checkpoint, save_checkpoint, write_file
from tests.papers import BAR, answered, begin_with, options_of, register, run_paper

LEVELS = dict(L1=12, L2=8, L3=5, L4=2, L5=0)
register("synergy")


@dataclass
class Config(grpo.Config):
    """Options of grpo.py, and three more."""
    mode: str = option("interleaved", "how", ("interleaved", "progressive", "mixed", "merged"))
    weight: str = option("nll", "token weight of interleaved steps", tuple(sft.WEIGHTS))
    beta: float = option(0.0, "weight of the KL: it would pull on given tokens, too")
    merge: float = option(0.5, "lambda of --mode merged", most=1)


def guided(run, step, examples, prompts):
    """grpo.rollout that begins with what --mode says."""
    c, shares = run.config, torch.zeros(len(examples), run.config.group)
    if c.mode == "progressive":
        shares[:] = max(0, 1 - 2 * step / c.steps)
    else:
        shares[:, -1] = 1
    given = begin_with(run, examples, shares).to(c.device)
    rollouts, mask, advantage, metrics = grpo.rollout(run, step, examples, prompts, given)
    weight = float(c.mode == "mixed") * torch.ones_like(rollouts.logprobs)     # (R, N)
    metrics["sampled"] = metrics["tokens"] - (given >= 0).sum().item()
    return rollouts, mask, weight.where((given >= 0).flatten(0, 1), advantage), metrics


def one_step(run, step, *batch):
    if run.config.mode != "interleaved":
        return grpo.explore(run, step, *batch, rollout=guided)
    return sft.imitate(run, step, *batch) if step % 2 else grpo.explore(run, step, *batch)


def merged(one, other, share):
    """Into the first of two models, in place: (1 - share) of itself, and a share of the other."""
    with torch.no_grad():
        for p, q in zip(one.parameters(), other.parameters()):
            p.lerp_(q, share)


def train(c):
    if c.mode != "merged":
        return grpo.main(c, one_step)
    shared = options_of(c, sft.RunConfig, "steps", "lr")
    out = shlex.quote(c.out)
    run_command(f"python sft.py --out {out}/sft --resume{shared}")
    run_command(f"python grpo.py --out {out}/grpo --resume{options_of(c, grpo.Config)}")
    model, processor = load_checkpoint(f"{c.out}/sft")
    merged(model, load_checkpoint(f"{c.out}/grpo")[0], c.merge)
    save_checkpoint(model, processor, c.out)
    write_file(f"{c.out}/run.json", pathlib.Path(c.out, "grpo", "run.json").read_text())


def level(rights):
    """The bucket of a question, by how many of 16 tries were right."""
    return next(name for name, least in LEVELS.items() if sum(rights) >= least)


@functools.cache
def levels_of(directory, count=300):
    """-> the bucket of each of the first questions of the test, by a base's tries."""
    tries = answered(*load_checkpoint(directory), data.World("test", size=count), 16, 1.0)
    return [level([row["correct"] for row in answers])
            for answers in grouped(tries, "index").values()]


def at_level(directory, name):
    """Accuracy in a bucket; None where it is empty."""
    base = directory.parent / "base" / ("step-800" if directory.name.startswith("weak") else "")
    levels = levels_of(base)
    rights = [row["correct"] for row in data.read_jsonl(directory / "answers.jsonl")
              if row["split"] == "test" and levels[row["index"]:][:1] == [name]]
    return mean(rights) if rights else None


STEPS = dict(interleaved=200, progressive=125, mixed=125, merged=82)
MODES = {mode: f"{{}}/synergy --mode {mode} --steps {steps}" for mode, steps in STEPS.items()}
FINDING = Finding(
    "Synergy: does any way to mix SFT and RL beat one after the other?", "base",
    ("weak", "strong"), ("test", "ood"),
    {"SFT": "{}/sft", "GRPO": "{}/grpo", "SFT → GRPO": BAR, **MODES},
    {f"{mode} leads SFT → GRPO (weak base)":
        lambda a, cell=cell.format("weak"): a(cell) - a(BAR.format("weak"))
     for mode, cell in MODES.items()})
MEASURES = {name: functools.partial(at_level, name=name) for name in LEVELS}

if __name__ == "__main__":
    run_paper(FINDING, train, Config, __doc__, **MEASURES)
