"""Several processes by torchrun, here of CPUs (gloo): they train and answer as one does."""
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed
from conftest import ROOT
from safetensors.torch import load_file

import data
import evaluate
import grpo
import kernels
import sft

SMALL = dict(device="cpu", eval_examples=5, warmup=0, seed=3)
WORK = {  # name: module, options of a run; 4 questions a step, but the last step of an epoch has 2
    "sft": (sft, dict(batch=4, examples=6, epochs=2)),
    "entropy": (sft, dict(batch=4, examples=6, epochs=2, weight="entropy", micro_batch=1)),
    "grpo": (grpo, dict(prompts=4, examples=6, group=4, steps=2, max_new_tokens=6)),
    "dapo": (grpo, dict(prompts=4, examples=6, group=4, steps=2, max_new_tokens=6, beta=0.1,
                          algorithm="dapo", minibatches=2, micro_batch=1))}


def varied(response, example, answer_format):
    """A grader to which some answers of a model that knows nothing are right."""
    return SimpleNamespace(correct=len(response) % 3 == 0, parsed=True, formatted=False)


def work(start, out):
    """All of WORK, in this process or in each of several; beside each run the gradients of its
    steps, and at which step each process sees it saved. The one that writes is slow."""
    if kernels.WORLD > 1:
        torch.distributed.init_process_group()
    grpo.grade, clip, write = varied, torch.nn.utils.clip_grad_norm_, sft.write_file

    def slowly(path, content):
        time.sleep(0.3 * (kernels.RANK == 0))
        write(path, content)

    sft.write_file = slowly
    for name, (module, options) in WORK.items():
        gradients = []

        def clipped(parameters, most, gradients=gradients):
            parameters = list(parameters)
            gradients.append([None if p.grad is None else p.grad.clone() for p in parameters])
            return clip(parameters, most)

        torch.nn.utils.clip_grad_norm_ = clipped
        module.main(module.Config(init=str(start), out=f"{out}/{name}", **SMALL | options))
        step = load_file(f"{out}/{name}/training/state.safetensors")["step"]
        torch.save((gradients, step), f"{out}/{name}/seen-{kernels.RANK}.pt")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_device_has_a_backend(monkeypatch, device):
    """On a machine with a GPU torch alone chooses NCCL, which refuses the sums of CPU tensors: the
    first of several processes that met stopped there."""
    @dataclasses.dataclass
    class Config:
        device: str = evaluate.option("cuda", "where")

    chosen = []
    monkeypatch.setattr(evaluate, "WORLD", 2)
    monkeypatch.setattr(torch.distributed, "init_process_group", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    evaluate.run_script(lambda c: None, Config, "", ["--device", device])
    backend = torch.distributed.BackendConfig(torch.distributed.Backend(chosen[0]))
    expected = dict(cpu="gloo") if device == "cpu" else dict(cpu="gloo", cuda="nccl")
    assert backend.device_backend_map == expected


def launch(processes, *command):
    """Starts a command on several processes, or on one."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words = [sys.executable, *(several if processes > 1 else []), *map(str, command)]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=f"{ROOT}")
    return subprocess.Popen(words, cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process, fails=False):
    """Waits for it -> what it said."""
    said, _ = process.communicate(timeout=300)
    assert (process.returncode != 0) == fails, said
    return said


@pytest.fixture(scope="module")
def worked(start, tmp_path_factory):
    """{processes: the directory of their runs}; of three, one has no pass where there are 2."""
    outs = {count: tmp_path_factory.mktemp(f"of-{count}") for count in (1, 3)}
    for process in [launch(count, __file__, start, out) for count, out in outs.items()]:
        finish(process)
    return outs


def metrics(path):
    clock = ("seconds", "waited", "rollout_seconds", "tokens_per_second")
    return [{name: value for name, value in row.items() if name not in (*clock, "val_interval")}
            for row in data.read_jsonl(path / "metrics.jsonl")]


@pytest.mark.parametrize("name", WORK)
def test_three_processes_train_as_one(worked, name):
    """The same rollouts and figures, and at the first step the gradient, in every process."""
    one, three = (worked[count] / name for count in (1, 3))
    gradients, last = torch.load(one / "seen-0.pt")
    assert sum(g.abs().sum() for g in gradients[0] if g is not None) > 0.1
    for rank in range(3):
        in_three, saved = torch.load(three / f"seen-{rank}.pt")
        assert saved == last
        for ours, theirs in zip(gradients[0], in_three[0]):
            assert theirs.abs().max() < 1e-6 if ours is None else (ours - theirs).abs().max() < 1e-6
    rows = metrics(one), metrics(three)
    assert len(rows[0]) == len(rows[1]) >= 4
    for mine, theirs in zip(*rows):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    if name in ("grpo", "dapo"):
        assert rows[0][1]["updates"] > 0
        exact = "reward", "length", "advantage", "equal_groups"
        assert all(rows[0][1][key] == rows[1][1][key] for key in exact)


def test_processes_stay_alike(worked):
    """A process that went its own way would be seen in the gradients of its last step."""
    for name in WORK:
        last = [torch.load(worked[3] / name / f"seen-{rank}.pt")[0][-1] for rank in range(3)]
        assert all(map(torch.equal, last[0], last[1])) and all(map(torch.equal, last[0], last[2]))


def options(start, out):
    return (ROOT / "sft.py", "--init", start, "--out", out, "--device", "cpu", "--examples", 40,
            "--batch", 4, "--epochs", 1, "--eval-examples", 3, "--save-every", 2, "--resume")


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    finish(launch(1, *options(start, out)))
    return out


@pytest.mark.parametrize("how, before, after", [("SIGKILL", 2, 1), ("SIGINT", 1, 2),
                                                ("SIGINT", 2, 3)])
def test_resume_with_another_number(start, tmp_path, undisturbed, how, before, after):
    """Killed or stopped, a run goes on with another number of processes, as if nothing was."""
    process = launch(before, *options(start, tmp_path))
    path = tmp_path / "metrics.jsonl"
    while process.poll() is None and len(path.read_text().split("\n") if path.exists() else []) < 5:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0]
    if how == "SIGKILL":             # torchrun and its children have the path in their words
        subprocess.run(["pkill", "-KILL", "-f", str(tmp_path)], check=True)
        process.wait()
    else:
        process.send_signal(signal.SIGINT)
        said = finish(process, fails=True)
        assert said.count("saved; go on with --resume") == before
    state = load_file(tmp_path / "training" / "state.safetensors")
    assert 2 <= state["step"] < 10
    finish(launch(after, *options(start, tmp_path)))
    assert len(metrics(tmp_path)) == len(metrics(undisturbed)) == 12
    for mine, theirs in zip(metrics(tmp_path), metrics(undisturbed)):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert json.loads((tmp_path / "run.json").read_text())["finished"]


def test_evaluation_is_shared_out(start, tmp_path):
    """The rows of two processes are those of one, and one of them talks and writes."""
    said = []
    for count in (1, 2):
        said.append(finish(launch(
            count, ROOT / "evaluate.py", "--model", start, "--device", "cpu", "--limit", 5,
            "--samples", 2, "--split", "test,text", "--max-new-tokens", 6, "--out",
            tmp_path / f"{count}.jsonl")))
    one, two = (data.read_jsonl(tmp_path / f"{count}.jsonl") for count in (1, 2))
    assert len(one) == 20 and said[0] in said[1] and said[1].count("5 of 20000 questions") == 2
    for mine, theirs in zip(one, two):
        assert mine.pop("logprobs") == pytest.approx(theirs.pop("logprobs"), abs=1e-5)
        assert mine == theirs


def test_no_base_is_made_by_many(tmp_path):
    """Each process would have made it, into one directory."""
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         ROOT / "sft.py", "--out", tmp_path / "out", "--device", "cpu"], cwd=tmp_path, text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True)
    assert process.returncode != 0 and not (tmp_path / "runs").exists()
    assert "first, as one process: python sft.py --stage base" in process.stderr


if __name__ == "__main__":
    work(*map(pathlib.Path, sys.argv[1:]))
