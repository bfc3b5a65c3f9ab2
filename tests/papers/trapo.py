"""TRAPO (arXiv 2512.17636): reinforcement learning whose rollouts begin with an expert's tokens.

Its sentence: trust-region SFT on those prefixes and RL on what follows beats GRPO, SFT and SFT then
GRPO; with plain NLL on the prefixes training collapsed.

    TrSFT   -p_t / sg(max(p_t, alpha)), alpha = 0.1: equals NLL where p_t >= alpha
    RL      A_i = r_i - mean of its group; no KL, groups of equal reward dropped

Of 8 rollouts {4, 2, 1, 1} begin with {0, 0.2, 0.5, 1} of the trace; each of the last three micro-
groups does so where, of its question's rollouts before it, a share under {0.5, 0.7, 0.9} is right,
else it is free. TrSFT's tokens are tokens of the one sum of weight * grad log p: their weight
stands where others have an advantage. Not published: whether prefixes of dropped groups count. Here
they do not. `reward` in metrics.jsonl counts what was helped, too; `sampled` is of all generations.
RL here differs from this repository's GRPO in more than prefixes: «without prefixes» has its
options alone. All but SFT alone take as many steps as cost what 100 steps of GRPO do, about
2.0e12 FLOP. Only plain GRPO has a KL.
"""
from dataclasses import dataclass

import torch

import grpo
from data import DataError
from evaluate import Finding, option
from sft import WEIGHTS
from tests.papers import BAR, begin_with, recorded, register, run_paper

SIZES, SHARES, THRESHOLDS = (4, 2, 1, 1), (0.0, 0.2, 0.5, 1.0), (2.0, 0.5, 0.7, 0.9)
register("trapo")


@dataclass
class Config(grpo.Config):
    """Options of grpo.py, and one more."""
    prefix_loss: str = option("trsft", "on given tokens", ("trsft", "nll"))
    algorithm: str = option("dr_grpo", "preset of advantage to tis", tuple(grpo.ALGORITHMS))
    filter: str = option("drop", "groups of equal reward", ("keep", "drop"))
    aggregation: str = option("token", "what is averaged over", ("sequence", "token", "constant"))


def rollout(run, step, examples, prompts):
    """grpo.rollout, once for each micro-group: only then is it known what the next one begins with.
    Noise depends on question and member alone, so earlier members say the same again."""
    shares, start, sampled, rights = torch.zeros(len(examples), sum(SIZES)), 0, 0, []
    for size, share, bar in zip(SIZES, SHARES, THRESHOLDS):
        if start:
            before = torch.tensor(rights).view(shares.shape)[:, :start]
            shares[before.mean(1) < bar, start:start + size] = share
        rights, given = [], begin_with(run, examples, shares).to(run.config.device)
        rollouts, mask, advantage, metrics = grpo.rollout(run, step, examples, prompts, given,
                                                          recorded(rights))
        sampled += metrics["tokens"] - (given >= 0).sum().item()
        start += size
    told = (given >= 0).flatten(0, 1)                                          # (R, N)
    weight = WEIGHTS[run.config.prefix_loss](rollouts.logprobs.exp())
    return rollouts, mask, weight.where(told, advantage), metrics | dict(
        sampled=sampled, given=told.sum().item() / metrics["tokens"])


def train(c):
    if c.group != sum(SIZES):
        raise DataError(f"--group {c.group}: expected {sum(SIZES)}, of micro-groups {SIZES}")

    def one_step(*batch):
        return grpo.explore(*batch, rollout=rollout)

    grpo.main(c, one_step)


PLAIN = "{}/grpo --algorithm dr_grpo --filter drop --aggregation token --steps 130"
TRAPO, NLL = "{}/trapo --steps 80", "{}/trapo --prefix-loss nll --steps 80"
FINDING = Finding(
    "TRAPO: do rollouts that begin with an expert's tokens beat SFT, then GRPO?", "base",
    ("weak", "strong"), ("test", "ood"),
    {"SFT": "{}/sft", "GRPO": "{}/grpo", "without prefixes": PLAIN, "SFT → GRPO": BAR,
     "TRAPO": TRAPO, "NLL on prefixes": NLL},
    {f"TRAPO leads {name} (weak base)":
        lambda a, cell=cell: a(TRAPO.format("weak")) - a(cell.format("weak"))
     for name, cell in {"GRPO": "{}/grpo", "its RL without prefixes": PLAIN, "SFT → GRPO": BAR,
                        "NLL on prefixes": NLL}.items()})

if __name__ == "__main__":
    run_paper(FINDING, train, Config, __doc__)
