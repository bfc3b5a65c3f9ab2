"""Imitation: the weights, the optimizers, and what every run needs: resume, errors, metrics."""
import copy
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import score_plain
from safetensors.torch import load_file, save_file

import data
import evaluate
import kernels
import model as models
import sft

ROOT = pathlib.Path(__file__).parents[1]
ENVIRONMENT = dict(os.environ, CUDA_VISIBLE_DEVICES="")


def command(script, out, start, *more):
    common = [sys.executable, str(ROOT / script), "--init", str(start), "--out", str(out),
              "--device", "cpu", "--steps", "8", "--save-every", "1", "--eval-examples", "6",
              "--examples", "64"]
    size = ["--batch", "8"] if script == "sft.py" else ["--prompts", "2", "--group", "4",
                                                       "--max-new-tokens", "12"]
    return common + size + list(more)


def run(words):
    return subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, cwd=ROOT)


def metrics(out):
    return [json.loads(line) for line in open(pathlib.Path(out) / "metrics.jsonl")]


def run_of(start, out, **changes):
    """A run by hand."""
    c = sft.Config(**dict(init=str(start), out=str(out), device="cpu", steps=4, batch=8,
                          examples=16, eval_examples=2, warmup=0, lr=1e-3) | changes)
    return sft.Run(c, *sft.starting_model(c, None, None), decay=True)


@pytest.mark.parametrize("script, more", [
    ("sft.py", []), ("sft.py", ["--lora-rank", "4", "--micro-batch", "3", "--recompute"]),
    ("grpo.py", ["--minibatches", "2"]), ("grpo.py", ["--lora-rank", "4", "--freeze-vision"])])
def test_killed_and_resumed_is_never_killed(tmp_path, start, script, more):
    """A resume that forgets the optimizer, the sampler or the data order repeats or skips data.

    SIGKILL at random moments after the first checkpoint, until the run is through: the same
    weights, optimizer state and metrics, bit for bit.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = run(command(script, whole, start, *more))
    assert done.returncode == 0, done.stderr
    rng, kills = random.Random(script), 0
    broken.mkdir()
    (broken / "run.json").write_text("{}")
    while not json.loads((broken / "run.json").read_text()).get("finished"):
        process = subprocess.Popen(command(script, broken, start, "--resume", *more),
                                   env=ENVIRONMENT, stdout=subprocess.DEVNULL, cwd=ROOT)
        before = (broken / "metrics.jsonl").stat().st_size if kills else 0
        while process.poll() is None and kills < 3:
            path = broken / "metrics.jsonl"
            if path.exists() and path.stat().st_size > before + 300:
                time.sleep(rng.random() * 0.2)
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        assert process.wait() in (0, -signal.SIGKILL)
    assert kills
    for name in ("model.safetensors", "training/state.safetensors"):
        first, second = load_file(whole / name), load_file(broken / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    for one, two in zip(metrics(whole), metrics(broken), strict=True):
        for key in one.keys() - {"seconds", "waited", "tokens_per_second", "rollout_seconds"}:
            assert one[key] == two[key], key


def test_ctrl_c_saves(tmp_path, start):
    process = subprocess.Popen(command("sft.py", tmp_path, start)[:-2] + ["--steps", "2000"],
                               env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while not (tmp_path / "metrics.jsonl").exists() or len(metrics(tmp_path)) < 4:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode and "saved; go on with --resume" in said
    assert (tmp_path / "training" / "state.safetensors").exists()


def test_a_second_run_does_not_overwrite_the_first(tmp_path, start):
    assert run(command("sft.py", tmp_path, start, "--steps", "1")).returncode == 0
    again = run(command("sft.py", tmp_path, start, "--steps", "1"))
    assert again.returncode and "already holds a run" in again.stderr
    other = run(command("sft.py", tmp_path, start, "--steps", "1", "--resume", "--lr", "5"))
    assert other.returncode and "--lr was 0.003 in" in other.stderr
    thrifty = run(command("sft.py", tmp_path, start, "--steps", "1", "--resume", "--recompute",
                          "--micro-batch", "2"))
    assert thrifty.returncode == 0, "what cures a lack of memory may change on resume"


def one_line(*arguments):
    """What a command that ends with an error says, without the progress bar; no traceback."""
    done = run(command(*arguments))
    assert done.returncode and "Traceback" not in done.stderr, done.stderr
    return done.stderr.splitlines()[-1]


def test_a_longer_run_is_the_same_run(tmp_path, start):
    """A finished run could not go on. GRPO's learning rate does not know the last step: two steps
    and two more are four. SFT's falls until the last step: more of it would be another run."""
    outs, common = [tmp_path / name for name in "ab"], ["--save-every", "2"]
    assert run(command("grpo.py", outs[0], start, *common, "--steps", "4")).returncode == 0
    for more in (["--steps", "2"], ["--steps", "4", "--resume"]):
        done = run(command("grpo.py", outs[1], start, *common, *more))
        assert done.returncode == 0, done.stderr
    whole, parts = (load_file(out / "training" / "state.safetensors") for out in outs)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    assert [row["reward"] for row in metrics(outs[0]) if "reward" in row] == [
        row["reward"] for row in metrics(outs[1]) if "reward" in row]
    assert run(command("sft.py", tmp_path / "c", start, "--steps", "2")).returncode == 0
    said = one_line("sft.py", tmp_path / "c", start, "--steps", "4", "--resume")
    assert "--steps was 2" in said and "another schedule" in said


def test_what_a_run_started_from_may_not_change(tmp_path, start):
    """Resumed on an edited file, or against another model at the same path, a run goes on as if
    nothing had happened: the order of its examples and its KL are those of something else."""
    rows = [dict(question=f"{i} + 1?", answer=i + 1) for i in range(30)]
    own, init = tmp_path / "own.jsonl", tmp_path / "init"
    write_rows(own, rows)
    shutil.copytree(start, init)
    common = ["--data", str(own), "--steps", "1"]
    assert run(command("grpo.py", tmp_path / "out", init, *common)).returncode == 0
    write_rows(own, rows[::-1])
    said = one_line("grpo.py", tmp_path / "out", init, *common, "--resume")
    assert "--data-content was" in said
    write_rows(own, rows)
    weights = load_file(init / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, init / "model.safetensors", {"format": "pt"})
    said = one_line("grpo.py", tmp_path / "out", init, *common, "--resume")
    assert "--init-content was" in said
    traces = tmp_path / "traces.jsonl"
    told = [dict(index=i, prompt=rows[i]["question"], response="<answer>3</answer>", correct=True)
            for i in range(4)]
    write_rows(traces, told)
    assert run(command("sft.py", tmp_path / "told", init, *common, "--traces", traces)
               ).returncode == 0
    write_rows(traces, told[1:])
    said = one_line("sft.py", tmp_path / "told", init, *common, "--traces", traces, "--resume")
    assert "--traces-content was" in said
    shutil.rmtree(init)
    assert "config.json is missing" in one_line("grpo.py", tmp_path / "out", init, *common,
                                                "--resume")


def test_init_is_not_overwritten(tmp_path, start):
    """--out at --init trained over the model that it had started from, without a word."""
    init = tmp_path / "init"
    shutil.copytree(start, init)
    before = (init / "model.safetensors").read_bytes()
    assert "is --init" in one_line("sft.py", f"{init}/../init", init)
    assert (init / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name, content, words", [
    ("training/state.safetensors", b"damaged", "state.safetensors cannot be read"),
    ("run.json", b"{", "run.json cannot be read"), ("run.json", b"[]", "run.json cannot be read"),
    ("metrics.jsonl", None, "metrics.jsonl")])
def test_a_damaged_run_is_one_line(tmp_path, start, name, content, words):
    assert run(command("sft.py", tmp_path, start, "--steps", "1")).returncode == 0
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(content) if content else (tmp_path / name).mkdir()
    assert words in one_line("sft.py", tmp_path, start, "--steps", "1", "--resume")


def test_damaged_lines_of_metrics_are_left_out(tmp_path, start):
    assert run(command("grpo.py", tmp_path, start, "--steps", "2")).returncode == 0
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'[1]\n"step"\n\xff\n{"step": 2, "reward": 0.5')
    done = run(command("grpo.py", tmp_path, start, "--steps", "3", "--resume"))
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics(tmp_path)] == [0, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("where", ["model.safetensors", "prompt.json"])
def test_what_fails_at_the_first_save_fails_before_the_first_step(tmp_path, start, where):
    """A dtype unknown to torch, a directory in the way: fifty steps later all were lost."""
    (tmp_path / where).mkdir()
    (tmp_path / where / "in the way").touch()
    assert where in one_line("sft.py", tmp_path, start)
    assert not [row for row in metrics(tmp_path) if row["step"]]


@pytest.mark.parametrize("options, words", [
    (["--lr", "0"], "--lr 0.0: expected 1e-09 to"), (["--lr", "-1"], "--lr -1.0: expected"),
    (["--lr", "nan"], "--lr nan: expected"), (["--lr", "inf"], "--lr inf: expected"),
    (["--seed", "9" * 20], f"--seed {'9' * 20}: expected 0 to"), (["--seed", "-1"], "--seed -1"),
    (["--lora-alpha", "0"], "--lora-alpha 0.0: expected"), (["--steps", "0"], "--steps 0: exp"),
    (["--batch", "0"], "--batch 0: expected 1 to"), (["--warmup", "-1"], "--warmup -1: expected 0"),
    (["--device", "gpu"], "--device: invalid choice: 'gpu'"),
    pytest.param(["--device", "cuda"], "--device: invalid choice: 'cuda'", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a GPU"))])
def test_an_option_out_of_range_is_named(capsys, options, words):
    """--lr 0 trained at 0.003, --lora-alpha 0 trained nothing; others were tracebacks."""
    with pytest.raises(SystemExit):
        evaluate.parse(sft.Config, options)
    assert words in capsys.readouterr().err


def test_a_gradient_of_zero_moves_nothing(tmp_path, start):
    """Muon goes on along its momentum, by a whole step, where the gradient is 0."""
    run = run_of(start, tmp_path)
    prepared = run.processor.prepare(data.World("train"), range(8))
    assert sft.imitate(run, 0, *prepared)["updates"] == 1
    before = [p.clone() for p in run.model.parameters()]
    run.zero_grad()
    for p in run.model.parameters():
        p.grad = torch.zeros_like(p)
    assert run.optimizer_step(1.0, []) == 0
    assert all(map(torch.equal, before, run.model.parameters()))


def test_a_loss_that_is_not_a_number_stops(tmp_path, start):
    """It names the step and the batch, and the last checkpoint stays as it was."""
    done = run(command("sft.py", tmp_path, start, "--lr", "1e9", "--warmup", "0"))
    assert done.returncode and "not finite" in done.stderr and "batch: train/" in done.stderr
    model, _ = models.load_checkpoint(tmp_path)
    assert all(p.isfinite().all() for p in model.parameters())


def test_missing_model_is_one_clear_line(tmp_path):
    done = run(command("grpo.py", tmp_path / "out", tmp_path / "nowhere"))
    assert done.returncode and "config.json is missing" in done.stderr
    assert "Traceback" not in done.stderr


def test_weights():
    """Each is the gradient of the published loss: checked against autograd of that loss."""
    logit = torch.tensor([-3.0, -1.0, 0.5, 2.0], requires_grad=True)
    p = torch.sigmoid(logit)
    entropy = torch.tensor([0.1, 0.9, 0.5, 0.2])
    published = {"nll": -p.log(), "dft": -p.detach() * p.log(),
                 "trsft": -p / p.clamp(min=0.1).detach(),
                 "luffy": -(p / (p + 0.1)).detach() * p.log()}
    mask = torch.ones(1, 4, dtype=torch.bool)
    for name, loss in published.items():
        expected, = torch.autograd.grad(loss.sum() / 4, logit, retain_graph=True)
        ours = sft.imitation_loss(torch.sigmoid(logit).log()[None], entropy[None], None, mask, name)
        ours = ours / 4
        assert torch.allclose(torch.autograd.grad(ours, logit)[0], expected), name
    entropy = torch.arange(10.0)
    assert sft.WEIGHTS["entropy"](entropy, entropy, None).tolist() == [0] * 8 + [1] * 2
    assert sft.WEIGHTS["trsft"](torch.tensor([0.05, 0.2])).tolist() == [0.5, 1]


def test_loss_counts_tokens_only():
    logprob = torch.tensor([[-1.0, -2.0, 0.0], [-3.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert sft.imitation_loss(logprob, -logprob, None, mask, "nll").item() == 6.0


def test_data_order():
    """Every example once an epoch, another order in each, the same again for the same seed."""
    epochs = [sum((sft.batch_indices(20, 5, e * 4 + s, 0) for s in range(4)), []) for e in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] and sft.batch_indices(20, 5, 3, 0) == epochs[0][15:]
    assert sft.batch_indices(20, 5, 0, 1) != epochs[0][:5]
    assert sorted(sft.batch_indices(3, 8, 5, 0)) == [0, 1, 2]


@pytest.mark.parametrize("count, batch", [(127, 64), (65, 64), (64, 64), (3, 8), (1, 1), (7, 2)])
def test_every_example_is_seen_in_every_epoch(count, batch):
    """Each epoch dropped its last part: of 127 rows, 64 at a time, one epoch saw 64."""
    steps = -(-count // batch)
    for epoch in range(2):
        seen = [sft.batch_indices(count, batch, epoch * steps + step, 0) for step in range(steps)]
        assert sorted(sum(seen, [])) == list(range(count)) and max(map(len, seen)) <= batch


def test_epochs_are_steps(tmp_path, start):
    sft.main(sft.Config(init=str(start), out=str(tmp_path), device="cpu", batch=8, examples=17,
                        epochs=2, eval_examples=1))
    assert [row["step"] for row in metrics(tmp_path) if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_optimizers_share_the_parameters():
    """Every parameter in exactly one of Muon and AdamW; only matrices of layers in Muon."""
    model, _ = models.fresh("s", [data.base_example(i) for i in range(50)], 0)
    made = sft.make_optimizers(dict(model.named_parameters()), 1e-3)
    adam, muon = sorted(set(made.values()), key=lambda one: type(one).__name__)
    assert isinstance(muon, sft.Muon) and isinstance(adam, torch.optim.AdamW)
    first, second = ({id(p) for p in o.param_groups[0]["params"]} for o in (muon, adam))
    assert not first & second and first | second == {id(p) for p in model.parameters()}
    assert id(model.lm_head.weight) in second


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_muon_goes_where_that_of_torch_goes(scale):
    """Tall and wide matrices, one without a gradient in a step. torch's iterates in bf16: on a CPU
    that cannot multiply in it (AVX2 alone), its step once took longer than the passes of the model
    forward and backward."""
    shapes = [(64, 64), (64, 64), (160, 64), (64, 160), (32, 64)]
    torch.manual_seed(0)
    mine = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    starts = [p.detach().clone() for p in mine]
    theirs = [torch.nn.Parameter(p.clone()) for p in starts]
    muon = sft.Muon(mine, 1e-2)
    other = torch.optim.Muon(theirs, 1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        for place, (p, q) in enumerate(zip(mine, theirs)):
            p.grad = None if (place, step) == (1, 2) else scale * torch.randn(p.shape)
            q.grad = None if p.grad is None else p.grad.clone()
        muon.step()
        other.step()
    for p, q, start in zip(mine, theirs, starts):
        assert (p - q).norm() < 0.02 * (p - start).norm()


def test_orthogonal_keeps_the_directions_of_a_matrix():
    """U S Vᵀ becomes U S' Vᵀ, every s' in 0.68..1.14 (Jordan 2024), tall or wide."""
    torch.manual_seed(0)
    for shape in [(48, 64), (64, 48)]:
        matrix = torch.randn(shape)
        u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
        values = u.T @ sft.orthogonal(matrix) @ vt.T
        assert (0.68 < values.diagonal()).all() and (values.diagonal() < 1.14).all()
        assert (values - values.diagonal().diag()).abs().max() < 1e-4


def test_resume_leaves_the_number_of_steps_on_the_cpu(tmp_path, start):
    """It was moved to the GPU with the moments, where AdamW waits twice for each parameter. On the
    device «meta», which is as far from the CPU as a GPU is."""
    run = run_of(start, tmp_path)
    sft.imitate(run, 0, *run.processor.prepare(data.World("train"), range(8)))
    run.save()
    run.trained = {name: torch.nn.Parameter(p.detach().to("meta")) for name, p in
                   run.trained.items()}
    run.restore()
    devices = {(part, tensor.device.type) for name, p in run.trained.items()
               for part, tensor in run.optimizers[name].state[p].items()}
    assert devices == {("step", "cpu"), ("exp_avg", "meta"), ("exp_avg_sq", "meta"),
                       ("momentum_buffer", "meta")}


def test_lora_gets_the_whole_rate(start):
    """AdamW beside Muon takes a third of --lr; alone, under LoRA, it once took a third as well."""
    for name, rate in (("x.lora_A.weight", 1e-4), ("lm_head.weight", 1e-4)):
        made = sft.make_optimizers({name: torch.nn.Parameter(torch.ones(2, 2))}, 1e-4)
        assert made[name].param_groups[0]["lr"] == rate
    both = {"a.layers.0.q": torch.nn.Parameter(torch.ones(2, 2)),
            "norm": torch.nn.Parameter(torch.ones(2))}
    made = sft.make_optimizers(both, 3e-4)
    rates = [made[name].param_groups[0]["lr"] for name in both]
    assert rates == [3e-4, pytest.approx(1e-4)]


def test_traces_of_a_file_are_its_own(tmp_path):
    with pytest.raises(data.DataError, match="--traces answer"):
        sft.training_examples(sft.Config(data=str(tmp_path / "x.jsonl"), traces="answer"))


def test_file_of_rollouts_as_traces(tmp_path, start):
    """Rejection sampling is: write rollouts, train on the right ones. Of one's own file it was not
    possible, though README said so; its rows may all have one id."""
    own, path = tmp_path / "own.jsonl", tmp_path / "rollouts.jsonl"
    write_rows(own, [dict(id="same", question=f"{i} + 0?", answer=i) for i in range(40)])
    for source in ("world", str(own)):
        c = sft.Config(data=source, traces=str(path))
        asked = evaluate.load_examples(c, "train")
        rows = [dict(index=i, prompt=asked[i].question, response=f"<answer>{i}</answer>",
                     correct=i % 2 == 0) for i in range(6)]
        write_rows(path, rows)
        traces = sft.training_examples(c)
        assert [one.response for one in traces] == [f"<answer>{i}</answer>" for i in (0, 2, 4)]
        assert [one.question for one in traces] == [asked[i].question for i in (0, 2, 4)]
        write_rows(path, rows[1:2])
        with pytest.raises(data.DataError, match="no right answer"):
            sft.training_examples(c)


def test_weights_see_who_wrote_the_answers(tmp_path, start, monkeypatch):
    """The log-probs of a file of rollouts, token for token in every pass; nan where there are none,
    or where the file's text is made of other tokens than were sampled."""
    run = run_of(start, tmp_path, micro_batch=2)
    asked, seen = data.World("train"), []
    answers = [asked[i].response for i in range(4)]
    ids = [run.processor.response_ids(answer) for answer in answers]
    rows = [dict(index=i, prompt=asked[i].question, response=answers[i], correct=True,
                 response_ids=ids[i], logprobs=[-float(i + 1)] * len(ids[i])) for i in range(4)]
    rows[1]["response_ids"] = ids[1][:-2] + ids[1][-1:] + ids[1][-2:-1]
    del rows[2]["logprobs"], rows[2]["response_ids"]
    write_rows(tmp_path / "rollouts.jsonl", rows)
    examples = sft.read_traces(tmp_path / "rollouts.jsonl", asked)
    monkeypatch.setitem(sft.WEIGHTS, "nll", lambda p, entropy, written: (
        seen.extend(row.tolist() for row in written), torch.ones_like(p))[1])
    sft.imitate(run, 0, *run.processor.prepare(examples, range(4)))
    known = [[x for x in row if x == x] for row in seen]
    assert known == [[-1.0] * len(ids[0]), [], [], [-4.0] * len(ids[3])]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("row", [
    dict(prompt="another question"), dict(index=39), dict(index=None), dict(response=5),
    dict(index="1"), "text", None])
def test_traces_of_something_else_are_one_line(tmp_path, row):
    """A damaged file, rollouts of val or of another file: once a traceback, or, worse, answers to
    other questions. 40 rows of one's own are 38 of train and 2 of val."""
    own, path = tmp_path / "own.jsonl", tmp_path / "rollouts.jsonl"
    write_rows(own, [dict(question=f"{i} + 0?", answer=i) for i in range(40)])
    good = dict(index=1, prompt="1 + 0?", response="<answer>1</answer>", correct=True)
    write_rows(path, [good, good | row if isinstance(row, dict) else row])
    with pytest.raises(data.DataError, match=r"rollouts\.jsonl:2"):
        sft.training_examples(sft.Config(data=str(own), traces=str(path)))


def test_learns_by_heart(tmp_path, start):
    """Ninety steps on eight examples: greedy answers are the traces (the whole loop learns)."""
    c = sft.Config(init=str(start), out=str(tmp_path), device="cpu", examples=8, batch=8, steps=90,
                   warmup=5, lr=5e-3, eval_examples=1, traces="answer")
    sft.main(c)
    model, processor = models.load_checkpoint(tmp_path)
    from kernels import Sampler
    rows = evaluate.evaluate(Sampler(model, processor.banned(model.vocabulary), processor.stop),
                             processor, [data.world_example("train", i) for i in range(8)])
    assert sum(row["correct"] for row in rows) >= 7


def textbook(weight, logprob, entropy):
    """The loss of one answer's tokens as the papers write it, from their log-probs."""
    p = logprob.exp()
    if weight == "trsft":                            # 2512.17636: a trust region
        return -p / p.clamp(min=0.1).detach()
    if weight == "entropy":                          # MIFO: the fifth with the highest entropy
        return -logprob * (entropy >= np.quantile(entropy.detach().numpy(), 0.8))
    return -logprob * {"nll": torch.ones_like(p), "dft": p, "luffy": p / (p + 0.1)}[weight].detach()


@pytest.mark.parametrize("micro_batch", [0, 3])
@pytest.mark.parametrize("weight", list(sft.WEIGHTS))
def test_a_step_is_the_gradient_of_the_textbook_loss(tmp_path, start, weight, micro_batch):
    """The loss is one of tokens, over all micro-batches of a step, long answers and short, pictures
    and text: a mean over each pass or each answer is the usual error of gradient accumulation, and
    the entropy mask once took its quantile over a pass."""
    run = run_of(start, tmp_path, weight=weight, micro_batch=micro_batch)
    examples = [data.world_example("text" if i == 1 else "train", i, ("answer", "canonical")[i % 2])
                for i in range(8)]
    examples, prompts, responses = run.processor.prepare(examples, range(len(examples)))
    assert len(set(map(len, responses))) > 3
    initial = copy.deepcopy(run.model)
    figures = sft.imitate(run, 0, examples, prompts, responses)
    got = torch.cat([p.grad.flatten() for p in run.model.parameters()])

    ids, lengths = data.pad_rows(responses, run.processor.pad)
    logprob, entropy = score_plain(initial, prompts, ids, kernels.length_mask(lengths))
    tokens = [textbook(weight, logprob[r, :n], entropy[r, :n]) for r, n in enumerate(lengths)]
    loss = torch.cat(tokens).sum() / int(lengths.sum())
    slopes = torch.autograd.grad(loss, list(initial.parameters()))
    slope = torch.cat([one.flatten() for one in slopes])
    slope *= min(1, 1 / slope.norm())                # it was clipped
    torch.testing.assert_close(got, slope, rtol=1e-3, atol=1e-4 * slope.abs().max().item())
    assert figures["tokens"] == int(lengths.sum())
    assert figures["entropy"] == pytest.approx(entropy.sum().item() / int(lengths.sum()), rel=1e-4)
    if weight != "trsft":                            # whose value is not -w log p, only its slope
        assert figures["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_defaults_of_the_base(tmp_path, monkeypatch):
    """The steps and the rate that it was calibrated with; it sees each example once."""
    made = []
    monkeypatch.setattr(sft.Run, "train", lambda run, examples, *_: made.append((run, examples)))
    sft.main(sft.Config(stage="base", out=str(tmp_path), device="cpu"))
    (run, examples), = made
    assert (run.config.steps, run.config.lr) == (2200, 6e-3)
    assert len(examples) == 2200 * run.config.batch
    assert examples[7].question == data.base_example(7).question


def test_lr_factor():
    """Up in `warmup` steps, then (SFT) down to a tenth; GRPO's stays at its peak."""
    assert [sft.lr_factor(step, 100, 4, False) for step in (0, 1, 3, 4, 99)] == [
        0.25, 0.5, 1, 1, 1]
    assert sft.lr_factor(0, 100, 0, False) == 1
    assert sft.lr_factor(50, 100, 4, True) == pytest.approx(0.55)
    assert sft.lr_factor(99, 100, 4, True) == pytest.approx(0.109)


def test_each_step_has_its_rate(tmp_path, start):
    """Of both optimizers, AdamW's peak a third of Muon's; the second step knows the first's."""
    run = run_of(start, tmp_path, lr=3e-3, warmup=2)
    prepared = run.processor.prepare(data.World("train"), range(8))
    for step in range(3):
        run.step = step
        sft.imitate(run, step, *prepared)
        rates = {type(o).__name__: o.param_groups[0]["lr"] for o in run.optimizers.values()}
        factor = sft.lr_factor(step, 4, 2, True)
        expected = {"Muon": 3e-3 * factor, "AdamW": 1e-3 * factor}
        assert rates == pytest.approx(expected)


def test_gradients_are_clipped(tmp_path, start):
    """To a norm of 1 over all parameters; what is smaller stays. The norm before is reported."""
    run = run_of(start, tmp_path)
    count = sum(p.numel() for p in run.model.parameters())
    for size, left in ((5.0, 1.0), (0.5, 0.5)):
        for p in run.model.parameters():
            p.grad = torch.full_like(p, size / count ** 0.5)
        assert run.optimizer_step(0.0, []) == pytest.approx(size, rel=1e-4)
        gradient = torch.cat([p.grad.flatten() for p in run.model.parameters()]).double()
        norm = gradient.norm().item()                # in fp32 equal summands lose 2e-4
        assert norm == pytest.approx(left, rel=1e-4)


@pytest.mark.parametrize("kind", ["world", "file"])
def test_validation_is_on_the_split_val(tmp_path, start, monkeypatch, capsys, kind):
    """Never on train or test; and training never sees what is validated on. The answers are kept,
    and the first is shown."""
    seen = {"val": set(), "train": set()}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(dict(question=f"{i}?", answer=i)) + "\n"
                            for i in range(60)))
    monkeypatch.setattr(sft, "evaluate", lambda sampler, processor, examples, *_, **__: (
        seen["val"].update(e.id for e in examples), evaluate.evaluate(
            sampler, processor, examples, "val", new_tokens=2))[1])
    monkeypatch.setattr(sft, "imitate", lambda run, step, examples, *_: (
        seen["train"].update(e.id for e in examples), dict(loss=0.0))[1])
    common = {} if kind == "world" else dict(data=str(path))
    sft.main(sft.Config(init=str(start), out=str(tmp_path / "run"), device="cpu", steps=6, batch=16,
                        examples=60, eval_examples=30, **common))
    assert all(row["prompt_tokens"] > 16 * 5 for row in metrics(tmp_path / "run") if "loss" in row)
    expected = {f"val/{i}" for i in range(30)} if kind == "world" else {
        f"{path}:{i}" for i in range(58, 61)}
    assert seen["val"] == expected and not seen["train"] & expected
    shown = capsys.readouterr().out
    for step in (0, 6):
        kept = data.read_jsonl(tmp_path / "run" / "answers" / f"step-{step}.jsonl")
        assert {row["id"] for row in kept} == expected
        assert f"{kept[0]['prompt']} -> {kept[0]['response']}" in shown
    if kind == "world":
        assert seen["train"] <= {f"train/{i}" for i in range(60)}


def test_validation_is_of_the_trained_model(tmp_path, start):
    """On a GPU the sampler has weights of its own: without a refresh the first model's accuracy is
    reported for ever."""
    run = run_of(start, tmp_path)
    run.sampler = kernels.Sampler(run.model, run.sampler.banned, run.processor.stop, torch.bfloat16)
    with torch.no_grad():
        for weight in run.model.parameters():
            weight += 0.1
    run.validate()
    pairs = zip(run.sampler.model.parameters(), run.model.parameters())
    assert all(torch.equal(mine, theirs.bfloat16()) for mine, theirs in pairs)


def test_what_is_kept_may_be_written_with_spaces(tmp_path, start):
    """--keep "800, 1200" kept the first alone, without a word."""
    sft.main(sft.Config(init=str(start), out=str(tmp_path), device="cpu", steps=3, batch=4,
                        examples=12, eval_examples=1, keep="1, 2"))
    assert {path.name for path in tmp_path.glob("step-*")} == {"step-1", "step-2"}
    models.load_checkpoint(tmp_path / "step-2")


def test_validation_gives_its_memory_back(tmp_path, start):
    """The cache of 240 answers, of a large model a gigabyte, was held through all of training."""
    run = run_of(start, tmp_path)
    run.validate()
    assert run.sampler.shape[:3] == (1, 1, 1) and run.sampler.cache.nbytes < 2 ** 20


@pytest.mark.parametrize("more, moved", [
    (dict(freeze_vision=True), {"connector", "text_model", "lm_head"}),
    (dict(lora_rank=2, lora_targets="q_proj, up_proj"), {"text_model"})])
def test_what_is_frozen_stays(tmp_path, start, more, moved):
    sft.main(sft.Config(init=str(start), out=str(tmp_path), device="cpu", batch=8, examples=16,
                        steps=2, eval_examples=1, warmup=0, **more))
    before, after = (models.load_checkpoint(path)[0].state_dict() for path in (start, tmp_path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {part for part in ("vision_model", "connector", "text_model", "lm_head")
            if any(part in name for name in changed)} == moved
    if "lora_rank" in more:
        assert all("q_proj" in name or "up_proj" in name for name in changed)


def smolvlm(hidden, inter, layers, heads, kv_heads, vocabulary, theta, image, shuffle, **vision):
    """A hub config.json, which leaves out what equals a default."""
    return dict(model_type="idefics3", image_token_id=image, scale_factor=shuffle,
                vision_config=vision, text_config=dict(
                    hidden_size=hidden, intermediate_size=inter, num_hidden_layers=layers,
                    num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=64,
                    vocab_size=vocabulary, rope_theta=theta, rms_norm_eps=1e-5))


def qwen(kind, hidden, inter, layers, heads, kv_heads, vocabulary, tied, **vision):
    return dict(model_type=kind, hidden_size=hidden, intermediate_size=inter,
                num_hidden_layers=layers, num_attention_heads=heads, vocab_size=vocabulary,
                num_key_value_heads=kv_heads, rms_norm_eps=1e-6, rope_theta=1e6,
                rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]), image_token_id=151655,
                tie_word_embeddings=tied, vision_config=vision)


SMALL = dict(hidden_size=768, num_attention_heads=12, image_size=512, patch_size=16, shuffle=4)
SO400M = dict(hidden_size=1152, num_hidden_layers=27, num_attention_heads=16, shuffle=3,
              intermediate_size=4304, image_size=384, patch_size=14)
PUBLISHED = {       # name: (config.json of the hub, published millions of parameters)
    "SmolVLM-256M": (smolvlm(576, 1536, 30, 9, 3, 49280, 1e5, 49190, **SMALL), 256.5),
    "SmolVLM-500M": (smolvlm(960, 2560, 32, 15, 5, 49280, 1e5, 49190, **SMALL), 507.5),
    "SmolVLM (2.2B)": (smolvlm(2048, 8192, 24, 32, 32, 49155, 273768, 49153, **SO400M), 2246.3),
    "Qwen2-VL-2B": (qwen("qwen2_vl", 1536, 8960, 28, 12, 2, 151936, True, hidden_size=1536),
                    2209.0),
    "Qwen2.5-VL-3B": (qwen("qwen2_5_vl", 2048, 11008, 36, 16, 2, 151936, True, hidden_size=1280,
                           out_hidden_size=2048), 3754.6),
    "Qwen2-VL-7B": (qwen("qwen2_vl", 3584, 18944, 28, 28, 4, 152064, False, hidden_size=3584),
                    8291.4),
    "Qwen2.5-VL-7B": (qwen("qwen2_5_vl", 3584, 18944, 28, 28, 4, 152064, False, hidden_size=1280,
                           out_hidden_size=3584), 8292.2)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """Hub configs, defaults left out, sum up to the published sizes."""
    raw, millions = PUBLISHED[name]
    with torch.device("meta"):
        model = models.VLM(raw)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def memory(raw, script, rank):
    """GB on a GPU, computed, in a step and in a validation. A step: the sampler's cache, and one
    pass of --micro-batch 1 --recompute over a picture of 512x512 and answers of 256 tokens: of 8
    rollouts in GRPO (8 questions a step), of one trace in SFT. A validation: the cache of 240
    answers, or what there is room for. Without the activations of the ViT."""
    with torch.device("meta"):
        model = models.VLM(raw)
        if rank:
            models.add_lora(model, rank, 32.0, sft.Config.lora_targets)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    every, c = sum(p.numel() for p in model.parameters()), model.config.text
    total = 0.6e9 + 2 * every        # CUDA itself; in bf16: frozen, or a copy for the sampler
    if script == "grpo" and not rank:
        total += 4 * every           # the reference
    for optimizer in set(sft.make_optimizers(trained, 1.0).values()):     # all of it in fp32
        moments = 1 if isinstance(optimizer, sft.Muon) else 2
        total += 4 * (2 + moments) * sum(p.numel() for p in optimizer.param_groups[0]["params"])
    slot = 2 * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    layer = 2 * (8 * c.hidden_size + 4 * c.intermediate_size)    # of a token, within one layer

    def cache(groups, group):
        """Its bytes, and how many rows they hold."""
        each = slot * (384 + 256 * group)
        groups = min(groups, kernels.CACHE_BYTES // each)
        return each * groups, groups * group

    tokens = 384 + 256 * (8 if script == "grpo" else 1)
    step = 0 if rank else 2 * every  # what autocast makes of fp32 weights
    step += cache(8, 8)[0] if script == "grpo" else 0
    step += tokens * c.num_hidden_layers * c.hidden_size * (4 if rank else 6)    # layers' inputs
    step += tokens * layer
    step += 2 * 4 * c.vocab_size * c.hidden_size * (not rank)    # a chunk's gradient, the new sum
    step += 4 * 4 * max(kernels.CHUNK, kernels.LEAST * c.vocab_size)             # chunks of logits
    held, rows = cache(sft.Config.eval_examples, 1)
    validation = held + kernels.TOKENS_AT_ONCE * layer + 4 * 4 * rows * c.vocab_size
    return (total + step) / 1e9, (total + validation) / 1e9


def test_memory_table():
    """The README's table is what these formulas give."""
    readme = (ROOT / "README.md").read_text()
    for name, (raw, _) in PUBLISHED.items():
        cells = [f"{max(memory(raw, script, rank)):.1f}" for rank in (0, 16)
                 for script in ("sft", "grpo")]
        assert re.search(rf"\| {re.escape(name)} +\| " + r" +\| ".join(cells), readme), cells
