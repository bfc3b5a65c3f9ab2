"""SFT or contrastive training of a judge (arXiv 2510.14824): does a description fit a picture?

Its sentence: supervised fine-tuning on the words yes and no ranks better than InfoNCE on the logit
of yes, and it is the weight in its gradient that does it, not the direction.

    gradient = sum over candidates of weight * d direction / d theta
    sft          weight s - label, s = e^{z_y} / (e^{z_y} + e^{z_n})     direction z_y - z_n
    contrastive  weight softmax(z_y) - label over the candidates        direction z_y

Each weight goes with each direction here. A picture has one description that fits; in the others
one thing has another colour, shape or place. MRR: mean of 1 / rank of the one that fits, by z_y -
z_n. Candidates in training: 4; in ranking: 4, 8 and 16.
"""
import functools
import random
from dataclasses import dataclass, replace

import torch

import data
import sft
from evaluate import Finding, mean, option
from model import load_checkpoint
from tests.papers import register, run_paper

register("umr", every=30)
KINDS = ("sft", "contrastive")


@dataclass
class Config(sft.Config):
    """Options of sft.py, and three more."""
    judge_weight: str = option("sft", "of a candidate in the gradient", KINDS)
    judge_direction: str = option("sft", "of the gradient", KINDS)
    candidates: int = option(4, "descriptions a picture", least=2)
    batch: int = option(16, "pictures per step", least=1)


def changed(rng, things):
    """The scene with one thing of another colour, shape, row or column."""
    values = dict(colour=[*data.COLOURS], shape=data.SHAPES, row=range(1, 5), column=range(1, 5))
    while True:
        i, kind = rng.randrange(len(things)), rng.choice([*values])
        scene = [*things]
        scene[i] = things[i]._replace(**{kind: rng.choice(values[kind])})
        if scene != things and len({thing[2:4] for thing in scene}) == len(scene):
            return scene


def candidates(example, count):
    """The picture with `count` descriptions, the first of which fits."""
    rng = random.Random(f"{example.id}/{count}")
    scenes = [example.scene, *(changed(rng, example.scene) for _ in range(count - 1))]
    return [replace(example, question=f"{data.IMAGE}{data.describe(scene)} Does this fit?")
            for scene in scenes]


def judge_logits(model, processor, examples, device="cpu"):
    """-> z_y, z_n (B,): logits of «yes» and «no» as the first word of an answer."""
    prompts = processor.batch(examples).to(device)
    hidden, _ = model(prompts)
    last = hidden[torch.arange(len(examples)), prompts.lengths - 1]            # (B, D)
    words = [processor.encode(processor.LEAD + word)[0] for word in ("yes", "no")]
    return (last @ model.lm_head.weight[words].T).float().unbind(1)


def judge_loss(z_yes, z_no, weight, direction):
    """A sum whose gradient is weight times direction. z (pictures, candidates), the first fits."""
    label = torch.zeros_like(z_yes)
    label[:, 0] = 1
    share = (z_yes - z_no).sigmoid() if weight == "sft" else z_yes.softmax(1)
    way = z_yes - z_no if direction == "sft" else z_yes
    return ((share - label).detach() * way).sum()


def one_step(run, step, examples, prompts, responses):
    c = run.config
    asked = [some for one in examples for some in candidates(one, c.candidates)]
    run.zero_grad()
    with run.autocast():
        logits = judge_logits(run.model, run.processor, asked, c.device)
    z_yes, z_no = (z.view(-1, c.candidates) for z in logits)
    loss = judge_loss(z_yes, z_no, c.judge_weight, c.judge_direction) / len(asked)
    loss.backward()
    chosen = (z_yes - z_no).argmax(1) == 0
    norm = run.optimizer_step(loss.item(), examples)
    return dict(loss=loss.item(), grad_norm=norm, chosen=chosen.float().mean().item(),
                tokens=len(asked))


@torch.no_grad()
def mrr(directory, count=8, pictures=100):
    """Mean reciprocal rank of the description that fits, on val."""
    model, processor = load_checkpoint(directory)
    ranks = []
    for example in data.World("val", size=pictures):
        z_yes, z_no = judge_logits(model, processor, candidates(example, count))
        ranks.append((z_yes - z_no >= z_yes[0] - z_no[0]).sum().item())
    return mean(1 / rank for rank in ranks)


WAYS = {f"{weight} weight, {direction} direction":
        f"{{}}/umr --judge-weight {weight} --judge-direction {direction}"
        for weight in KINDS for direction in KINDS}
SFT, SWAPPED, OTHER, CONTRASTIVE = (cell.format("strong") for cell in WAYS.values())
FINDING = Finding(
    "A judge of pictures: by imitation of yes and no, or by contrast?", "base", ("weak", "strong"),
    ("test",), WAYS,
    {"SFT ranks better than contrast (MRR of 8)":
         lambda a: a(SFT, "mrr_8") - a(CONTRASTIVE, "mrr_8"),
     "SFT's weight on contrast's direction does, too":
         lambda a: a(SWAPPED, "mrr_8") - a(CONTRASTIVE, "mrr_8"),
     "contrast's weight on SFT's direction does not":
         lambda a: a(CONTRASTIVE, "mrr_8") - a(OTHER, "mrr_8")})
MEASURES = dict(mrr_4=functools.partial(mrr, count=4), mrr_8=mrr,
                mrr_16=functools.partial(mrr, count=16))

if __name__ == "__main__":
    run_paper(FINDING, lambda c: sft.main(c, one_step), Config, __doc__, **MEASURES)
