"""Reward, advantage and objective against hand-worked numbers; whole steps against the textbook."""
import copy
import inspect
import json
import math
import pathlib
import re
import types
import zlib
from dataclasses import replace

import pytest
import torch
from conftest import score_plain

import data
import evaluate
import grpo
import kernels
import model as models
import sft

ROOT = pathlib.Path(__file__).parents[1]


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


def test_a_failing_grader_teaches_nothing():
    """Its rollout gets advantage 0 and does not move the mean of its siblings."""
    broken = types.SimpleNamespace(answer=None, choices=None, scene=None)
    c = grpo.Config(overlong="keep")
    failed = grpo.reward("<answer>1</answer>", 5, broken, "tags", c)
    assert list(failed) == ["reward"] and math.isnan(failed["reward"])
    rewards = torch.tensor([[1.0, 0.0, float("nan"), 0.5], [float("nan")] * 4])
    advantage = grpo.group_advantages(rewards, "centred")
    assert advantage[0].tolist() == [0.5, -0.5, 0, 0] and (advantage[1] == 0).all()
    one = torch.tensor([[1.0, float("nan"), float("nan"), float("nan")]])
    assert not grpo.group_advantages(one, "group").any() and not grpo.group_advantages(
        one, "rloo").any()


@pytest.mark.parametrize("kind", ["group", "centred", "rloo"])
def test_unknown_rewards_are_no_siblings(kind):
    """Two of six rewards missing once stood there as the mean: they made the std smaller, and the
    advantages of the others 1.29 times what they should be."""
    known = torch.tensor([[1.0, 0.0, 0.3, 0.1]])
    some = torch.tensor([[1.0, float("nan"), 0.0, 0.3, float("nan"), 0.1]])
    advantage = grpo.group_advantages(some, kind)[0]
    torch.testing.assert_close(advantage[[0, 2, 3, 5]], grpo.group_advantages(known, kind)[0])
    assert not advantage[[1, 4]].any()


@pytest.mark.parametrize("group", [2, 3, 6, 7, 12])
@pytest.mark.parametrize("reward", [1.1, 0.1, -0.3, 1 / 3])
def test_equal_rewards_give_exactly_nothing(reward, group):
    """The mean of six times 1.1 is not 1.1: a rounding, divided by a std of 1e-4, is a signal, and
    Muon makes of any signal a whole step."""
    for kind in ("group", "centred", "rloo"):
        assert not grpo.group_advantages(torch.full((1, group), reward), kind).any()



def test_reward_parts():
    """An unparseable answer earns 0; the format part is apart; DAPO's penalty grows at the end."""
    example, c = data.Example("x", "?", "5"), grpo.Config(overlong="penalty", max_new_tokens=48)
    parts = grpo.reward("<think>a</think><answer>5</answer>", 42, example, "tags", c)
    assert parts.pop("reward") == pytest.approx(0.6)
    assert parts == dict(accuracy=1.0, parsed=1.0, format=1.0, overlong=-0.5)
    assert grpo.reward("???", 10, example, "tags", c)["reward"] == 0
    assert grpo.reward("", 48, example, "tags", c)["overlong"] == -1
    boxed = grpo.reward("<think>a</think>\\boxed{5}", 42, example, "boxed", c)
    assert boxed["accuracy"] == boxed["format"] == 1.0


YES, CELL_BOX = data.Example("x", "?", "yes"), data.Example("x", "?", "[2, 1, 3, 2]", box=True)


@pytest.mark.parametrize("said, example, strict, lenient", [
    ("2", data.Example("x", "?", "2"), 1, 1), ("1 2 3", data.Example("x", "?", "2"), 0, 1),
    ("it is 2 or 3", data.Example("x", "?", "2"), 0, 1), ("12", data.Example("x", "?", "2"), 0, 0),
    ("1 3", data.Example("x", "?", "2"), 0, 0), ("two", data.Example("x", "?", "2"), 0, 0),
    ("", data.Example("x", "?", "2"), 0, 0), ("1 2 3", data.Example("x", "?", "12"), 0, 0),
    ("yes", YES, 1, 1), ("yes or no", YES, 0, 0), ("no", YES, 0, 0), ("yes 1 2", YES, 0, 0),
    ("[2, 1, 3, 2]", CELL_BOX, 1, 1), ("[2, 1, 3, 2] [1, 1, 2, 2]", CELL_BOX, 0, 0),
    ("1 2 3 4 5", CELL_BOX, 0, 0)])
def test_a_lenient_reward_takes_any_number(said, example, strict, lenient):
    """Of the answer, not of the thought; whole numbers alone, so yes and boxes stay as they are.
    What else is measured stays the strict grader's."""
    for tag in ("<think>2 12.</think><answer>{}</answer>", "<answer>{}</answer>"):
        parts = [grpo.reward(tag.format(said), 9, example, "tags", grpo.Config(
            overlong="keep", format_weight=0.1, grader=grader)) for grader in ("strict", "lenient")]
        assert [part.pop("accuracy") for part in parts] == [strict, lenient]
        rewards = [part.pop("reward") for part in parts]
        assert rewards[1] - rewards[0] == pytest.approx(lenient - strict)
        assert parts[0] == parts[1]


def test_evaluation_is_never_lenient(tmp_path, start, monkeypatch):
    """The reward may be deceived, or there would be nothing to see: held-out accuracy is not."""
    every = data.tagged(" ".join(map(str, range(99))))
    monkeypatch.setattr(data.Processor, "decode", lambda self, ids: every)
    for grader, paid in (("strict", False), ("lenient", True)):
        rows = train(start, tmp_path / grader, grader=grader)
        assert all((row["accuracy"] > 0) == paid for row in rows if "reward" in row)
        assert [row["val_accuracy"] for row in rows if "val_accuracy" in row] == [0, 0]
    assert "grader" not in vars(evaluate.Config())
    assert list(inspect.signature(evaluate.grade).parameters) == [
        "response", "example", "answer_format"]


def test_clipping():
    """w = 2: a good token is held at 1 + high, a bad one is not; w = 1/2 the other way round."""
    old = torch.zeros(2, 2)
    logprob = torch.tensor([[2.0, 0.5], [2.0, 0.5]]).log()
    advantage, mask = torch.tensor([[1.0], [-1.0]]), torch.ones(2, 2)
    loss = grpo.surrogate(logprob, old, advantage, mask, options(clip_high=0.28))
    assert torch.allclose(loss, torch.tensor([[-1.28, -0.5], [2.0, 0.8]]))


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
    assert total(mask, "token") == 10 / 4 and total(mask, "constant") == pytest.approx(1.0)
    assert total(torch.zeros(2, 3), "sequence") == total(torch.zeros(2, 3), "token") == 0
    assert total(torch.tensor([[0.0, 0, 0], [1, 1, 1]]), "sequence") == pytest.approx(2.0)
    thirds = grpo.token_weights(torch.ones(1, 3, dtype=torch.bool), "sequence", 5)
    assert (3 * thirds == 1).all() and thirds.dtype == torch.double, "also where the loss is fp64"


def test_kl_estimators():
    """Both are near KL(p, q) in expectation; the gradient of k2 is right, that of k3 is near, and
    that of k1 = log p - log q, which is not offered, is zero."""
    torch.manual_seed(0)
    logits = torch.randn(6, dtype=torch.double, requires_grad=True)
    other = (logits.detach() + 0.3 * torch.randn(6, dtype=torch.double)).log_softmax(0)
    logp = logits.log_softmax(0)
    p = logp.exp().detach()
    true = torch.nn.functional.kl_div(other, logp, log_target=True, reduction="sum")
    gradient = torch.autograd.grad(true, logits, retain_graph=True)[0]
    for kind, nearness in (("k2", 1e-9), ("k3", 0.05)):
        value = (p * grpo.kl_estimate(logp, other, kind)).sum()
        assert abs(value - true) < 0.2 * true
        slope = torch.autograd.grad(value, logits, retain_graph=True)[0]
        assert torch.allclose(slope, gradient, atol=nearness)
    k1 = torch.autograd.grad((p * (logp - other)).sum(), logits)[0]
    assert k1.abs().max() < 1e-9 < gradient.abs().max()


def test_truncated_importance_sampling():
    """π_old / π_sampler, at most C, scales the loss without a gradient of its own."""
    logprob, sampled = torch.zeros(1, 2), torch.tensor([[-3.0, 0.5]])
    loss = objective(logprob, logprob, sampled, None, torch.ones(1, 1), torch.ones(1, 2),
                            options(tis=2.0))
    assert loss.item() == pytest.approx(-(2 + torch.tensor(-0.5).exp().item()) / 2)


def digits_only(run):
    """Only digits and the end mark are sampled: answers of all lengths, which the grader reads."""
    run.sampler.banned.fill_(True)
    run.sampler.banned[[*run.processor.encode("0123456"), run.processor.stop]] = False


def run_of(start, out, **changes):
    """A run by hand -> it, examples with pictures and one without, and their prompts. Each answer
    is one that the model gives to that question in step 0, but the last question's, which no
    rollout finds: its group's rewards are equal."""
    c = grpo.Config(**dict(init=str(start), out=str(out), device="cpu", steps=2, prompts=4, group=4,
                           max_new_tokens=6, lr=1e-9, warmup=0) | changes)
    model, processor = sft.starting_model(c, None, None)
    reference = copy.deepcopy(model).requires_grad_(False)
    run = sft.Run(c, model, processor, decay=False, reference=reference)
    digits_only(run)
    examples = [data.world_example("text" if i == 1 else "train", i) for i in range(c.prompts)]
    prompts = processor.batch(examples)
    said = [processor.decode(ids) for ids in sample(run, prompts, 0).rows()]
    for b in range(c.prompts - 1):
        group = said[b * c.group:(b + 1) * c.group]
        seldom = min(filter(None, group), key=group.count)
        examples[b] = replace(examples[b], answer=seldom)
    examples[-1] = replace(examples[-1], answer="none of these")
    return run, examples, prompts


def sample(run, prompts, step):
    """The rollouts of a step, by the rule that the seed of question b in step s is s * B + b."""
    c = run.config
    return run.sampler.generate(prompts, c.group, c.max_new_tokens, c.temperature,
                                torch.arange(c.prompts) + c.prompts * step)


def textbook(algorithm, now, old, reference, rewards, finished, longest):
    """The loss of a minibatch as the papers write it. now, old, reference: for each answer the
    log-probs of its tokens; rewards (B, G), finished (B * G) -> a scalar."""
    rows = []
    B, G = rewards.shape
    for i in range(B * G):
        group, r = rewards[i // G], rewards[i // G, i % G]
        A = {"dr_grpo": r - group.mean(), "rloo": r - (group.sum() - r) / (G - 1)}.get(
            algorithm, (r - group.mean()) / (group.std() + 1e-4))
        w = (now[i] - old[i]).exp()
        if algorithm in ("grpo", "dr_grpo", "rloo"):
            tokens = -torch.min(w * A, w.clamp(0.8, 1.2) * A)
        if algorithm == "grpo":
            log_ratio = reference[i] - now[i]
            tokens = tokens + 0.05 * (log_ratio.exp() - log_ratio - 1)
        if algorithm == "dapo":
            if (group == group[0]).all():
                continue
            tokens = -torch.min(w * A, w.clamp(0.8, 1.28) * A)
        if algorithm == "gspo":
            s = (now[i] - old[i]).mean().exp()
            tokens = -torch.min(s * A, s.clamp(1 - 3e-4, 1 + 4e-4) * A)[None]
        if algorithm == "cispo":
            tokens = -w.detach().clamp(max=5) * A * now[i]
        rows.append(tokens)
    if algorithm in ("grpo", "gspo"):
        return sum(tokens.mean() for tokens in rows) / len(rows)
    if algorithm == "dr_grpo":
        return sum(tokens.sum() for tokens in rows) / (len(rows) * longest)
    return torch.cat(rows).sum() / max(1, sum(map(len, rows)))


@pytest.mark.parametrize("algorithm", list(grpo.ALGORITHMS))
def test_a_step_is_the_gradient_of_the_textbook_loss(tmp_path, start, algorithm):
    """Sampler, grader, advantage, ratio, clipping, KL, aggregation, minibatches and micro-batches
    together, at a temperature that is not 1, against the loss written out answer by answer from
    whole logits. Before this test the policy could minimise its reward, answers be graded against
    another question, advantages go to other answers, and every test passed."""
    run, examples, prompts = run_of(start, tmp_path, algorithm=algorithm, temperature=0.8, lr=0.03,
                                    minibatches=2, micro_batch=1, overlong_buffer=2,
                                    **dict(beta=0.05) if algorithm == "grpo" else {})
    for weight in run.reference.parameters():        # elsewhere, so that the KL has a gradient
        weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    initial, c, step, taken = copy.deepcopy(run.model), run.config, run.optimizer_step, []

    def recorded(loss, some):
        gradient = torch.cat([p.grad.flatten() for p in run.model.parameters()])
        taken.append((copy.deepcopy(run.model), gradient, loss))
        return step(loss, some)

    run.optimizer_step = recorded
    grpo.explore(run, 0, examples, prompts, None)
    rollouts = kernels.Sampler(initial, run.sampler.banned, run.processor.stop).generate(
        prompts, c.group, c.max_new_tokens, c.temperature, torch.arange(4))
    assert len(set(rollouts.lengths.tolist())) > 3 and len(taken) == 2

    def logprobs(model):
        whole, _ = score_plain(model, prompts, rollouts.ids, rollouts.mask, c.group,
                                     run.sampler.banned, c.temperature)
        return [row[:n] for row, n in zip(whole, rollouts.lengths.tolist())]

    rewards = torch.zeros(4, 4)
    for r, ids in enumerate(rollouts.rows()):
        said, example = run.processor.decode(ids), examples[r // 4]
        rewards[r // 4, r % 4] = float(evaluate.judge(said, example) is True)
        if algorithm == "dapo":                      # from 2 tokens before the limit on
            rewards[r // 4, r % 4] += min((c.max_new_tokens - len(ids)) / 2 - 1, 0)
    assert ((rewards.std(1) > 0).sum() >= 3) and (algorithm == "dapo" or (rewards[3] == 0).all())
    old, reference = logprobs(initial), logprobs(run.reference)
    for k, (model, got, loss) in enumerate(taken):
        rows = slice(8 * k, 8 * k + 8)
        expected = textbook(algorithm, logprobs(model)[rows], old[rows], reference[rows],
                            rewards[2 * k:2 * k + 2], rollouts.finished[rows], c.max_new_tokens)
        assert loss == pytest.approx(expected.item(), rel=1e-3, abs=1e-5)
        slopes = torch.autograd.grad(expected, list(model.parameters()))
        slope = torch.cat([one.flatten() for one in slopes])
        assert slope.norm() > 1e-3
        torch.testing.assert_close(got, slope, rtol=1e-3, atol=1e-4 * slope.abs().max().item())
    moved = torch.cat(logprobs(taken[1][0])) - torch.cat(old)
    assert moved.abs().max() > 0.3, "so that the second minibatch has ratios to clip"


def test_readme_explains_every_figure(tmp_path, start):
    """Of metrics.jsonl, of steps and evaluations, with all that is optional."""
    rows = train(start, tmp_path / "grpo", algorithm="dapo", log_kl=True)
    sft.main(sft.Config(init=str(start), out=str(tmp_path / "sft"), device="cpu", steps=1,
                        batch=2, examples=4, eval_examples=2))
    rows += [json.loads(line) for line in open(tmp_path / "sft" / "metrics.jsonl")]
    _, table = (ROOT / "README.md").read_text().split("## What the figures of a run mean")
    explained = set(re.findall(r"`(\w+)`", table.split("\n## ")[0]))
    assert set().union(*rows) - {"step"} <= explained
    assert explained <= set().union(*rows) | {"logprob", "metrics"}


def train(start, out, **changes):
    c = grpo.Config(**dict(init=str(start), out=str(out), device="cpu", steps=2, prompts=4, group=4,
                           max_new_tokens=10, eval_examples=4, examples=16) | changes)
    grpo.main(c)
    return [json.loads(line) for line in open(out / "metrics.jsonl")]


@pytest.mark.parametrize("algorithm", list(grpo.ALGORITHMS))
def test_every_preset_runs(tmp_path, start, algorithm):
    """Two minibatches, so that ratios differ from 1; a KL is measured where something uses it."""
    rows = train(start, tmp_path, algorithm=algorithm, minibatches=2, overlong="keep")
    steps = [row for row in rows if "reward" in row]
    assert len(steps) == 2
    assert {"reward", "accuracy", "format", "reward_std", "equal_groups", "length", "truncated",
            "entropy", "grad_norm", "gap_mean", "gap_max", "tokens_per_second",
            "rollout_seconds", "advantage"} <= set(steps[0])
    assert ("kl" in steps[0]) == (grpo.ALGORITHMS[algorithm]["beta"] > 0)
    assert steps[0]["gap_max"] < 1e-4, "sampler and trainer disagree"
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored["clip_high"] == grpo.ALGORITHMS[algorithm]["clip_high"]


@pytest.mark.parametrize("temperature", [0.6, 1.4])
def test_sampler_and_trainer_use_one_temperature(tmp_path, start, temperature):
    """Sampled from one distribution, differentiated another: the classic quiet bug."""
    rows = train(start, tmp_path, temperature=temperature, steps=1)
    assert [row["gap_max"] < 1e-4 for row in rows if "reward" in row] == [True]


def test_equal_groups_are_counted_and_dropped(tmp_path, start):
    """A group of equal rewards teaches nothing: neither its advantage nor, when it is dropped, its
    KL moves the model. `equal_groups` says how many groups these are."""
    run, examples, prompts = run_of(start, tmp_path, filter="drop", beta=0.5)
    for weight in run.reference.parameters():
        weight += 0.02
    nobody = [replace(example, answer="none of these") for example in examples]
    for some, share in ((nobody, 1.0), (examples, 0.25)):
        figures = grpo.explore(run, 0, some, prompts, None)
        assert figures["equal_groups"] == share
        assert (figures["grad_norm"] > 0) == (share < 1)
    rollouts, mask, _, _ = grpo.rollout(run, 0, examples, prompts)
    assert torch.equal(mask[:12], rollouts.mask[:12]) and not mask[12:].any()


def test_a_grader_that_fails_once_is_counted(tmp_path, start, monkeypatch):
    """The figures are those of the answers that could be graded, the first one or not."""
    run, examples, prompts = run_of(start, tmp_path)

    def grade(response, example, *rest):
        if example is examples[0]:
            raise RuntimeError("a bug in a grader")
        return evaluate.grade(response, example, *rest)

    monkeypatch.setattr(grpo, "grade", grade)
    _, _, advantage, figures = grpo.rollout(run, 0, examples, prompts)
    assert figures["grader_failures"] == 4 and not advantage[:4].any()
    assert 0 < figures["accuracy"] == figures["reward"] < 1


def weights_of(run):
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


@pytest.mark.parametrize("more", [
    dict(), dict(beta=0.0), dict(filter="drop"), dict(overlong="mask"), dict(minibatches=2),
    dict(algorithm="dapo"), dict(lora_rank=2)])
def test_a_step_without_a_signal_moves_nothing(tmp_path, start, monkeypatch, more):
    """All rewards are equal, or no answer counts, or the grader fails. The gradient is 0, or is of
    the KL alone; Muon scales any to a full step and goes on in its last direction where there is
    none: 48 of 60 steps of a run once moved the model so."""
    run, examples, prompts = run_of(start, tmp_path, **dict(lr=0.02) | more)
    for weight in run.reference.parameters():        # elsewhere: the KL has a gradient
        weight += 0.02
    assert grpo.explore(run, 0, examples, prompts, None)["updates"] == run.config.minibatches
    before = weights_of(run)
    nobody = [replace(example, answer="none of these") for example in examples]
    if run.config.overlong == "penalty":             # of DAPO, which tells long answers apart
        run.config.overlong = "keep"
    if run.config.overlong == "mask":                # no answer comes to its end: none counts
        run.sampler.stop, nobody = -1, examples
    figures = grpo.explore(run, 1, nobody, prompts, None)
    assert figures["updates"] == 0 and figures["grad_norm"] == 0
    monkeypatch.setattr(grpo, "grade", lambda *_: 1 / 0)
    assert grpo.explore(run, 2, examples, prompts, None)["updates"] == 0
    assert torch.equal(weights_of(run), before)
    monkeypatch.undo()
    run.sampler.stop = run.processor.stop
    assert grpo.explore(run, 0, examples, prompts, None)["updates"] >= 1
    assert not torch.equal(weights_of(run), before)


@pytest.mark.parametrize("noise, told, stopped", [(0.0, False, False), (0.06, True, False),
                                                  (0.5, True, True)])
def test_gap_between_sampler_and_trainer(tmp_path, start, capsys, noise, told, stopped):
    """A sampler of other weights draws from another policy than the one that learns; nothing said
    so but a figure that nobody looks at."""
    run, examples, prompts = run_of(start, tmp_path)
    other = copy.deepcopy(run.model)
    with torch.no_grad():
        other.lm_head.weight *= 1 + noise * 10
    run.sampler.model, run.sampler.refresh = other, lambda: None
    try:
        grpo.explore(run, 0, examples, prompts, None)
        ended = False
    except models.CheckpointError as error:
        ended = "differ too much" in str(error)
    assert ended == stopped and ("sampler and trainer differ" in capsys.readouterr().out) == told


def test_truncated_answers_can_be_masked(tmp_path, start):
    run, examples, prompts = run_of(start, tmp_path, overlong="mask")
    rollouts, mask, _, figures = grpo.rollout(run, 0, examples, prompts)
    finished = rollouts.finished
    assert 0 < finished.sum() < 16 and figures["truncated"] == 1 - finished.float().mean()
    assert torch.equal(mask, rollouts.mask & finished[:, None])


def test_each_step_has_its_noise_and_each_minibatch_is_a_step(tmp_path, start):
    """The same noise in every step explores nothing; a minibatch left out learns nothing."""
    run, examples, prompts = run_of(start, tmp_path, minibatches=2)
    for step in (0, 1):
        rollouts, *_ = grpo.rollout(run, step, examples, prompts)
        assert rollouts.rows() == sample(run, prompts, step).rows()
    assert sample(run, prompts, 0).rows() != sample(run, prompts, 1).rows()
    grpo.explore(run, 0, examples, prompts, None)
    head = run.model.lm_head.weight
    assert run.optimizers["lm_head.weight"].state[head]["step"] == 2


def test_seeds_of_runs_differ(tmp_path, start):
    rows = []
    for seed in (0, 1):
        run, examples, prompts = run_of(start, tmp_path / str(seed), seed=seed)
        rows.append(grpo.rollout(run, 0, examples, prompts)[0].rows())
    assert rows[0] != rows[1]


def test_rollouts_are_of_the_trained_model(tmp_path, start):
    """A sampler with weights of its own (bf16 on a GPU) takes over those of the trainer before each
    rollout and each validation; from stale weights the policy learns of another one's answers."""
    run, examples, prompts = run_of(start, tmp_path)
    banned = run.sampler.banned

    def sampler():
        return kernels.Sampler(run.model, banned, run.processor.stop, torch.bfloat16)

    run.sampler = sampler()
    with torch.no_grad():
        for weight in run.model.parameters():
            weight += 0.1 * torch.randn(weight.shape)
    stale = sample(run, prompts, 0).rows()
    rollouts = grpo.rollout(run, 0, examples, prompts)[0].rows()
    run.sampler = sampler()
    assert rollouts == sample(run, prompts, 0).rows() != stale


def coin(response, example, *_):
    """A verdict that nobody can foresee, so that groups differ."""
    right = zlib.crc32(f"{example.id} {response}".encode()) % 2 == 1
    return types.SimpleNamespace(correct=right, parsed=True, formatted=False)


@pytest.mark.parametrize("more", [dict(beta=0.0, log_kl=True), dict(lora_rank=4), dict(beta=0.01)])
def test_kl_is_to_the_initial_model(tmp_path, start, monkeypatch, more):
    """0 in the first step, then not: of the model itself, or (with LoRA, where it needs no copy) of
    the one without adapters. It was once only asserted not to be negative, which k3 never is."""
    monkeypatch.setattr(grpo, "grade", coin)
    rows = train(start, tmp_path, steps=3, lr=1e-2, warmup=0, **more)
    kl = [row["kl"] for row in rows if "kl" in row]
    assert abs(kl[0]) < 1e-6 and kl[1] > 1e-5 and kl[2] > 1e-5


def test_reference_is_made_where_it_is_used(tmp_path, start, monkeypatch):
    """A copy of the model in fp32 is memory that DAPO, Dr. GRPO, GSPO, CISPO and RLOO need not."""
    made = []
    monkeypatch.setattr(sft.Run, "train", lambda run, *_: made.append(run.reference))
    for i, more in enumerate((dict(), dict(algorithm="dapo"), dict(beta=0.0, log_kl=True))):
        train(start, tmp_path / str(i), **more)
    assert [reference is not None for reference in made] == [True, False, True]
    assert not any(p.requires_grad for p in made[0].parameters())


def test_reward_rises(tmp_path, start, monkeypatch):
    """The loop explores: in fifteen steps the kind of answer that is rewarded is the usual one."""
    monkeypatch.setattr(grpo, "grade", lambda response, *_: types.SimpleNamespace(
        correct="e" in response, parsed=True, formatted=False))
    rows = train(start, tmp_path, steps=15, prompts=8, group=8, max_new_tokens=3, lr=3e-2,
                 warmup=0, save_every=99, eval_examples=1)
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "dr_grpo"])
def test_micro_batches_are_one_batch(tmp_path, start, algorithm):
    """Gradients of passes add up to those of the whole minibatch, whatever the aggregation: a mean
    of means over passes of different sizes once was the usual error of gradient accumulation."""
    gradients = []
    for size in (0, 3):
        run, examples, prompts = run_of(start, tmp_path / str(size), algorithm=algorithm,
                                        micro_batch=size, temperature=1.2)
        figures = grpo.explore(run, 0, examples, prompts, None)
        assert figures["grad_norm"] > 1e-3
        gradients.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
