"""MIFO (arXiv 2510.04454): RL whose failures become SFT's lessons, without undoing what RL did.

Its sentence: SFT on a buffer of RL's failures, of the tokens of the highest entropy alone and with
the parameters frozen that RL moved most, beats interleaving all of SFT with RL.

    C_i = alpha C_{i-1} + |theta after RL's phase - theta before|; frozen: the largest share of C

Questions of which a group solves less than the threshold go into the buffer with their trace, once
each phase. Interval, share, alpha, threshold were not published: 5 steps a phase, 0.1, 0.5, 0.25.
A resumed run begins with an empty buffer, and nothing frozen. Interleaving takes turns each step.
SFT's steps have GRPO's rate; all are without KL, and take the compute of 100 steps of GRPO.
"""
from dataclasses import dataclass

import torch

import grpo
import sft
from evaluate import Finding, option
from tests.papers import BAR, recorded, register, run_paper, synergy

PHASE, FROZEN, ALPHA, THRESHOLD = 5, 0.1, 0.5, 0.25
register("mifo")


@dataclass
class Config(grpo.Config):
    """Options of grpo.py, without its KL, and two more."""
    weight: str = option("entropy", "token weight of SFT's phases", tuple(sft.WEIGHTS))
    beta: float = option(0.0, "weight of the KL in the loss")
    frozen: float = option(FROZEN, "share of the parameters that SFT leaves as they are", most=1)


class Mifo:
    """A step, and what it remembers of those before: phases of RL and of SFT in turn."""
    def __init__(self):
        self.buffer, self.moved, self.start = {}, {}, {}

    def rollout(self, run, step, examples, prompts):
        """grpo.rollout that puts what was not solved into the buffer."""
        rights = []
        found = grpo.rollout(run, step, examples, prompts, reward=recorded(rights))
        shares = torch.tensor(rights).view(len(examples), -1).mean(1)
        self.buffer |= {one.id: one for one, share in zip(examples, shares) if share < THRESHOLD}
        return found

    def remember(self, run):
        """At the end of a phase of RL: how far it has moved each entry."""
        for name, p in run.trained.items():
            way = (p.detach() - self.start[name]).abs()
            self.moved[name] = ALPHA * self.moved.get(name, 0) + way

    def frozen(self, share):
        """{name: which entries} of the share that RL moved most."""
        if not (share and self.moved):
            return {}
        everything = torch.cat([moved.flatten() for moved in self.moved.values()])
        count = max(1, round(share * len(everything)))
        least = everything.kthvalue(len(everything) - count + 1).values
        return {name: (moved >= least) & (moved > 0) for name, moved in self.moved.items()}

    def __call__(self, run, step, examples, prompts, responses):
        (phase, place), B = divmod(step, PHASE), len(examples)
        before = {name: p.detach().clone() for name, p in run.trained.items()}
        if place == 0 or not self.start:
            self.start = before
        if phase % 2 == 0 or not self.buffer:        # without a failure there is no lesson
            metrics = grpo.explore(run, step, examples, prompts, responses, self.rollout)
            if place == PHASE - 1:
                self.remember(run)
            return metrics
        failed = [*self.buffer.values()]
        lessons = [failed[(place * B + i) % len(failed)] for i in range(min(B, len(failed)))]
        metrics = sft.imitate(run, step, *run.processor.prepare(lessons, range(len(lessons))))
        with torch.no_grad():        # put back: both optimizers move what has no gradient
            for name, entries in self.frozen(run.config.frozen).items():
                run.trained[name][entries] = before[name][entries]
        if place == PHASE - 1:
            self.buffer = {}
        return metrics


def train(c):
    grpo.main(c, Mifo())


MIFO, UNFROZEN = "{}/mifo --steps 210", "{}/mifo --frozen 0 --steps 210"
FINDING = Finding(
    "MIFO: does RL lose less where SFT learns its failures alone?", "base",
    ("weak", "strong"), ("test", "ood"),
    {"SFT → GRPO": BAR, "interleaved": synergy.MODES["interleaved"], "MIFO": MIFO,
     "nothing frozen": UNFROZEN},
    {f"MIFO leads {name} (weak base)":
        lambda a, cell=cell: a(MIFO.format("weak")) - a(cell.format("weak"))
     for name, cell in {"interleaving": synergy.MODES["interleaved"], "SFT → GRPO": BAR,
                        "MIFO without freezing": UNFROZEN}.items()})

if __name__ == "__main__":
    run_paper(FINDING, train, Config, __doc__)
