"""What measures has to be right too: operations, memory, and that all rivals really run."""
from types import SimpleNamespace

import pytest
import speed
import torch
from speed import in_turn, loss_ways, operations, peak

import data
import grpo
import kernels


def test_operations_and_memory():
    x = torch.randn(64, 64)
    assert operations(lambda: x @ x) == 2 * 64 ** 3
    three = peak(lambda: [torch.empty(1 << 20) for _ in range(3)])
    assert three == pytest.approx(3 * 2 ** 22 / 1e9)
    assert peak(lambda: [torch.empty(1 << 20).sum() for _ in range(3)]) < 2 * 2 ** 22 / 1e9
    fast, slow = in_turn(lambda: x @ x, lambda: [x @ x for _ in range(300)])
    assert 0 < fast < slow


def test_loss_in_chunks_is_the_loss_and_takes_less_memory(monkeypatch):
    """Beside the gradients and the logits of a chunk there is at most the gradient of the head that
    one chunk gives, in two copies: autograd adds it to the sum."""
    monkeypatch.setattr(kernels, "CHUNK", 0)
    monkeypatch.setattr(kernels, "LEAST", 64)
    chunks, whole = loss_ways(words=5000, width=1024, tokens=2048)
    for mine, other in zip(chunks(), whole()):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    gradients, head = 4 * (5000 + 2048) * 1024 / 1e9, 4 * 5000 * 1024 / 1e9
    assert gradients < peak(chunks) < gradients + 2 * head + 4 * 4 * 64 * 5000 / 1e9
    assert peak(whole) > 3 * 4 * 2048 * 5000 / 1e9 > 1.5 * peak(chunks)


@pytest.mark.parametrize("rivals", [[], ["transformers", "trl"]])
def test_measuring(rivals):
    """Every row of `python -m tests.speed`, on few and short answers; TRL trains our checkpoint."""
    for name in rivals:
        pytest.importorskip(name)
    rows = []
    c = SimpleNamespace(model=None, prompts=2, group=2, new_tokens=3, against=rivals)
    speed.measure_steps(c, lambda *row: rows.append(row), 1e11, 1e10)
    names = [name.partition(",")[0] for name, *_ in rows]
    assert [n for i, n in enumerate(names) if n not in names[:i]] == [
        "sampler", "GRPO step", "SFT step"]
    for _, values, floor, _ in rows:
        assert len(values) >= 1 + bool(rivals) and min(values) > 0 and floor > 0


def test_a_grpo_step_has_its_optimizer(start, tmp_path):
    """A random model's answers all got reward 0, and a step without a signal makes no update: what
    was timed beside TRL's whole step was one without Muon and AdamW."""
    run = speed.run_of(grpo, start, tmp_path, *"--prompts 2 --group 4 --max-new-tokens 24".split())
    some = [data.world_example("train", i) for i in range(2)]
    metrics = speed.grpo_step(run, some, run.processor.batch(some))
    assert metrics["updates"] == 1 and metrics["grad_norm"] > 0
