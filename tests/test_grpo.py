"""Reward, advantage and objective against hand-worked numbers; the loop in small."""
import json
import types

import pytest
import torch

import data
import grpo
import model as models


def options(**changes):
    return types.SimpleNamespace(**(grpo.GRPO | dict(beta=0.0, max_new_tokens=4) | changes))


def objective(*tensors):
    """The loss of a whole minibatch: token losses times token weights."""
    *_, mask, c = tensors
    return (grpo.token_loss(*tensors)
            * grpo.token_weights(mask, c.aggregation, c.max_new_tokens)).sum()


def test_advantages():
    """GRPO by hand: rewards 1 0 0 1 have mean 1/2 and unbiased std 1/sqrt(3)."""
    rewards = torch.tensor([[1.0, 0, 0, 1], [2.0, 2, 2, 2]])
    group = grpo.group_advantages(rewards, "group")
    assert torch.allclose(group[0], torch.tensor([0.5, -0.5, -0.5, 0.5]) / (3 ** -0.5 + 1e-4))
    assert (group[1] == 0).all()
    assert grpo.group_advantages(rewards, "centred")[0].tolist() == [0.5, -0.5, -0.5, 0.5]
    rloo = grpo.group_advantages(rewards, "rloo")[0]
    assert torch.allclose(rloo, torch.tensor([1 - 1 / 3, -2 / 3, -2 / 3, 1 - 1 / 3]))
    batch = grpo.group_advantages(rewards, "batch")
    assert torch.allclose(batch[0, 0], 0.5 / (rewards.std() + 1e-4))


def test_a_failing_grader_teaches_nothing():
    """Its rollout gets advantage 0 and does not move the mean of its siblings."""
    broken = types.SimpleNamespace(answer=None, choices=None, scene=None)
    c = grpo.Config(overlong="keep")
    assert grpo.reward("<answer>1</answer>", 5, broken, "tags", c) is None
    rewards = torch.tensor([[1.0, 0.0, float("nan"), 0.5], [float("nan")] * 4])
    advantage = grpo.group_advantages(rewards, "centred")
    assert advantage[0].tolist() == [0.5, -0.5, 0, 0] and (advantage[1] == 0).all()


def test_reward_parts():
    """An unparseable answer earns 0; the format part is apart; DAPO's penalty grows at the end."""
    example, c = data.Example("x", "?", "5"), grpo.Config(overlong="penalty", max_new_tokens=48)
    parts = grpo.reward("<think>a</think><answer>5</answer>", 42, example, "tags", c)
    assert parts.pop("reward") == pytest.approx(0.6)
    assert parts == dict(accuracy=1.0, format=1.0, overlong=-0.5)
    assert grpo.reward("???", 10, example, "tags", c)["reward"] == 0
    assert grpo.reward("", 48, example, "tags", c)["overlong"] == -1
    boxed = grpo.reward("<think>a</think>\\boxed{5}", 42, example, "boxed", c)
    assert boxed["accuracy"] == boxed["format"] == 1.0


def test_clipping():
    """w = 2: a good token is held at 1 + high, a bad one is not; w = 1/2 the other way round."""
    old = torch.zeros(2, 2)
    logprob = torch.tensor([[2.0, 0.5], [2.0, 0.5]]).log()
    advantage, mask = torch.tensor([[1.0], [-1.0]]), torch.ones(2, 2)
    loss = grpo.surrogate(logprob, old, advantage, mask, options(clip_high=0.28))
    assert torch.allclose(loss, torch.tensor([[-1.28, -0.5], [2.0, 0.8]]))
    dual = grpo.surrogate(torch.tensor([[1.0, 5.0]]).log(), old[:1], advantage[1:], mask[:1],
                          options(dual_clip=3.0))
    assert torch.allclose(dual, torch.tensor([[1.0, 3.0]]))


def test_one_update_has_ratio_one():
    """With w = 1 clip, GSPO and CISPO are the same gradient: comparing them needs minibatches."""
    advantage, mask = torch.tensor([[1.0], [-2.0]]), torch.tensor([[1.0, 1, 0], [1, 1, 1]])
    gradients = []
    for changes in (dict(), dict(ratio="sequence", aggregation="sequence"),
                    dict(clip="cispo", clip_high=5.0)):
        logprob = torch.tensor([[-1.0, -2, 0], [-0.5, -1, -3]], requires_grad=True)
        loss = objective(logprob, logprob.detach(), None, None, advantage, mask,
                                options(**changes))
        gradients.append(torch.autograd.grad(loss, logprob)[0])
    assert all(torch.allclose(g, gradients[0]) for g in gradients)
    assert torch.allclose(gradients[0][0], torch.tensor([-0.25, -0.25, 0]))


def test_sequence_ratio():
    """GSPO: exp of the mean log-ratio over counted tokens, the same for each of them."""
    mask, logprob = torch.tensor([[1.0, 1, 0]]), torch.tensor([[0.2, 0.4, 9.0]])
    loss = grpo.surrogate(logprob, torch.zeros(1, 3), torch.ones(1, 1), mask,
                          options(ratio="sequence", clip_high=9.0))
    assert torch.allclose(-loss[:, :2], torch.tensor([[0.3, 0.3]]).exp())


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    logprob = torch.tensor([[10.0]]).log().requires_grad_()
    loss = grpo.surrogate(logprob, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1),
                          options(clip="cispo", clip_high=5.0))
    assert torch.autograd.grad(loss.sum(), logprob)[0].item() == -5


def test_aggregation():
    """Rows of 1 and 3 tokens: mean of means, by tokens, by rows times the limit."""
    loss = torch.tensor([[4.0, 9, 9], [1, 2, 3]])
    mask = torch.tensor([[1.0, 0, 0], [1, 1, 1]])

    def total(mask, how):
        return (loss * grpo.token_weights(mask, how, 5)).sum().item()

    assert total(mask, "sequence") == pytest.approx((4 + 2) / 2)
    assert total(mask, "token") == 10 / 4 and total(mask, "constant") == 1.0
    assert total(torch.zeros(2, 3), "sequence") == total(torch.zeros(2, 3), "token") == 0
    assert total(torch.tensor([[0.0, 0, 0], [1, 1, 1]]), "sequence") == 2.0


def test_kl_estimators():
    """All three values are near KL(p, q) in expectation; k1's gradient is zero, k2's right."""
    torch.manual_seed(0)
    logits = torch.randn(6, dtype=torch.double, requires_grad=True)
    other = (logits.detach() + 0.3 * torch.randn(6, dtype=torch.double)).log_softmax(0)
    logp = logits.log_softmax(0)
    p = logp.exp().detach()
    true = torch.nn.functional.kl_div(other, logp, log_target=True, reduction="sum")
    gradient = torch.autograd.grad(true, logits, retain_graph=True)[0]
    for kind in ("k1", "k2", "k3"):
        value = (p * grpo.kl_estimate(logp, other, kind)).sum()
        assert abs(value - true) < 0.2 * true
        slope = torch.autograd.grad(value, logits, retain_graph=True)[0]
        if kind == "k1":
            assert slope.abs().max() < 1e-9
        assert torch.allclose(slope, gradient, atol=1e-9) == (kind == "k2")


def test_truncated_importance_sampling():
    """π_old / π_sampler, at most C, scales the loss without a gradient of its own."""
    logprob, sampled = torch.zeros(1, 2), torch.tensor([[-3.0, 0.5]])
    loss = objective(logprob, logprob, sampled, None, torch.ones(1, 1), torch.ones(1, 2),
                            options(tis=2.0))
    assert loss.item() == pytest.approx(-(2 + torch.tensor(-0.5).exp().item()) / 2)


def train(start, out, **changes):
    c = grpo.Config(**dict(init=str(start), out=str(out), device="cpu", steps=2, prompts=4, group=4,
                           max_new_tokens=10, eval_examples=4, examples=16) | changes)
    grpo.main(c)
    return [json.loads(line) for line in open(out / "metrics.jsonl")]


@pytest.mark.parametrize("algorithm", list(grpo.ALGORITHMS))
def test_every_preset_runs(tmp_path, start, algorithm):
    """Two minibatches, so that ratios differ from 1; every figure of the issue is logged."""
    rows = train(start, tmp_path, algorithm=algorithm, minibatches=2, overlong="keep")
    steps = [row for row in rows if "reward" in row]
    assert len(steps) == 2
    assert {"reward", "accuracy", "format", "reward_std", "equal_groups", "length", "truncated",
            "entropy", "kl", "grad_norm", "gap_mean", "gap_max", "tokens_per_second",
            "rollout_seconds", "advantage"} <= set(steps[0])
    assert steps[0]["gap_max"] < 1e-4, "sampler and trainer disagree"
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored["clip_high"] == grpo.ALGORITHMS[algorithm]["clip_high"]


@pytest.mark.parametrize("temperature", [0.6, 1.4])
def test_sampler_and_trainer_use_one_temperature(tmp_path, start, temperature):
    """Sampled from one distribution, differentiated another: the classic quiet bug."""
    rows = train(start, tmp_path, temperature=temperature, steps=1)
    assert [row["gap_max"] < 1e-4 for row in rows if "reward" in row] == [True]


def test_equal_groups_are_counted_and_dropped(tmp_path, start):
    """Trap 6: nobody is right and the format earns nothing, so no group teaches anything: neither
    its advantage nor, when dropped, its KL moves the model."""
    common = dict(format_weight=0.0, filter="drop", lr=1e-2, warmup=0, max_new_tokens=24)
    steps = [row for row in train(start, tmp_path / "none", **common) if "grad_norm" in row]
    assert [(row["equal_groups"], row["grad_norm"]) for row in steps] == [(1, 0), (1, 0)]
    rows = train(start, tmp_path / "some", overlong="penalty", **common)
    assert all((row["grad_norm"] > 0) == (row["equal_groups"] < 1) for row in rows if "kl" in row)
    assert any(row.get("equal_groups", 1) < 1 for row in rows)


def test_kl_starts_at_zero_and_grows(tmp_path, start):
    rows = train(start, tmp_path, steps=3, lr=1e-2, warmup=0, format_weight=0.0, beta=0.0,
                 overlong="penalty", max_new_tokens=24)
    kl = [row["kl"] for row in rows if "reward" in row]
    assert kl[0] == 0 and kl[2] >= 0


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "dr_grpo"])
def test_micro_batches_are_one_batch(tmp_path, start, algorithm):
    """Gradients of passes add up to those of the whole minibatch, whatever the aggregation: a mean
    of means over passes of different sizes once was the usual error of gradient accumulation."""
    norms = []
    for size in (0, 3):
        rows = train(start, tmp_path / str(size), algorithm=algorithm, micro_batch=size, steps=1,
                     temperature=1.2, overlong="penalty", filter="keep", max_new_tokens=24)
        norms.append([(r["grad_norm"], r["loss"]) for r in rows if "grad_norm" in r])
    assert norms[0][0][0] > 0 and torch.allclose(*map(torch.tensor, norms), rtol=1e-4, atol=1e-7)


def test_lora_is_its_own_reference(tmp_path, start):
    """The KL is to the model that the adapters adapt: 0 at first, not for ever."""
    rows = train(start, tmp_path, steps=3, lr=1e-2, warmup=0, lora_rank=4, overlong="penalty",
                 max_new_tokens=24)
    kl = [row["kl"] for row in rows if "kl" in row]
    assert kl[0] == 0 and kl[2] > 0


def test_prompt_budgets_are_nested():
    """The first 2K prompts of 20K are the 2K: an ablation over budgets adds prompts, no more."""
    small, large = data.World("train", size=20), data.World("train", size=200)
    assert [small[i].question for i in range(20)] == [large[i].question for i in range(20)]
