"""The GPU's path without a GPU: captured sampling, and training with every tensor on a device.

tests/emulator.py is the device. What a real one alone can tell is in tests/test_kernels.py."""
import copy
import importlib.util
import json
import sys
import zlib
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, picky_model, widen
from emulator import CUDA, Refused, emulated_cuda

import data
import evaluate
import grpo
import kernels
import sft

pytestmark = pytest.mark.skipif(torch.cuda.is_available() or sys.platform != "linux",
                                reason="a GPU is there, or torch's libraries are elsewhere")
TOKENS = 8
LAYER, ONCE = 23, 83              # kernels of a captured step


def short_windows(module, monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 4)         # two windows of TOKENS steps
    monkeypatch.setattr(module, "CHECK_EVERY", 2)


@pytest.fixture
def device(monkeypatch):
    with emulated_cuda() as emulated:
        short_windows(kernels, monkeypatch)
        yield emulated


@pytest.fixture(scope="module")
def vlm():
    """A model, and what it is asked, on the CPU."""
    model, processor, banned = picky_model()
    splits = dict(mixed=("test", "text"), pictures=("test",), words=("text",))
    batches = {kind: processor.batch([data.world_example(some[i % len(some)], i)
                                      for i in range(4)]) for kind, some in splits.items()}
    ids = kernels.Sampler(model, banned, -1).generate(batches["mixed"], 8, TOKENS).ids
    return SimpleNamespace(model=model, banned=banned, seeds=torch.arange(5, 9), **batches,
                           stop=int(ids.flatten().bincount().argmax()))


# ------------------------------------------------------------------------------- the device
def test_devices_do_not_mix(device):
    """A tensor left on the CPU crashes on a GPU alone; numbers and indices may stay there."""
    x = torch.arange(6.0, device="cuda").view(2, 3)
    assert x.is_cuda and x.device == CUDA == (x + 1).device and x.cpu().device.type == "cpu"
    assert x[torch.tensor([1])].tolist() == [[3, 4, 5]] == (x * torch.tensor(1.0))[1:].tolist()
    assert x.new_zeros(2).is_cuda and x.to("cpu").to(x.device).is_cuda and x.to("cuda") is x
    for mixed in (lambda: x + torch.ones(3), lambda: torch.ones(3)[x[0].long() * 0],
                  lambda: torch.cat([x, torch.ones(1, 3)]), lambda: x.T @ torch.ones(2, 2),
                  lambda: torch.ones(3) + x.sum(), lambda: x.index_copy_(
                      0, torch.tensor([0]), x[:1]), lambda: x.numpy()):
        with pytest.raises(RuntimeError):
            mixed()
    assert not torch.equal(torch.empty(4, device="cuda"), torch.zeros(4, device="cuda"))


def test_waits_are_counted_by_line(device):
    """Each look at a value, mask as an index and copy from the host waits for the device."""
    x = torch.ones(3, 3, device="cuda")
    mask, device_waits = x > 0, []
    for look in (lambda: x.sum().item(), lambda: x.tolist(), lambda: x[mask], lambda: x.cpu(),
                 lambda: x.nonzero(), lambda: bool(mask.any()), lambda: torch.ones(3).to("cuda"),
                 lambda: x.copy_(torch.zeros(3, 3)), lambda: x.masked_select(mask),
                 lambda: x.repeat_interleave(x[0].long(), 0), lambda: x[torch.tensor([0])]):
        device.waits.clear()
        look()
        device_waits.append(sum(device.waits.values()))
        assert all(" test_emulated.py:" in line for line in device.waits)
    assert device_waits == [1] * 11
    device.waits.clear()
    x[0].add_(x[mask[0].long()].repeat_interleave(2, 0)[0]).masked_fill_(mask[0], 2.0)
    assert not device.waits


def test_autocast_is_that_of_a_gpu(device):
    """On a CPU softmax stays in bf16 under autocast; on a GPU it is made fp32."""
    x = torch.ones(2, 2, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        product = x @ x
        assert product.dtype == torch.bfloat16 and torch.is_autocast_enabled("cuda")
        assert product.softmax(-1).dtype == product.pow(2).dtype == torch.float32
    assert (x @ x).dtype == torch.float32 and not torch.is_autocast_enabled("cuda")
    product.float().sum().backward()
    assert x.grad.is_cuda and x.grad.dtype == torch.float32


def captured(run):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=None):
        run()
    return graph


def test_a_graph_knows_its_memory_alone(device):
    """Python's numbers and names are frozen; nothing is computed before the first replay."""
    held = SimpleNamespace(x=torch.ones(3, device="cuda"), number=2, new=None)
    total = torch.zeros(3, device="cuda")

    def step():
        held.new = held.x * held.number
        total.add_(held.new)

    graph = captured(step)
    assert total.tolist() == [0] * 3
    held.number = 5
    held.x.fill_(3)
    graph.replay()
    graph.replay()
    assert total.tolist() == [12] * 3 and held.new.tolist() != [6] * 3
    held.x = torch.ones(3, device="cuda")
    with pytest.raises(Refused, match="freed"):
        graph.replay()


def test_a_capture_refuses_to_wait(device):
    x = torch.ones(3, device="cuda")
    for look in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x.cpu(), lambda: x.tolist(),
                 lambda: torch.ones(3).to("cuda"), lambda: x.copy_(torch.ones(3)),
                 lambda: torch.equal(x, x), lambda: x.nonzero()):
        with pytest.raises(Refused, match="within a capture"):
            captured(look)
    with torch.inference_mode(), pytest.raises(Refused, match="within a capture"):
        captured(lambda: torch.ones(3).to(x.device))
    captured(lambda: x.add_(1)).replay()
    assert x.tolist() == [2] * 3


def test_all_is_undone():
    """The other files of the process must not notice."""
    def state():
        return (torch.Tensor.to, torch.autocast, torch.amp.autocast, torch.cuda.graph,
                torch.cuda.is_available())

    before = state()
    with pytest.raises(ZeroDivisionError), emulated_cuda():
        left = torch.ones(3, device="cuda")
        1 / 0
    assert before == state()
    with pytest.raises(Refused, match="no longer"):
        left + 1
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(3, device="cuda")


# ------------------------------------------------------------------------------- the sampler
def same(got, expected):
    return all(map(torch.equal, vars(got).values(), vars(expected).values()))


class Pair:
    """A sampler that captures, and one that does not: of equal weights, on one device."""
    def __init__(self, vlm, device, module=kernels, stop=None, dtype=None, rows=1024, model=None):
        self.device, self.model = device, model or copy.deepcopy(vlm.model).to("cuda")
        stop = vlm.stop if stop is None else stop
        self.captured = module.Sampler(self.model, vlm.banned, stop, dtype, rows=rows)
        self.plain = kernels.Sampler(self.model, vlm.banned, stop, dtype, capture=False, rows=rows)

    def check(self, *ask):
        got, expected = self.captured.generate(*ask), self.plain.generate(*ask)
        assert same(got, expected) and got.ids.is_cuda
        assert self.captured.graphs and not self.plain.graphs
        return got

    def train(self):
        with torch.no_grad():
            for weight in self.model.parameters():
                weight += 0.05 * torch.randn(weight.shape).to("cuda")
        self.captured.refresh()
        self.plain.refresh()


@pytest.mark.parametrize("group, rows", [(1, 1024), (2, 1024), (8, 1024), (8, 16)])
def test_captured_is_plain(vlm, device, group, rows):
    """Temperature, seeds and prompts are read from buffers, not from what was captured; in waves,
    where there is room for few rows. A CPU says the same."""
    pair = Pair(vlm, device, rows=rows)
    for kind, temperature, late in (("mixed", 1.0, 0), ("pictures", 0.7, 3), ("words", 0.0, 1),
                                    ("mixed", 1.0, 9)):
        ask = getattr(vlm, kind), group, TOKENS, temperature, vlm.seeds + late
        got = pair.check(*ask)
        expected = kernels.Sampler(vlm.model, vlm.banned, vlm.stop).generate(*ask)
        assert got.rows() == expected.rows()
        torch.testing.assert_close(got.logprobs.cpu(), expected.logprobs, rtol=1e-4, atol=1e-4)
    assert len(device.graphs) == 2               # a window each, for all calls
    assert sum(graph.replays for graph in device.graphs) > 10


def test_captured_begins_with_given_tokens(vlm, device):
    """Under the graphs of a free rollout, which is the same again afterwards."""
    pair, ask = Pair(vlm, device), (vlm.mixed, 2, TOKENS, 1.0, vlm.seeds)
    free, captured = pair.check(*ask), len(device.graphs)
    given = free.ids.roll(1, 0).view(-1, 2, TOKENS).clone()
    given[:, :, 3:] = -1
    led = pair.check(*ask, given)
    assert torch.equal(led.ids[:, :3], given[:, :, :3].flatten(0, 1) * led.mask[:, :3])
    assert pair.check(*ask).rows() == free.rows() != led.rows()
    assert len(device.graphs) == captured


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_captured_follows_the_weights(vlm, device, dtype):
    """A step of the trainer, in place, is seen without a new capture, copied to bf16 or not."""
    pair, answers = Pair(vlm, device, stop=-1, dtype=dtype), []
    for _ in range(3):
        answers.append(pair.check(vlm.mixed.part(0, 2), 2, TOKENS, 1.0, vlm.seeds[:2]).rows())
        pair.train()
    assert answers[0] != answers[1] != answers[2] and len(device.graphs) == 2


def test_captured_in_other_shapes(vlm, device):
    """New buffers need new graphs; narrower prompts, and fewer, need neither."""
    pair, whole = Pair(vlm, device, stop=-1), vlm.mixed
    for prompts, group, new, fresh in (
            (whole, 2, TOKENS, 2), (vlm.words.part(0, 3), 2, TOKENS, 0),
            (widen(whole, 40), 2, TOKENS, 2), (whole, 2, TOKENS, 0), (whole, 1, TOKENS, 2),
            (whole.part(0, 1), 8, 3, 1), (whole.part(0, 2), 8, 3, 1), (whole, 2, 1, 1),
            (whole, 2, 9, 3)):
        before = len(device.graphs)
        pair.check(prompts, group, new, 1.0, vlm.seeds[:len(prompts.ids)])
        assert len(device.graphs) - before == fresh


def test_graphs_share_their_memory(vlm, device):
    """They run one after the other; each once had its own, hundreds of megabytes of logits."""
    sampler = Pair(vlm, device, stop=-1).captured
    for group in (2, 1):             # new buffers, new graphs
        before = len(device.graphs)
        sampler.generate(vlm.mixed, group, TOKENS)
        first, *others = device.graphs[before:]
        assert others and all(one.given_pool == first.pool() for one in others)
        assert first.given_pool is None


def test_captured_where_all_end_at_once(vlm, device):
    """No more than one look's steps are made where the first token ends every row."""
    banned = torch.ones_like(vlm.banned).index_fill(0, torch.tensor([vlm.stop]), False)
    pair = Pair(SimpleNamespace(**vars(vlm) | dict(banned=banned)), device)
    for _ in range(2):
        rollouts = pair.check(vlm.mixed, 2, TOKENS, 1.0, vlm.seeds)
        assert rollouts.rows() == [[vlm.stop]] * 8 and rollouts.finished.all()
        assert pair.captured.generated.item() == kernels.CHECK_EVERY


def test_kernels_of_a_captured_step(vlm, device):
    """Small kernels, not memory, limit a GPU: the next one of a layer is noticed."""
    shallow, counts = copy.deepcopy(vlm.model), []
    for layers in (3, 2):
        del shallow.decoder.layers[layers:]
        shallow.config.text.num_hidden_layers = layers
        model = copy.deepcopy(shallow).to("cuda")
        kernels.Sampler(model, vlm.banned, -1).generate(vlm.words.part(0, 1), 2, 1)
        counts.append(sum(device.graphs[-1].kernels.values()))
    per_layer = counts[0] - counts[1]
    print(f"\nkernels of a captured step: {per_layer} a layer, {counts[0] - 3 * per_layer} once")
    assert per_layer <= LAYER and counts[0] - 3 * per_layer <= ONCE


FAULTS = {  # what a capture punishes: [(a piece of kernels.py, what stands in its place)]
    "the temperature of the capture": [
        ("self.noisy.fill_", "self.baked = 1 / (temperature or 1)\n            self.noisy.fill_"),
        ("self.inverse_temperature, self.noisy, self.n",
         "self.inverse_temperature.new_full((1,), self.baked), self.noisy, self.n")],
    "the number of tokens at the capture": [
        ("positions = (self.last_position + self.generated)",
         "positions = (self.last_position + self.steps - 1)"),
        ("        _, G, N, start = self.shape", "        _, G, N, start = self.shape\n"
         "        self.steps = steps")],
    "another tensor for the temperature": [
        ("self.inverse_temperature.fill_(1 / (temperature or 1))",
         "self.inverse_temperature = torch.ones_like(self.noisy) / (temperature or 1)")],
    "another tensor for the token": [
        ("self.token.copy_(token.view_as(self.token))", "self.token = token.view_as(self.token)")],
    "another tensor for the clock": [
        ("self.generated.add_(1)", "self.generated = self.generated + 1")],
    "another tensor for the prompts": [
        ("self.last_position[groups] = prompts.positions[..., 0].gather(1, last)",
         "self.last_position = (0 * self.last_position).index_copy(0, torch.arange(groups.start, "
         "groups.stop, device=self.device), (prompts.positions[..., 0].gather(1, last).expand("
         "-1, self.shape[1])))")],
    "a copy is not refreshed": [("            mine.copy_(theirs)", "            pass")],
    "a refresh moves the weights": [
        ("mine.copy_(theirs)", "mine.data = theirs.to(mine.dtype, copy=True)")],
    "a graph outlives its buffers": [("self.graphs, self.cache = {}, None", "self.cache = None")],
    "a copy to the host": [
        ("decoder.embed_tokens(self.token.flatten())",
         "decoder.embed_tokens(self.token.flatten().cpu().to(self.device))")],
    "a look at the clock": [("self.generated * self.shape[1]",
                             "self.generated.item() * self.shape[1]")],
    "a mask as an index": [("self.token.copy_(token.view_as(self.token))",
                            "self.token[self.token >= 0] = token")],
    "a window that is a step short": [
        ("min(N, math.ceil(steps / window) * window) * G", "(N - 1) * G")],
    "a capture taken for a step": [
        ("        self.step(slots)                             # also", "        # also")],
    "one graph for all windows": [
        ("        if slots in self.graphs:", "        if self.graphs:"),
        ("self.graphs[slots].replay()", "next(iter(self.graphs.values())).replay()")],
}


def broken_kernels(pieces, directory):
    """-> kernels.py as a module of its own, with other lines in the place of some."""
    text = (ROOT / "kernels.py").read_text()
    for old, new in pieces:
        assert text.count(old) == 1, f"not once in kernels.py: {old!r}"
        text = text.replace(old, new)
    path = directory / "broken_kernels.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_faults_of_a_capture_are_noticed(vlm, device, fault, tmp_path, monkeypatch):
    """A device that forgives these would prove nothing; without a fault nothing is noticed."""
    module = broken_kernels(FAULTS.get(fault, []), tmp_path)
    short_windows(module, monkeypatch)
    two, seeds = vlm.mixed.part(0, 2), vlm.seeds[:2]

    def calls():
        pair = Pair(vlm, device, module, stop=-1, dtype=torch.bfloat16)
        pair.check(two, 2, TOKENS, 1.0, seeds)
        pair.check(vlm.words.part(0, 2), 2, TOKENS, 0.5, seeds + 3)
        pair.train()
        pair.check(two, 2, TOKENS, 1.0, seeds)
        pair.check(vlm.mixed.part(0, 3), 2, TOKENS, 1.0, vlm.seeds[:3])

    if fault is None:
        calls()
        return
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        calls()


# ------------------------------------------------------------------------------- training
SMALL = dict(examples=16, eval_examples=2, max_new_tokens=4, warmup=0)


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def steps_of(out):
    return [row for row in rows_of(out) if "loss" in row]


def trained(script, start, out, **options):
    """Two steps of a script on the device -> its metrics of each."""
    script.main(script.Config(init=str(start), out=str(out), **SMALL | dict(
        steps=2, device="cuda") | options))
    metrics = steps_of(out)
    assert len(metrics) == 2 and all(row["updates"] > 0 for row in metrics)
    assert (out / "training" / "state.safetensors").exists()
    return metrics


@pytest.mark.parametrize("options", [
    {}, dict(micro_batch=3, weight="entropy"), dict(micro_batch=2, recompute=True),
    dict(freeze_vision=True), dict(lora_rank=4, micro_batch=3, recompute=True)], ids=str)
def test_sft_on_the_device(start, tmp_path, device, options):
    """No tensor is left on the CPU; the loss is that of the CPU, but for bf16."""
    got = trained(sft, start, tmp_path / "cuda", batch=4, **options)
    expected = trained(sft, start, tmp_path / "cpu", batch=4, device="cpu", **options)
    assert got[0]["loss"] == pytest.approx(expected[0]["loss"], rel=0.02)
    assert abs(got[1]["loss"] - expected[1]["loss"]) > 1e-5      # autocast was on
    assert got[1]["loss"] != got[0]["loss"]


def varied(response, *_):
    """A random model earns nothing: a verdict that differs within a group."""
    number = zlib.crc32(response.encode())
    return SimpleNamespace(correct=number % 2 == 0, formatted=number % 3 == 0, parsed=True)


@pytest.mark.parametrize("options", [
    {}, dict(minibatches=2, micro_batch=1), dict(lora_rank=4, minibatches=2, recompute=True),
    dict(algorithm="dapo", overlong_buffer=2), dict(overlong="mask", algorithm="gspo"),
    dict(algorithm="cispo", tis=2.0, log_kl=True, freeze_vision=True)], ids=str)
def test_grpo_on_the_device(start, tmp_path, device, monkeypatch, options):
    """Rollouts, captured, and an update from them; sampler and trainer agree, but for bf16."""
    monkeypatch.setattr(grpo, "grade", varied)
    # Eight words, so that answers end; what does not is masked, or punished.
    monkeypatch.setattr(data.Processor, "banned", lambda self, vocabulary: (
        torch.arange(vocabulary) % (vocabulary // 8) != self.stop % (vocabulary // 8)))
    metrics = trained(grpo, start, tmp_path / "out", prompts=3, group=4, **options)
    assert all(row["gap_max"] < 0.1 for row in metrics) and device.graphs


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_other_families_on_the_device(checkpoint, tmp_path, device, monkeypatch, family):
    """Windows, grids and three positions a token are made on the CPU, and used on the device."""
    monkeypatch.setattr(grpo, "grade", varied)
    directory, _ = checkpoint(family)
    trained(sft, directory, tmp_path / "sft", batch=2, longest_edge=64)
    trained(grpo, directory, tmp_path / "grpo", prompts=2, group=2, longest_edge=64)


def test_evaluate_on_the_device(start, tmp_path, device):
    out = tmp_path / "rows.jsonl"
    evaluate.main(evaluate.Config(model=str(start), device="cuda", limit=3, samples=2,
                                  split="test,text", max_new_tokens=4, out=str(out)))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 12 and all(len(row["logprobs"]) == len(row["response_ids"]) for row in rows)


def run_of(start, out, **options):
    c = sft.Config(init=str(start), out=str(out), steps=4, device="cuda", **SMALL | options)
    return sft.Run(c, *sft.starting_model(c, 1e-3, 1e-3), decay=True)


def test_resumed_steps_wait_no_more(start, tmp_path, device):
    """--resume put AdamW's count of steps on the GPU: two waits for each tensor, in each step."""
    examples = [data.world_example("train", i) for i in range(4)]
    waits, losses = [], []

    def step(run):
        device.waits.clear()
        prepared = run.processor.prepare(examples, range(4))
        losses.append(sft.imitate(run, run.step, *prepared)["loss"])
        waits.append(sum(device.waits.values()))
        run.step += 1

    run = run_of(start, tmp_path / "out")
    step(run)
    run.save()
    step(run)
    resumed = run_of(start, tmp_path / "out", resume=True)
    assert resumed.step == 1
    step(resumed)
    assert waits[1] == waits[2] < 40 and losses[1] == losses[2] != losses[0]
    states = [state for optimizer in set(resumed.optimizers.values())
              for state in optimizer.state.values()]
    assert all(state["step"].device.type == "cpu" for state in states if "step" in state)
    assert any(state["exp_avg"].is_cuda for state in states if "exp_avg" in state)


def test_waits_do_not_grow_with_the_rows(start, tmp_path, device):
    """Rows once waited twice each for their length, in a rollout and in an evaluation."""
    c = grpo.Config(init=str(start), out=str(tmp_path / "out"), steps=1, device="cuda", **SMALL,
                    group=2)
    run = grpo.Run(c, *sft.starting_model(c, 1e-3, 1e-3), decay=False)
    examples = [data.world_example("train", i) for i in range(6)]

    def rollout(count):
        some = examples[:count]
        grpo.rollout(run, 0, some, run.processor.batch(some))

    def evaluation(count):
        evaluate.evaluate(run.sampler, run.processor, examples[:count], new_tokens=4)

    for work in (rollout, evaluation):
        waits = []
        for count in (6, 2, 6):                  # the first captures
            device.waits.clear()
            work(count)
            waits.append(sum(device.waits.values()))
        assert waits[1] == waits[2] < 60, device.waits
