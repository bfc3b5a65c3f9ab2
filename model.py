"""The vision-language model: Idefics3 / SmolVLM, Qwen2-VL and Qwen2.5-VL, with public names.

    picture -> ViT -> neighbours folded into one -> linear -> in place of the image tokens
    tokens  -> embedding -> L x { attention, SwiGLU } -> RMSNorm -> head

`save` writes a Hugging Face checkpoint, `load` reads one. Attention is handed in, as `attend`: so
prompts, forked rollouts and the sampler's static cache are one decoder with its ways to attend.

    B prompts, T tokens, P patches, D width, H heads, K kv-heads, E head width, V vocabulary,
    G group, L layers, R = B * G rollouts, N new tokens, M tokens that count (no padding)
"""
import contextlib
import functools
import json
import os
import pathlib
import re
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from tokenizers import AddedToken, Tokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint

import data
from kernels import RANK, length_mask, rotary, token_logprobs

# Fresh layers are the identity, tokens as large as pieces of picture: what attends knows itself.
SPREAD = dict(embed_tokens=0.6, lm_head=0.02, position_embedding=0.5, o_proj=0.0, down_proj=0.0,
              out_proj=0.0, fc2=0.0)
SIZES = {           # name: (ViT layers, ViT width, decoder layers, decoder width)
    "xs": (2, 32, 3, 32), "s": (2, 64, 3, 64), "m": (3, 128, 4, 128), "l": (4, 256, 6, 256)}


class CheckpointError(ValueError):
    """A directory that does not hold the model it should; the message lists what differs."""


def preset_config(size, processor):
    """config.json of a tabletop model: an Idefics3 for one 64x64 tile, 16 image tokens."""
    vit_layers, vit_width, layers, width = SIZES[size]
    vision = dict(hidden_size=vit_width, intermediate_size=4 * vit_width, image_size=64,
                  num_hidden_layers=vit_layers, num_attention_heads=vit_width // 16, patch_size=8)
    text = dict(model_type="llama", vocab_size=processor.tokenizer.get_vocab_size(), head_dim=16,
                hidden_size=width, intermediate_size=width * 5 // 2, num_hidden_layers=layers,
                num_attention_heads=width // 16, num_key_value_heads=width // 16,
                rms_norm_eps=1e-5, pad_token_id=processor.pad)
    return dict(model_type="idefics3", architectures=["Idefics3ForConditionalGeneration"],
                scale_factor=2, image_token_id=processor.image, tie_word_embeddings=False,
                dtype="float32", vision_config=vision, text_config=text)


SIGLIP = dict(intermediate_size=3072, num_hidden_layers=12, layer_norm_eps=1e-6, hidden_size=1152,
    num_attention_heads=16, image_size=224, patch_size=32, hidden_act="gelu_pytorch_tanh")
LLAMA = dict(num_hidden_layers=32, num_attention_heads=32, rms_norm_eps=1e-6, rope_theta=1e4,
             attention_bias=False)
QWEN2 = dict(rms_norm_eps=1e-5, rope_theta=1e6, attention_bias=True, mrope_section=(16, 24, 24))
QWEN_VIT = dict(depth=32, num_heads=16, patch_size=14, rope_theta=1e4)
DEFAULTS = {        # model_type: what hub files leave out of vision_config and of text_config
    "idefics3": (SIGLIP, LLAMA), "smolvlm": (SIGLIP, LLAMA),
    "qwen2_vl": (QWEN_VIT | dict(embed_dim=1280, mlp_ratio=4, window_size=None,
                                 hidden_act="quick_gelu"), QWEN2),
    "qwen2_5_vl": (QWEN_VIT | dict(hidden_size=3584, intermediate_size=3420, window_size=112,
        fullatt_block_indexes=(7, 15, 23, 31), hidden_act="silu"), QWEN2)}
# Keys that change the arithmetic but no shape: what alone is computed here.
FIXED = dict(hidden_act="silu", rope_type="default", partial_rotary_factor=1,
             mrope_interleaved=False, use_sliding_window=False, quantization_config=None)


def read_config(raw):
    """config.json, flat or nested -> sizes. Raises CheckpointError for another model_type."""
    kind = raw.get("model_type")
    if kind not in DEFAULTS:
        raise CheckpointError(f"model_type {kind!r}, not {', '.join(DEFAULTS)}")
    vision, text = DEFAULTS[kind]
    given = raw.get("text_config", raw)              # Qwen's on the hub are flat
    rope = dict(given.get("rope_scaling") or given.get("rope_parameters") or {})
    rope.setdefault("rope_type", rope.get("type", "default").replace("mrope", "default"))
    text = text | raw | given | rope
    text.setdefault("num_key_value_heads", text["num_attention_heads"])
    text["head_dim"] = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    vision = vision | raw["vision_config"] | (raw["vision_config"].get("rope_parameters") or {})
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise CheckpointError(f"dtype {dtype!r}, not float32, bfloat16 or float16")
    expected = [(text, FIXED), (vision, dict(hidden_act=DEFAULTS[kind][0]["hidden_act"]))]
    for part, key, only in [(part, *item) for part, fixed in expected for item in fixed.items()]:
        if part.get(key, only) != only:
            raise CheckpointError(f"{key} is {part[key]!r:.80}; only {only!r} is computed here")
    tied = raw.get("tie_word_embeddings") or given.get("tie_word_embeddings", False)
    return SimpleNamespace(vision=SimpleNamespace(**vision), text=SimpleNamespace(**text),
                           tied=tied, qwen="qwen" in kind, image_token=raw["image_token_id"],
                           shuffle=raw.get("scale_factor", 2), dtype=getattr(torch, dtype))


# ------------------------------------------------------------------------------------- vision
def attention(q, k, v, mask=None, causal=False):
    """q (B, T, H, E); k, v (B, S, K, E); mask (B, 1, T or 1, S) -> (B, T, H, E)"""
    per_head = q.shape[2] // k.shape[2]                     # GPUs have no fused masked GQA
    k, v = (x.repeat_interleave(per_head, 2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))        # (B, H, T, E) and twice (B, H, S, E)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, D, wide, activation):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, wide), nn.Linear(wide, D)
        self.activation = activation

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class SwiGLU(nn.Module):
    def __init__(self, D, wide, bias=False):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, wide, bias), nn.Linear(D, wide, bias)
        self.down_proj = nn.Linear(wide, D, bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class VisionLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, self.heads = c.hidden_size, c.num_attention_heads
        self.layer_norm1 = nn.LayerNorm(D, c.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(D, c.layer_norm_eps)
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(D, D) for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.mlp = MLP(D, c.intermediate_size, functools.partial(F.gelu, approximate="tanh"))

    def forward(self, x):
        attn, h = self.self_attn, self.layer_norm1(x)                          # (B, P, D)
        q, k, v = (proj(h).unflatten(-1, (self.heads, -1))                     # (B, P, H, E)
                   for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
        x = x + attn.out_proj(attention(q, k, v).flatten(2))
        return x + self.mlp(self.layer_norm2(x))


class Vision(nn.Module):
    """SigLIP: patches and a position table in, one vector a patch out."""
    def __init__(self, c):
        super().__init__()
        D, P = c.hidden_size, (c.image_size // c.patch_size) ** 2
        self.embeddings = nn.ModuleDict(dict(
            patch_embedding=nn.Conv2d(3, D, c.patch_size, c.patch_size),
            position_embedding=nn.Embedding(P, D)))
        layers = nn.ModuleList(VisionLayer(c) for _ in range(c.num_hidden_layers))
        self.encoder = nn.ModuleDict(dict(layers=layers))
        self.post_layernorm = nn.LayerNorm(D, c.layer_norm_eps)

    def forward(self, pixels):                                                 # (B, 3, S, S)
        pixels = pixels.type_as(self.post_layernorm.weight)
        x = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, P, D)
        x = x + self.embeddings.position_embedding.weight
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


class Connector(nn.Module):
    """Pixel shuffle: r x r neighbouring patches become one image token, by one linear layer."""
    def __init__(self, shuffle, vision_width, D):
        super().__init__()
        self.shuffle = shuffle
        self.modality_projection = nn.ModuleDict(dict(
            proj=nn.Linear(vision_width * shuffle ** 2, D, bias=False)))

    def forward(self, x):
        """x (B, P, vision width) -> (B * P / r², D)"""
        r, side = self.shuffle, int(x.shape[1] ** 0.5) // self.shuffle
        blocks = x.unflatten(1, (side, r, side, r)).transpose(2, 3)    # (B, side, side, r, r, .)
        return self.modality_projection.proj(blocks.reshape(len(x) * side ** 2, -1))


class Rope(nn.Module):
    """Rotary angles. Frequency i turns with axis[i]: of 1 in text, 3 in M-RoPE, 2 in pictures."""
    def __init__(self, theta, width, axis, repeat=1):
        super().__init__()
        turns = torch.arange(0, width, 2, device="cpu") / width
        self.register_buffer("frequency", (1 / theta ** turns).repeat(repeat), persistent=False)
        self.register_buffer("axis", torch.tensor(axis, device="cpu"), persistent=False)

    def forward(self, positions):
        """positions (M, axes), or (M,) where all are alike -> cos, sin (M, E), in fp32."""
        positions = positions[:, None].expand(-1, 3) if positions.ndim == 1 else positions
        angles = positions[:, self.axis] * self.frequency
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()


class Ragged:
    """Where the M tokens that count stand in a padded (B, T) grid, half of which is padding. Linear
    layers see the tokens alone; only attention sees the grid."""
    def __init__(self, mask):
        self.mask = mask                                                       # (B, T)
        self.places = mask.flatten().nonzero()[:, 0]                           # (M,)

    def pack(self, x):
        """(B, T, ...) -> (M, ...)"""
        return x.flatten(0, 1).index_select(0, self.places)

    def pad(self, x):
        """(M, ...) -> (B, T, ...), zero where nothing stands"""
        grid = x.new_zeros(self.mask.numel(), *x.shape[1:])
        return grid.index_copy(0, self.places, x).unflatten(0, self.mask.shape)


class QwenLayer(nn.Module):
    def __init__(self, c, D, norm):
        super().__init__()
        self.heads, self.norm1, self.norm2 = c.num_heads, norm(D, eps=1e-6), norm(D, eps=1e-6)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(D, 3 * D), proj=nn.Linear(D, D)))
        self.mlp = (SwiGLU(D, c.intermediate_size, bias=True) if c.window_size else    # 2.5
                    MLP(D, D * c.mlp_ratio, lambda x: x * torch.sigmoid(1.702 * x)))

    def forward(self, x, rope, segments):
        """x (P, D); rope: cos, sin (P, E); segments: Ragged, one row for patches that may meet."""
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        q, k, v = (segments.pad(x) for x in (rotary(q, *rope), rotary(k, *rope), v))
        mixed = attention(q, k, v, segments.mask[:, None, None])               # (B, T, H, E)
        x = x + self.attn.proj(segments.pack(mixed).flatten(1))
        return x + self.mlp(self.norm2(x))


def window_order(grids, side):
    """Sorts the image tokens of all pictures into windows of side x side. grids (N, 2) ->
    order (P / 4,); row and column of each patch in that order (P, 2); patches in each window."""
    block = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])   # the four patches of an image token
    order, places, windows, tokens_before = [], [], [], 0
    for rows, columns in grids.tolist():
        token = torch.arange(rows * columns)
        row, column = token // columns, token % columns
        window = row // side * columns + column // side
        by_window = window.argsort(stable=True)
        order.append(tokens_before + by_window)
        corner = 2 * torch.stack([row, column], 1)[by_window]                  # (P / 4, 2)
        places.append((corner[:, None] + block).flatten(0, 1))                 # (P, 2)
        windows.append(4 * window.unique(return_counts=True)[1])
        tokens_before += rows * columns
    return torch.cat(order), torch.cat(places), torch.cat(windows)


class QwenVision(nn.Module):
    """Qwen2-VL's ViT; in Qwen2.5-VL's most layers see windows of 112x112 pixels alone."""
    def __init__(self, c, out):
        super().__init__()
        windows, patch = c.window_size, c.patch_size         # Qwen2-VL has no windows
        D, norm = (c.hidden_size, nn.RMSNorm) if windows else (c.embed_dim, nn.LayerNorm)
        self.side = windows // (2 * patch) if windows else 1 << 30
        self.full = c.fullatt_block_indexes if windows else range(c.depth)
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv3d(3, D, (2, patch, patch), bias=False)))
        self.blocks = nn.ModuleList(QwenLayer(c, D, norm) for _ in range(c.depth))
        self.merger = nn.ModuleDict(dict(ln_q=norm(D, eps=1e-6), mlp=nn.Sequential(
            nn.Linear(4 * D, 4 * D), nn.GELU(), nn.Linear(4 * D, out))))
        half = D // c.num_heads // 2                         # of a head turns with the row
        self.rope = Rope(c.rope_theta, half, [0] * (half // 2) + [1] * (half // 2), repeat=2)

    def forward(self, pixels, grids):
        """pixels (P, 3 * 2 * 14 * 14), blocks of 2x2 patches; grids (N, 2) -> (P / 4, out)"""
        weight = self.patch_embed.proj.weight
        order, places, windows = (x.to(weight.device) for x in window_order(grids, self.side))
        x = F.linear(pixels.type_as(weight), weight.flatten(1)).type_as(weight)    # (P, D)
        x, rope = x.unflatten(0, (-1, 4))[order].flatten(0, 1), self.rope(places)
        windows, pictures = Ragged(length_mask(windows)), Ragged(length_mask(4 * grids.prod(1)))
        for index, layer in enumerate(self.blocks):
            x = layer(x, rope, pictures if index in self.full else windows)
        x = self.merger.mlp(self.merger.ln_q(x).unflatten(0, (-1, 4)).flatten(1))
        return x[order.argsort()]


# ------------------------------------------------------------------------------------- decoder
class Layer(nn.Module):
    def __init__(self, c, index):
        super().__init__()
        D, bias = c.hidden_size, c.attention_bias
        wide, narrow = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.index, self.head_width = index, c.head_dim
        self.self_attn = nn.ModuleDict(dict(
            q_proj=nn.Linear(D, wide, bias), k_proj=nn.Linear(D, narrow, bias),
            v_proj=nn.Linear(D, narrow, bias), o_proj=nn.Linear(wide, D, bias=False)))
        self.mlp = SwiGLU(D, c.intermediate_size)
        self.input_layernorm = nn.RMSNorm(D, c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(D, c.rms_norm_eps)

    def forward(self, x, rope, attend):
        """x (M, D), the residual stream."""
        attn, h = self.self_attn, self.input_layernorm(x)
        q, k, v = (proj(h).unflatten(-1, (-1, self.head_width))                # (M, H or K, E)
                   for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
        x = x + attn.o_proj(attend(self.index, q, k, v, rope).flatten(1))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, index) for index in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        sections = getattr(c, "mrope_section", [c.head_dim // 2])
        axis = [axis for axis, count in enumerate(sections) for _ in range(count)]
        self.rope = Rope(c.rope_theta, c.head_dim, axis)

    def forward(self, x, positions, attend):
        """x (M, D) embedded -> (M, D). attend(layer, q, k, v, rope) -> (M, H, E)."""
        rope = self.rope(positions)
        for layer in self.layers:
            x = layer(x, rope, attend)
        return self.norm(x)


class VLM(nn.Module):
    """A vision-language model. `raw` is its config.json."""
    def __init__(self, raw):
        super().__init__()
        self.raw, self.config = raw, read_config(raw)
        c = self.config
        D, self.vocabulary = c.text.hidden_size, c.text.vocab_size
        if c.qwen:
            parts = dict(visual=QwenVision(c.vision, D), language_model=Decoder(c.text))
        else:
            parts = dict(vision_model=Vision(c.vision), text_model=Decoder(c.text),
                         connector=Connector(c.shuffle, c.vision.hidden_size, D))
        self.model = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(D, self.vocabulary, bias=False)
        self.tie()

    @property
    def decoder(self):
        return self.model.language_model if self.config.qwen else self.model.text_model

    def tie(self):
        if self.config.tied:
            self.lm_head.weight = self.decoder.embed_tokens.weight

    def features(self, pixels, grids):
        """The image tokens of all pictures in reading order. -> (tokens, D)"""
        if self.config.qwen:
            return self.model.visual(pixels, grids)
        return self.model.connector(self.model.vision_model(pixels))

    def embed(self, ids, batch):
        """Tokens, with each image token replaced by its piece of picture. (M,) -> (M, D)"""
        x = self.decoder.embed_tokens(ids)
        if len(batch.pixels):
            features = self.features(batch.pixels, batch.grids)
            places = ids == self.config.image_token                            # (M,)
            x = x.masked_scatter(places[:, None], features.type_as(x))
        return x

    def decode(self, x, positions, ragged, mask=None, past=None):
        """The decoder over embedded tokens x (M, D): causal, or by a mask (B, 1, T, S) after
        `past(layer)` -> hidden states (M, D), and without `past` the cache: L pairs of keys and
        values (B, T, K, E). With it `attend`, which lives until backward ends, keeps nothing."""
        cache = [None] * len(self.decoder.layers)

        def attend(layer, q, k, v, rope):
            q, k, v = (ragged.pad(x) for x in (rotary(q, *rope), rotary(k, *rope), v))
            cache[layer] = None if past else (k, v)                            # (B, T, K, E)
            if past:
                past_k, past_v = past(layer)
                k, v = torch.cat([past_k, k], 1), torch.cat([past_v, v], 1)    # (B, S, K, E)
            return ragged.pack(attention(q, k, v, mask, causal=mask is None))

        return self.decoder(x, positions, attend), cache

    def forward(self, batch):
        """Reads B prompts -> hidden states (B, T, D), and the cache that rollouts fork from."""
        ragged = Ragged(length_mask(batch.lengths, batch.ids.shape[1]))
        x = self.embed(ragged.pack(batch.ids), batch)                          # (M, D)
        hidden, cache = self.decode(x, ragged.pack(batch.positions), ragged)
        return ragged.pad(hidden), cache

    def score(self, prompts, ids, mask, group=1, banned=None, temperature=1.0):
        """Log-prob and entropy of every response token: the one scorer of SFT, GRPO and tests.
        prompts: Batch of B; ids (R, N) responses, padded on the right; mask (R, N) True on their
        tokens, the first of each row; banned (V,) and temperature: those of the sampler
        -> two tensors (R, N), zero where the mask is False.

        The textbook form is `score_plain` of tests/conftest.py. Here a prompt is read once for its
        whole group: its keys and values are forked to the rollouts (with gradient). The hidden
        state of the prompt's last token predicts the first response token, so that token is run
        again as the first input of each rollout, and is masked out of the forked cache."""
        (R, N), device = ids.shape, ids.device
        prompt = torch.arange(len(prompts.ids), device=device)                 # (B,)
        last = prompts.lengths - 1                                             # (B,)

        def per_rollout(x):                                            # (B, ...) -> (R, ...)
            return x.repeat_interleave(group, 0)

        first = per_rollout(prompts.ids[prompt, last])[:, None]                # (R, 1)
        start = per_rollout(prompts.positions[prompt, last, 0])[:, None]       # (R, 1), of 3 equal
        inputs = torch.cat([first, ids[:, :-1]], 1)                            # (R, N)
        positions = start + torch.arange(N, device=device)                     # (R, N)
        in_prompt = per_rollout(length_mask(last, prompts.ids.shape[1]))       # (R, T)
        causal = torch.ones(N, N, dtype=torch.bool, device=device).tril()
        visible = torch.cat([in_prompt[:, None].expand(R, N, -1),
                             causal.expand(R, N, N)], -1)[:, None]             # (R, 1, N, T + N)
        _, cache = self(prompts)

        def forked(layer):           # as a function: one layer's copies at a time
            keys, values = cache[layer]
            return per_rollout(keys), per_rollout(values)                      # (R, T, K, E)

        ragged = Ragged(mask)
        x = self.decoder.embed_tokens(ragged.pack(inputs))
        hidden, _ = self.decode(x, ragged.pack(positions), ragged, visible, forked)      # (M, D)
        logprob, entropy = token_logprobs(hidden, self.lm_head.weight, ids[mask], banned,
                                          temperature)                         # (M,)
        return ragged.pad(logprob), ragged.pad(entropy)


# ------------------------------------------------------------------- to fit a consumer's GPU
def recompute_activations(model):
    """Each layer keeps its inputs alone and runs once more backward (Chen et al. 2016)."""
    for layer in model.modules():
        if isinstance(layer, (Layer, VisionLayer, QwenLayer)):
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False,
                                              preserve_rng_state=False)


class LoRA(nn.Module):
    """A linear layer W and what it learns: W x + alpha / rank B A x, with W frozen and B zero at
    first (Hu et al. 2021, section 4.1)."""
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias      # by their names in a checkpoint
        device = linear.weight.device
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False, device=device)
        nn.init.zeros_(self.lora_B.weight)
        self.scale, self.enabled = alpha / rank, True

    def forward(self, x):
        out = F.linear(x, self.weight, self.bias)
        if self.enabled:
            low = F.linear(x, self.lora_A.weight.type_as(x))                   # (..., rank)
            out = out + self.scale * F.linear(low, self.lora_B.weight.type_as(x))
        return out

    def merged(self):
        """W + alpha / rank B A, the one matrix that does the same."""
        return self.weight + self.scale * (self.lora_B.weight @ self.lora_A.weight).float()


@contextlib.contextmanager
def without_adapters(model):
    """Inside, the model is the one that its adapters adapt."""
    adapted = [layer for layer in model.modules() if isinstance(layer, LoRA)]
    for layer in adapted:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer in adapted:
            layer.enabled = True


def add_lora(model, rank, alpha, targets):
    """Freezes a model and adapts the decoder's linear layers whose names are among `targets`."""
    names = [name.strip() for name in targets.split(",")]
    model.requires_grad_(False)
    for name, layer in list(model.decoder.named_modules()):
        if name.split(".")[-1] in names and isinstance(layer, nn.Linear):
            model.decoder.set_submodule(name, LoRA(layer, rank, alpha))
    if not any(p.requires_grad for p in model.parameters()):
        raise CheckpointError(f"--lora-targets {targets}: no such layer as q_proj, up_proj, ...")


# ------------------------------------------------------------------------------- load and save
def read_json(path):
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("expected an object")
    return found


def write_file(path, content):
    """A text, or {name: tensor}; whenever it is killed, a reader sees the old file or the new.
    Of several processes the first writes."""
    if RANK > 0:
        return
    new = pathlib.Path(f"{path}.new")
    new.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, str):
        tensors = {name: tensor.detach().contiguous() for name, tensor in content.items()}
        content = save(tensors, {"format": "pt"})
    new.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(new, path)


# What people and other programs read beside weights and tokenizer; only picture sizes and ends are
# changed.
SIDE_FILES = ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json",
              "special_tokens_map.json", "generation_config.json", "chat_template.json",
              "chat_template.jinja", "video_preprocessor_config.json", "added_tokens.json",
              "vocab.json", "merges.txt", "README.md", "LICENSE")


def tabletop_files(processor):
    """{name: text} of the side files of a model made from scratch."""
    image = dict(image_processor_type="Idefics3ImageProcessor", image_mean=processor.MEAN,
                 image_std=processor.STD, max_image_size={"longest_edge": processor.tile})
    whole = dict(processor_class="Idefics3Processor", image_seq_len=processor.image_tokens)
    words = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=data.START,
                 eos_token=data.STOP, pad_token=data.PAD)
    return {"preprocessor_config.json": json.dumps(image),
            "processor_config.json": json.dumps(whole), "tokenizer_config.json": json.dumps(words),
            "chat_template.jinja": data.CHAT_TEMPLATE}


def hub_name(name):
    """What the hub calls a tensor: the parts of Qwen's models had other names there."""
    return re.sub(r"^model\.language_model", "model", re.sub(r"^model\.visual", "visual", name))


def hub_state(model):
    """The tensors as others know them: names of the hub, adapters merged, no head that is tied."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
    for name, layer in model.named_modules():
        if isinstance(layer, LoRA):
            tensors[f"{name}.weight"] = layer.merged().cpu()
    if model.config.tied:
        del tensors["lm_head.weight"]
    return {hub_name(name): tensor for name, tensor in tensors.items()}


def side_files(model, processor):
    """{name: text} beside the weights: side files as they came, but for what this run changed."""
    files, size = dict(processor.files), processor.preprocessing()
    dtype = str(model.config.dtype).removeprefix("torch.")
    files["config.json"] = json.dumps(model.raw | dict(dtype=dtype, torch_dtype=dtype), indent=1)
    files["prompt.json"] = json.dumps(processor.style, indent=1)
    files["tokenizer.json"] = processor.tokenizer.to_str(pretty=True)

    def change(name, **fields):
        files[name] = json.dumps(json.loads(files.get(name, "{}")) | fields)

    change("preprocessor_config.json", **size)
    nested = json.loads(files.get("processor_config.json", "{}")).get("image_processor")
    if nested:                       # where transformers 5 keeps it
        change("processor_config.json", image_processor=nested | size)
    banned = processor.banned(model.vocabulary).nonzero()[:, 0].tolist()
    change("generation_config.json", eos_token_id=processor.stop, pad_token_id=processor.pad,
           suppress_tokens=banned)
    return files


def save_checkpoint(model, processor, directory):
    """Writes what transformers, vLLM and TRL open, adapters merged."""
    directory = pathlib.Path(directory)
    for name, text in side_files(model, processor).items():
        write_file(directory / name, text)
    write_file(directory / "model.safetensors", {
        name: tensor.to("cpu", model.config.dtype) for name, tensor in hub_state(model).items()})
    stale = ("model-*-of-*.safetensors", "model.safetensors.index.json", "pytorch_model*")
    for old in [path for pattern in stale for path in directory.glob(pattern)]:
        old.unlink(missing_ok=True)  # or other programs would read them


def read_file(read, path, default=None):
    """read(path), or an error that names the file. default: where that may be missing."""
    if default is not None and not path.exists():
        return default
    if not path.is_file():           # nor a pipe, which would be waited for
        raise CheckpointError(f"{path} is missing; expected the directory of a checkpoint or run")
    try:
        return read(path)
    except (KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: a key is missing: {error}") from None
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def read_side_file(path):
    """-> its text; of JSON, which is changed when it is saved, only an object."""
    return json.dumps(read_json(path)) if path.suffix == ".json" else path.read_text("utf-8")


def read_tokenizer(path):
    """tokenizer.json, with the tokens that stand in files beside it alone, as transformers does."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()        # files of other trainings keep these
    tokenizer.no_padding()
    config = read_file(read_json, path.with_name("tokenizer_config.json"), {})
    added = read_file(read_json, path.with_name("added_tokens.json"), {})
    tokens = {i: dict(content=w) for w, i in added.items() if tokenizer.token_to_id(w) != i}
    tokens |= {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}
    for place, token in sorted(tokens.items()):
        tokenizer.add_tokens([AddedToken(**token)])
        if tokenizer.token_to_id(token["content"]) != place:
            raise ValueError(f"{token['content']} is not token {place}, as files beside it say")
    return tokenizer


def read_index(path):
    """The names of the shards; of what lies elsewhere, too, so that it is missing."""
    return sorted({pathlib.Path(name).name for name in read_json(path)["weight_map"].values()})


def load_weights(model, directory, dtype):
    """Reads the weights, of one file or of shards, into a model that has none yet. Strict: every
    tensor, no other tensor, every shape; or an error that lists what differs."""
    shards, index = ["model.safetensors"], directory / "model.safetensors.index.json"
    if not (directory / shards[0]).exists():         # it goes before shards, as in transformers
        shards = read_file(read_index, index, shards)
    ours, tensors = {hub_name(name): name for name in model.state_dict()}, {}
    for shard in shards:
        for name, tensor in read_file(load_file, directory / shard).items():
            if not (tensor.is_floating_point() and tensor.itemsize > 1 and tensor.isfinite().all()):
                raise CheckpointError(f"{directory / shard}: {name} holds no finite numbers")
            tensors[ours.get(hub_name(name), name)] = tensor.to(dtype)
    heads = [tensors[name] for name in tensors if re.search("lm_head|embed_tokens", name)]
    model.config.tied = model.config.tied and (len(heads) < 2 or torch.equal(*heads))
    if model.config.tied:            # else a head of its own counts, as in transformers
        tensors["lm_head.weight"] = model.lm_head.weight
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{directory}: the weights do not fit config.json: {error}") from None
    model.tie()


def load_processor(model, directory, prompt, may_differ):
    """The tokenizer, and how the model is asked and shown pictures."""
    tokenizer = read_file(read_tokenizer, directory / "tokenizer.json")
    files = {name: read_file(read_side_file, directory / name) for name in SIDE_FILES
             if (directory / name).exists()}
    path = directory / "prompt.json"
    stored = read_file(read_json, path, {})
    style = stored | (prompt or {})
    if stored and style != stored and not may_differ:
        raise CheckpointError(f"{path}: trained with {stored}, got {prompt}: leave these out")
    vision = model.config.vision
    if model.config.qwen:
        processor = data.QwenProcessor(tokenizer, 2 * vision.patch_size, 1, style, files)
    else:
        side = vision.image_size // vision.patch_size // model.config.shuffle
        processor = data.Processor(tokenizer, vision.image_size, side ** 2, style, files)
    if processor.stop is None or processor.image != model.config.image_token:
        raise CheckpointError(f"{directory}: tokenizer: {processor.IMAGE} is {processor.image}"
                              f", {processor.STOP} is {processor.stop}; config.json disagrees")
    return processor


def load_checkpoint(directory, device="cpu", dtype=torch.float32, prompt=None, may_differ=True):
    """-> (VLM, Processor) of a run directory or a downloaded SmolVLM, Qwen2-VL or Qwen2.5-VL.
    prompt: some of data.PROMPT; may_differ: may contradict prompt.json."""
    directory = pathlib.Path(directory)
    with torch.device("meta"):
        model = read_file(lambda path: VLM(read_json(path)), directory / "config.json")
    processor = load_processor(model, directory, prompt, may_differ)
    load_weights(model, directory, dtype)
    return model.to(device), processor


def fresh(size, examples, seed, prompt=None):
    """A random model of a tabletop size, with a tokenizer trained on the text of the examples."""
    torch.manual_seed(seed)
    processor = data.Processor(data.train_tokenizer(examples), 64, 16, prompt)
    processor.files = tabletop_files(processor)
    model = VLM(preset_config(size, processor))
    for name, layer in model.named_modules():
        kind = name.split(".")[-1]
        if kind in SPREAD:
            nn.init.normal_(layer.weight, std=SPREAD[kind])
    table = model.model.vision_model.embeddings.position_embedding.weight.data.view(8, 8, -1)
    table.copy_(table[:, :1] + table[:1])    # (8, 8, D): a patch's place is its row and its column
    return model, processor
