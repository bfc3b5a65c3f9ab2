"""Everything that has to be fast: Triton kernels, token log-probs, and the sampler.

Each kernel stands beside a torch reference of the same signature. The reference runs on the CPU
and under autograd, the kernel on CUDA without gradients; the tests hold one against the other.

The last token of a prompt is the first token of each of its rollouts: a prompt is read once, and
every rollout starts with a `step` on that token; no first token is special.

Sizes are those of model.py; S slots are the length of a group's cache.
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
    """lengths (B,) -> (B, width) True in the first lengths[b] columns. width None: the longest."""
    return torch.arange(width or int(lengths.max()), device=lengths.device) < lengths[:, None]


def on_cuda(launch):
    """Beside a torch reference: `launch` runs instead on CUDA when no gradient is needed."""
    def beside(reference):
        def choose(x, *rest):
            on_kernel = triton and x.is_cuda and not torch.is_grad_enabled()
            return (launch if on_kernel else reference)(x, *rest)

        choose.reference, choose.triton = reference, launch
        return functools.update_wrapper(choose, reference)
    return beside


def mix(x):
    """A 32-bit hash (lowbias32) of int32 numbers: the same in torch and Triton, on every device.
    The masks drop the copies of the sign that >> shifts in."""
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * (0x846CA68B - 2 ** 32)
    return x ^ (x >> 16 & 0xFFFF)


# ------------------------------------------------------------------------------------- kernels
if triton:
    mix_kernel = triton.jit(mix)
    MASKED = tl.constexpr(NEGATIVE)

    @triton.jit
    def load_fp32(pointer, inside):
        """Zero outside."""
        return tl.load(pointer, inside, 0.0).to(tl.float32)

    @triton.jit
    def rotated(x, cos, sin, E, BLOCK: tl.constexpr):
        """-> the head of width E at pointer x, turned by the angles at cos and sin."""
        e = tl.arange(0, BLOCK)
        inside, left = e < E, e < E // 2
        turned = load_fp32(x + tl.where(left, e + E // 2, e - E // 2), inside)
        turned = tl.where(left, -turned, turned) * load_fp32(sin + e, inside)
        return load_fp32(x + e, inside) * load_fp32(cos + e, inside) + turned

    @triton.jit
    def rotate_and_store_kernel(q, k, v, cos, sin, keys, values, slots, out, S, G, H, K, E,
                            BLOCK: tl.constexpr):
        """One head of one row a program: the first H heads are of q, the other K of k and v."""
        row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        e, angle = tl.arange(0, BLOCK), row * E
        if head < H:
            at = (row * H + head) * E
            tl.store(out + at + e, rotated(q + at, cos + angle, sin + angle, E, BLOCK), e < E)
        else:
            at = (row * K + head - H) * E
            k_turned = rotated(k + at, cos + angle, sin + angle, E, BLOCK)
            slot = row // G * S + tl.load(slots + row)               # among those of all groups
            stored = (slot * K + head - H) * E + e
            tl.store(keys + stored, k_turned, e < E)
            tl.store(values + stored, load_fp32(v + at + e, e < E), e < E)

    @triton.jit
    def sample_kernel(hidden, weight, banned, inverse_temperature, noisy, keys, best, found, sums,
                      R, D, V, share, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                      PRECISION: tl.constexpr):
        """A block of rows over `share` words: head, ban, noise, arg-max; logits never leave the
        chip. best, found, sums (splits, R): the winner's noisy logit, its id, the log-sum-exp."""
        row, split = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
        inside, key = row < R, tl.load(keys + row, row < R, 0)
        scale, loudness = tl.load(inverse_temperature), tl.load(noisy)
        # The winner so far; the running max and sum of a softmax without noise.
        token, peak = tl.zeros((ROWS,), tl.int64), tl.full((ROWS,), -float("inf"), tl.float32)
        top, total = tl.full((ROWS,), MASKED, tl.float32), tl.zeros((ROWS,), tl.float32)
        for start in range(split * share, tl.minimum((split + 1) * share, V), BLOCK):
            word = start + tl.arange(0, BLOCK)
            logit = tl.zeros((ROWS, BLOCK), tl.float32)
            for column in range(0, D, BLOCK):
                d = column + tl.arange(0, BLOCK)
                h = tl.load(hidden + row[:, None].to(tl.int64) * D + d[None],
                            inside[:, None] & (d[None] < D), 0.0)
                w = tl.load(weight + word[None].to(tl.int64) * D + d[:, None],
                            (word[None] < V) & (d[:, None] < D), 0.0)
                logit = tl.dot(h, w, logit, input_precision=PRECISION)
            free = tl.load(banned + word, word < V, 1) == 0
            logit = tl.where(free[None], logit * scale, MASKED)
            higher = tl.maximum(top, tl.max(logit, 1))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(logit - higher[:, None]), 1)
            top = higher
            bits = mix_kernel(key[:, None] ^ mix_kernel(word)[None]) >> 9 & 0x7FFFFF
            uniform = (bits.to(tl.float32) + 0.5) * 2 ** -23         # as in `gumbel`
            logit -= loudness * tl.log(-tl.log(uniform))
            highest = tl.max(logit, 1)
            token = tl.where(highest > peak, start + tl.argmax(logit, 1), token)
            peak = tl.maximum(peak, highest)
        at = split * R + row
        tl.store(best + at, peak, inside)
        tl.store(found + at, token, inside)
        tl.store(sums + at, top + tl.log(total), inside)


def rotary(x, cos, sin):
    """Rotary positions, half-split. x (M, H, E); cos, sin (M, E) -> (M, H, E)."""
    left, right = x.chunk(2, -1)
    turned = torch.cat([-right, left], -1)
    return (x * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)).type_as(x)


def rotate_and_store_triton(q, k, v, cos, sin, keys, values, slots):
    q, k, v, cos, sin = (x.contiguous() for x in (q, k, v, cos, sin))
    (R, H, E), K, out = q.shape, k.shape[1], torch.empty_like(q)
    rotate_and_store_kernel[(R, H + K)](
        q, k, v, cos, sin, keys, values, slots, out,
        S=keys.stride(0) // keys.stride(1),          # keys may be the first slots of a longer cache
        G=R // len(keys), H=H, K=K, E=E, BLOCK=triton.next_power_of_2(E))
    return out


@on_cuda(rotate_and_store_triton)
def rotate_and_store(q, k, v, cos, sin, keys, values, slots):
    """Rotates q and k, and writes k and v of row r to its slot in the cache of its group, r // G.
    q (R, H, E); k, v (R, K, E); cos, sin (R, E); keys, values (R / G, S, K, E); slots (R,)."""
    G = len(q) // len(keys)
    group = torch.arange(len(q), device=q.device) // G                         # (R,)
    q, k = rotary(torch.cat([q, k], 1), cos, sin).split([q.shape[1], k.shape[1]], 1)
    keys[group, slots], values[group, slots] = k, v
    return q


def decode_attention(q, keys, values, bias):
    """A group's rollouts, one query each, against the one cache of the group. q (B * G, H, E);
    keys, values (B, S, K, E); bias (B, G, S): NEGATIVE where one may not look."""
    G, K = bias.shape[1], keys.shape[2]             # a group's heads are rows of queries
    q = q.unflatten(0, (-1, G)).unflatten(2, (K, -1)).transpose(1, 2)          # (B, K, G, H / K, E)
    mask = bias.repeat_interleave(q.shape[3], 1)[:, None]              # (B, 1, G * H / K, S)
    out = F.scaled_dot_product_attention(q.flatten(2, 3), keys.transpose(1, 2),
                                         values.transpose(1, 2), mask)
    return out.view(q.shape).transpose(1, 2).flatten(2, 3).flatten(0, 1)       # (B * G, H, E)


def gumbel(keys, vocabulary):
    """Standard Gumbel noise (R, V) that depends on (key, token id) alone. keys (R,) int32."""
    words = mix(torch.arange(vocabulary, dtype=torch.int32, device=keys.device))
    bits = mix(keys[:, None] ^ words) >> 9 & 0x7FFFFF                          # (R, V) of 23 bits
    uniform = bits.float().add_(0.5).mul_(2 ** -23)  # neither 0 nor 1: finite noise
    return uniform.log_().neg_().log_().neg_()


def sample_triton(hidden, weight, banned, inverse_temperature, noisy, keys):
    (R, D), V, fp32 = hidden.shape, len(weight), hidden.dtype == torch.float32
    # tl.dot takes 16 rows or more; the tiles of more rows would not stay in registers.
    block = max(16, min(16 if fp32 else 64, triton.next_power_of_2(R)))
    share, splits = 1024, triton.cdiv(V, 1024)       # words a program: few rows still fill a GPU
    best, sums = torch.empty(2, splits, R, device=hidden.device)
    found = torch.zeros(splits, R, dtype=torch.long, device=hidden.device)
    sample_kernel[(triton.cdiv(R, block), splits)](
        hidden, weight, banned, inverse_temperature, noisy, keys, best, found, sums, R=R, D=D, V=V,
        share=share, ROWS=block, BLOCK=64, PRECISION="ieee" if fp32 else "tf32", num_warps=8)
    token = found.gather(0, best.argmax(0, keepdim=True))[0]                   # (R,)
    logit = (hidden.float() * weight[token].float()).sum(1) * inverse_temperature
    return token, (logit - sums.logsumexp(0)).clamp(max=0)   # two sums, rounded differently


@on_cuda(sample_triton)
def sample(hidden, weight, banned, inverse_temperature, noisy, keys):
    """Draws from softmax(h Wᵀ / T) without banned ids, by Gumbel arg-max in fp32. hidden (R, D);
    weight (V, D); inverse_temperature (1,); noisy (1,): 1, or 0 for greedy; keys (R,) int32
    -> tokens, log-probs (R,)."""
    logits = (hidden @ weight.T).float().mul_(inverse_temperature).masked_fill_(banned, NEGATIVE)
    tokens = gumbel(keys, len(weight)).mul_(noisy).add_(logits).argmax(-1)     # (R,)
    return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


# ------------------------------------------------------------------------------------- log-probs
CHUNK = 1 << 22                      # logits held at a time: 16 MiB in fp32,
LEAST = 256                          # but rows of at least: products of fewer are slow


def chunk_logits(hidden, weight, banned, scale):
    """-> pairs (slice of the rows, their logits at least in fp32), CHUNK numbers at a time."""
    rows = max(LEAST, CHUNK // len(weight))
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        logits = widened(hidden[part] @ weight.T).mul_(scale)                  # (rows, V)
        yield part, logits if banned is None else logits.masked_fill_(banned, NEGATIVE)


class TokenLogprobs(torch.autograd.Function):
    """log softmax(scale * h Wᵀ)[target] without ever holding (N, V): chunks, made again backward
    from the same casts of h and W. The head's gradient is summed over the chunks in fp32."""
    @staticmethod
    def forward(ctx, hidden, weight, targets, banned, scale):
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        logprob, entropy = (widened(hidden.new_empty(len(hidden))) for _ in range(2))    # (N,)
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
                slope = logits.softmax(-1).mul_(-factor)                       # (rows, V)
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
CHECK_EVERY = 16         # steps of a GPU between looks at `done`: each look waits for it
PROMPTS_AT_ONCE = 32     # prompts read together: more pictures, more activations of the ViT
CACHE_BYTES = 2 ** 32    # of the rows at work, at 1,000 tokens each


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
        """Ids without padding, as lists."""
        return [row[:length] for row, length in zip(self.ids.tolist(), self.lengths.tolist())]


class Sampler:
    """Prompts in, rollouts out: fixed buffers and one `step` over them, which CUDA captures.

    A group is the rollouts of one prompt, which is read and held once for all of them. All groups
    that there is room for step together, by one token at a time; rows that have ended («dead»)
    step on until the last one ends, and their tokens count nowhere.

    banned (V,): never sampled. With another `dtype` it samples from copied weights, which `refresh`
    updates in place. rows: rollouts at once, at most what 4 GiB hold at 1,000 tokens each. A row's
    randomness depends on (seed of its prompt, member, token index) alone, not on its company."""
    def __init__(self, model, banned, stop, dtype=None, capture=True, rows=1024):
        self.source = self.model = model
        if dtype not in (None, next(model.parameters()).dtype):
            self.model = copy.deepcopy(model).requires_grad_(False)
            for weight in filter(torch.is_floating_point, self.model.parameters()):
                weight.data = weight.data.to(dtype)      # not the buffers: rope needs fp32
        c, head = model.config.text, self.model.lm_head.weight
        self.device, self.on_gpu = head.device, head.is_cuda
        self.banned, self.stop = banned.to(self.device), stop
        self.capture = capture                           # only a GPU can
        token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * head.element_size()
        self.rows = min(rows, CACHE_BYTES // (1000 * token))
        self.graph, self.shape = None, (0, 0, 0, 0)  # groups, group, new tokens, start of answers

    @torch.no_grad()
    def refresh(self):
        """Takes over the weights of the model in training; no tensor moves, so no new capture."""
        for mine, theirs in zip(self.model.parameters(), self.source.parameters()):
            mine.copy_(theirs)

    def generate(self, prompts, group=1, new_tokens=48, temperature=1.0, seeds=None):
        """Batch of B prompts -> Rollouts of B * group rows. temperature 0 is greedy.
        seeds (B,): one per prompt; the same seed gives the same rollouts in any company. Without
        seeds every call gives the same."""
        B, T = prompts.ids.shape
        seeds = torch.arange(B) if seeds is None else seeds
        groups = min(B, max(1, self.rows // group))  # answered at a time
        logprobs = torch.zeros(B, group, new_tokens, device=self.device)
        ids = torch.zeros_like(logprobs, dtype=torch.long)
        with torch.inference_mode():
            self.reserve(groups, group, new_tokens, T)
            self.inverse_temperature.fill_(1 / (temperature or 1))
            self.noisy.fill_(temperature > 0)
            for start in range(0, B, groups):
                part = slice(start, min(start + groups, B))
                ids[part], logprobs[part] = self.answer(prompts.part(start, part.stop), seeds[part])
        ids, logprobs = ids.flatten(0, 1), logprobs.flatten(0, 1)              # (R, N)
        stops = ids == self.stop
        ended = stops.cumsum(1) - stops.long() > 0   # after the first end mark: dead rows went on
        return Rollouts(ids.masked_fill(ended, 0), (~ended).sum(1), logprobs.masked_fill(ended, 0),
                        stops.any(1))

    def answer(self, prompts, seeds):
        """Reads at most as many prompts as there is room for, and steps until all have ended."""
        B = len(prompts.ids)
        for start in range(0, B, PROMPTS_AT_ONCE):
            stop = min(start + PROMPTS_AT_ONCE, B)
            groups = torch.arange(start, stop, device=self.device)
            self.admit(prompts.part(start, stop), groups, seeds[start:stop])
        while not self.done.all():                   # waits for a GPU
            self.advance()
        return self.ids[:B, :, :-1], self.logprobs[:B, :, :-1]

    def reserve(self, groups, group, new_tokens, width):
        """Buffers for so many groups, kept where they fit. Nobody is in there yet."""
        start = max(width, self.shape[3]) if self.on_gpu else width      # so, no new capture
        if groups > self.shape[0] or (group, new_tokens, start) != self.shape[1:]:
            self.graph = self.cache = None           # before there are new ones
            self.allocate(groups, group, new_tokens, start)
        self.done.fill_(True)

    def allocate(self, groups, G, N, start):
        c, head = self.model.config.text, self.model.lm_head.weight
        zeros = functools.partial(torch.zeros, device=self.device)
        integers = functools.partial(zeros, dtype=torch.long)
        S = start + (N + 1) * G                      # G to spare: for dead rows after N tokens
        self.cache = head.new_zeros(c.num_hidden_layers, 2, groups, S, c.num_key_value_heads,
                                    c.head_dim)
        self.bias = head.new_zeros(groups, G, S)     # NEGATIVE where a row may not look
        self.inverse_temperature, self.noisy = zeros(2, 1)           # noisy: 1, or 0 for greedy
        self.last_position = integers(groups, 1)     # of the prompt's last token
        self.generated = integers(groups, 1)         # tokens so far; dead rows count on
        self.token = integers(groups, G)             # the input of the next step
        self.noise_key, self.done = zeros(groups, G).int(), zeros(groups, G).bool()
        self.ids = integers(groups, G, N + 1)        # one to spare, as above
        self.logprobs = zeros(groups, G, N + 1)
        self.shape = (groups, G, N, start)

    def admit(self, prompts, groups, seeds):
        """Reads prompts; the rollouts of each start in its group, with its last token."""
        prompts, T = prompts.to(self.device), prompts.ids.shape[1]
        last = prompts.lengths[:, None] - 1                          # (B, 1)
        _, cache = self.model(prompts)
        for layer, (keys, values) in enumerate(cache):               # (B, T, K, E)
            self.cache[layer, 0, groups, :T] = keys
            self.cache[layer, 1, groups, :T] = values
        visible = torch.where(length_mask(last[:, 0], T), 0.0, NEGATIVE)   # (B, T)
        self.bias[groups] = NEGATIVE
        self.bias[groups, :, :T] = visible[:, None].to(self.bias.dtype)
        self.last_position[groups] = prompts.positions[..., 0].gather(1, last)
        self.generated[groups] = 0
        member = torch.arange(self.done.shape[1], dtype=torch.int32, device=self.device)
        seeds = mix(seeds.to(self.device).int())[:, None]
        self.noise_key[groups] = mix(seeds ^ mix(member + 0x5EED))   # (B, G)
        self.token[groups] = prompts.ids.gather(1, last)
        self.done[groups] = False

    def advance(self):
        """One step; on a GPU some steps, by a graph, which the first of them captures."""
        _, G, N, start = self.shape
        for _ in range(CHECK_EVERY if self.on_gpu else 1):
            if self.graph:
                self.graph.replay()
                continue
            steps = N if self.on_gpu else int(self.generated.max())
            self.step(start + (steps + 1) * G)       # also compiles the kernels, for the capture
            if self.on_gpu and self.capture:
                self.capture_step()

    def capture_step(self):
        """Later steps replay it; capturing itself computes nothing."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(self.bias.shape[2])
        self.graph = graph

    def step(self, slots):
        """One more token a row. The cache of a group of three, whose tokens are t0, t1, ...:

            slot:  0                start
                   [prompt ... |    | t0g0 t0g1 t0g2 | t1g0 t1g1 t1g2 | ... ]

        t0 is the prompt's last token, for every member g. Row g sees, by `bias`, the prompt without
        that token, and its own t0, t1, ... The first `slots` slots are in use.

        All rows of a group have generated equally many tokens: dead ones go on until all have
        ended, so one number says how far a group is, and its slots in use end in one place."""
        _, G, N, start = self.shape
        slot = start + self.generated * G + torch.arange(G, device=self.device)    # (groups, G)
        self.bias.scatter_(2, slot[..., None], 0.0)

        def attend(layer, q, k, v, rope):
            keys, values = self.cache[layer, :, :, :slots]
            q = rotate_and_store(q, k, v, *rope, keys, values, slot.flatten())
            return decode_attention(q, keys, values, self.bias[:, :, :slots])

        decoder = self.model.decoder
        positions = (self.last_position + self.generated).expand_as(slot)
        hidden = decoder(decoder.embed_tokens(self.token.flatten()), positions.flatten(), attend)
        noise_keys = mix(self.noise_key ^ mix(self.generated.int()))
        token, logprob = sample(hidden, self.model.lm_head.weight, self.banned,
                                self.inverse_temperature, self.noisy, noise_keys.flatten())
        self.token.copy_(token.view_as(slot))
        column = self.generated.expand_as(slot)[..., None]                         # (groups, G, 1)
        self.ids.scatter_(2, column, self.token[..., None])
        self.logprobs.scatter_(2, column, logprob.view_as(column))
        self.done |= (self.token == self.stop) | (self.generated >= N - 1)
        self.generated.add_(1).clamp_(max=N)
