"""Everything that has to be fast: Triton kernels, token log-probs, and the sampler.

Each kernel stands beside a torch reference of the same signature. The reference runs on the CPU
and under autograd, the kernel on CUDA without gradients; the tests hold one against the other.

The last token of a prompt is the first token of each of its rollouts: a prompt is read once, and
every rollout starts with a `step` on that token; no first token is special.
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


def up_to(lengths, width=None):
    """(B,) -> (B, width) True at the first lengths[b] places."""
    return torch.arange(width or int(lengths.max()), device=lengths.device) < lengths[:, None]


def on_cuda(launch):
    """Beside a torch reference: `launch` runs instead on CUDA when no gradient is needed."""
    def beside(reference):
        def choose(x, *rest):
            return (launch if x.is_cuda and not torch.is_grad_enabled() else reference)(x, *rest)
        choose.reference, choose.triton = reference, launch
        return functools.update_wrapper(choose, reference)
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
        unit = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)).to(normed.dtype.element_ty)
        tl.store(normed + at, load(weight + column, inside) * unit, inside)

    @triton.jit
    def rotated(x, cos, sin, row, E, BLOCK: tl.constexpr):
        """-> the head of width E at pointer x, turned by the angles of this row."""
        at, angle = tl.arange(0, BLOCK), row * E + tl.arange(0, BLOCK)
        inside, left = at < E, at < E // 2
        turned = load(x + tl.where(left, at + E // 2, at - E // 2), inside)
        turned = tl.where(left, -turned, turned)
        return load(x + at, inside) * load(cos + angle, inside) + turned * load(sin + angle, inside)

    @triton.jit
    def rotary_cache_kernel(q, k, v, cos, sin, keys, values, slots, out, room, H, K, E,
                            BLOCK: tl.constexpr):
        row, head, at = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
        if head < H:
            q_at = (row * H + head) * E
            tl.store(out + q_at + at, rotated(q + q_at, cos, sin, row, E, BLOCK), at < E)
        else:
            k_at = (row * K + head - H) * E
            slot = ((row * room + tl.load(slots + row)) * K + head - H) * E + at
            tl.store(keys + slot, rotated(k + k_at, cos, sin, row, E, BLOCK), at < E)
            tl.store(values + slot, load(v + k_at + at, at < E), at < E)

    @triton.jit
    def decode_attention_kernel(q, keys, values, lengths, out, room, scale, K, PER, E,
                                HEADS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
        row, k_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        head, e, at = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None], tl.arange(0, 64)
        q_at = ((row * K + k_head) * PER + head) * E + e
        query = load(q + q_at, (head < PER) & (e < E))
        best, total = tl.full((HEADS, 1), -1e30, tl.float32), tl.zeros((HEADS, 1), tl.float32)
        mixed, length = tl.zeros((HEADS, WIDTH), tl.float32), tl.load(lengths + row)
        for start in range(0, length, 64):
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
    def sample_kernel(logits, banned, scale, noise, keys, tokens, logprobs, vocabulary):
        row, at = tl.program_id(0).to(tl.int64), tl.arange(0, 4096)
        key, factor, loud = tl.load(keys + row), tl.load(scale), tl.load(noise)
        best, token, top, total = -float("inf"), 0, -1e30, 0.0
        logits += row * vocabulary
        for start in range(0, vocabulary, 4096):
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
    x, width, block = x.contiguous(), x.shape[-1], triton.next_power_of_2(x.shape[-1])
    delta = torch.zeros_like(x) if delta is None else delta.contiguous()
    total, normed = torch.empty_like(x), torch.empty_like(x)
    rms_norm_kernel[(x.numel() // width,)](x, delta, weight, total, normed, width, eps, block)
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


def rotary_cache_triton(q, k, v, cos, sin, keys, values, slots):
    q, k, v, cos, sin = (x.contiguous() for x in (q, k, v, cos, sin))
    (rows, H, E), K, out = q.shape, k.shape[1], torch.empty_like(q)
    room = keys.stride(0) // keys.stride(1)          # of a window: that of its whole cache
    rotary_cache_kernel[(rows, H + K)](q, k, v, cos, sin, keys, values, slots, out, room, H, K, E,
                                       triton.next_power_of_2(E))
    return out


@on_cuda(rotary_cache_triton)
def rotary_cache(q, k, v, cos, sin, keys, values, slots):
    """Rotates q and k, and writes k and v of each row r to its slot in the cache.
    q (R, H, E); k, v (R, K, E); cos, sin (R, E); keys, values (R, S, K, E); slots (R,)."""
    rows = torch.arange(len(q), device=q.device)
    keys[rows, slots], values[rows, slots] = rotary(k, cos, sin), v
    return rotary(q, cos, sin)


def decode_attention_triton(q, keys, values, lengths):
    (rows, H, E), K, out = q.shape, keys.shape[2], torch.empty_like(q)
    heads, width = (max(16, triton.next_power_of_2(n)) for n in (H // K, E))
    decode_attention_kernel[(rows, K)](
        q, keys, values, lengths, out, keys.stride(0) // keys.stride(1), E ** -0.5, K, H // K, E,
        heads, width, "ieee" if q.dtype == torch.float32 else "tf32")      # bf16 is exact in tf32
    return out


@on_cuda(decode_attention_triton)
def decode_attention(q, keys, values, lengths):
    """One query per row against the first lengths[r] slots of its cache, heads grouped.
    q (R, H, E); keys, values (R, S, K, E); lengths (R,) -> (R, H, E)."""
    mask = up_to(lengths, keys.shape[1])            # (R, S)
    q = q.unflatten(1, (keys.shape[2], -1))         # a group of heads is a row of queries
    return F.scaled_dot_product_attention(q, keys.transpose(1, 2), values.transpose(1, 2),
                                          mask[:, None, None]).flatten(1, 2)


def gumbel(keys, vocabulary):
    """Standard Gumbel noise (R, V) that depends on (key, token id) alone. keys (R,) int32."""
    words = mix(torch.arange(vocabulary, dtype=torch.int32, device=keys.device))
    bits = mix(keys[:, None] ^ words) >> 9 & 0x7FFFFF
    return -torch.log(-torch.log((bits.float() + 0.5) * 2 ** -23))       # of neither 0 nor 1


def sample_triton(logits, banned, scale, noise, keys):
    (rows, vocabulary), logits = logits.shape, logits.contiguous()
    tokens, logprobs = (logits.new_empty(rows, dtype=kind) for kind in (torch.long, torch.float32))
    sample_kernel[(rows,)](logits, banned, scale, noise, keys, tokens, logprobs, vocabulary)
    return tokens, logprobs


@on_cuda(sample_triton)
def sample(logits, banned, scale, noise, keys):
    """Draws from softmax(scale * logits) without banned ids, by Gumbel arg-max in fp32. logits
    (R, V); scale 1/T, noise 1, or 1, 0 to be greedy; keys (R,) int32 -> tokens, log-probs (R,)."""
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
    """log softmax(scale * h Wᵀ)[target] without ever holding (N, V): chunks, made again backward
    from the same casts of h and W. The head's gradient is summed over the chunks in fp32."""
    @staticmethod
    def forward(ctx, hidden, weight, targets, banned, scale):
        if torch.is_autocast_enabled(hidden.device.type):
            kind = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(kind), weight.to(kind)
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
        grad_hidden = torch.empty_like(hidden)
        grad_weight = widened(torch.zeros_like(weight)) if ctx.needs_input_grad[1] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for part, logits in chunk_logits(hidden, weight, banned, ctx.scale):
                slope = logits.softmax(-1).neg_().scatter_(1, targets[part, None], 1, reduce="add")
                slope *= (grad[part] * ctx.scale)[:, None]
                grad_hidden[part] = slope.to(weight.dtype) @ weight
                if grad_weight is not None:
                    grad_weight += slope.T @ hidden[part].to(slope.dtype)
        return grad_hidden, grad_weight, None, None, None     # autograd casts to the inputs' types


def token_logprobs(hidden, weight, targets, banned=None, temperature=1.0):
    """The sampler's log-prob of each target, and the entropy there, which has no gradient.
    hidden (N, D); weight (V, D); targets (N,); banned (V,) -> (N,), (N,).
    A banned target, which the sampler never draws, gets about -1e30 and a meaningless gradient."""
    return TokenLogprobs.apply(hidden, weight, targets, banned, 1 / (temperature or 1))


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
        return up_to(self.lengths, self.ids.shape[1])

    def rows(self):
        return [row[:length].tolist() for row, length in zip(self.ids, self.lengths)]


class Sampler:
    """Prompts in, rollouts out: a static cache, per-row lengths, one `step` over fixed buffers that
    CUDA captures. banned (V,): never sampled. With another `dtype` it samples from copied weights,
    which `refresh` updates in place. A row's randomness depends on (seed of its prompt, place in
    its group, token index) alone, not on other rows, batch size or device."""
    def __init__(self, model, banned, stop, dtype=None, capture=True):
        self.source = self.model = model
        if dtype not in (None, next(model.parameters()).dtype):
            self.model = copy.deepcopy(model).requires_grad_(False)
            for weight in filter(torch.is_floating_point, self.model.parameters()):
                weight.data = weight.data.to(dtype)      # not the buffers: rope needs fp32
        self.device, self.stop = next(model.parameters()).device, stop
        self.capture, self.banned = capture and self.device.type == "cuda", banned.to(self.device)
        self.room, self.graph = 0, None

    @torch.no_grad()
    def refresh(self):
        """Takes over the weights of the model in training; no tensor moves, so no new capture."""
        for mine, theirs in zip(self.model.parameters(), self.source.parameters()):
            mine.copy_(theirs)

    def start(self, prompts, group, new_tokens, temperature, seeds):
        """Reads each prompt once, forks its cache, sets every buffer, in place where they fit."""
        (B, width), zeros = prompts.ids.shape, prompts.ids.new_zeros
        room, rows = (width + new_tokens + 31) // 32 * 32, B * group
        last = torch.arange(B, device=self.device), prompts.lengths - 1
        counters = torch.stack([last[1], prompts.positions[..., 0][last], zeros(B)])
        seeds = last[0] if seeds is None else seeds.to(self.device)
        member = torch.arange(group, dtype=torch.int32, device=self.device)
        buffers = dict(
            token=prompts.ids[last].repeat_interleave(group),
            counters=counters.repeat_interleave(group, 1),       # cache slot, position, new tokens
            stream=mix(mix(seeds.int())[:, None] ^ mix(member + 0x5EED)).flatten(),
            heat=torch.tensor([1 / (temperature or 1), temperature > 0], device=self.device),
            done=zeros(rows, dtype=torch.bool),
            ids=zeros(rows, new_tokens + 1),                     # the last column takes what
            logprobs=zeros(rows, new_tokens + 1, dtype=torch.float32))     # done rows go on to draw
        cache = torch.stack([torch.stack(pair) for pair in self.model(prompts)[1]])
        if room > self.room or self.ids.shape != buffers["ids"].shape:
            empty = cache.new_zeros(*cache.shape[:2], rows, room, *cache.shape[4:])
            vars(self).update(buffers, cache=empty, room=room, graph=None)
        for name, value in buffers.items():
            vars(self)[name].copy_(value)
        self.cache.unflatten(2, (B, group))[:, :, :, :, :width] = cache[:, :, :, None]

    def step(self, window):
        """One token a row, within a window of cache slots. Done rows write behind their end."""
        slot, position, count = self.counters

        def attend(layer, q, k, v, rope):
            keys, values = self.cache[layer, :, :, :window]
            q = rotary_cache(q, k, v, *rope, keys, values, slot)
            return decode_attention(q, keys, values, slot + 1)

        text = self.model.text
        logits = self.model.lm_head(text(text.embed_tokens(self.token), position, attend))
        key = mix(self.stream ^ mix(count.int()))
        token, logprob = sample(logits, self.banned, *self.heat.split(1), key)
        here = count.masked_fill(self.done, self.ids.shape[1] - 1)[:, None]
        self.ids.scatter_(1, here, token[:, None])
        self.logprobs.scatter_(1, here, logprob[:, None])
        self.token.copy_(torch.where(self.done, self.token, token))
        self.counters += ~self.done
        self.done |= (token == self.stop) | (count == self.ids.shape[1] - 1)

    @torch.no_grad()
    def generate(self, prompts, group=1, new_tokens=48, temperature=1.0, seeds=None):
        """Batch of B prompts -> Rollouts of B * group rows. temperature 0 is greedy.
        seeds (B,): one per prompt; the same seed gives the same rollouts in any company."""
        self.start(prompts.to(self.device), group, new_tokens, temperature, seeds)
        for count in range(1, new_tokens + 1):
            if self.graph:
                self.graph.replay()
            else:
                self.step(prompts.ids.shape[1] + count)
            if self.capture and not self.graph:      # the first step has compiled the kernels;
                self.graph = torch.cuda.CUDAGraph()  # capturing computes nothing
                with torch.cuda.graph(self.graph):
                    self.step(self.room)
            if (count % 16 == 0 or not self.capture) and self.done.all():     # waits for a GPU
                break
        return Rollouts(self.ids[:, :-1].clone(), self.counters[2].clone(),
                        self.logprobs[:, :-1].clone(), self.token == self.stop)


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
        logits = model.lm_head(model(wide)[0][rows, wide.lengths - 1])
        chances = logits.masked_fill(banned, NEGATIVE).softmax(-1)
        wide.ids[rows, wide.lengths] = chances.multinomial(1)[:, 0]
        wide.lengths += 1


def transformers_generate(directory, batch, group, new_tokens, dtype):
    """-> a function that samples the same number of tokens from a checkpoint, with transformers."""
    from transformers import AutoModelForImageTextToText
    theirs = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype)
    return functools.partial(
        theirs.to(batch.ids.device).generate, input_ids=batch.ids, do_sample=True, top_k=0,
        attention_mask=torch.ones_like(batch.ids), pixel_values=batch.pixels[:, None].to(dtype),
        num_return_sequences=group, min_new_tokens=new_tokens, max_new_tokens=new_tokens)


def measure(size, prompts, group=8, new_tokens=48):
    """-> rows (name, value, unit, floor, ratio): the sampler's speed to its floor (reading weights
    and cache as fast as a GPU copies) and to other ways; all prompts alike, so that none pads."""
    import data
    from model import fresh, save
    cuda, rows, floor = torch.cuda.is_available(), [], None
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    model, processor = fresh(size, [data.base_example(i) for i in range(1000)], 0)
    batch = processor.batch([data.world_example("test", 0)] * prompts).to(device)
    banned, ask = processor.banned(model.vocabulary).to(device), (batch, group, new_tokens)
    sampler, plain = (Sampler(model.to(device), banned, -1, dtype, way) for way in (True, False))
    ways = {"sampler": lambda: sampler.generate(*ask)}
    if cuda:
        ways["the same step, not captured"] = lambda: plain.generate(*ask)
    if importlib.util.find_spec("transformers"):
        with tempfile.TemporaryDirectory() as directory:
            save(model, processor, directory)
            ways["transformers generate"] = transformers_generate(directory, *ask, dtype)
    if prompts <= 4:
        ways["a full pass per token"] = lambda: naive_generate(sampler.model, banned, *ask)
    for way, run in ways.items():
        speed = prompts * group * new_tokens / seconds(run)
        if cuda and not rows:
            x = torch.empty(1 << 28, dtype=torch.uint8, device=device)
            read = sum(part.nbytes for part in [*sampler.model.parameters(), sampler.cache])
            floor = prompts * group * 2 * x.nbytes / seconds(x.clone) / read
        ratio = rows[0]["value"] / speed if rows else floor and speed / floor
        name = f"{way}, {prompts} x {group} x {new_tokens}, size {size}"
        rows.append(dict(name=name, value=speed, unit="tokens/s", floor=floor, ratio=ratio))
        floor = None
        print(f"{name:56} {speed:12,.0f} tokens/s{f' {ratio:8.2f}' if ratio else ''}", flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Tokens a second of the sampler on this machine.")
    parser.add_argument("--json", type=pathlib.Path, help="file for the rows")
    args = parser.parse_args()
    measured = measure("m", 4) + measure("m", 32)
    if args.json:
        args.json.write_text(json.dumps(measured, indent=1))
