"""A step's parts against fp64, log-probs against autograd, the sampler against the trainer."""
import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import picky_model, widen
from torch.utils._python_dispatch import TorchDispatchMode

import data
import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DRAWS = 20_000
each_float = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
each_shape = pytest.mark.parametrize("H, K, E", [(9, 3, 64), (4, 2, 32), (5, 5, 16)])


@pytest.fixture(autouse=True)
def full_precision():
    """Training allows TF32 for good; on a GPU, what is compared with fp64 would then differ."""
    torch.backends.cuda.matmul.allow_tf32 = False


def random(*shape, dtype=torch.float32, seed=0):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return made.to(DEVICE, dtype)


def close(got, expected, dtype=torch.float32):
    """Within a few roundings of fp64."""
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


ROOM = 700                           # slots of the whole cache


def cache_inputs(H, K, E, dtype, G=2):
    """Five groups of G rows."""
    rows = (random(5 * G, n, E, dtype=dtype, seed=seed) for seed, n in enumerate((H, K, K)))
    return *rows, *(random(5, ROOM, K, E, dtype=dtype, seed=seed) for seed in (3, 4))


@pytest.mark.parametrize("slots", [(0, 1), (640, 17), (63, 649)])
@each_shape
@each_float
def test_rotate_and_store(H, K, E, dtype, slots):
    """In a window of 650 slots every row writes to its own slot of its group, nowhere else."""
    q, k, v, keys, values = cache_inputs(H, K, E, dtype)
    slots = torch.tensor(slots, device=DEVICE)
    angles = random(10, E // 2, seed=6).double()
    rope = [torch.cat([part, part], -1).float() for part in (angles.cos(), angles.sin())]

    def rotated(x):
        turned = torch.complex(*x.double().chunk(2, -1)) * torch.exp(1j * angles)[:, None]
        return torch.cat([turned.real, turned.imag], -1)

    at = torch.arange(10, device=DEVICE) // 2, slots.repeat(5)
    written = torch.zeros(5, ROOM, dtype=torch.bool, device=DEVICE)
    written[at] = True
    assert written.sum() == 10
    after = keys.clone(), values.clone()
    got = kernels.rotate_and_store(q, k, v, *rope, *(x[:, :650] for x in after), slots)
    close(got, rotated(q), dtype)
    for got, old, new in zip(after, (keys, values), (rotated(k), v)):
        assert torch.equal(got[~written], old[~written])
        close(got[at], new, dtype)


@pytest.mark.parametrize("G", [1, 2, 40])
@each_shape
@each_float
def test_decode_attention(H, K, E, dtype, G):
    """Every row sees slots of its own in the cache of its group, and no other."""
    q, _, _, keys, values = cache_inputs(H, K, E, dtype, G)
    q[G] *= 32                                   # its largest score overflows exp
    ends = torch.tensor([1, 650, 130, 256, 577], device=DEVICE)
    seen = torch.rand(5, G, ROOM, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.3
    seen[:, :, 0], seen[1, 0, :640], seen[4, -1, 1:] = True, False, False
    seen[1, 0, 645] = True
    seen &= kernels.length_mask(ends, ROOM)[:, None]
    expected = torch.zeros(q.shape, dtype=torch.float64, device=DEVICE)
    for row, (slots, head) in enumerate((slots, head) for slots in seen.flatten(0, 1)
                                        for head in range(H)):
        at = (row // H // G, slots, head // (H // K))
        weights = (keys[at].double() @ q[row // H, head].double() / math.sqrt(E)).softmax(0)
        expected[row // H, head] = weights @ values[at].double()
    for group, end in enumerate(ends.tolist()):
        keys[group, end:], values[group, end:] = 100, 1e4
    window = (x[:, :650] for x in (keys, values))
    mask = torch.where(seen, 0.0, kernels.NEGATIVE).to(dtype).repeat_interleave(H // K, 1)
    close(kernels.decode_attention(q, *window, mask[:, None, :, :650]), expected, dtype)


START = torch.zeros(1, dtype=torch.long, device=DEVICE)      # tokens generated, at first
FREE = torch.tensor(-1, device=DEVICE)                       # no token is given


def switches(temperature):
    return [torch.full((1,), float(x), device=DEVICE)
            for x in (1 / (temperature or 1), temperature > 0)]


@pytest.mark.parametrize("R, D, V, free", [(1, 5, 7, 3), (3, 72, 513, 400), (70, 64, 2500, 1500),
                                           (3, 130, 2500, 40)])
@pytest.mark.parametrize("temperature", [0, 0.7, 1])
@each_float
def test_sample(R, D, V, free, temperature, dtype):
    """The arg-max of fp64 is drawn, with whole parts of the vocabulary banned.
    Few bits an entry, so that every sum is exact and no arg-max is a matter of rounding."""
    hidden, weight = ((2 * random(n, D, seed=9)).round().clamp(-3, 3) / 4 for n in (R, V))
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    banned = torch.arange(V, device=DEVICE) < V - free
    banned[-1], weight[-1] = True, hidden[0].sign()          # the likeliest of all is banned
    keys = kernels.mix(torch.arange(R, dtype=torch.int32, device=DEVICE) - 2 ** 31)
    scale, noise = switches(temperature)
    wide = (hidden.double() @ weight.double().T * scale.double()).masked_fill(banned, -math.inf)
    steps = torch.tensor([R], device=DEVICE)
    mixed = kernels.mix(keys ^ kernels.mix(steps.int()))
    noisy = wide + noise * kernels.gumbel(mixed, V)
    got, logprobs = kernels.sample(hidden, weight, banned, scale, noise, keys, steps, FREE)
    assert not banned[got].any()
    close(noisy.gather(1, got[:, None])[:, 0], noisy.max(1)[0])          # of equals, any one
    close(logprobs, wide.log_softmax(-1).gather(1, got[:, None])[:, 0])
    alone, _ = kernels.sample(hidden[-1:], weight, banned, scale, noise, keys[-1:], steps,
                              FREE)
    assert alone.tolist() == got[-1:].tolist(), "noise depends on the rest of the batch"


@each_float
def test_no_log_prob_is_above_zero(dtype):
    """A token's logit and the sum of exponentials, made apart, rounded differently: of an almost
    certain token the log-prob was up to 8e-6, its probability above 1."""
    hidden = 3 * random(32, 64, dtype=dtype)
    keys, banned = torch.arange(32, dtype=torch.int32, device=DEVICE), torch.zeros(32) > 0
    ask = hidden, hidden, banned.to(DEVICE), *switches(1), keys, START, FREE
    _, logprobs = kernels.sample(*ask)
    assert (logprobs <= 0).all() and logprobs.max() > -1e-4


def unmixed(x):
    """numpy's inverse of the hash lowbias32, as int32: the hash of that key is x."""
    x = (x ^ x >> 16) * pow(0x846CA68B, -1, 2 ** 32) & 0xFFFFFFFF
    x = (x ^ x >> 15 ^ x >> 30) * pow(0x7FEB352D, -1, 2 ** 32) & 0xFFFFFFFF
    return torch.from_numpy((x ^ x >> 16).astype(np.uint32).view(np.int32)).to(DEVICE)


def test_noise_of_all_bit_patterns():
    """Infinite noise draws a token whatever the model says; one word in 2^23 is seldom seen."""
    bits = np.arange(2 ** 23, dtype=np.uint64) << np.uint64(9)
    noise, free = kernels.gumbel(unmixed(bits), 1)[:, 0].double(), torch.zeros(2) > 0
    assert noise.isfinite().all() and (noise.diff() >= 0).all()
    assert abs(noise.mean() - 0.5772157) < 1e-5 and abs(noise.var() - math.pi ** 2 / 6) < 1e-4
    # Word 0 gets the loudest noise, then the softest.
    for which, logit, token in ((bits[-1:], 25.0, 1), (bits[:1], -25.0, 0)):
        head = torch.tensor([[0.0], [logit]], device=DEVICE)
        key = unmixed(unmixed(which).cpu().numpy().view(np.uint32).astype(np.uint64))
        ask = head[1:] * 0 + 1, head, free.to(DEVICE), *switches(1), key, START, FREE
        got, _ = kernels.sample(*ask)
        assert int(got) == token


def fits(counts, expected):
    """Pearson's chi-square below the value passed once in 10,000 times (Wilson and Hilferty)."""
    live = expected > 0
    freedom = int(live.sum()) - 1
    part, statistic = 2 / (9 * freedom), ((counts - expected).square() / expected)[live].sum()
    assert not counts[~live].any()
    return statistic < freedom * (1 - part + 3.72 * math.sqrt(part)) ** 3


@pytest.mark.parametrize("first", [0, -2 ** 31, 123456789])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_samples_follow_the_softmax(first, temperature):
    """Tokens follow the softmax at T without banned ids, even for keys in a row."""
    keys = torch.arange(DRAWS, dtype=torch.int32, device=DEVICE) + first
    logits, banned = random(12), torch.zeros(12, dtype=torch.bool, device=DEVICE)
    logits[3], banned[[3, 8]] = 9.0, True
    ones = torch.ones(DRAWS, 1, device=DEVICE)
    tokens, _ = kernels.sample(ones, logits[:, None], banned, *switches(temperature), keys, START,
                               FREE)
    chance = (logits.double() / temperature).masked_fill(banned, -math.inf).softmax(0)
    assert fits(tokens.bincount(minlength=12), DRAWS * chance)
    pairs = (tokens[:-1] * 12 + tokens[1:]).bincount(minlength=144)
    assert fits(pairs, (DRAWS - 1) * (chance[:, None] * chance).flatten())
    words = kernels.gumbel(keys, 3)
    assert (torch.corrcoef(torch.cat([words[1:], words[:-1]], 1).T).triu(1).abs() < 0.03).all()


@pytest.mark.parametrize("arguments, expected", [
    ((0, 7, 3), [(0, 3), (3, 6), (6, 7)]), ((4, 8, 2), [(4, 6), (6, 8)]), ((2, 7, 0), [(2, 7)]),
    ((2, 7, 99), [(2, 7)]), ((0, 0, 3), []), ((0, 0, 0), [])])
def test_pieces(arguments, expected):
    """Every index once, in order: a pass that is left out is an example that is not learnt."""
    assert kernels.pieces(*arguments) == expected


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [0, 1, 2])
def test_own_pieces(monkeypatch, world, size):
    """Together the processes make every pass once; of all at once each makes a share."""
    monkeypatch.setattr(kernels, "WORLD", world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(kernels, "RANK", rank)
        shares.append(kernels.own_pieces(3, 10, size))
    passes = sorted(sum(shares, []))
    assert [i for first, last in passes for i in range(first, last)] == list(range(3, 10))
    assert all(last - first <= (size or 7) for first, last in passes)
    assert size or max(map(len, shares)) == 1


class Watch(TorchDispatchMode):
    """Refuses what a CUDA graph cannot capture, and tensors of `limit` elements."""
    REFUSED = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select",
               "multinomial", "_unique2", "bincount", "equal"}

    def __init__(self, limit=math.inf):
        super().__init__()
        self.limit, self.seen = limit, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, self.seen = function.overloadpacket.__name__, self.seen + 1
        assert name not in self.REFUSED, function
        assert name not in ("index", "index_put", "index_put_") or not any(
            torch.is_tensor(i) and i.dtype == torch.bool for i in args[1]), "a mask as an index"
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            assert not torch.is_tensor(tensor) or tensor.numel() < self.limit, function
        return out


def plain(hidden, weight, targets, banned=None, temperature=1.0):
    logits = hidden.double() @ weight.double().T / temperature
    logp = (logits if banned is None else logits.masked_fill(banned, -1e30)).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def scorer_inputs(N, D, V, dtype=torch.float32):
    hidden, weight = (random(n, D).cpu().to(dtype).requires_grad_() for n in (N, V))
    return hidden, weight, torch.arange(N) * 7 % (V - 2) + 2, torch.arange(V) < 2


def gradients(way, hidden, weight, *rest, slope=1):
    logprob, entropy = way(hidden, weight, *rest)
    return logprob, entropy, *torch.autograd.grad((logprob * slope).sum(), (hidden, weight))


@pytest.mark.parametrize("chunk", [1, 13 * 4, 13 * 100])
@pytest.mark.parametrize("ban", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs(monkeypatch, chunk, ban, temperature):
    """Chunks of one row, of four with a rest, of all: values, entropies and gradients of fp64."""
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    monkeypatch.setattr(kernels, "LEAST", 1)
    for dtype in (torch.float32, torch.float64):
        *inputs, banned = scorer_inputs(11, 5, 13, dtype)
        inputs = *inputs, banned if ban else None, temperature
        for got, expected in zip(*(gradients(way, *inputs, slope=random(11).cpu())
                                   for way in (kernels.token_logprobs, plain))):
            close(got, expected)
    assert torch.autograd.gradcheck(
        lambda h, w: kernels.token_logprobs(h, w, *inputs[2:])[0], inputs[:2])
    assert not gradients(kernels.token_logprobs, inputs[0][:0], inputs[1], inputs[2][:0])[3].any()


def in_bf16(way):
    def under_autocast(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return way(*inputs)
    return under_autocast


def test_chunks(monkeypatch):
    """A head gradient summed in bf16 loses small parts; (N, V) logits are gigabytes."""
    monkeypatch.setattr(kernels, "CHUNK", 0)
    monkeypatch.setattr(kernels, "LEAST", 8)
    hidden, weight, targets, _ = scorer_inputs(4096, 16, 32)
    hidden = (hidden.detach() + 1).requires_grad_()
    with Watch(limit=4096 * 32) as watch:
        got = gradients(in_bf16(kernels.token_logprobs), hidden, weight, targets)[3]
    rounded = weight.detach().bfloat16().requires_grad_()
    chunks = zip(hidden.split(8), targets.split(8))
    naive = sum(gradients(kernels.token_logprobs, h.bfloat16(), rounded, target)[3]
                for h, target in chunks)
    exact = gradients(plain, hidden.double(), weight.double(), targets)[3]
    error, worse = ((x - exact).norm() / exact.norm() for x in (got, naive))
    assert error < 0.01 and worse > 0.03 and watch.seen > 1000


@pytest.mark.parametrize("least, held", [(256, True), (8, False)])
def test_large_logits_are_not_kept_for_backward(monkeypatch, least, held):
    """Held for the whole pass, those of 6,400 tokens and 49,280 words are 1.3 GB."""
    monkeypatch.setattr(kernels, "CHUNK", 0)
    monkeypatch.setattr(kernels, "LEAST", least)
    hidden, weight, targets, _ = scorer_inputs(64, 48, 96)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        kernels.token_logprobs(hidden, weight, targets)
    assert any(x.ndim == 2 and x.shape[1] == 96 for x in saved) == held


@pytest.mark.parametrize("least", [256, 8])
def test_token_logprobs_under_autocast(monkeypatch, least):
    """Only the forward pass runs under autocast: backward's softmax was one of other logits."""
    def rounded(hidden, weight, targets):
        logp = (hidden.bfloat16() @ weight.bfloat16().T).float().log_softmax(-1)
        return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    monkeypatch.setattr(kernels, "CHUNK", 0)
    monkeypatch.setattr(kernels, "LEAST", least)
    hidden, weight, targets, _ = scorer_inputs(64, 48, 96)
    logprob, entropy = in_bf16(kernels.token_logprobs)(hidden, weight, targets)
    got = torch.autograd.grad(logprob.sum(), (hidden, weight))
    assert all(x.dtype == torch.float32 for x in (logprob, entropy, *got))
    *expected, hidden_slope, weight_slope = gradients(rounded, hidden, weight, targets)
    assert torch.equal(logprob, expected[0]) and torch.equal(entropy, expected[1])
    for x, y in zip(got, (hidden_slope, weight_slope)):
        close(x, y, torch.bfloat16)


def test_frozen_head():
    """LoRA trains no head: its gradient, as large as the head in fp32, is not computed."""
    hidden, weight, *rest = scorer_inputs(300, 5, 401)
    expected = gradients(kernels.token_logprobs, hidden, weight, *rest)[2]
    logprob, _ = kernels.token_logprobs(hidden, weight.detach(), *rest)
    with Watch() as watch:
        got, = torch.autograd.grad(logprob.sum(), hidden)
    frozen = watch.seen
    logprob, _ = kernels.token_logprobs(hidden, weight, *rest)
    with Watch() as watch:
        torch.autograd.grad(logprob.sum(), (hidden, weight))
    assert torch.equal(got, expected) and frozen < watch.seen


@pytest.fixture(scope="module")
def vlm():
    """A model, and what it is asked; half the prompts have pictures."""
    model, processor, banned = picky_model()
    examples = [data.world_example(("test", "text")[i % 2], i) for i in range(4)]
    batch, *alone = (processor.batch(some) for some in (examples, *([e] for e in examples)))
    ids = kernels.Sampler(model.to(DEVICE), banned, -1).generate(batch, 16, 12).ids
    return SimpleNamespace(
        model=model, banned=banned.to(DEVICE), batch=batch.to(DEVICE), seeds=torch.arange(5, 9),
        alone=[one.to(DEVICE) for one in alone], stop=int(ids.flatten().bincount().argmax()))


def sampler_of(vlm, **options):
    return kernels.Sampler(vlm.model, vlm.banned, vlm.stop, **options)


@pytest.mark.parametrize("dtype, temperature, most, mean", [
    (None, 1.0, 1e-4, 1e-4), (None, 0.7, 1e-4, 1e-4), (torch.bfloat16, 1.0, 0.1, 0.02)])
@torch.no_grad()
def test_sampled_is_what_is_trained(vlm, dtype, temperature, most, mean):
    """T or banned ids on one side only make the trainer's log-probs those of another
    distribution than was sampled from. A bf16 copy once rounded rope with it."""
    sampler, place = sampler_of(vlm, dtype=dtype), torch.tensor([999], device=DEVICE)
    close(*(m.model.text_model.rope(place)[0] for m in (sampler.model, vlm.model)))
    r = sampler.generate(vlm.batch, 8, 12, temperature, vlm.seeds)
    logprobs, _ = vlm.model.score(vlm.batch, r.ids, r.mask, 8, vlm.banned, temperature)
    gap = (logprobs - r.logprobs)[r.mask].abs()
    assert gap.max() < most and gap.mean() < mean
    assert not vlm.banned[r.ids[r.mask]].any() and len(r.ids[r.mask].unique()) > 10


@pytest.mark.parametrize("gap", [0, 5])
@torch.no_grad()
def test_cache_equals_full_forward(vlm, gap):
    """Greedy tokens from the cache are those of whole rows read again for every token. After a
    picture, M-RoPE's positions are smaller than the slots of the cache."""
    def apart(batch):
        return replace(batch, positions=batch.positions - gap * (batch.positions > 8))

    rollouts = sampler_of(vlm).generate(apart(vlm.batch), 1, 12, 0.0)
    for batch, row in zip(map(apart, vlm.alone), rollouts.rows()):
        for token in row:
            logits = vlm.model.lm_head(vlm.model(batch)[0][0, -1])
            logits = logits.masked_fill(vlm.banned, -math.inf)
            assert int(logits.argmax()) == token
            batch = replace(widen(batch, 1), lengths=batch.lengths + 1)
            batch.ids[0, -1] = token


def test_tokens_depend_on_the_seed_alone(vlm):
    """One generator for the batch made every row change with its company, padding and group."""
    sampler = sampler_of(vlm)
    rows, again, other = (sampler.generate(vlm.batch, 4, 12, 1.0, vlm.seeds + late).rows()
                          for late in (0, 0, 9))
    assert rows == again
    for i, batch in enumerate(vlm.alone):
        group = rows[4 * i:4 * i + 4]
        assert len(set(map(tuple, group))) > 1 and group != other[4 * i:4 * i + 4]
        assert group[:2] == sampler.generate(batch, 2, 12, 1.0, vlm.seeds[i:i + 1]).rows()


def test_seeds_alone_decide(vlm):
    """Nothing else does: not the place in the batch, not what was sampled before, not torch's
    generator. With one key for a batch, equal prompts got equal answers."""
    batch, seeds = vlm.alone[0], torch.tensor([3, 4, 3, 2 ** 31 - 1])
    four = replace(batch, **{name: torch.cat([x] * 4) for name, x in vars(batch).items()})
    sampler = sampler_of(vlm)
    torch.manual_seed(1)
    first, second, third, fourth = groups(sampler.generate(four, 4, 12, 1.0, seeds).rows(), 4)
    assert first == third and second != first != fourth and second != fourth
    torch.manual_seed(2)
    again = groups(sampler.generate(four, 4, 12, 1.0, seeds.flip(0)).rows(), 4)
    assert again == [fourth, first, second, first]


def groups(rows, G):
    return [rows[start:start + G] for start in range(0, len(rows), G)]


def test_draws_are_independent(vlm):
    """A key without the step, the place in the group or the seed says the same thing twice."""
    model, free = copy.deepcopy(vlm.model), (~vlm.banned).nonzero()[:8, 0]
    model.lm_head.weight.data.zero_()
    banned = torch.ones_like(vlm.banned).index_fill(0, free, False)
    ids = kernels.Sampler(model, banned, -1).generate(vlm.batch, 80, 60).ids
    draws = torch.searchsorted(free, ids).view(4, 80, 60)
    assert fits(draws.flatten().bincount(minlength=8), torch.full((8,), 2400.0, device=DEVICE))
    for x, y in ((draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1]),
                 (draws[:, :, 1:], draws[:, :, :-1])):
        pairs = (x * 8 + y).flatten().bincount(minlength=64)
        assert fits(pairs, torch.full((64,), x.numel() / 64, device=DEVICE))


@torch.no_grad()
def test_answers_begin_with_given_tokens(vlm):
    """They come back bit for bit, with the log-probs of the trainer; what follows is drawn as if
    they had been drawn, too; the next call knows nothing of them."""
    sampler = sampler_of(vlm)
    free = sampler.generate(vlm.batch, 4, 12, 1.0, vlm.seeds)
    mine, others = free.ids.view(4, 4, 12), free.ids.roll(1, 0).view(4, 4, 12)
    begins = torch.arange(12, device=DEVICE) < torch.tensor([[0], [2], [5], [12]], device=DEVICE)
    again = sampler.generate(vlm.batch, 4, 12, 1.0, vlm.seeds, mine.where(begins, -1))
    assert torch.equal(again.ids, free.ids) and torch.equal(again.logprobs, free.logprobs)
    led = sampler.generate(vlm.batch, 4, 12, 1.0, vlm.seeds, others.where(begins, -1))
    ids = led.ids.view(4, 4, 12)
    told = begins & led.mask.view(4, 4, 12)
    assert torch.equal(ids[told], others[told]) and not torch.equal(ids, mine)
    logprobs, _ = vlm.model.score(vlm.batch, led.ids, led.mask, 4, vlm.banned)
    close(led.logprobs[led.mask], logprobs[led.mask])
    assert sampler.generate(vlm.batch, 4, 12, 1.0, vlm.seeds).rows() == free.rows()


def test_the_end_mark_is_the_last_token_that_counts(vlm):
    """A mask that drops the end mark trains a model that never stops; also at the limit."""
    r = sampler_of(vlm).generate(vlm.batch, 8, 12, 1.0, vlm.seeds)
    assert r.finished.any() and not r.finished.all() and r.mask.sum() == r.lengths.sum()
    for row, length, finished in zip(r.rows(), r.lengths, r.finished):
        assert vlm.stop not in row[:-1] and finished == (row[-1] == vlm.stop)
        assert finished or length == 12
    assert not r.ids[~r.mask].any() and not r.logprobs[~r.mask].any()
    assert (r.logprobs[r.mask] < 0).all()
    ends = sorted({int(n) for n in r.lengths[r.finished] if n > 1})
    for limit in (ends[0] - 1, ends[0], ends[-1] - 1, ends[-1]):
        cut = sampler_of(vlm).generate(vlm.batch, 8, limit, 1.0, vlm.seeds)
        assert cut.rows() == [row[:limit] for row in r.rows()]
        assert torch.equal(cut.finished, r.finished & (r.lengths <= limit))


def addresses(sampler):
    tensors = [*vars(sampler).values(), *sampler.model.parameters()]
    return [x.data_ptr() for x in tensors if torch.is_tensor(x)]


def test_leftovers_are_not_seen_and_buffers_stay(vlm):
    """Leftovers of other prompts, or of finished rows, that the next batch attends to."""
    sampler, fresh = sampler_of(vlm), sampler_of(vlm)
    sampler.generate(vlm.batch, 8, 12)
    assert sampler.cache.isfinite().all()
    with torch.inference_mode():
        sampler.cache.fill_(9.0)
    before, one = addresses(sampler), vlm.alone[3]
    one = widen(one, vlm.batch.ids.shape[1] - one.ids.shape[1])
    got, expected = (s.generate(one, 8, 12, 1.0, vlm.seeds[:1]) for s in (sampler, fresh))
    assert before == addresses(sampler) and len(sampler.mask) == 4 and len(fresh.mask) == 1
    assert torch.equal(got.ids, expected.ids)
    close(got.logprobs, expected.logprobs)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU keeps the wider buffers, and its graph")
def test_what_came_before_changes_no_bit(vlm):
    """On a CPU a resumed run sampled other log-probs than one that had seen wider prompts before:
    its answers began in other slots, and sums over more slots round otherwise."""
    sampler, ask = sampler_of(vlm), (vlm.batch, 8, 12, 1.0, vlm.seeds)
    expected = sampler_of(vlm).generate(*ask)
    for before in (widen(vlm.batch, 30), vlm.alone[3]):
        sampler.generate(before, 8, 12)
        got = sampler.generate(*ask)
        assert torch.equal(got.ids, expected.ids) and torch.equal(got.logprobs, expected.logprobs)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_prompt_is_held_once(vlm, dtype):
    """The cache once held a copy of the prompt for each rollout; a row adds its tokens alone."""
    def held(extra, group, new_tokens):
        sampler = sampler_of(vlm, dtype=dtype)
        sampler.generate(widen(vlm.batch, extra), group, new_tokens)
        return sampler.cache.nbytes

    slot = held(1, 1, 3) - held(0, 1, 3)         # of all four prompts
    for extra, group, new_tokens in ((30, 1, 3), (30, 8, 3), (0, 8, 7)):
        more = held(extra, group, new_tokens) - held(0, 1, 3)
        assert more == slot * (extra + group * new_tokens - 3)


def test_room_is_counted_by_group(vlm, monkeypatch):
    """1,000 tokens were counted for each row, though a prompt is held once: of SmolVLM-2.2B two
    groups were at work on any card. A long prompt, on the other hand, took more than was there."""
    def places(extra, group, bytes_free, dtype=None):
        monkeypatch.setattr(kernels, "CACHE_BYTES", bytes_free)
        sampler = sampler_of(vlm, dtype=dtype)
        sampler.generate(widen(vlm.batch, extra), group, 3)
        return len(sampler.mask), sampler.cache.nbytes

    for extra, group in ((0, 1), (0, 8), (500, 8)):
        _, whole = places(extra, group, 2 ** 32)
        assert places(extra, group, whole) == (4, whole)
        assert places(extra, group, whole - 1) == (3, whole * 3 // 4)
        assert places(extra, group, 1) == (1, whole // 4)        # one is always read
        assert places(extra, group, whole // 2, torch.bfloat16) == (4, whole // 2)


def test_pictures_are_read_some_at_a_time(vlm):
    """All prompts of an evaluation once went through the ViT at once: gigabytes of activations."""
    batch, given = vlm.alone[0], []
    many = replace(batch, **{name: torch.cat([value] * 70) for name, value in vars(batch).items()})
    hook = vlm.model.model.vision_model.register_forward_pre_hook(
        lambda module, inputs: given.append(len(inputs[0])))
    rows = sampler_of(vlm).generate(many, 1, 3, 1.0, torch.arange(70)).rows()
    hook.remove()
    together = kernels.TOKENS_AT_ONCE // batch.ids.shape[1] * len(batch.pixels)
    assert sum(given) == 70 * len(batch.pixels) and max(given) == together < 70
    assert rows[69] == sampler_of(vlm).generate(batch, 1, 3, 1.0, torch.tensor([69])).rows()[0]


@pytest.mark.parametrize("rows, places", [(1, 1), (9, 1), (16, 2), (24, 3), (1024, 4)])
def test_waves_change_nothing(vlm, rows, places):
    """Where there is room for few rows the prompts are answered in waves, each as long as its
    longest answer. Nobody's tokens depend on it, nor on what the wave before left behind."""
    ask = vlm.batch, 8, 24, 1.0, vlm.seeds + 2   # the second prompt has by far the longest answer
    expected, passes, prefills = sampler_of(vlm).generate(*ask), [], []
    hooks = [module.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
             for module, seen in ((vlm.model.decoder, passes), (vlm.model, prefills))]
    sampler = sampler_of(vlm, rows=rows)
    got = sampler.generate(*ask)
    for hook in hooks:
        hook.remove()
    assert sampler.shape[0] == places
    assert got.rows() == expected.rows() and torch.equal(got.finished, expected.finished)
    close(got.logprobs, expected.logprobs)
    longest = expected.lengths.view(4, 8).max(1)[0]
    if DEVICE == "cpu":                          # a GPU replays steps, sixteen between looks
        steps = len(passes) - len(prefills)
        assert steps == sum(int(some.max()) for some in longest.split(places))


def test_refresh_follows_the_trainer(vlm):
    """A copy that is never refreshed samples from the base model for the whole run."""
    trained = SimpleNamespace(**{**vars(vlm), "model": copy.deepcopy(vlm.model)})
    sampler, ask = sampler_of(trained, dtype=torch.bfloat16), (vlm.alone[1], 4, 12, 1.0)
    old = sampler.generate(*ask)
    before, graphs = addresses(sampler), dict(sampler.graphs)
    with torch.no_grad():                        # a step of the trainer, in place as optimizers do
        for weight in trained.model.parameters():
            weight += 0.05 * torch.randn(weight.shape).to(weight)
    expected = sampler_of(trained, dtype=torch.bfloat16).generate(*ask)
    stale = sampler.generate(*ask)
    sampler.refresh()
    new = sampler.generate(*ask)
    assert stale.rows() == old.rows() != expected.rows() == new.rows()
    close(new.logprobs, expected.logprobs)
    assert before == addresses(sampler) and graphs == sampler.graphs


def test_copies_only_where_the_type_differs(vlm):
    """Rope in bf16 places words wrongly; a copy that stays in fp32 samples at half the speed."""
    for dtype in (None, torch.float32):
        assert sampler_of(vlm, dtype=dtype).model is vlm.model
    mixed = copy.deepcopy(vlm.model)
    mixed.packed = torch.nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)
    copied = kernels.Sampler(mixed, vlm.banned, vlm.stop, torch.bfloat16).model
    for mine, theirs in zip(copied.parameters(), mixed.parameters()):
        assert mine.dtype == (torch.bfloat16 if theirs.is_floating_point() else torch.uint8)
        assert mine is not theirs and not mine.requires_grad
    assert all(map(torch.equal, copied.buffers(), mixed.buffers()))


@torch.inference_mode()
def test_step_can_be_captured(vlm):
    """No look at a tensor from Python, no shape from data, no buffer that moves."""
    with pytest.raises(AssertionError), Watch():
        bool(torch.ones(1, device=DEVICE))
    sampler = sampler_of(vlm, capture=False)
    expected = sampler.generate(vlm.batch, 2, 12, 1.0, vlm.seeds)
    sampler.generated.zero_()
    sampler.admit(vlm.batch, slice(0, 4), vlm.seeds)
    before, weights = addresses(sampler), [p.clone() for p in vlm.model.parameters()]
    with Watch() as watch:
        for _ in range(12):
            sampler.step(sampler.cache.shape[3])
    assert watch.seen > 100 and before == addresses(sampler)
    ids = sampler.ids.movedim(0, 2).flatten(0, 1)
    assert torch.equal(ids.where(expected.mask, 0), expected.ids)
    assert all(map(torch.equal, weights, vlm.model.parameters()))


@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU captures graphs")
@pytest.mark.parametrize("B, G, N", [(1, 1, 5), (3, 3, 17), (4, 8, 48)])
@each_float
def test_capture_changes_nothing(vlm, dtype, B, G, N):
    """A replayed graph reads its buffers, not the values they had when it was captured."""
    batch = vlm.batch.part(0, B)
    captured, other = (sampler_of(vlm, dtype=dtype, capture=x) for x in (True, False))
    for temperature, late in ((1.0, 0), (0.7, 1), (0.0, 2), (1.0, 0)):
        ask = batch, G, N, temperature, vlm.seeds[:B] + late
        assert captured.generate(*ask).rows() == other.generate(*ask).rows()
    assert captured.graphs and not other.graphs
