"""Everything that has to be fast: Triton kernels, token log-probs, and the sampler.

Each kernel stands beside a torch reference of the same signature. The reference runs on the CPU
and under autograd, the kernel on CUDA while sampling; the tests hold one against the other.

    sampler = Sampler(model, processor.banned(model.vocabulary), processor.stop)
    rollouts = sampler.generate(prompts, group=8, new_tokens=48, temperature=1.0)

The last token of a prompt is the first token of each of its rollouts: prefill computes the cache
of a prompt once, and every rollout starts with a `step` on that token; no first token is special.
"""
import argparse
import copy
import functools
import importlib.util
import json
import pathlib
import tempfile
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

try:
    import triton
    import triton.language as tl
except ImportError:                  # a CPU build of torch comes without triton: references run
    triton = None

NEGATIVE = -1e30                     # the logit of a banned token; finite, so that 0 * it is 0


def widened(x):
    """At least fp32: norms, softmax and sampling are computed in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def on_cuda(launch):
    """Beside a torch reference: `launch` runs instead on CUDA when no gradient is needed."""
    def beside(reference):
        @functools.wraps(reference)
        def choose(x, *rest):
            way = launch if x.is_cuda and not torch.is_grad_enabled() else reference
            return way(x, *rest)
        choose.reference, choose.triton = reference, launch
        return choose
    return beside


def mix(x):
    """A 32-bit hash (lowbias32) of int32 numbers: the same in torch and Triton, on every device."""
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * (0x846CA68B - 2 ** 32)
    return x ^ (x >> 16 & 0xFFFF)


# ------------------------------------------------------------------------------------- kernels

if triton:
    mix_kernel = triton.jit(mix)

    @triton.jit
    def load(pointer, inside):
        """In fp32, zero outside."""
        return tl.load(pointer, inside, 0.0).to(tl.float32)

    @triton.jit
    def rms_norm_kernel(x, delta, weight, total, normed, width, eps, BLOCK: tl.constexpr):
        row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        at, inside = row * width + column, column < width
        wide = load(x + at, inside) + load(delta + at, inside)
        wide = wide.to(total.dtype.element_ty).to(tl.float32)        # rounded as it is stored
        tl.store(total + at, wide, inside)
        unit = wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
        unit = unit.to(normed.dtype.element_ty).to(tl.float32)
        tl.store(normed + at, load(weight + column, inside) * unit, inside)

    @triton.jit
    def rotated(x, cos, sin, E: tl.constexpr, BLOCK: tl.constexpr):
        """-> the head of width E at pointer x, turned by the angles at cos and sin."""
        at = tl.arange(0, BLOCK)
        inside, left = at < E, at < E // 2
        turned = load(x + tl.where(left, at + E // 2, at - E // 2), inside)
        turned = tl.where(left, -turned, turned)
        return load(x + at, inside) * load(cos + at, inside) + turned * load(sin + at, inside)

    @triton.jit
    def rotary_cache_kernel(q, k, v, cos, sin, keys, values, slots, done, out, room,
                            H: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
                            BLOCK: tl.constexpr):
        row, head, at = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
        cos += row * E
        sin += row * E
        if head < H:
            q_at = (row * H + head) * E
            tl.store(out + q_at + at, rotated(q + q_at, cos, sin, E, BLOCK), at < E)
        elif tl.load(done + row) == 0:             # a finished row writes nothing
            k_at = (row * K + head - H) * E
            slot = ((row * room + tl.load(slots + row)) * K + head - H) * E + at
            tl.store(keys + slot, rotated(k + k_at, cos, sin, E, BLOCK), at < E)
            tl.store(values + slot, load(v + k_at + at, at < E), at < E)

    @triton.jit
    def decode_attention_kernel(q, keys, values, lengths, out, room, scale, K: tl.constexpr,
                                PER: tl.constexpr, E: tl.constexpr, HEADS: tl.constexpr,
                                WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                                PRECISION: tl.constexpr):
        row, k_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        head, e, at = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None], tl.arange(0, BLOCK)
        q_at = ((row * K + k_head) * PER + head) * E + e
        query = load(q + q_at, (head < PER) & (e < E))
        best, total = tl.full((HEADS, 1), -1e30, tl.float32), tl.zeros((HEADS, 1), tl.float32)
        mixed, length = tl.zeros((HEADS, WIDTH), tl.float32), tl.load(lengths + row)
        for start in range(0, length, BLOCK):
            slot = start + at
            cache = ((row * room + slot[:, None]) * K + k_head) * E + e
            inside = (slot[:, None] < length) & (e < E)
            key, value = load(keys + cache, inside), load(values + cache, inside)
            score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
            score = tl.where(slot[None] < length, score, -1e30)
            higher = tl.maximum(best, tl.max(score, 1, keep_dims=True))
            part, shrink = tl.exp(score - higher), tl.exp(best - higher)
            mixed = mixed * shrink + tl.dot(part, value, input_precision=PRECISION)
            total = total * shrink + tl.sum(part, 1, keep_dims=True)
            best = higher
        tl.store(out + q_at, mixed / total, (head < PER) & (e < E))

    @triton.jit
    def sample_kernel(logits, banned, scale, noise, keys, tokens, logprobs, vocabulary,
                      BLOCK: tl.constexpr):
        row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        key, factor, loud = tl.load(keys + row), tl.load(scale), tl.load(noise)
        best, token, top, total = -float("inf"), 0, -1e30, 0.0
        logits += row * vocabulary
        for start in range(0, vocabulary, BLOCK):
            word = start + at
            logit = load(logits + word, word < vocabulary) * factor
            logit = tl.where(tl.load(banned + word, word < vocabulary, 1) != 0, -1e30, logit)
            higher = tl.maximum(top, tl.max(logit, 0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(logit - higher), 0)
            top = higher
            bits = mix_kernel(key ^ mix_kernel(word)) >> 9 & 0x7FFFFF
            uniform = (bits.to(tl.float32) + 0.5) * 2 ** -23
            score = logit - loud * tl.log(-tl.log(uniform))
            peak = tl.max(score, 0)
            token = tl.where(peak > best, start + tl.argmax(score, 0), token)
            best = tl.maximum(best, peak)
        tl.store(tokens + row, token)
        tl.store(logprobs + row, load(logits + token, token >= 0) * factor - top - tl.log(total))


def rms_norm_triton(x, delta, weight, eps):
    x, width = x.contiguous(), x.shape[-1]
    delta = torch.zeros_like(x) if delta is None else delta.contiguous()
    total, normed = torch.empty_like(x), torch.empty_like(x)
    rms_norm_kernel[(x.numel() // width,)](x, delta, weight, total, normed, width, eps,
                                           triton.next_power_of_2(width))
    return total, normed


@on_cuda(rms_norm_triton)
def rms_norm(x, delta, weight, eps):
    """x + delta, and its RMSNorm (fp32 inside). x, delta (..., D); delta None counts as zero."""
    x = x if delta is None else x + delta
    wide = widened(x)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return x, weight * wide.type_as(x)


def rotary(x, cos, sin):
    """Rotary positions, half-split. x (M, H, E); cos, sin (M, E) -> (M, H, E)."""
    left, right = x.chunk(2, -1)
    turned = torch.cat([-right, left], -1)
    return (x * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)).type_as(x)


def rotary_cache_triton(q, k, v, cos, sin, keys, values, slots, done):
    q, k, v, cos, sin = (x.contiguous() for x in (q, k, v, cos, sin))
    (rows, H, E), K, out = q.shape, k.shape[1], torch.empty_like(q)
    room = keys.stride(0) // keys.stride(1)          # of a window: that of its whole cache
    rotary_cache_kernel[(rows, H + K)](q, k, v, cos, sin, keys, values, slots, done, out, room,
                                       H, K, E, triton.next_power_of_2(E))
    return out


@on_cuda(rotary_cache_triton)
def rotary_cache(q, k, v, cos, sin, keys, values, slots, done):
    """Rotates q and k, and writes k and v of each unfinished row r to its slot in the cache.
    q (R, H, E); k, v (R, K, E); cos, sin (R, E); keys, values (R, S, K, E); slots, done (R,)."""
    rows, finished = torch.arange(len(q), device=q.device), done[:, None, None]
    keys[rows, slots] = torch.where(finished, keys[rows, slots], rotary(k, cos, sin))
    values[rows, slots] = torch.where(finished, values[rows, slots], v)
    return rotary(q, cos, sin)


def decode_attention_triton(q, keys, values, lengths):
    (rows, H, E), K, out = q.shape, keys.shape[2], torch.empty_like(q)
    heads, width = (max(16, triton.next_power_of_2(n)) for n in (H // K, E))
    precision = "ieee" if q.dtype == torch.float32 else "tf32"       # bf16 is exact in tf32
    decode_attention_kernel[(rows, K)](
        q, keys, values, lengths, out, keys.stride(0) // keys.stride(1), E ** -0.5, K, H // K, E,
        heads, width, 64, precision)
    return out


@on_cuda(decode_attention_triton)
def decode_attention(q, keys, values, lengths):
    """One query per row against the first lengths[r] slots of its cache, heads grouped.
    q (R, H, E); keys, values (R, S, K, E); lengths (R,) -> (R, H, E)."""
    mask = torch.arange(keys.shape[1], device=q.device) < lengths[:, None]      # (R, S)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    return F.scaled_dot_product_attention(q[:, :, None], keys, values, mask[:, None, None],
                                          enable_gqa=True)[:, :, 0]


def gumbel(keys, vocabulary):
    """Standard Gumbel noise (R, V) that depends on (key, token id) alone. keys (R,) int32.
    23 random bits and a half: never 0 and never 1, so both logarithms are finite."""
    words = mix(torch.arange(vocabulary, dtype=torch.int32, device=keys.device))
    bits = mix(keys[:, None] ^ words) >> 9 & 0x7FFFFF
    return -torch.log(-torch.log((bits.float() + 0.5) * 2 ** -23))


def sample_triton(logits, banned, scale, noise, keys):
    rows, vocabulary = logits.shape
    tokens, logprobs = (logits.new_empty(rows, dtype=kind) for kind in (torch.long, torch.float32))
    sample_kernel[(rows,)](logits.contiguous(), banned, scale, noise, keys, tokens, logprobs,
                           vocabulary, min(4096, triton.next_power_of_2(vocabulary)))
    return tokens, logprobs


@on_cuda(sample_triton)
def sample(logits, banned, scale, noise, keys):
    """Draws from softmax(scale * logits) without the banned ids, by Gumbel arg-max in fp32.
    logits (R, V); banned (V,); scale, noise (1,): 1/T and 1, or 1 and 0 for the arg-max itself;
    keys (R,) int32 -> tokens (R,), their log-probs (R,)."""
    logits = (logits.float() * scale).masked_fill(banned, NEGATIVE)
    tokens = (logits + noise * gumbel(keys, logits.shape[1])).argmax(-1)
    return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


CHUNK = 1 << 24                      # logits held at a time: 64 MiB in fp32


def chunk_logits(hidden, weight, banned, scale):
    """-> pairs (slice of the rows, their logits at least in fp32), CHUNK numbers at a time."""
    rows = max(1, CHUNK // len(weight))
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        logits = widened(hidden[part] @ weight.T) * scale
        yield part, logits if banned is None else logits.masked_fill(banned, NEGATIVE)


class TokenLogprobs(torch.autograd.Function):
    """log softmax(scale * h Wᵀ)[target] without ever holding (N, V): chunks, made again backward,
    from what autocast made of h and W for the forward pass. The head's gradient is summed over
    the chunks in fp32, whatever the type of its weight."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, banned, scale):
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            hidden, weight = (x.to(torch.get_autocast_dtype(kind)) for x in (hidden, weight))
        logprob, entropy = (widened(hidden.new_empty(len(hidden))) for _ in range(2))
        for part, logits in chunk_logits(hidden, weight, banned, scale):
            logp = logits.log_softmax(-1)
            logprob[part] = logp.gather(1, targets[part, None])[:, 0]
            entropy[part] = -(logp.exp() * logp).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, banned)
        ctx.scale = scale
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, banned = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(widened(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            for part, logits in chunk_logits(hidden, weight, banned, ctx.scale):
                slope = logits.softmax(-1).neg_()
                slope.scatter_add_(1, targets[part, None], torch.ones_like(slope[:, :1]))
                slope *= (grad[part] * ctx.scale)[:, None]
                grad_hidden[part] = slope.to(weight.dtype) @ weight
                grad_weight += slope.T @ hidden[part].to(slope.dtype)
        return grad_hidden, grad_weight, None, None, None     # autograd casts to the inputs' types


def token_logprobs(hidden, weight, targets, banned=None, temperature=1.0):
    """Log-prob of each target and entropy of its distribution, at a temperature, ids banned.
    hidden (N, D); weight (V, D); targets (N,); banned (V,) -> (N,), (N,); the entropy has no
    gradient. With the sampler's `banned` and `temperature` these are the sampler's log-probs.
    A banned target, which the sampler never draws, has log-prob -1e30 and a useless gradient."""
    scale = 1.0 / temperature if temperature > 0 else 1.0
    return TokenLogprobs.apply(hidden, weight, targets, banned, scale)


# ------------------------------------------------------------------------------------- sampler

@dataclass
class Rollouts:
    """R = prompts * group answers; row r belongs to prompt r // group."""
    ids: torch.Tensor                # (R, N) padded on the right
    lengths: torch.Tensor            # (R,) tokens that count, the end mark included
    logprobs: torch.Tensor           # (R, N) under the distribution they were drawn from
    finished: torch.Tensor           # (R,) False: cut at N tokens

    @property
    def mask(self):
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]

    def rows(self):
        return [row[:length].tolist() for row, length in zip(self.ids, self.lengths)]


class Sampler:
    """Prompts in, rollouts out: a static cache, per-row lengths, and one `step` over fixed buffers.
    model: prefill(batch), decode(tokens, positions, attend), logits(hidden), and the sizes layers,
    k_heads, head_width. banned (V,): never sampled. On CUDA `step` is captured once for a shape
    and replayed `look_every` times between looks at the done flags. With `dtype` it samples from
    a copy of the weights, which `refresh` updates in place. A row's randomness depends on (seed of
    its prompt, place in its group, token index) alone, not on other rows, batch size or device."""

    def __init__(self, model, banned, stop, dtype=None, look_every=None, capture=True):
        self.source = self.model = model
        if dtype not in (None, next(model.parameters()).dtype):
            self.model = copy.deepcopy(model).requires_grad_(False)
            for weight in filter(torch.is_floating_point, self.model.parameters()):
                weight.data = weight.data.to(dtype)      # not the buffers: rope needs fp32
        self.device = next(model.parameters()).device
        self.capture = capture and self.device.type == "cuda"
        self.banned, self.stop = banned.to(self.device), stop
        self.look_every = look_every or (16 if self.capture else 4)
        self.shape = self.graph = None

    @torch.no_grad()
    def refresh(self):
        """Takes over the weights of the model in training; no tensor moves, so no new capture."""
        if self.model is not self.source:
            for mine, theirs in zip(self.model.parameters(), self.source.parameters()):
                mine.copy_(theirs)

    def allocate(self, rows, room, new_tokens):
        """Buffers, and on CUDA a graph that reads and writes them, unless those at hand will do."""
        if self.shape == (rows, new_tokens) and room <= self.room:
            return
        self.shape, self.room = (rows, new_tokens), room
        model, make = self.model, functools.partial(torch.zeros, device=self.device)
        self.cache = make(model.layers, 2, rows, room, model.k_heads, model.head_width,
                          dtype=next(model.parameters()).dtype)
        self.token, self.slot, self.position, self.count = make(4, rows, dtype=torch.long)
        self.done, self.stream = make(rows, dtype=torch.bool), make(rows, dtype=torch.int32)
        self.ids = make(rows, new_tokens + 1, dtype=torch.long)      # finished rows write to the
        self.logprobs = make(rows, new_tokens + 1)                   # last column, never read
        self.scale, self.noise = make(2, 1)
        if self.capture:
            self.record()

    def record(self):
        """Captures `step` in a CUDA graph, once its kernels are compiled and loaded."""
        self.done.fill_(True)                            # so that these steps write nothing
        self.step(self.room)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step(self.room)

    def step(self, window):
        """One token for every row, in place. window: how many cache slots can be in use."""
        def attend(layer, q, k, v, rope):
            keys, values = self.cache[layer, :, :, :window]
            q = rotary_cache(q, k, v, *rope, keys, values, self.slot, self.done)
            return decode_attention(q, keys, values, self.slot + 1)

        hidden = self.model.decode(self.token, self.position, attend)
        key = mix(self.stream ^ mix(self.count.int()))
        token, logprob = sample(self.model.logits(hidden), self.banned, self.scale, self.noise, key)
        here = self.count.masked_fill(self.done, self.shape[1])[:, None]
        self.ids.scatter_(1, here, token[:, None])
        self.logprobs.scatter_(1, here, logprob[:, None])
        self.token.copy_(token)
        for counter in (self.slot, self.position, self.count):
            counter += ~self.done
        self.done |= (token == self.stop) | (self.count >= self.shape[1])

    def start(self, prompts, group, temperature, seeds):
        """Prefill once per prompt, fork the cache to its group, reset every buffer in place."""
        for mine, pair in zip(self.cache, self.model.prefill(prompts)):
            mine[:, :, :prompts.ids.shape[1]] = torch.stack(pair).repeat_interleave(group, 1)
        place = torch.arange(len(prompts.ids), device=self.device), prompts.lengths - 1
        self.token.copy_(prompts.ids[place].repeat_interleave(group))
        self.slot.copy_(place[1].repeat_interleave(group))
        self.position.copy_(prompts.positions[place][:, 0].repeat_interleave(group))
        member = torch.arange(group, dtype=torch.int32, device=self.device)
        self.stream.copy_(mix(mix(seeds.int())[:, None] ^ mix(member + 0x5EED)).flatten())
        self.scale.fill_(1 / temperature if temperature > 0 else 1)
        self.noise.fill_(float(temperature > 0))
        for buffer in (self.count, self.done, self.ids, self.logprobs):
            buffer.zero_()

    @torch.no_grad()
    def generate(self, prompts, group=1, new_tokens=48, temperature=1.0, seeds=None):
        """Batch of B prompts -> Rollouts of B * group rows. temperature 0 is greedy.
        seeds (B,): one per prompt; the same seed gives the same rollouts in any company."""
        prompts, (rows, width) = prompts.to(self.device), prompts.ids.shape
        seeds = torch.arange(rows) if seeds is None else seeds
        self.allocate(rows * group, (width + new_tokens + 31) // 32 * 32, new_tokens)
        self.start(prompts, group, temperature, seeds.to(self.device))
        for count in range(1, new_tokens + 1):
            if self.capture:
                self.graph.replay()
            else:
                self.step(width + count)
            if count % self.look_every == 0 and bool(self.done.all()):
                break
        ids, logprobs, lengths = self.ids[:, :-1], self.logprobs[:, :-1], self.count.clone()
        ended = ids.gather(1, lengths[:, None] - 1)[:, 0] == self.stop
        return Rollouts(ids.clone(), lengths, logprobs.clone(), ended)


# ----------------------------------------------------------------------------------- measuring

def seconds(run):
    """Median wall time of run() when it is warm, repeated until the times agree within a tenth."""
    timer = Timer("run()", globals=dict(run=run), num_threads=torch.get_num_threads())
    return timer.adaptive_autorange(0.1, max_run_time=60).median


@torch.no_grad()
def naive_generate(model, banned, batch, group, new_tokens):
    """What the sampler replaces: every token from a full forward pass over every row."""
    wide = batch.widen(new_tokens)
    wide = type(batch)(*(torch.cat([value] * group) for value in vars(wide).values()))
    rows = torch.arange(len(wide.ids), device=wide.ids.device)
    for _ in range(new_tokens):
        logits = model.logits(model(wide)[rows, wide.lengths - 1]).masked_fill(banned, NEGATIVE)
        wide.ids[rows, wide.lengths] = logits.softmax(-1).multinomial(1)[:, 0]
        wide.lengths += 1


def transformers_generate(model, processor, batch, group, new_tokens, dtype):
    """-> a function that samples the same number of tokens with transformers, same checkpoint."""
    from model import save
    from transformers import AutoModelForImageTextToText
    with tempfile.TemporaryDirectory() as directory:
        save(model, processor, directory)
        theirs = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype)
    width, device = batch.ids.shape[1], batch.ids.device
    ids = torch.stack([row.roll(width - int(n)) for row, n in zip(batch.ids, batch.lengths)])
    mask = torch.arange(width, device=device) >= (width - batch.lengths)[:, None]
    return functools.partial(
        theirs.to(device).generate, input_ids=ids, attention_mask=mask.long(),
        pixel_values=batch.pixels[:, None].to(dtype), do_sample=True, top_k=0, temperature=1.0,
        num_return_sequences=group, min_new_tokens=new_tokens, max_new_tokens=new_tokens)


def read_once(sampler, rows):
    """The floor: tokens a second if each only read weights and cache, as fast as a copy does."""
    x = torch.empty(1 << 28, dtype=torch.uint8, device=sampler.device)
    needed = sum(x.nbytes for x in [*sampler.model.parameters(), sampler.cache])
    return rows * 2 * x.nbytes / seconds(x.clone) / needed


def measure(size, prompts, group=8, new_tokens=48):
    """-> rows (name, value, unit, floor, ratio): ratios are the sampler's to each way, and to the
    floor; no row of tokens ends early (stop -1)."""
    import data
    from model import fresh
    cuda, rows = torch.cuda.is_available(), []
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    model, processor = fresh(size, [data.base_example(i) for i in range(1000)], 0)
    batch = processor.batch([data.world_example("test", i) for i in range(prompts)]).to(device)
    make = functools.partial(Sampler, model.to(device), processor.banned(model.vocabulary), -1, dtype)
    sampler, ask = make(), (batch, group, new_tokens)
    ways = {"sampler": functools.partial(sampler.generate, *ask)}
    if cuda:
        ways["the same step, not captured"] = functools.partial(make(capture=False).generate, *ask)
    if importlib.util.find_spec("transformers"):
        ways["transformers generate"] = transformers_generate(model, processor, *ask, dtype)
    if prompts <= 4:
        ways["a full pass per token"] = lambda: naive_generate(model, sampler.banned, *ask)
    for way, run in ways.items():
        speed = prompts * group * new_tokens / seconds(run)
        floor = read_once(sampler, prompts * group) if cuda and not rows else None
        ratio = rows[0]["value"] / speed if rows else floor and speed / floor
        name = f"{way}, {prompts} x {group} x {new_tokens}, size {size}"
        rows.append(dict(name=name, value=speed, unit="tokens/s", floor=floor, ratio=ratio))
        print(f"{name:56} {speed:12,.0f} tokens/s{f' {ratio:8.2f}' if ratio else ''}", flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description="Tokens a second of the sampler on this machine.")
    parser.add_argument("--json", type=pathlib.Path, help="file for the rows")
    args = parser.parse_args()
    rows = measure("m", 4) + measure("m", 32)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
