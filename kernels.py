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
import json
import pathlib
import tempfile
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:                  # a CPU build of torch comes without triton: references run
    triton = None

NEGATIVE = -1e30                     # the logit of a banned token; finite, so that 0 * it is 0


def widened(x):
    """At least fp32: norms, softmax and sampling are computed in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def on_cuda(launch, reference):
    """Beside a torch reference: `launch` runs instead on CUDA when no gradient is needed."""
    @functools.wraps(reference)
    def choose(x, *rest):
        return (launch if x.is_cuda and not torch.is_grad_enabled() else reference)(x, *rest)
    choose.reference, choose.triton = reference, launch
    return choose


# ------------------------------------------------------------------------------------- kernels

if triton:
    @triton.jit
    def rms_norm_kernel(x, delta, weight, total, normed, width, eps, HAS_DELTA: tl.constexpr,
                        BLOCK: tl.constexpr):
        row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        inside = column < width
        wide = tl.load(x + row * width + column, inside, 0.0).to(tl.float32)
        if HAS_DELTA:
            wide += tl.load(delta + row * width + column, inside, 0.0).to(tl.float32)
            wide = wide.to(total.dtype.element_ty).to(tl.float32)    # rounded as it is stored
            tl.store(total + row * width + column, wide, inside)
        scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
        gain = tl.load(weight + column, inside, 0.0).to(tl.float32)
        unit = (wide * scale).to(normed.dtype.element_ty).to(tl.float32)
        tl.store(normed + row * width + column, gain * unit, inside)

    @triton.jit
    def rotate_halves(x, row, cos, sin, HALF: tl.constexpr, BLOCK: tl.constexpr):
        """-> the two halves of one head of width 2 * HALF at pointer x, rotated, in fp32."""
        at = tl.arange(0, BLOCK)
        inside = at < HALF
        left = tl.load(x + at, inside, 0.0).to(tl.float32)
        right = tl.load(x + HALF + at, inside, 0.0).to(tl.float32)
        c = tl.load(cos + row * 2 * HALF + at, inside, 0.0).to(tl.float32)
        s = tl.load(sin + row * 2 * HALF + at, inside, 0.0).to(tl.float32)
        return left * c - right * s, right * c + left * s

    @triton.jit
    def rotary_cache_kernel(q, k, v, cos, sin, keys, values, slots, done, out, room,
                            H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
                            BLOCK: tl.constexpr):
        row, head, at = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
        inside = at < HALF
        if head < H:
            base = (row * H + head) * 2 * HALF
            left, right = rotate_halves(q + base, row, cos, sin, HALF, BLOCK)
            tl.store(out + base + at, left, inside)
            tl.store(out + base + HALF + at, right, inside)
        elif tl.load(done + row) == 0:             # a finished row writes nothing
            base = (row * K + head - H) * 2 * HALF
            slot = ((row * room + tl.load(slots + row)) * K + head - H) * 2 * HALF
            left, right = rotate_halves(k + base, row, cos, sin, HALF, BLOCK)
            tl.store(keys + slot + at, left, inside)
            tl.store(keys + slot + HALF + at, right, inside)
            tl.store(values + slot + at, tl.load(v + base + at, inside, 0.0), inside)
            tl.store(values + slot + HALF + at, tl.load(v + base + HALF + at, inside, 0.0), inside)

    @triton.jit
    def decode_attention_kernel(q, keys, values, lengths, out, room, scale, K: tl.constexpr,
                                PER: tl.constexpr, E: tl.constexpr, HEADS: tl.constexpr,
                                WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                                PRECISION: tl.constexpr):
        row, k_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        head, e, at = tl.arange(0, HEADS), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
        q_at = ((row * K + k_head) * PER + head[:, None]) * E + e[None, :]
        q_in = (head[:, None] < PER) & (e[None, :] < E)
        query = tl.load(q + q_at, q_in, 0.0).to(tl.float32)
        best = tl.full((HEADS,), -1e30, tl.float32)
        total = tl.zeros((HEADS,), tl.float32)
        mixed = tl.zeros((HEADS, WIDTH), tl.float32)
        length = tl.load(lengths + row)
        for start in range(0, length, BLOCK):
            slot = start + at
            cache = ((row * room + slot[:, None]) * K + k_head) * E + e[None, :]
            inside = (slot[:, None] < length) & (e[None, :] < E)
            key = tl.load(keys + cache, inside, 0.0).to(tl.float32)
            score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
            score = tl.where(slot[None, :] < length, score, -1e30)
            higher = tl.maximum(best, tl.max(score, 1))
            part = tl.exp(score - higher[:, None])
            shrink = tl.exp(best - higher)
            value = tl.load(values + cache, inside, 0.0).to(tl.float32)
            mixed = mixed * shrink[:, None] + tl.dot(part, value, input_precision=PRECISION)
            total = total * shrink + tl.sum(part, 1)
            best = higher
        tl.store(out + q_at, (mixed / total[:, None]).to(out.dtype.element_ty), q_in)

    @triton.jit
    def mix_kernel(x):
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) * 0x846CA68B
        return x ^ (x >> 16)

    @triton.jit
    def sample_kernel(logits, banned, scale, noise, keys, tokens, logprobs, vocabulary,
                      BLOCK: tl.constexpr):
        row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        key = tl.load(keys + row).to(tl.uint32)
        factor, loud = tl.load(scale), tl.load(noise)
        best, token, chosen, top, total = -float("inf"), 0, 0.0, -1e30, 0.0
        for start in range(0, vocabulary, BLOCK):
            word = start + at
            inside = word < vocabulary
            logit = tl.load(logits + row * vocabulary + word, inside, 0.0).to(tl.float32) * factor
            logit = tl.where(tl.load(banned + word, inside, 1) != 0, -1e30, logit)
            higher = tl.maximum(top, tl.max(logit, 0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(logit - higher), 0)
            top = higher
            uniform = ((mix_kernel(key ^ mix_kernel(word.to(tl.uint32))) >> 9).to(tl.float32)
                       + 0.5) * 1.1920928955078125e-07
            score = logit - loud * tl.log(-tl.log(uniform))
            peak = tl.max(score, 0)
            if peak > best:
                best = peak
                token = start + tl.argmax(score, 0)
                chosen = tl.sum(tl.where(word == token, logit, 0.0), 0)
        tl.store(tokens + row, token)
        tl.store(logprobs + row, chosen - top - tl.log(total))


def rms_norm_triton(x, delta, weight, eps):
    width, x = x.shape[-1], x.contiguous()
    total, normed = (x if delta is None else torch.empty_like(x)), torch.empty_like(x)
    rms_norm_kernel[(x.numel() // width,)](
        x, x if delta is None else delta.contiguous(), weight, total, normed, width, eps,
        delta is not None, triton.next_power_of_2(width))
    return total, normed


@functools.partial(on_cuda, rms_norm_triton)
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
    (rows, heads, width), k_heads, out = q.shape, k.shape[1], torch.empty_like(q)
    half = width // 2
    rotary_cache_kernel[(rows, heads + k_heads)](
        q.contiguous(), k.contiguous(), v.contiguous(), cos.contiguous(), sin.contiguous(), keys,
        values, slots, done, out, keys.stride(0) // keys.stride(1), heads, k_heads, half,
        triton.next_power_of_2(half))
    return out


@functools.partial(on_cuda, rotary_cache_triton)
def rotary_cache(q, k, v, cos, sin, keys, values, slots, done):
    """Rotates q and k, and writes k and v of each unfinished row r to its slot in the cache.
    q (R, H, E); k, v (R, K, E); cos, sin (R, E); keys, values (R, S, K, E); slots, done (R,)."""
    rows, finished = torch.arange(len(q), device=q.device), done[:, None, None]
    keys[rows, slots] = torch.where(finished, keys[rows, slots], rotary(k, cos, sin))
    values[rows, slots] = torch.where(finished, values[rows, slots], v)
    return rotary(q, cos, sin)


def decode_attention_triton(q, keys, values, lengths):
    (rows, heads, width), k_heads, out = q.shape, keys.shape[2], torch.empty_like(q)
    per, room = heads // k_heads, keys.stride(0) // keys.stride(1)   # of a window: its cache's
    decode_attention_kernel[(rows, k_heads)](
        q, keys, values, lengths, out, room, width ** -0.5, k_heads, per, width,
        max(16, triton.next_power_of_2(per)), max(16, triton.next_power_of_2(width)), 64,
        "ieee" if q.dtype == torch.float32 else "tf32")              # bf16 is exact in tf32
    return out


@functools.partial(on_cuda, decode_attention_triton)
def decode_attention(q, keys, values, lengths):
    """One query per row against the first lengths[r] slots of its cache, heads grouped.
    q (R, H, E); keys, values (R, S, K, E); lengths (R,) -> (R, H, E)."""
    mask = torch.arange(keys.shape[1], device=q.device) < lengths[:, None]      # (R, S)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    return F.scaled_dot_product_attention(q[:, :, None], keys, values, mask[:, None, None],
                                          enable_gqa=True)[:, :, 0]


def mix(x):
    """A 32-bit hash (lowbias32) of an int32 tensor: the same numbers on every device."""
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * (0x846CA68B - 2 ** 32)
    return x ^ (x >> 16 & 0xFFFF)


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


@functools.partial(on_cuda, sample_triton)
def sample(logits, banned, scale, noise, keys):
    """Draws from softmax(scale * logits) without the banned ids, by Gumbel arg-max in fp32.
    logits (R, V); banned (V,); scale, noise (1,): 1/T and 1, or 1 and 0 for the arg-max itself;
    keys (R,) int32 -> tokens (R,), their log-probs (R,)."""
    logits = (logits.float() * scale).masked_fill(banned, NEGATIVE)
    tokens = (logits + noise * gumbel(keys, logits.shape[1])).argmax(-1)
    return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


CHUNK = 1 << 24                      # logits held at a time: 64 MiB in fp32


class TokenLogprobs(torch.autograd.Function):
    """log softmax(scale * h Wᵀ)[target] without ever holding (N, V): chunks, made again backward.
    The head's gradient is summed over the chunks in fp32, whatever the type of its weight."""

    @staticmethod
    def logits(hidden, weight, banned, scale):
        logits = widened(hidden @ weight.T) * scale
        return logits if banned is None else logits.masked_fill(banned, NEGATIVE)

    @staticmethod
    def forward(ctx, hidden, weight, targets, banned, scale):
        logprobs, entropies, ctx.scale, ctx.rows = [], [], scale, max(1, CHUNK // len(weight))
        for h, target in zip(hidden.split(ctx.rows), targets.split(ctx.rows)):
            logp = TokenLogprobs.logits(h, weight, banned, scale).log_softmax(-1)
            logprobs.append(logp.gather(1, target[:, None])[:, 0])
            entropies.append(-(logp.exp() * logp).sum(-1))
        ctx.save_for_backward(hidden, weight, targets, banned)
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, banned = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(widened(weight))
        for start in range(0, len(hidden), ctx.rows):
            part = slice(start, start + ctx.rows)
            slope = TokenLogprobs.logits(hidden[part], weight, banned, ctx.scale).softmax(-1)
            slope.neg_().scatter_add_(1, targets[part, None], torch.ones_like(slope[:, :1]))
            slope *= (grad[part] * ctx.scale)[:, None]
            grad_hidden[part] = slope.to(weight.dtype) @ weight
            grad_weight += slope.T @ hidden[part].to(slope.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def token_logprobs(hidden, weight, targets, banned=None, temperature=1.0):
    """Log-prob of each target and entropy of its distribution, at a temperature, ids banned.
    hidden (N, D); weight (V, D); targets (N,); banned (V,) -> (N,), (N,); the entropy has no
    gradient. With the sampler's `banned` and `temperature` these are the sampler's log-probs."""
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
        if dtype is not None and dtype != next(model.parameters()).dtype:
            self.model = copy.deepcopy(model).requires_grad_(False)
            for weight in self.model.parameters():       # not the buffers: rope needs fp32
                weight.data = weight.data.to(dtype)
        self.device = next(model.parameters()).device
        self.capture = capture and self.device.type == "cuda"
        self.banned, self.stop = banned.to(self.device), stop
        self.look_every = look_every or (16 if self.capture else 4)
        self.rows = self.room = self.new_tokens = self.graph = None

    @torch.no_grad()
    def refresh(self):
        """Takes over the weights of the model in training; no tensor moves, so no new capture."""
        if self.model is not self.source:
            for mine, theirs in zip(self.model.parameters(), self.source.parameters()):
                mine.copy_(theirs)

    def allocate(self, rows, room, new_tokens):
        if rows == self.rows and room <= self.room and new_tokens == self.new_tokens:
            return
        self.rows, self.room, self.new_tokens, self.graph = rows, room, new_tokens, None
        model, make = self.model, functools.partial(torch.zeros, device=self.device)
        shape, kind = (rows, room, model.k_heads, model.head_width), next(model.parameters()).dtype
        self.cache = [[make(shape, dtype=kind) for _ in "kv"] for _ in range(model.layers)]
        self.token, self.slot, self.count = (make(rows, dtype=torch.long) for _ in range(3))
        self.done, self.stream = make(rows, dtype=torch.bool), make(rows, dtype=torch.int32)
        self.ids, self.logprobs = make(rows, new_tokens, dtype=torch.long), make(rows, new_tokens)
        self.scale, self.noise = make(1), make(1)

    def step(self, window):
        """One token for every row, in place. window: how many cache slots can be in use."""
        def attend(layer, q, k, v, rope):
            keys, values = (x[:, :window] for x in self.cache[layer])
            q = rotary_cache(q, k, v, *rope, keys, values, self.slot, self.done)
            return decode_attention(q, keys, values, self.slot + 1)

        hidden = self.model.decode(self.token, self.slot, attend)
        key = mix(self.stream ^ mix(self.count.int()))
        token, logprob = sample(self.model.logits(hidden), self.banned, self.scale, self.noise, key)
        here = self.count.clamp(max=self.new_tokens - 1)[:, None]
        for buffer, new in ((self.ids, token), (self.logprobs, logprob)):
            kept = torch.where(self.done[:, None], buffer.gather(1, here), new[:, None])
            buffer.scatter_(1, here, kept)
        self.token.copy_(torch.where(self.done, self.token, token))
        self.count += ~self.done
        self.slot += ~self.done
        self.done |= (token == self.stop) | (self.count >= self.new_tokens)

    def record(self):
        """Captures `step` in a CUDA graph. Done rows write nothing, so warming up is harmless."""
        self.done.fill_(True)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step(self.room)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step(self.room)

    def start(self, prompts, group, temperature, seeds):
        """Prefill once per prompt, fork the cache to its group, reset every buffer in place."""
        cache, width = self.model.prefill(prompts), prompts.ids.shape[1]
        for (keys, values), (k, v) in zip(self.cache, cache):
            keys[:, :width] = k.repeat_interleave(group, 0)
            values[:, :width] = v.repeat_interleave(group, 0)
        last = prompts.lengths - 1
        self.token.copy_(prompts.ids.gather(1, last[:, None])[:, 0].repeat_interleave(group))
        self.slot.copy_(last.repeat_interleave(group))
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
        prompts = prompts.to(self.device)
        rows, width = len(prompts.ids) * group, prompts.ids.shape[1]
        seeds = torch.arange(len(prompts.ids)) if seeds is None else seeds
        self.allocate(rows, (width + new_tokens + 31) // 32 * 32, new_tokens)
        if self.capture and self.graph is None:
            self.record()
        self.start(prompts, group, temperature, seeds.to(self.device))
        for count in range(new_tokens):
            if self.capture:
                self.graph.replay()
            else:
                self.step(min(self.room, width + count + 1))
            if (count + 1) % self.look_every == 0 and bool(self.done.all()):
                break
        ended = self.ids.gather(1, (self.count - 1)[:, None])[:, 0] == self.stop
        return Rollouts(self.ids.clone(), self.count.clone(), self.logprobs.clone(), ended)


# ----------------------------------------------------------------------------------- measuring

def median_seconds(run, repeats=5):
    """Median wall time of run(), after one call that warms up."""
    times = [time.perf_counter()]
    for _ in range(repeats + 1):
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter())
    return sorted(end - begin for begin, end in zip(times[1:], times[2:]))[repeats // 2]


@torch.no_grad()
def naive_generate(model, banned, batch, group, new_tokens):
    """What the sampler replaces: every token from a full forward pass over every row."""
    ids = F.pad(batch.ids, (0, new_tokens)).repeat(group, 1)
    lengths, pixels = batch.lengths.repeat(group), batch.pixels.repeat(group, 1, 1, 1)
    rows = torch.arange(len(ids), device=ids.device)
    for _ in range(new_tokens):
        hidden = model(type(batch)(ids, lengths, pixels))[rows, lengths - 1]
        logits = model.logits(hidden).masked_fill(banned, NEGATIVE)
        ids[rows, lengths] = logits.softmax(-1).multinomial(1)[:, 0]
        lengths = lengths + 1


def transformers_generate(model, processor, batch, group, new_tokens, dtype):
    """-> a function that samples the same number of tokens with transformers, same checkpoint."""
    from model import save
    from transformers import AutoModelForImageTextToText
    with tempfile.TemporaryDirectory() as directory:
        save(model, processor, directory)
        theirs = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype)
    theirs = theirs.to(batch.ids.device).eval()
    theirs.generation_config.suppress_tokens = None
    width = batch.ids.shape[1]
    ids = torch.stack([row.roll(width - int(n)) for row, n in zip(batch.ids, batch.lengths)])
    mask = torch.arange(width, device=ids.device) >= (width - batch.lengths)[:, None]
    return lambda: theirs.generate(
        input_ids=ids, attention_mask=mask.long(), pixel_values=batch.pixels[:, None].to(dtype),
        do_sample=True, top_k=0, temperature=1.0, num_return_sequences=group,
        min_new_tokens=new_tokens, max_new_tokens=new_tokens)


def measure(size, new_tokens, prompts, device, group=8):
    """-> rows (name, value, unit, floor, ratio): ratios are the sampler's to each way, no row ends
    early (stop -1), the floor reads weights and cache once per token at copy bandwidth."""
    import data
    from model import fresh
    model, processor = fresh(size, [data.base_example(i) for i in range(1000)], 0)
    model, dtype = model.to(device), torch.bfloat16 if device == "cuda" else torch.float32
    batch = processor.batch([data.world_example("test", i) for i in range(prompts)]).to(device)
    make = functools.partial(Sampler, model, processor.banned(model.vocabulary), -1, dtype)
    sampler, ask = make(), (batch, group, new_tokens)
    ways = {"sampler": functools.partial(sampler.generate, *ask)}
    if device == "cuda":
        ways["the same step, not captured"] = functools.partial(make(capture=False).generate, *ask)
    try:
        ways["transformers generate"] = transformers_generate(model, processor, *ask, dtype)
    except ImportError:
        print("transformers is not installed: no comparison with its generate")
    if prompts <= 4:
        ways["a full pass per token"] = lambda: naive_generate(model, sampler.banned, *ask)
    rows, tokens = [], prompts * group * new_tokens
    for way, run in ways.items():
        speed, floor = tokens / median_seconds(run), None
        if device == "cuda" and way == "sampler":
            x = torch.empty(1 << 28, dtype=torch.uint8, device=device)
            bandwidth = 2 * x.numel() / median_seconds(x.clone)
            read = [*sampler.model.parameters(), *(x for pair in sampler.cache for x in pair)]
            floor = prompts * group * bandwidth / sum(x.numel() * x.element_size() for x in read)
        ratio = rows[0]["value"] / speed if rows else floor and speed / floor
        name = f"{way}, {prompts} x {group} x {new_tokens}, size {size}"
        rows.append(dict(name=name, value=speed, unit="tokens/s", floor=floor, ratio=ratio))
        print(f"{name:56} {speed:12,.0f} tokens/s{f' {ratio:8.2f}' if ratio else ''}", flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description="Tokens a second of the sampler on this machine.")
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args()
    device, rows = "cuda" if torch.cuda.is_available() else "cpu", []
    for prompts in (4, 32):
        rows += measure("m", 48, prompts, device)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
