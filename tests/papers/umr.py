"""SFT or contrastive training of a judge (arXiv 2510.14824): does a description fit a picture?

Its sentence: supervised fine-tuning on the words yes and no ranks better than InfoNCE on the logit
of yes, and it is the weight in its gradient that does it, not the direction.

    gradient = sum over candidates of weight * d direction / d theta
    sft          weight s - label, s = e^{z_y} / (e^{z_y} + e^{z_n})     direction z_y - z_n
    contrastive  weight softmax(z_y) - label over the candidates        direction z_y

Each weight goes with each direction here. A picture has one description that fits; in each
of the others, all different, one thing has another colour, shape or place, but is never a coloured
shape that only ood has. MRR: mean of 1 / rank of the one that fits, by the direction that was
trained. Candidates in training: 4; in ranking: 4, 8 and 16, where chance has an MRR of 0.52, 0.34
and 0.21.
"""
import functools
import random
from dataclasses import dataclass, replace

import torch

import data
import sft
from evaluate import Finding, mean, option
from kernels import own_pieces, summed
from model import load_checkpoint, read_json
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


def changed(rng, scenes):
    """The first scene with one thing of another colour, shape, row or column; unlike all scenes."""
    values = dict(colour=[*data.COLOURS], shape=data.SHAPES, row=range(1, 5), column=range(1, 5))
    while True:
        scene, kind = [*scenes[0]], rng.choice([*values])
        i = rng.randrange(len(scene))
        scene[i] = scene[i]._replace(**{kind: rng.choice(values[kind])})
        alone = len({thing[2:4] for thing in scene}) == len(scene)
        if scene not in scenes and alone and scene[i][:2] not in data.HELD_OUT:
            return scene


def candidates(example, count):
    """The picture with `count` descriptions, the first of which fits."""
    rng, scenes = random.Random(f"{example.id}/{count}"), [example.scene]
    while len(scenes) < count:
        scenes.append(changed(rng, scenes))
    return [replace(example, question=f"{data.IMAGE}{data.describe(scene)} Does this fit?")
            for scene in scenes]


def judge_logits(model, processor, prompts):
    """-> z_y, z_n (B,): logits of «yes» and «no» as the first token of an answer."""
    hidden, _ = model(prompts)
    last = hidden[torch.arange(len(prompts.ids)), prompts.lengths - 1]         # (B, D)
    [yes], [no] = processor.encode("yes"), processor.encode("no")
    return (last @ model.lm_head.weight[[yes, no]].T).float().unbind(1)


def judge_loss(z_yes, z_no, weight, direction):
    """A sum whose gradient is weight times direction. z (pictures, candidates), the first fits."""
    label = torch.eye(z_yes.shape[1], device=z_yes.device)[0]
    share = (z_yes - z_no).sigmoid() if weight == "sft" else z_yes.softmax(1)
    way = z_yes - z_no if direction == "sft" else z_yes
    return ((share - label).detach() * way).sum()


def one_step(run, step, examples, prompts, responses):
    c, sums = run.config, torch.zeros(2, device=run.config.device)             # loss, tokens
    run.zero_grad()
    for start, stop in own_pieces(0, len(examples), c.micro_batch):
        asked = run.processor.batch([some for one in examples[start:stop]
                                     for some in candidates(one, c.candidates)]).to(c.device)
        with run.autocast():
            logits = judge_logits(run.model, run.processor, asked)
        logits = (z.view(-1, c.candidates) for z in logits)
        loss = judge_loss(*logits, c.judge_weight, c.judge_direction) / len(examples)
        loss.backward()
        sums += torch.stack([loss.detach(), asked.lengths.sum()])
    loss, tokens = summed(sums).tolist()
    return dict(loss=loss, grad_norm=run.optimizer_step(loss, examples), tokens=int(tokens))


@torch.no_grad()
def mrr(directory, count, pictures=100):
    """Mean reciprocal rank of the description that fits, on val, by the direction of training."""
    model, processor = load_checkpoint(directory)
    by_yes = read_json(directory / "run.json").get("judge_direction") == "contrastive"
    asked = [candidates(example, count) for example in data.World("val", size=pictures)]
    logits = [judge_logits(model, processor, processor.batch(some)) for some in asked]
    scores = [z_yes if by_yes else z_yes - z_no for z_yes, z_no in logits]
    return mean(1 / (score >= score[0]).sum().item() for score in scores)


def leads(one, other):
    return lambda a: a(one, "mrr_8") - a(other, "mrr_8")


WAYS = {f"{weight} weight, {direction} direction":
        f"{{}}/umr --judge-weight {weight} --judge-direction {direction}"
        for weight in KINDS for direction in KINDS}
SFT, SWAPPED, OTHER, CONTRASTIVE = (cell.format("strong") for cell in WAYS.values())
FINDING = Finding(
    "A judge of pictures: by imitation of yes and no, or by contrast?", "base", ("weak", "strong"),
    ("mrr_8",), WAYS,
    {"SFT ranks better than contrast (strong base, MRR of 8)": leads(SFT, CONTRASTIVE),
     "so does SFT's weight on contrast's direction": leads(SWAPPED, CONTRASTIVE),
     "contrast's weight on SFT's direction ranks worse": leads(CONTRASTIVE, OTHER)})
MEASURES = {f"mrr_{count}": functools.partial(mrr, count=count) for count in (4, 8, 16)}

if __name__ == "__main__":
    run_paper(FINDING, lambda c: sft.main(c, one_step), Config, __doc__, **MEASURES)
