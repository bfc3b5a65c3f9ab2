"""Reinforcement learning with a rule-based reward: GRPO and its family.

    A_i  = (r_i - mean_group) / (std_group + 1e-4)              how much better than its siblings
    loss = mean_i 1/|y_i| sum_t -min(w_t A_i, clip(w_t, 1-e, 1+e) A_i) + beta * KL_t
    w_t  = exp(log p(y_t) - log p_old(y_t))                      1 with one update per rollout

Each choice is an option, and --algorithm is a preset of them. A loss near zero is normal here:
watch reward, advantage and gradient norm. --minibatches 2 makes the ratio, and clipping, real.
Departs from the paper: Muon beside AdamW; groups of 8 and 0.1 for the format (theirs: not found).
"""
import copy
import math
import time
from dataclasses import dataclass

import torch

import data
from evaluate import grade, mean, option, pieces, run_script
from model import LoRA
from sft import Run, RunConfig, starting_model

GRPO = dict(advantage="group", ratio="token", clip="ppo", clip_low=0.2, clip_high=0.2,
            dual_clip=0.0, aggregation="sequence", kl="k3", beta=0.01, filter="keep",
            overlong="keep", tis=0.0)
ALGORITHMS = {
    "grpo": GRPO,
    "dapo": GRPO | dict(clip_high=0.28, aggregation="token", beta=0.0, filter="drop",
                        overlong="penalty"),
    "dr_grpo": GRPO | dict(advantage="centred", aggregation="constant", beta=0.0),
    "gspo": GRPO | dict(ratio="sequence", clip_low=3e-4, clip_high=4e-4, beta=0.0),
    "cispo": GRPO | dict(clip="cispo", clip_high=5.0, aggregation="token", beta=0.0),
    "rloo": GRPO | dict(advantage="rloo", aggregation="token", beta=0.0),
}


@dataclass
class Config(RunConfig):
    """Options of grpo.py. Those from advantage to tis come from --algorithm where none is given."""
    steps: int = option(100, "rollout steps", least=1)
    algorithm: str = option("grpo", "preset of advantage to tis", tuple(ALGORITHMS))
    advantage: str = option(None, "centred: no std; rloo: the others' mean; batch: its std",
                            ("group", "centred", "rloo", "batch"))
    ratio: str = option(None, "of a token, or of a sequence (GSPO)", ("token", "sequence"))
    clip: str = option(None, "of the objective (PPO), or of the weight (CISPO)", ("ppo", "cispo"))
    clip_low: float = option(None, "the ratio is clipped below 1 minus this")
    clip_high: float = option(None, "and above 1 plus this; CISPO: the largest weight")
    dual_clip: float = option(None, "with A < 0, the loss is at most -c A; 0: off")
    aggregation: str = option(None, "mean of means, by tokens, or by rows times max-new-tokens",
                              ("sequence", "token", "constant"))
    kl: str = option(None, "estimator of the KL to the initial model", ("k1", "k2", "k3"))
    beta: float = option(None, "weight of that KL in the loss")
    filter: str = option(None, "groups of equal reward", ("keep", "drop"))
    overlong: str = option(None, "truncated answers; DAPO: penalty", ("keep", "mask", "penalty"))
    tis: float = option(None, "cap of truncated importance sampling; 0: off")
    overlong_buffer: int = option(12, "tokens over which the penalty grows", least=1)
    format_weight: float = option(0.1, "what the format adds to the reward")
    prompts: int = option(32, "questions per step", least=1)
    group: int = option(8, "rollouts per question", least=2)
    minibatches: int = option(1, "optimizer steps per rollout", least=1)
    temperature: float = option(1.0, "of sampling, in the loss too", least=1e-3)

    def __post_init__(self):
        for name, value in ALGORITHMS[self.algorithm].items():
            if getattr(self, name) is None:
                setattr(self, name, value)


def reward(response, length, example, answer_format, c):
    """-> reward and its parts, or None where the grader itself fails (then the advantage is 0)."""
    try:
        verdict = grade(response, example, answer_format)
    except Exception:                # a bug in a grader must not teach the policy anything
        return None
    parts = dict(accuracy=float(verdict.correct), format=float(verdict.formatted))
    if c.overlong == "penalty":      # DAPO, eq. 13
        parts["overlong"] = min((c.max_new_tokens - length) / c.overlong_buffer - 1, 0.0)
    total = parts["accuracy"] + c.format_weight * parts["format"] + parts.get("overlong", 0.0)
    return dict(parts, reward=total)


def group_advantages(rewards, kind):
    """GRPO's critic: how much better than its siblings each rollout did. (B, G); 0 for a nan."""
    rewards = torch.where(rewards.isnan(), rewards.nanmean(1, keepdim=True), rewards).nan_to_num()
    advantage = rewards - rewards.mean(1, keepdim=True)
    if kind == "group":              # Dr. GRPO leaves this out: it favours very easy and very hard
        advantage = advantage / (rewards.std(1, keepdim=True) + 1e-4)
    elif kind == "rloo":             # minus the mean of the others
        advantage = advantage * rewards.shape[1] / (rewards.shape[1] - 1)
    elif kind == "batch":
        advantage = advantage / (rewards.std() + 1e-4)
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
    loss = -torch.minimum(w * advantage, clipped * advantage)
    if c.dual_clip:
        loss = torch.where(advantage < 0, loss.clamp(max=-c.dual_clip * advantage), loss)
    return loss


def kl_estimate(logprob, reference, kind):
    """Per-token KL to the reference (Schulman): k1 = d, k2 = d²/2, k3 = exp(-d) + d - 1."""
    d = logprob - reference
    return {"k1": d, "k2": d.square() / 2, "k3": (-d).exp() + d - 1}[kind]


def token_weights(mask, how, longest):
    """What each token's loss counts in the loss of a minibatch. (R, N) -> (R, N), of sum 1 but for
    «constant». Rows without a counted token count nowhere else."""
    lengths = mask.sum(1, keepdim=True)
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


def rollout(run, examples, prompts, step):
    """Samples and rewards -> Rollouts, mask of the loss (R, N), advantage (R, 1), figures."""
    c, begin = run.config, time.perf_counter()
    run.sampler.refresh()
    seeds = (torch.arange(c.prompts) + c.prompts * (step + 1_000_003 * c.seed)) % 2 ** 31
    rollouts = run.sampler.generate(prompts, c.group, c.max_new_tokens, c.temperature,
                                    seeds[:len(examples)])
    seconds, answer_format = time.perf_counter() - begin, run.processor.style["answer_format"]
    graded = [reward(run.processor.decode(ids), len(ids), examples[r // c.group], answer_format, c)
              for r, ids in enumerate(rollouts.rows())]
    rewards = torch.tensor([p["reward"] if p else math.nan for p in graded]).view(-1, c.group)
    advantage = group_advantages(rewards, c.advantage)
    known, mask = [parts for parts in graded if parts], rollouts.mask
    equal = (rewards == rewards[:, :1]).all(1)       # groups that no gradient comes from
    if c.filter == "drop":
        mask = mask & ~equal.repeat_interleave(c.group).to(c.device)[:, None]
    if c.overlong == "mask":
        mask = mask & rollouts.finished[:, None]
    means = dict(reward_std=rewards.std(1), equal_groups=equal.float(), advantage=advantage.abs(),
                 length=rollouts.lengths.float(), truncated=1 - rollouts.finished.float())
    figures = {name: mean(parts[name] for parts in known) for name in (known or [()])[0]}
    figures |= {name: value.nanmean().item() for name, value in means.items()}
    figures |= dict(grader_failures=len(graded) - len(known), rollout_seconds=round(seconds, 4),
                    tokens_per_second=rollouts.lengths.sum().item() / seconds)
    return rollouts, mask, advantage.flatten()[:, None].to(c.device), figures


def update(run, reference, examples, prompts, rollouts, mask, advantage):
    """One optimizer step for each minibatch -> figures over all tokens of the rollouts."""
    c, sampled, counted = run.config, rollouts.logprobs, []
    steps = [[(prompts.part(i, j).to(c.device), slice(i * c.group, j * c.group))
              for i, j in pieces(start, stop, c.micro_batch)]
             for start, stop in pieces(0, len(examples), -(-len(examples) // c.minibatches))]

    def score(model, prompts, rows):
        with run.autocast():         # under the distribution that the rollouts were drawn from
            return model.score(prompts, rollouts.ids[rows], rollouts.mask[rows], c.group,
                               run.sampler.banned, c.temperature)

    @torch.no_grad()
    def log_probs(model):
        return torch.cat([score(model, *part)[0] for parts in steps for part in parts])

    LoRA.on = False                  # what adapters adapt is the reference, at no cost
    base = log_probs(reference or run.model)
    LoRA.on = True
    old = log_probs(run.model) if len(steps) > 1 else None

    def losses(parts):
        whole = slice(parts[0][1].start, parts[-1][1].stop)
        weights = torch.zeros_like(sampled)
        weights[whole] = token_weights(mask[whole], c.aggregation, c.max_new_tokens)
        for prompts, rows in parts:
            logprob, entropy = score(run.model, prompts, rows)
            now, tokens = logprob.detach(), rollouts.mask[rows]
            before = now if old is None else old[rows]
            kl, gap = kl_estimate(now, base[rows], "k3"), (before - sampled[rows]).abs()
            counted.append(torch.stack([gap, kl, entropy])[:, tokens])
            loss = token_loss(logprob, before, sampled[rows], base[rows], advantage[rows],
                              mask[rows], c)
            yield (loss * weights[rows]).sum()

    for parts in steps:
        figures = run.update(losses(parts), examples)
    gap, kl, entropy = torch.cat(counted, 1)
    return figures | dict(entropy=entropy.mean().item(), kl=kl.mean().item(),
                          gap_mean=gap.mean().item(), gap_max=gap.max().item())


def main(c):
    c.out = c.out or "runs/grpo"
    model, processor = starting_model(c, small=5e-4, published=1e-6)
    reference = None if c.lora_rank else copy.deepcopy(model).requires_grad_(False)
    limit = c.examples if c.data == "world" else None
    examples = data.load_dataset(c.data, "train", limit, c.skip_bad_rows)
    run = Run(c, model, processor, decay=False)

    def one_step(step, some, prompts, _):
        *experience, figures = rollout(run, some, prompts, step)
        return figures | update(run, reference, some, prompts, *experience)

    run.train(examples, c.prompts, one_step)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
