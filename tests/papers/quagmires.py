"""Quagmires in SFT (arXiv 2510.01624): a high score after SFT does not promise one after RL.

Its sentence: accuracy after RL is predicted badly by accuracy after SFT, and well by the loss on
held-out traces and by pass@k of a large k.

    pass@k = 1 - C(n - c, k) / C(n, k) of n tries, c of them right; the paper: n 256, k 64

Eight SFT checkpoints of one base (budget, epochs, traces), each with the same GRPO after it; their
rank correlations over the eight. Here n 32, k 16, 100 questions of val, on which accuracy after SFT
is pass@1.
"""
import functools

import data
from evaluate import Finding, spearman, summary
from model import load_checkpoint
from tests.papers import answered, mean_logprob, run_paper

CHECKPOINTS = ("--examples 125", "--examples 500", "--examples 8000", "--epochs 1", "--epochs 6",
               "--traces verbose", "--traces answer", "--traces @middle")


def trace_loss(directory, count=200):
    """Mean loss per token on canonical traces of val."""
    return -mean_logprob(directory, data.World("val", size=count))


@functools.cache
def pass_at(directory, count=100, tries=32):
    """-> {k: pass@k}"""
    rows = answered(*load_checkpoint(directory), data.World("val", size=count), tries, 1.0)
    return summary(rows)["pass_at"]


def predicts(a, figure):
    """100 times Spearman's rho of a figure after SFT and of the accuracy after GRPO."""
    cells = FINDING.cells()
    return 100 * spearman([a(cell, figure) for cell in cells["after SFT"]],
                          [a(cell) for cell in cells["after GRPO"]])


FINDING = Finding(
    "Quagmires: which SFT checkpoint does RL make the most of?", "SFT of the middle base",
    CHECKPOINTS, ("test",), {"after SFT": "middle/sft {}", "after GRPO": "middle/sft {}/grpo"},
    {"held-out loss predicts better than accuracy (100 ρ)":
        lambda a: -predicts(a, "trace_loss") - predicts(a, "pass_at_1"),
     "pass@16 predicts better than accuracy (100 ρ)":
        lambda a: predicts(a, "pass_at_16") - predicts(a, "pass_at_1")})
MEASURES = dict(trace_loss=trace_loss, pass_at_1=lambda directory: pass_at(directory)[1],
                pass_at_16=lambda directory: pass_at(directory)[16])

if __name__ == "__main__":
    run_paper(FINDING, None, None, __doc__, **MEASURES)
