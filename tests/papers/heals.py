"""RL heals what SFT forgot out of distribution (arXiv 2509.12235).

Its sentence: ood accuracy peaks early in SFT and then falls, and RL brings it back; in SFT singular
values stay and singular vectors turn, and putting back an early model's vectors restores ood.

    angles between W and W':  arccos of the singular values of UᵀU' and of VᵀV'
    restored:                 the late W with its k first singular vectors those of the early W
                              and the others made orthogonal to these; its values stay

SFT of 1, 4 and 12 epochs, each with a schedule of its own, for checkpoints of one run; restored are
the longer ones, by vectors of the shortest; where that has not the higher ood, there is nothing to
heal. The k of the paper was not found: a quarter of the vectors.
"""
import torch

from data import World
from evaluate import Finding, summary
from model import load_checkpoint
from tests.papers import answered, run_paper

EPOCHS, SHARE = (1, 4, 12), 0.25


def matrices(model):
    """{name: weight} of the layers' matrices."""
    return {name: p for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name}


def angles(one, other):
    """Principal angles in degrees between the singular vectors of two matrices, left and right,
    those of the larger half of the singular values."""
    (U, _, Vt), (A, _, Bt) = torch.linalg.svd(one), torch.linalg.svd(other)
    k = min(one.shape) // 2
    cosines = [torch.linalg.svdvals(A[:, :k].T @ U[:, :k]), torch.linalg.svdvals(Bt[:k] @ Vt[:k].T)]
    return torch.cat(cosines).clamp(-1, 1).arccos().rad2deg()


def replaced(late, early, k):
    """Columns: the first k of early, then those of late, each made orthogonal to all before it."""
    Q, R = torch.linalg.qr(torch.cat([early[:, :k], late[:, k:]], 1))
    return Q * R.diagonal().sign()


def restored(late, early, k):
    """late, with its first k singular vectors, left and right, those of early."""
    (U, S, Vt), (A, _, Bt) = (torch.linalg.svd(one, full_matrices=False) for one in (late, early))
    return replaced(U, A, k) * S @ replaced(Vt.T, Bt.T, k).T


def base_of(directory):
    """The model that all of this seed's trainings here began with."""
    return load_checkpoint(directory.parent / "base")[0]


@torch.no_grad()
def turned(directory):
    """Mean angle by which a training has turned singular vectors."""
    ours, base = (matrices(m) for m in (load_checkpoint(directory)[0], base_of(directory)))
    return torch.cat([angles(base[name], p) for name, p in ours.items()]).mean().item()


@torch.no_grad()
def stretched(directory):
    """Mean share by which it has changed singular values."""
    ours, base = (matrices(m) for m in (load_checkpoint(directory)[0], base_of(directory)))
    values = torch.linalg.svdvals
    pairs = [(values(base[name]), values(p)) for name, p in ours.items()]
    return torch.cat([(new - old).abs() / old.mean() for old, new in pairs]).mean().item()


@torch.no_grad()
def restored_ood(directory, count=1000):
    """Accuracy on ood with the early model's first singular vectors put back."""
    model, processor = load_checkpoint(directory)
    early = matrices(load_checkpoint(directory.parent / "strong-sft-epochs-1")[0])
    for name, p in matrices(model).items():
        p.copy_(restored(p, early[name], round(SHARE * min(p.shape))))
    return summary(answered(model, processor, World("ood", size=count)))["accuracy"]


FINDING = Finding(
    "Does RL heal what SFT forgets out of distribution?", "epochs of SFT (strong base)", EPOCHS,
    ("test", "ood"),
    {"SFT": "strong/sft --epochs {}", "SFT → GRPO": "strong/sft --epochs {}/grpo"},
    {"SFT of 1 epoch leads 12 on ood":
        lambda a: a("strong/sft --epochs 1", "ood") - a("strong/sft --epochs 12", "ood"),
     "GRPO after 12 epochs gains on ood": lambda a:
        a("strong/sft --epochs 12/grpo", "ood") - a("strong/sft --epochs 12", "ood"),
     "the early model's vectors restore ood": lambda a:
        a("strong/sft --epochs 12", "restored_ood") - a("strong/sft --epochs 12", "ood")})
MEASURES = dict(turned=turned, stretched=stretched, restored_ood=restored_ood)

if __name__ == "__main__":
    run_paper(FINDING, None, None, __doc__, **MEASURES)
