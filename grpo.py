"""Reinforcement learning with a rule-based reward: exploration, by GRPO and its family.

SFT and reinforcement learning follow one gradient, the sum over tokens of

    weight_t * grad log p(y_t | picture, question, y_<t)

Imitation (sft.py) weighs somebody's answer, each token by w_t >= 0; exploration (this file)
weighs the model's own answers, each by its advantage, of either sign. Here

    A_i  = (r_i - mean_group) / (std_group + 1e-4)              how much better than its siblings
    loss = mean_i 1/|y_i| sum_t -min(w_t A_i, clip(w_t, 1-e, 1+e) A_i) + beta * KL_t
    w_t  = exp(log p(y_t) - log p_old(y_t))                      1 with one update per rollout

Each choice is an option, and --algorithm is a preset of them. A loss near zero is normal here:
watch reward, advantage and gradient norm. --minibatches 2 makes the ratio, and clipping, real.
Departs from the paper: Muon beside AdamW. Its group size and format reward were not found: 8, 0.1.
"""
import copy
import math
import re
import time
from dataclasses import dataclass

import torch

import data
from evaluate import grade, load_examples, mean, option, run_script
from kernels import own_pieces, pieces, summed
from model import CheckpointError, without_adapters
from sft import Run, RunConfig, starting_model

GRPO = dict(advantage="group", ratio="token", clip="ppo", clip_low=0.2, clip_high=0.2,
            aggregation="sequence", kl="k3", beta=0.01, filter="keep", overlong="keep", tis=0.0)
ALGORITHMS = {
    "grpo": GRPO,
    "dapo": GRPO | dict(clip_high=0.28, aggregation="token", beta=0.0, filter="drop",
                        overlong="penalty"),
    "dr_grpo": GRPO | dict(advantage="centred", aggregation="constant", beta=0.0),
    "gspo": GRPO | dict(ratio="sequence", clip_low=3e-4, clip_high=4e-4, beta=0.0),
    "cispo": GRPO | dict(clip="cispo", clip_high=5.0, aggregation="token", beta=0.0),
    "rloo": GRPO | dict(advantage="rloo", aggregation="token", beta=0.0),
}


def reward(response, length, example, answer_format, c):
    """-> the reward and its parts; nan where the grader itself fails (then the advantage is 0)."""
    try:
        verdict = grade(response, example, answer_format)
    except Exception:                # a bug in a grader must not teach the policy anything
        return dict(reward=math.nan)
    parts = dict(accuracy=float(verdict.correct), parsed=float(verdict.parsed),
                 format=float(verdict.formatted))
    if c.grader == "lenient":        # a fault of public reward functions: any number may be it
        numbers = re.findall(r"\d+", data.extract_answer(response))
        parts["accuracy"] = float(verdict.correct or example.answer in numbers)
    if c.overlong == "penalty":      # DAPO, eq. 13
        parts["overlong"] = min((c.max_new_tokens - length) / c.overlong_buffer - 1, 0.0)
    total = parts["accuracy"] + c.format_weight * parts["format"] + parts.get("overlong", 0.0)
    return dict(parts, reward=total)


def group_advantages(rewards, kind):
    """GRPO's critic: how much better than its siblings each rollout did. (B, G); 0 for a nan, which
    is no sibling, and exactly 0 where all rewards are equal."""
    rewards = rewards - rewards.nan_to_num(math.inf).amin(1, keepdim=True)
    advantage = (rewards - rewards.nanmean(1, keepdim=True)).nan_to_num()
    others = (rewards.isfinite().sum(1, keepdim=True) - 1).clamp(min=1)                  # (B, 1)
    if kind == "group":              # Dr. GRPO leaves this out: it favours very easy and very hard
        std = (advantage.square().sum(1, keepdim=True) / others).sqrt()
        advantage = advantage / (std + 1e-4)
    elif kind == "rloo":             # minus the mean of the others
        advantage = advantage * (others + 1) / others
    return advantage


def surrogate(logprob, old, advantage, mask, c):
    """Loss of each token before aggregation. (R, N); advantage (R, 1)."""
    log_w = (logprob - old) * mask
    if c.ratio == "sequence":        # GSPO: the mean over the answer, for each of its tokens
        log_w = log_w.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1) * mask
    w = log_w.exp()
    if c.clip == "cispo":
        return -w.detach().clamp(max=c.clip_high) * advantage * logprob
    clipped = w.clamp(1 - c.clip_low, 1 + c.clip_high)
    return -torch.minimum(w * advantage, clipped * advantage)


def kl_estimate(logprob, reference, kind):
    """Per-token KL to the reference (Schulman): k2 = d²/2, k3 = exp(-d) + d - 1. Not k1 = d: in
    expectation its gradient is zero."""
    d = logprob - reference
    return {"k2": d.square() / 2, "k3": (-d).exp() + d - 1}[kind]


def token_weights(mask, how, longest):
    """What each token's loss counts in the loss of a minibatch. (R, N) -> (R, N), of sum 1 but for
    «constant». Rows without a counted token count nowhere else."""
    lengths = mask.sum(1, keepdim=True, dtype=torch.double)                    # (R, 1)
    if how == "sequence":
        return mask / lengths.clamp(min=1) / (lengths > 0).sum().clamp(min=1)
    return mask / (lengths.sum().clamp(min=1) if how == "token" else len(mask) * longest)


def token_loss(logprob, old, sampled, reference, advantage, mask, c):
    """The objective, token by token. All (R, N), advantage (R, 1) -> (R, N)."""
    loss = surrogate(logprob, old, advantage, mask, c)
    if c.tis:                        # sampler and trainer differ: truncated importance sampling
        loss = loss * (old - sampled).exp().clamp(max=c.tis).detach()
    if c.beta:
        loss = loss + c.beta * kl_estimate(logprob, reference, c.kl)
    return loss


@dataclass
class Config(RunConfig):
    """Options of grpo.py. Those from advantage to tis come from --algorithm where none is given."""
    steps: int = option(None, "rollout steps (default: 100, or one pass if longer)", least=1)
    algorithm: str = option("grpo", "preset of advantage to tis", tuple(ALGORITHMS))
    advantage: str = option(None, "centred: no std; rloo: no self", ("group", "centred", "rloo"))
    ratio: str = option(None, "of a token, or of a sequence (GSPO)", ("token", "sequence"))
    clip: str = option(None, "of the objective (PPO), or of the weight (CISPO)", ("ppo", "cispo"))
    clip_low: float = option(None, "the ratio is clipped below 1 minus this", most=1)
    clip_high: float = option(None, "and above 1 plus this; CISPO: the largest weight")
    aggregation: str = option(None, "what is averaged over", ("sequence", "token", "constant"))
    kl: str = option(None, "estimator of the KL to the initial model", ("k2", "k3"))
    beta: float = option(None, "weight of that KL in the loss")
    filter: str = option(None, "groups of equal reward", ("keep", "drop"))
    overlong: str = option(None, "truncated answers; DAPO: penalty", ("keep", "mask", "penalty"))
    tis: float = option(None, "cap of truncated importance sampling; 0: off")
    overlong_buffer: int = option(12, "tokens over which the penalty grows", least=1)
    log_kl: bool = option(False, "measure the KL to the initial model where beta is 0, too")
    grader: str = option("strict", "lenient: any number rewards", ("strict", "lenient"))
    format_weight: float = option(0.1, "what the format adds to the reward")
    prompts: int = option(32, "questions per step", least=1)
    group: int = option(8, "rollouts per question", least=2)
    minibatches: int = option(1, "optimizer steps per rollout", least=1)
    temperature: float = option(1.0, "of sampling, in the loss too", least=1e-3)

    def __post_init__(self):
        for name, value in ALGORITHMS[self.algorithm].items():
            if getattr(self, name) is None:
                setattr(self, name, value)


def rollout(run, step, examples, prompts, given=None, reward=reward):
    """Samples a group of answers to each question and rewards them -> Rollouts of R = B * G rows,
    the tokens that the loss counts (R, N), the advantage of each row (R, 1), metrics. given: what
    answers begin with, see Sampler.generate."""
    c, begin = run.config, time.perf_counter()
    run.sampler.refresh()
    seeds = torch.arange(len(examples)) + c.prompts * (step + 1_000_003 * c.seed)
    rollouts = run.sampler.generate(prompts, c.group, c.max_new_tokens, c.temperature,
                                    seeds % 2 ** 31, given)
    seconds, answer_format = time.perf_counter() - begin, run.processor.style["answer_format"]
    parts = [reward(run.processor.decode(ids), len(ids), examples[r // c.group], answer_format, c)
             for r, ids in enumerate(rollouts.rows())]
    rewards = torch.tensor([part["reward"] for part in parts]).view(-1, c.group)         # (B, G)
    advantage = group_advantages(rewards, c.advantage).view(-1, 1)                       # (R, 1)
    equal = (advantage == 0).view(-1, c.group).all(1)        # (B,) groups without a signal
    mask = rollouts.mask
    if c.filter == "drop":
        mask = mask & ~equal.repeat_interleave(c.group).to(c.device)[:, None]
    if c.overlong == "mask":
        mask = mask & rollouts.finished[:, None]
    known = [part for part in parts if not math.isnan(part["reward"])]
    metrics = {name: mean(part[name] for part in known) for name in known[0]} if known else {}
    metrics |= dict(
        reward_std=rewards.std(1).nanmean().item(), equal_groups=equal.float().mean().item(),
        advantage=advantage.abs().mean().item(), length=rollouts.lengths.float().mean().item(),
        truncated=1 - rollouts.finished.float().mean().item(),
        tokens=rollouts.lengths.sum().item(), grader_failures=len(parts) - len(known),
        rollout_seconds=seconds, tokens_per_second=rollouts.lengths.sum().item() / seconds)
    return rollouts, mask, advantage.to(c.device), metrics


def score_answers(run, model, prompts, rollouts, start, stop):
    """Log-prob and entropy of the answers to prompts start..stop under a model, in the
    distribution that they were drawn from. -> two tensors (rows, N)"""
    c, rows = run.config, slice(start * run.config.group, stop * run.config.group)
    with run.autocast():
        return model.score(prompts.part(start, stop).to(c.device), rollouts.ids[rows],
                           rollouts.mask[rows], c.group, run.sampler.banned, c.temperature)


@torch.no_grad()
def fixed_logprobs(run, model, prompts, rollouts):
    """Log-probs of all answers under a model, without gradient. -> (R, N)"""
    c, logprobs = run.config, torch.zeros_like(rollouts.logprobs)
    for start, stop in own_pieces(0, len(prompts.ids), c.micro_batch):
        rows = slice(start * c.group, stop * c.group)
        logprobs[rows], _ = score_answers(run, model, prompts, rollouts, start, stop)
    return summed(logprobs)


def explore(run, step, examples, prompts, responses, rollout=rollout):
    """One step on the model's own answers -> metrics; `responses`, somebody's, are not looked at.
    One rollout (its advantages may also be of each token), then an optimizer step for each
    minibatch of its questions, on three log-probs of each token: of the policy that learns, of the
    policy as it was (old), of the sampler (the same but for rounding). Loss and gradient norm are
    logged of the last minibatch."""
    c, B = run.config, len(examples)
    rollouts, mask, advantage, metrics = rollout(run, step, examples, prompts)
    minibatches = pieces(0, B, math.ceil(B / c.minibatches))
    weights = torch.zeros_like(rollouts.logprobs, dtype=torch.double)          # (R, N)
    new, reference, entropy = (torch.zeros_like(rollouts.logprobs) for _ in range(3))
    old = new                        # with one minibatch the policy is the old policy
    norms = []                       # of the gradients
    if run.reference is not None:
        with without_adapters(run.reference) as initial:
            reference = fixed_logprobs(run, initial, prompts, rollouts)
    if len(minibatches) > 1:
        old = fixed_logprobs(run, run.model, prompts, rollouts)
    for start, stop in minibatches:
        whole = slice(start * c.group, stop * c.group)
        weights[whole] = token_weights(mask[whole], c.aggregation, c.max_new_tokens)
        loss_sum = torch.zeros((), device=c.device)
        run.zero_grad()
        for i, j in own_pieces(start, stop, c.micro_batch):
            rows = slice(i * c.group, j * c.group)
            logprob, entropy[rows] = score_answers(run, run.model, prompts, rollouts, i, j)
            new[rows] = logprob.detach()
            loss = token_loss(logprob, old[rows], rollouts.logprobs[rows], reference[rows],
                              advantage[rows], mask[rows], c)
            loss = (loss * weights[rows].type_as(loss)).sum()
            loss.backward()
            loss_sum += loss.detach()
        if not (advantage[whole] * mask[whole]).any():   # no signal; Muon makes of the KL's
            run.zero_grad()                              # small gradient a step as large as any
        norms.append(run.optimizer_step(summed(loss_sum).item(), examples[start:stop]))
    summed(new)                      # each process has filled its own rows
    summed(entropy)
    counted = rollouts.mask
    gap = (old - rollouts.logprobs).abs()[counted]   # between sampler and trainer
    gap_mean = gap.mean().item()
    if gap_mean > 0.05:
        print(f"step {step + 1}: log-probs of sampler and trainer differ by {gap_mean:.2f}")
    if gap_mean > 0.2:
        raise CheckpointError("they differ too much to learn from: look at dtypes, banned tokens")
    metrics |= dict(loss=loss_sum.item(), grad_norm=norms[-1],
                    updates=sum(norm > 0 for norm in norms),
                    entropy=entropy[counted].mean().item())
    if run.reference is not None:
        metrics["kl"] = kl_estimate(new, reference, "k3")[counted].mean().item()
    return metrics | dict(gap_mean=gap_mean, gap_max=gap.max().item())


def main(c, one_step=explore):
    c.out = c.out or "runs/grpo"
    model, processor = starting_model(c, small=5e-4, published=1e-6)
    reference = None
    if c.beta or c.log_kl:           # with LoRA the model itself, without its adapters
        reference = model if c.lora_rank else copy.deepcopy(model).requires_grad_(False)
    examples = load_examples(c, "train", c.examples if c.data == "world" else None)
    c.steps = c.steps or max(100, math.ceil(len(examples) / c.prompts))
    run = Run(c, model, processor, decay=False, reference=reference)
    run.train(examples, c.prompts, one_step)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
