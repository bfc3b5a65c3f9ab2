"""Everything that has to be fast: token log-probs, and the sampler.

A step of the sampler is torch's operations alone, which a GPU captures as they are: none of them
waits for the device, and none has a shape that depends on data.

The last token of a prompt is the first token of each of its rollouts: a prompt is read once, and
every rollout starts with a `step` on that token; no first token is special.

Sizes are those of model.py; S slots are the length of a group's cache.
"""
import copy
import functools
import math
import os
from dataclasses import dataclass

import torch
import torch.distributed
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

NEGATIVE = -1e30                     # the logit of a banned token; finite, so that 0 * it is 0


def length_mask(lengths, width=None):
    """lengths (B,) -> (B, width) True in the first lengths[b] columns. width None: the longest."""
    return torch.arange(width or int(lengths.max()), device=lengths.device) < lengths[:, None]


# ------------------------------------------------------------- several processes, by torchrun
# All hold the same model and the same step. Each answers and scores its share of the questions, and
# leaves zeros in the others' rows: `summed`, the tensors are whole again, in every process.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
QUIET = RANK > 0 or None             # for tqdm, to which None is: where nobody looks


def summed(tensor):
    """Its sum over the processes, in place."""
    if WORLD > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def pieces(start, stop, size):
    """[(first, last + 1)] of the passes over start..stop, `size` at a time; 0: all at once."""
    size = size or max(1, stop - start)
    return [(first, min(first + size, stop)) for first in range(start, stop, size)]


def own_pieces(start, stop, size):
    """Those of `pieces` that are this process's."""
    return pieces(start, stop, size or math.ceil((stop - start) / WORLD))[RANK::WORLD]


# ------------------------------------------------------------------------- the parts of a step
def mix(x):
    """A 32-bit hash (lowbias32) of int32 numbers, the same on every device.
    The masks drop the copies of the sign that >> shifts in."""
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * (0x846CA68B - 2 ** 32)
    return x ^ (x >> 16 & 0xFFFF)


def rotary(x, cos, sin):
    """Rotary positions, half-split. x (M, H, E); cos, sin (M, E) -> (M, H, E)."""
    left, right = x.chunk(2, -1)
    turned = torch.cat([-right, left], -1)
    return (x * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)).type_as(x)


def rotate_and_store(q, k, v, cos, sin, keys, values, slots):
    """Rotates q and k, and writes k and v of row r to slots[r % G] in its group's cache, r // G.
    q (R, H, E); k, v (R, K, E); cos, sin (R, E); keys, values (B, S, K, E); slots (G,)."""
    q, k = rotary(torch.cat([q, k], 1), cos, sin).split([q.shape[1], k.shape[1]], 1)
    keys.index_copy_(1, slots, k.unflatten(0, (len(keys), -1)))
    values.index_copy_(1, slots, v.unflatten(0, (len(keys), -1)))
    return q


def decode_attention(q, keys, values, mask):
    """A group's rollouts, one query each, against the one cache of the group. q (R, H, E); keys,
    values (B, S, K, E); mask (B, 1, G * H / K, S): NEGATIVE where one may not look."""
    q = q.unflatten(0, (len(keys), -1)).unflatten(2, (keys.shape[2], -1))      # (B, G, K, H / K, E)
    q = q.transpose(1, 2)                            # a group's heads are rows of queries
    out = F.scaled_dot_product_attention(q.flatten(2, 3), keys.transpose(1, 2),
                                         values.transpose(1, 2), mask)
    return out.view(q.shape).transpose(1, 2).flatten(2, 3).flatten(0, 1)       # (R, H, E)


def gumbel(keys, vocabulary):
    """Standard Gumbel noise (R, V) that depends on (key, token id) alone. keys (R,) int32."""
    words = mix(torch.arange(vocabulary, dtype=torch.int32, device=keys.device))
    bits = mix(keys[:, None] ^ words) >> 9 & 0x7FFFFF                          # (R, V) of 23 bits
    uniform = bits.float().add_(0.5).mul_(2 ** -23)  # neither 0 nor 1: finite noise
    return uniform.log_().neg_().log_().neg_()


def sample(hidden, weight, banned, inverse_temperature, noisy, keys, generated, given):
    """Draws from softmax(h Wᵀ / T) without banned ids, by Gumbel arg-max in fp32. hidden (R, D);
    weight (V, D); inverse_temperature (1,); noisy (1,): 1, or 0 for greedy; the noise is that of
    keys (R,) int32 and of the number of tokens generated (1,); given (R,): the token itself, or -1
    -> tokens, log-probs (R,)."""
    logits = (hidden @ weight.T).float().mul_(inverse_temperature).masked_fill_(banned, NEGATIVE)
    noise = gumbel(mix(keys ^ mix(generated.int())), len(weight))              # (R, V)
    tokens = noise.mul_(noisy).add_(logits).argmax(-1).where(given < 0, given)             # (R,)
    return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


# ------------------------------------------------------------------------------------- log-probs
CHUNK = 1 << 22                      # logits held at a time: 16 MiB in fp32,
LEAST = 256                          # but rows of at least: products of fewer are slow


def chunk_logprobs(hidden, weight, targets, banned, scale):
    """`token_logprobs` with all logits at once. Under autocast the head is cast anew for each
    chunk, so that the chunks' gradients of it are summed in fp32."""
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    logits = hidden.to(dtype) @ weight.to(dtype).T                             # (rows, V)
    logits = logits.to(torch.promote_types(dtype, torch.float32)).mul_(scale)
    if banned is not None:
        logits = logits.masked_fill_(banned, NEGATIVE)
    logp = logits.log_softmax(-1)
    logprob = logp.gather(1, targets[:, None])[:, 0]
    logp = logp.detach()             # from here on nothing is made again backward
    return logprob, -(logp.exp() * logp).sum(-1)


def token_logprobs(hidden, weight, targets, banned=None, temperature=1.0):
    """The sampler's log-prob of each target, and the entropy there, which has no gradient.
    hidden (N, D); weight (V, D); targets (N,); banned (V,) -> (N,), (N,).
    A banned target, which the sampler never draws, gets about -1e30 and a meaningless gradient.

    Large logits (N, V) are not held: each chunk of rows makes its own, and again backward."""
    rows, score = max(LEAST, CHUNK // len(weight)), chunk_logprobs
    if len(hidden) > rows:
        score = functools.partial(checkpoint, score, use_reentrant=False, preserve_rng_state=False)
    chunks = [score(some, weight, wanted, banned, 1 / (temperature or 1))
              for some, wanted in zip(hidden.split(rows), targets.split(rows))]
    logprobs, entropies = zip(*chunks)
    return torch.cat(logprobs), torch.cat(entropies)


# ------------------------------------------------------------------------------------- sampler
CHECK_EVERY = 16         # steps of a GPU between looks at the end marks: each look waits for it
WINDOW = 64              # steps of a GPU that read equally many slots: for each, a graph
TOKENS_AT_ONCE = 2048    # of prompts read together; their pictures pass the ViT together, too
CACHE_BYTES = 2 ** 30    # of the rows at work


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
    that there is room for step together, by one token at a time; rows that have ended step on until
    the last one ends, and their tokens count nowhere.

    banned (V,): never sampled. With another `dtype` it samples from copied weights, which `refresh`
    updates in place. rows: rollouts at once, at most what CACHE_BYTES hold. A row's randomness
    depends on (seed of its prompt, member, token index) alone, not on its company."""
    def __init__(self, model, banned, stop, dtype=None, capture=True, rows=1024):
        self.source = self.model = model
        if dtype not in (None, next(model.parameters()).dtype):
            self.model = copy.deepcopy(model).requires_grad_(False)
            for weight in filter(torch.is_floating_point, self.model.parameters()):
                weight.data = weight.data.to(dtype)      # not the buffers: rope needs fp32
        head = model.lm_head.weight
        self.device, self.on_gpu = head.device, head.is_cuda
        self.banned, self.stop, self.rows = banned.to(self.device), stop, rows
        self.capture = capture                           # only a GPU can
        self.graphs, self.shape = {}, (0, 0, 0, 0)   # groups, group, new tokens, start of answers

    @torch.no_grad()
    def refresh(self):
        """Takes over the weights of the model in training; no tensor moves, so no new capture."""
        for mine, theirs in zip(self.model.parameters(), self.source.parameters()):
            mine.copy_(theirs)

    def generate(self, prompts, group=1, new_tokens=48, temperature=1.0, seeds=None, given=None):
        """Batch of B prompts -> Rollouts of B * group rows. temperature 0 is greedy.
        seeds (B,): one per prompt; the same seed gives the same rollouts in any company. Without
        seeds every call gives the same. given (B, group, new_tokens): the tokens that answers begin
        with, then -1."""
        B, T = prompts.ids.shape
        seeds = torch.arange(B) if seeds is None else seeds
        logprobs = torch.zeros(B, group, new_tokens, device=self.device)
        ids = torch.zeros_like(logprobs, dtype=torch.long)
        given = torch.full_like(ids, -1) if given is None else given.to(self.device)
        with torch.inference_mode():
            groups = self.reserve(math.ceil(B / WORLD), group, new_tokens, T)
            self.inverse_temperature.fill_(1 / (temperature or 1))
            self.noisy.fill_(temperature > 0)
            for start, stop in own_pieces(0, B, groups):         # answered at a time
                part = slice(start, stop)
                some = prompts.part(start, stop)
                ids[part], logprobs[part] = self.answer(some, seeds[part], given[part])
        ids, logprobs = (summed(x).flatten(0, 1) for x in (ids, logprobs))     # (R, N)
        stops = ids == self.stop
        ended = stops.cumsum(1) - stops.long() > 0   # after the first end mark: they went on
        return Rollouts(ids.masked_fill(ended, 0), (~ended).sum(1), logprobs.masked_fill(ended, 0),
                        stops.any(1))

    def reserve(self, prompts, G, N, width):
        """Buffers for as many of the groups as fit, kept where they do. -> how many"""
        c, head = self.model.config.text, self.model.lm_head.weight
        slot = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * head.element_size()
        aligned = 16 * math.ceil(width / 16)         # and never less, so no new capture
        start = max(aligned, self.shape[3]) if self.on_gpu else width
        fit = CACHE_BYTES // (slot * (start + N * G))
        groups = max(1, min(prompts, self.rows // G, fit))
        if groups > self.shape[0] or (G, N, start) != self.shape[1:]:
            self.graphs, self.cache = {}, None       # before there are new ones
            self.allocate(groups, G, N, start)
        return groups

    def allocate(self, groups, G, N, start):
        c, head = self.model.config.text, self.model.lm_head.weight
        S, K = start + N * G, c.num_key_value_heads
        zeros = functools.partial(torch.zeros, device=self.device)
        integers = functools.partial(zeros, dtype=torch.long)
        self.cache = head.new_zeros(c.num_hidden_layers, 2, groups, S, K, c.head_dim)
        self.mask = head.new_zeros(groups, G, c.num_attention_heads // K, S)
        self.inverse_temperature, self.noisy = zeros(2, 1)           # noisy: 1, or 0 for greedy
        self.generated = integers(1)                 # tokens so far
        self.first_slot = start + torch.arange(G, device=self.device)
        self.last_position = integers(groups, G)     # of the prompt's last token
        self.token = integers(groups, G)             # the input of the next step
        self.noise_key = zeros(groups, G).int()
        self.ids, self.logprobs = integers(N, groups, G), zeros(N, groups, G)
        self.given = torch.full_like(self.ids, -1)
        self.shape = (groups, G, N, start)

    def answer(self, prompts, seeds, given):
        """Reads at most as many prompts as there is room for, and steps until all have ended.
        given (B, G, N) -> ids, log-probs (B, G, N)"""
        (B, T), N = prompts.ids.shape, self.shape[2]
        for start, stop in pieces(0, B, max(1, TOKENS_AT_ONCE // T)):
            self.admit(prompts.part(start, stop), slice(start, stop), seeds[start:stop])
        self.given[:, :B] = given.movedim(2, 0)
        self.generated.zero_()
        check_every = CHECK_EVERY if self.on_gpu else 1
        for steps in range(1, N + 1):
            self.advance(steps)
            ended = steps % check_every == 0 and (self.ids[:steps, :B] == self.stop).any(0).all()
            if ended:                                # waits for a GPU
                break
        return self.ids[:, :B].movedim(0, 2), self.logprobs[:, :B].movedim(0, 2)

    def admit(self, prompts, groups, seeds):
        """Reads prompts; the rollouts of each start in its group, with its last token."""
        prompts, T = prompts.to(self.device), prompts.ids.shape[1]
        last = prompts.lengths[:, None] - 1                          # (B, 1)
        _, cache = self.model(prompts)
        for layer, (keys, values) in enumerate(cache):               # (B, T, K, E)
            self.cache[layer, 0, groups, :T] = keys
            self.cache[layer, 1, groups, :T] = values
        hidden = length_mask(last[:, 0], T).logical_not()[:, None, None]     # (B, 1, 1, T)
        self.mask[groups] = NEGATIVE
        self.mask[groups, :, :, :T] = hidden * NEGATIVE
        self.last_position[groups] = prompts.positions[..., 0].gather(1, last)
        member = torch.arange(self.shape[1], dtype=torch.int32, device=self.device)
        seeds = mix(seeds.to(self.device).int())[:, None]
        self.noise_key[groups] = mix(seeds ^ mix(member + 0x5EED))   # (B, G)
        self.token[groups] = prompts.ids.gather(1, last)

    def advance(self, steps):
        """Step number `steps`; on a GPU by a graph, which the first step of its window captures."""
        _, G, N, start = self.shape
        window = WINDOW if self.on_gpu else 1
        slots = start + min(N, math.ceil(steps / window) * window) * G       # in use
        if slots in self.graphs:
            return self.graphs[slots].replay()
        self.step(slots)                             # also sets up cuBLAS, for the capture
        if self.on_gpu and self.capture:
            graph = torch.cuda.CUDAGraph()
            # one pool for all graphs: they run one after the other, and leave nothing in it
            pool = next((other.pool() for other in self.graphs.values()), None)
            with torch.cuda.graph(graph, pool):
                self.step(slots)                     # captured, it computes nothing
            self.graphs[slots] = graph

    def step(self, slots):
        """One more token a row. The cache of a group of three, whose tokens are t0, t1, ...:

            slot:  0                start
                   [prompt ... |    | t0g0 t0g1 t0g2 | t1g0 t1g1 t1g2 | ... ]

        t0 is the prompt's last token, for every member g. Row g sees, by `mask`, the prompt without
        that token, and its own t0, t1, ... The first `slots` slots are in use.

        All rows have generated equally many tokens, since they go on until all have ended."""
        slot = self.first_slot + self.generated * self.shape[1]                # (G,)
        own = slot[:, None, None].expand(*self.mask.shape[:3], 1)
        mask = self.mask.scatter_(3, own, 0.0).flatten(1, 2)[:, None, :, :slots]

        def attend(layer, q, k, v, rope):
            keys, values = self.cache[layer, :, :, :slots]
            q = rotate_and_store(q, k, v, *rope, keys, values, slot)
            return decode_attention(q, keys, values, mask)

        decoder = self.model.decoder
        positions = (self.last_position + self.generated).flatten()            # (R,)
        hidden = decoder(decoder.embed_tokens(self.token.flatten()), positions, attend)
        given = self.given.index_select(0, self.generated).flatten()           # (R,)
        token, logprob = sample(hidden, self.model.lm_head.weight, self.banned,
                                self.inverse_temperature, self.noisy, self.noise_key.flatten(),
                                self.generated, given)
        self.token.copy_(token.view_as(self.token))
        self.ids.index_copy_(0, self.generated, self.token[None])
        self.logprobs.index_copy_(0, self.generated, logprob.view_as(self.token)[None])
        self.generated.add_(1)
