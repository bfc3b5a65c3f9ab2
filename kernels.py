"""Everything that has to be fast: Triton kernels, token log-probs, and the sampler.

Each kernel stands beside a torch reference of the same signature. The reference runs on the CPU
and under autograd, the kernel on CUDA without gradients; the tests hold one against the other.

The last token of a prompt is the first token of each of its rollouts: a prompt is read once, and
every rollout starts with a `step` on that token; no first token is special.
"""
import copy
import functools
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


def length_mask(lengths, width=None):
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
    def rotary_cache_kernel(q, k, v, cos, sin, keys, values, slots, out, room, G, H, K, E,
                            BLOCK: tl.constexpr):
        row, head, at = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
        if head < H:
            q_at = (row * H + head) * E
            tl.store(out + q_at + at, rotated(q + q_at, cos, sin, row, E, BLOCK), at < E)
        else:
            k_at = (row * K + head - H) * E
            slot = ((row // G * room + tl.load(slots + row)) * K + head - H) * E + at
            tl.store(keys + slot, rotated(k + k_at, cos, sin, row, E, BLOCK), at < E)
            tl.store(values + slot, load(v + k_at + at, at < E), at < E)

    @triton.jit
    def swiglu_kernel(gate, up, out, size):
        at = tl.program_id(0).to(tl.int64) * 1024 + tl.arange(0, 1024)
        g = load(gate + at, at < size)
        g = (g * tl.sigmoid(g)).to(out.dtype.element_ty)
        tl.store(out + at, g * load(up + at, at < size), at < size)

    @triton.jit
    def decode_attention_kernel(q, keys, values, bias, ends, parts, sums, room, scale, share, rows,
                                G, K, PER, E, ROWS: tl.constexpr, WIDTH: tl.constexpr,
                                SLOTS: tl.constexpr, PRECISION: tl.constexpr):
        """ROWS queries of a group against `share` slots of the cache that they share."""
        b, k_head = tl.program_id(0).to(tl.int64) // K, tl.program_id(0) % K
        query, e = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)[None]
        member, split, at = query // PER, tl.program_id(2), tl.arange(0, SLOTS)
        head = ((b * G + member) * K + k_head) * PER + query % PER         # among all R * H
        there = (member < G)[:, None] & (e < E)
        asked = load(q + head[:, None] * E + e, there)
        best, total = tl.full((ROWS, 1), -1e30, tl.float32), tl.full((ROWS, 1), 1e-30, tl.float32)
        mixed, end = tl.zeros((ROWS, WIDTH), tl.float32), tl.load(ends + b)
        for start in range(split * share, tl.minimum(end, (split + 1) * share), SLOTS):
            slot = start + at
            cache = ((b * room + slot[:, None]) * K + k_head) * E + e
            inside = (slot[:, None] < end) & (e < E)
            key, value = load(keys + cache, inside), load(values + cache, inside)
            added = tl.load(bias + (b * G + member[:, None]) * room + slot[None],
                            (member < G)[:, None] & (slot < end)[None], -1e30).to(tl.float32)
            score = tl.dot(asked, tl.trans(key), input_precision=PRECISION) * scale + added
            higher = tl.maximum(best, tl.max(score, 1, keep_dims=True))
            part, shrink = tl.exp(score - higher), tl.exp(best - higher)
            mixed = mixed * shrink + tl.dot(part, value, input_precision=PRECISION)
            total = total * shrink + tl.sum(part, 1, keep_dims=True)
            best = higher
        head += split * rows
        tl.store(parts + head[:, None] * E + e, mixed / total, there)
        tl.store(sums + head[:, None], best + tl.log(total), member[:, None] < G)

    @triton.jit
    def merge_kernel(parts, sums, out, rows, splits, E, SPLITS: tl.constexpr, WIDTH: tl.constexpr):
        """One head's parts, each weighted by the sum of its exponentials."""
        head, e = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)[None]
        split = tl.arange(0, SPLITS)[:, None]
        weight = tl.load(sums + split * rows + head, split < splits, -1e30)
        weight = tl.exp(weight - tl.max(weight, 0, keep_dims=True))
        part = load(parts + (split * rows + head) * E + e, (split < splits) & (e < E))
        mixed = tl.sum(weight * part, 0, keep_dims=True) / tl.sum(weight, 0, keep_dims=True)
        tl.store(out + head * E + e, mixed, e < E)

    @triton.jit
    def sample_kernel(hidden, weight, banned, scale, noise, keys, best, found, sums, rows, width,
                      vocabulary, share, ROWS: tl.constexpr, PRECISION: tl.constexpr):
        """ROWS rows over `share` words: head, ban, noise, arg-max; logits never leave the chip."""
        row, at = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, 64)
        split, inside = tl.program_id(1), row < rows
        key, factor, loud = tl.load(keys + row, inside, 0), tl.load(scale), tl.load(noise)
        peak, top = tl.full((ROWS,), -float("inf"), tl.float32), tl.full((ROWS,), -1e30, tl.float32)
        token, total = tl.zeros((ROWS,), tl.int64), tl.zeros((ROWS,), tl.float32)
        for start in range(split * share, tl.minimum((split + 1) * share, vocabulary), 64):
            word, logit = start + at, tl.zeros((ROWS, 64), tl.float32)
            for chunk in range(0, width, 64):
                e = chunk + at
                h = tl.load(hidden + row[:, None].to(tl.int64) * width + e[None],
                            inside[:, None] & (e < width)[None], 0.0)
                w = tl.load(weight + word[None].to(tl.int64) * width + e[:, None],
                            (word < vocabulary)[None] & (e < width)[:, None], 0.0)
                logit = tl.dot(h, w, logit, input_precision=PRECISION)
            free = tl.load(banned + word, word < vocabulary, 1) == 0
            logit = tl.where(free[None], logit * factor, -1e30)
            higher = tl.maximum(top, tl.max(logit, 1))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(logit - higher[:, None]), 1)
            bits = mix_kernel(key[:, None] ^ mix_kernel(word)[None]) >> 9 & 0x7FFFFF
            logit -= loud * tl.log(-tl.log((bits.to(tl.float32) + 0.5) * 2 ** -23))
            token = tl.where(tl.max(logit, 1) > peak, start + tl.argmax(logit, 1), token)
            peak, top = tl.maximum(peak, tl.max(logit, 1)), higher
        out = split * rows + row
        tl.store(best + out, peak, inside)
        tl.store(found + out, token, inside)
        tl.store(sums + out, top + tl.log(total), inside)


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
    rotary_cache_kernel[(rows, H + K)](q, k, v, cos, sin, keys, values, slots, out, room,
                                       rows // len(keys), H, K, E, triton.next_power_of_2(E))
    return out


@on_cuda(rotary_cache_triton)
def rotary_cache(q, k, v, cos, sin, keys, values, slots):
    """Rotates q and k, and writes k and v of row r to its slot in the cache of its group, r // G.
    q (R, H, E); k, v (R, K, E); cos, sin (R, E); keys, values (R / G, S, K, E); slots (R,)."""
    group = torch.arange(len(q), device=q.device) // (len(q) // len(keys))
    q, k = rotary(torch.cat([q, k], 1), cos, sin).split([q.shape[1], k.shape[1]], 1)
    keys[group, slots], values[group, slots] = k, v
    return q


def decode_attention_triton(q, keys, values, bias, ends):
    (rows, H, E), (B, room, K, _), G, out = q.shape, keys.shape, bias.shape[1], torch.empty_like(q)
    splits, queries, wide = min(8, triton.cdiv(room, 256)), G * H // K, q.dtype == torch.float32
    size, width = (max(16, triton.next_power_of_2(n))
                   for n in (min(queries, 16 if wide else 32), E))
    parts, sums = (torch.empty(splits, rows * H, n, device=q.device) for n in (E, 1))
    decode_attention_kernel[(B * K, triton.cdiv(queries, size), splits)](
        q, keys, values, bias, ends, parts, sums, keys.stride(0) // keys.stride(1), E ** -0.5,
        triton.cdiv(room, 64 * splits) * 64, rows * H, G, K, H // K, E, size, width,
        min(64, 4096 // width), "ieee" if wide else "tf32", num_warps=8)    # bf16 is exact in tf32
    merge_kernel[(rows * H,)](parts, sums, out, rows * H, splits, E, 8, width)
    return out


@on_cuda(decode_attention_triton)
def decode_attention(q, keys, values, bias, ends):
    """A group's rollouts, one query each, against its cache. q (B * G, H, E); keys, values
    (B, S, K, E); bias (B, G, S): NEGATIVE where one may not look, and all from ends (B,) on."""
    G, K = bias.shape[1], keys.shape[2]             # a group's heads are rows of queries
    q = q.unflatten(0, (-1, G)).unflatten(2, (K, -1)).transpose(1, 2)       # (B, K, G, H / K, E)
    mask = bias.repeat_interleave(q.shape[3], 1)[:, None]
    out = F.scaled_dot_product_attention(q.flatten(2, 3), keys.transpose(1, 2),
                                         values.transpose(1, 2), mask)
    return out.view(q.shape).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def swiglu_triton(gate, up):
    gate, up, out = gate.contiguous(), up.contiguous(), torch.empty_like(gate)
    swiglu_kernel[(triton.cdiv(gate.numel(), 1024),)](gate, up, out, gate.numel())
    return out


@on_cuda(swiglu_triton)
def swiglu(gate, up):
    """silu(gate) * up, of one shape."""
    return F.silu(gate) * up


def gumbel(keys, vocabulary):
    """Standard Gumbel noise (R, V) that depends on (key, token id) alone. keys (R,) int32."""
    words = mix(torch.arange(vocabulary, dtype=torch.int32, device=keys.device))
    bits = mix(keys[:, None] ^ words) >> 9 & 0x7FFFFF
    return bits.float().add_(0.5).mul_(2 ** -23).log_().neg_().log_().neg_()   # of neither 0 nor 1


def sample_triton(hidden, weight, banned, scale, noise, keys):
    (rows, width), wide = hidden.shape, hidden.dtype == torch.float32
    size = max(16, triton.next_power_of_2(min(rows, 16 if wide else 64)))
    best, found, sums = torch.zeros(3, triton.cdiv(len(weight), 1024), rows, device=hidden.device)
    sample_kernel[(triton.cdiv(rows, size), len(best))](
        hidden, weight, banned, scale, noise, keys, best, found, sums, rows, width, len(weight),
        1024, size, "ieee" if wide else "tf32", num_warps=8)
    token = found.gather(0, best.argmax(0, keepdim=True))[0].long()     # in fp32 exact to 2^24
    logit = (hidden.float() * weight[token].float()).sum(1) * scale
    return token, logit - sums.logsumexp(0)


@on_cuda(sample_triton)
def sample(hidden, weight, banned, scale, noise, keys):
    """Draws from softmax(scale * h Wᵀ) without banned ids, by Gumbel arg-max in fp32. hidden
    (R, D); weight (V, D); scale 1/T, noise 1, or 1, 0 for greedy; keys (R,) int32 -> tokens,
    log-probs (R,)."""
    logits = (hidden @ weight.T).float().mul_(scale).masked_fill_(banned, NEGATIVE)
    tokens = gumbel(keys, len(weight)).mul_(noise).add_(logits).argmax(-1)
    return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


CHUNK, LEAST = 1 << 22, 256          # logits held at a time (16 MiB in fp32), but rows of at least


def chunk_logits(hidden, weight, banned, scale):
    """-> pairs (slice of the rows, their logits at least in fp32), CHUNK numbers at a time."""
    rows = max(LEAST, CHUNK // len(weight))
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        logits = widened(hidden[part] @ weight.T).mul_(scale)
        yield part, logits if banned is None else logits.masked_fill_(banned, NEGATIVE)


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
                factor = (grad[part] * ctx.scale)[:, None]
                slope = logits.softmax(-1).mul_(-factor)
                slope.scatter_add_(1, targets[part, None], factor)
                grad_hidden[part] = slope.to(weight.dtype) @ weight
                if grad_weight is not None:
                    grad_weight.addmm_(slope.T, hidden[part].to(slope.dtype))
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
        return length_mask(self.lengths, self.ids.shape[1])

    def rows(self):
        return [row[:length].tolist() for row, length in zip(self.ids, self.lengths)]


class Sampler:
    """Prompts in, rollouts out: fixed buffers and one `step` over them, which CUDA captures.

    A group lives in one place of the cache: its prompt, then token t of member g in slot
    start + t * G + g; `bias` says who may look where. So a prompt is held once, and all heads of a
    group are one matrix. Places whose group has ended take the next prompts (in-flight batching).

    banned (V,): never sampled. With another `dtype` it samples from copied weights, which `refresh`
    updates in place. rows: rollouts at once, at most what 4 GiB hold at 1,000 tokens each. A row's
    randomness depends on (seed of its prompt, member, token index) alone, not on its company."""
    def __init__(self, model, banned, stop, dtype=None, capture=True, rows=1024):
        self.source = self.model = model
        if dtype not in (None, next(model.parameters()).dtype):
            self.model = copy.deepcopy(model).requires_grad_(False)
            for weight in filter(torch.is_floating_point, self.model.parameters()):
                weight.data = weight.data.to(dtype)      # not the buffers: rope needs fp32
        head, c = self.model.lm_head.weight, model.config.text
        token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * head.element_size()
        self.rows, self.stop, self.device = min(rows, 2 ** 32 // (1000 * token)), stop, head.device
        self.capture, self.banned = capture and self.device.type == "cuda", banned.to(self.device)
        self.shape, self.graph = (0, 0, 0, 0), None      # places, group, new tokens, start

    @torch.no_grad()
    def refresh(self):
        """Takes over the weights of the model in training; no tensor moves, so no new capture."""
        for mine, theirs in zip(self.model.parameters(), self.source.parameters()):
            mine.copy_(theirs)

    def reserve(self, places, group, new_tokens, width):
        """Buffers for so many groups, kept where they fit. Nobody is in there yet."""
        start = max(width, self.shape[3] * self.banned.is_cuda)       # on a GPU, no new capture
        if places > self.shape[0] or (group, new_tokens, start) != self.shape[1:]:
            self.graph, self.cache, self.shape = None, None, (0, 0, 0, 0)  # freed, then made anew
            c, like, rows = self.model.config.text, self.model.lm_head.weight, places * group
            room = start + (new_tokens + 1) * group
            zeros = functools.partial(like.new_zeros, dtype=torch.long)
            self.cache = like.new_zeros(c.num_hidden_layers, 2, places, room, c.num_key_value_heads,
                                        c.head_dim)
            self.bias, self.heat = like.new_zeros(places, group, room), zeros((2,)).float()
            self.token, self.origin, self.clock, self.length = zeros((4, rows)).unbind()
            self.stream, self.done = zeros((rows,)).int(), zeros((rows,)).bool()
            self.ids = zeros((rows, new_tokens + 1))     # the last column: what follows the end
            self.logprobs, self.shape = self.ids.float(), (places, group, new_tokens, start)
        self.done.fill_(True)

    def admit(self, prompts, places, seeds):
        """Reads prompts; the rollouts of each start in its place, with its last token."""
        prompts, width, G = prompts.to(self.device), prompts.ids.shape[1], self.shape[1]
        last, member = prompts.lengths[:, None] - 1, torch.arange(G, device=self.device)
        self.cache[:, :, places, :width] = torch.stack([*map(torch.stack, self.model(prompts)[1])])
        self.bias[places] = NEGATIVE
        self.bias[places, :, :width] *= ~length_mask(last[:, 0], width)[:, None]
        seeds = mix(seeds.to(self.device).int())[:, None]
        for name, value in dict(
                token=prompts.ids.gather(1, last), clock=0, length=0, done=False, ids=0, logprobs=0,
                origin=prompts.positions[..., 0].gather(1, last),
                stream=mix(seeds ^ mix(member.int() + 0x5EED))).items():
            buffer = getattr(self, name)
            buffer.unflatten(0, (-1, G))[places] = torch.as_tensor(value).to(buffer)

    def step(self, window):
        """One token a row, within a window of slots. What follows a row's end is kept nowhere."""
        (_, G, N, start), row = self.shape, torch.arange(len(self.clock), device=self.device)
        slot = start + self.clock * G + row % G
        self.bias.scatter_(2, slot.view(-1, G, 1), 0.0)
        ends = slot[G - 1::G] + 1

        def attend(layer, q, k, v, rope):
            keys, values = self.cache[layer, :, :, :window]
            q = rotary_cache(q, k, v, *rope, keys, values, slot)
            return decode_attention(q, keys, values, self.bias[:, :, :window], ends)

        text = self.model.decoder
        hidden = text(text.embed_tokens(self.token), self.origin + self.clock, attend)
        token, logprob = sample(hidden, self.model.lm_head.weight, self.banned,
                                *self.heat.split(1), mix(self.stream ^ mix(self.clock.int())))
        for kept, new in ((self.ids, token), (self.logprobs, logprob)):
            kept.scatter_(1, self.clock[:, None], new.masked_fill(self.done, 0)[:, None])
        self.token.copy_(torch.where(self.done, self.token, token))
        self.length += ~self.done
        self.done |= (token == self.stop) | (self.clock >= N - 1)
        self.clock += self.clock < N

    def generate(self, prompts, group=1, new_tokens=48, temperature=1.0, seeds=None):
        """Batch of B prompts -> Rollouts of B * group rows. temperature 0 is greedy.
        seeds (B,): one per prompt; the same seed gives the same rollouts in any company."""
        (B, width), taken = prompts.ids.shape, 0
        seeds = torch.arange(B) if seeds is None else seeds
        owner = torch.full((min(B, max(1, self.rows // group)),), -1)    # the prompt in each place
        with torch.inference_mode():
            self.reserve(len(owner), group, new_tokens, width)
            self.heat.copy_(torch.tensor([1 / (temperature or 1), temperature > 0]))
            buffers = {name: getattr(self, name).unflatten(0, (-1, group))
                       for name in ("ids", "length", "logprobs", "token")}
            kept = {name: x.new_zeros(B, *x.shape[1:]) for name, x in buffers.items()}
            while True:
                idle = self.done.view(-1, group).all(1).cpu()[:len(owner)]       # waits for a GPU
                if idle.all() or taken < B and 4 * idle.sum() >= len(idle):
                    ended = (idle & (owner >= 0)).nonzero()[:, 0]
                    for name, whole in kept.items():
                        whole[owner[ended]] = buffers[name][ended]
                    free = idle.nonzero()[:B - taken, 0]
                    if not len(free):
                        break
                    for some in free.split(32):          # pictures of so many at once
                        owner[some] = torch.arange(taken, taken + len(some))
                        self.admit(prompts.part(taken, taken + len(some)), some, seeds[owner[some]])
                        taken += len(some)
                for _ in range(16 if self.banned.is_cuda else 1):
                    if self.graph:
                        self.graph.replay()
                        continue
                    steps = new_tokens if self.banned.is_cuda else int(self.clock.max())
                    window = self.shape[3] + (steps + 1) * group   # no further than slots in use
                    self.step(window)
                    if self.capture:                     # that step has compiled the kernels;
                        graph = torch.cuda.CUDAGraph()   # capturing computes nothing
                        with torch.cuda.graph(graph):
                            self.step(window)
                        self.graph = graph
        ids, length, logprobs, token = (whole.flatten(0, 1).clone() for whole in kept.values())
        return Rollouts(ids[:, :-1], length, logprobs[:, :-1], token == self.stop)


if __name__ == "__main__":
    from tests.speed import main     # it also drives transformers and TRL, which only tests need
    main()
