"""PEAR (arXiv 2602.01058): imitation weighted by how likely the model would write what follows.

Its sentence: traces of another model, weighted so in SFT, leave a better start for RL than NLL.

    L   = sum_t sg(G_t) * -log p(y_t),  d_t = clip(log p(y_t) - log q(y_t), -0.08, 0.3)
    G_t = gamma^(T - t) exp(sum_{j > t} d_j), gamma = 0.999                        suffix
    G   = exp(sum_j d_j), for each token; log G in [-10, 5] in both               sequence

q is the model that wrote the trace: its log-probs stand in a file of rollouts. block: the suffix of
a token's block of 4, for each of its tokens; where exactly a block's sum begins was not found, so
that is our choice. With q = p, suffix gives gamma^(T - t). Many right answers of the strong base
have no reasoning, so most suffixes are short here.
"""
import math
from dataclasses import dataclass

import sft
from data import STYLES, DataError
from evaluate import Finding, option
from tests.papers import register, run_paper

GAMMA, BLOCK = 0.999, 4
register("pear", every=30)


def likelier(p, entropy, written):
    """-> d (B, N), 0 for padding and where the writer's log-prob is not known; T - t (B, N)."""
    counted = ~entropy.isnan()
    d = (p.log() - written).clamp(-0.08, 0.3).nan_to_num(0) * counted
    return d, (counted.flip(1).cumsum(1).flip(1) - 1).clamp(min=0)


def suffix(*known):
    d, left = likelier(*known)
    after = d.flip(1).cumsum(1).flip(1) - d
    return (after + left * math.log(GAMMA)).clamp(-10, 5).exp()


def sequence(*known):
    d, _ = likelier(*known)
    return d.sum(1, keepdim=True).clamp(-10, 5).exp().expand_as(d)


def block(*known):
    G = suffix(*known)
    last = [min(t // BLOCK * BLOCK + BLOCK, G.shape[1]) - 1 for t in range(G.shape[1])]
    return G[:, last]


sft.WEIGHTS |= dict(suffix=suffix, sequence=sequence, block=block)


@dataclass
class Config(sft.Config):
    """Options of sft.py."""
    weight: str = option("suffix", "token weight", ("suffix", "sequence", "block"))


def train(c):
    if c.traces in STYLES:
        raise DataError(f"--traces {c.traces}: expected a file of rollouts, of evaluate.py --out: "
                        "it holds the log-probs of the model that wrote them")
    sft.main(c)


WAYS = dict(NLL="sft", suffix="pear", sequence="pear --weight sequence",
            block="pear --weight block")
FINDING = Finding(
    "PEAR: do traces of another model, weighted by how likely they are, prepare better for RL?",
    "weak base after SFT on the strong base's right answers, and GRPO after that",
    ("", "/grpo"), ("test", "ood"),
    {name: f"weak/{way} --traces @strong{{}}" for name, way in WAYS.items()},
    {"after GRPO, suffix weights lead NLL":
        lambda a: a("weak/pear --traces @strong/grpo") - a("weak/sft --traces @strong/grpo")})

if __name__ == "__main__":
    run_paper(FINDING, train, Config, __doc__)
