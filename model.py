"""The vision-language model: Idefics3 / SmolVLM with its public weight names.

    picture -> SigLIP ViT -> pixel shuffle -> one linear map -> in place of the image tokens
    tokens  -> embedding  -> L x { attention, SwiGLU }  -> RMSNorm -> head

A run directory is a Hugging Face checkpoint: `save` writes what transformers opens, `load` reads
what transformers, or the hub, wrote. Attention is handed in as a function, `attend`, so training,
prefill, forked rollouts and the sampler's static cache are one decoder with four ways to attend.

    B prompts, T tokens, P patches, D width, H heads, K kv-heads, E head width, V vocabulary,
    G group, L layers, R = B * G rollouts, N new tokens, M tokens that count (no padding)
"""
import json
import os
import pathlib
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn

import data
from kernels import rms_norm, rotary, token_logprobs

LAST_OF_A_LAYER = ("o_proj", "down_proj", "out_proj", "fc2")
SIZES = {           # name: (ViT layers, ViT width, decoder layers, decoder width)
    "s": (2, 64, 3, 64), "m": (3, 128, 4, 128), "l": (4, 256, 6, 256)}


class CheckpointError(ValueError):
    """A directory that does not hold the model it should; the message lists what differs."""


def preset_config(size, processor):
    """config.json of a tabletop model: an Idefics3 for one 64x64 tile, 16 image tokens."""
    v_layers, v_width, layers, width = SIZES[size]
    ends = dict(bos_token_id=processor.tokenizer.token_to_id(data.START),
                eos_token_id=processor.stop, pad_token_id=processor.pad, tie_word_embeddings=False)
    return dict(
        model_type="idefics3", architectures=["Idefics3ForConditionalGeneration"], scale_factor=2,
        image_token_id=processor.image, dtype="float32", **ends, vision_config=dict(
            model_type="idefics3_vision", hidden_size=v_width, intermediate_size=4 * v_width,
            num_hidden_layers=v_layers, num_attention_heads=v_width // 32, image_size=64,
            patch_size=8, layer_norm_eps=1e-6),
        text_config=dict(
            model_type="llama", vocab_size=processor.tokenizer.get_vocab_size(), hidden_size=width,
            intermediate_size=width * 5 // 2, num_hidden_layers=layers, head_dim=32,
            num_attention_heads=width // 32, num_key_value_heads=width // 64, rms_norm_eps=1e-5,
            rope_theta=1e4, max_position_embeddings=2048, **ends))


def read_config(raw):
    """config.json -> sizes, with the defaults that hub files leave out."""
    vision = dict(intermediate_size=3072, num_hidden_layers=12, layer_norm_eps=1e-6,
                  hidden_size=1152, num_attention_heads=16, image_size=224, patch_size=32)
    text = dict(num_hidden_layers=32, num_attention_heads=32, rms_norm_eps=1e-6, rope_theta=1e4,
                vocab_size=32000, hidden_size=4096, intermediate_size=11008)
    if raw.get("model_type") not in ("idefics3", "smolvlm"):
        raise CheckpointError(f"model_type {raw.get('model_type')!r}; expected idefics3 or smolvlm")
    vision |= raw["vision_config"]
    text |= (raw["text_config"].get("rope_parameters") or {}) | raw["text_config"]
    text.setdefault("num_key_value_heads", text["num_attention_heads"])
    text["head_dim"] = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    return SimpleNamespace(vision=SimpleNamespace(**vision), text=SimpleNamespace(**text),
                           scale=raw.get("scale_factor", 2), image=raw["image_token_id"])


# -------------------------------------------------------------------------------------- vision

class VisionLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, self.heads = c.hidden_size, c.num_attention_heads
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(D, c.layer_norm_eps) for _ in range(2))
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(D, D) for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(D, c.intermediate_size),
                                      fc2=nn.Linear(c.intermediate_size, D)))

    def forward(self, x):
        attn, h = self.self_attn, self.layer_norm1(x)                          # (B, P, D)
        q, k, v = (proj(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)     # (B, H, P, E)
                   for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + attn.out_proj(mixed.transpose(1, 2).flatten(2))
        h = F.gelu(self.mlp.fc1(self.layer_norm2(x)), approximate="tanh")
        return x + self.mlp.fc2(h)


class Vision(nn.Module):
    """SigLIP: patches and a position table in, one vector a patch out."""

    def __init__(self, c):
        super().__init__()
        D, self.patches = c.hidden_size, (c.image_size // c.patch_size) ** 2
        self.embeddings = nn.ModuleDict(dict(
            patch_embedding=nn.Conv2d(3, D, c.patch_size, c.patch_size),
            position_embedding=nn.Embedding(self.patches, D)))
        self.encoder = nn.ModuleDict(dict(
            layers=nn.ModuleList(VisionLayer(c) for _ in range(c.num_hidden_layers))))
        self.post_layernorm = nn.LayerNorm(D, c.layer_norm_eps)

    def forward(self, pixels):                                                 # (B, 3, S, S)
        pixels = pixels.type_as(self.post_layernorm.weight)
        x = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, P, D)
        x = x + self.embeddings.position_embedding.weight
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


def pixel_shuffle(x, scale):
    """Folds scale x scale neighbours into one. (B, P, D) -> (B, P / scale², D · scale²)."""
    side, width = int(x.shape[1] ** 0.5), x.shape[2]
    x = x.view(len(x), side // scale, scale, side // scale, scale, width)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(len(x), -1, width * scale * scale)


# ------------------------------------------------------------------------------------- decoder

class RMSNorm(nn.RMSNorm):
    def forward(self, x, delta=None):
        """-> (x + delta, its norm)."""
        return rms_norm(x, delta, self.weight, self.eps)


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, self.head_width, bias = c.hidden_size, c.head_dim, getattr(c, "attention_bias", False)
        wide, narrow = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.self_attn = nn.ModuleDict(dict(
            q_proj=nn.Linear(D, wide, bias), k_proj=nn.Linear(D, narrow, bias),
            v_proj=nn.Linear(D, narrow, bias), o_proj=nn.Linear(wide, D, False)))
        self.mlp = nn.ModuleDict(dict(
            gate_proj=nn.Linear(D, c.intermediate_size, False),
            up_proj=nn.Linear(D, c.intermediate_size, False),
            down_proj=nn.Linear(c.intermediate_size, D, False)))
        self.input_layernorm = RMSNorm(D, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(D, c.rms_norm_eps)

    def forward(self, x, delta, attend):
        """x (M, D), the residual stream; delta, what the layer before adds to it."""
        attn, mlp = self.self_attn, self.mlp
        x, h = self.input_layernorm(x, delta)
        q, k, v = (proj(h).unflatten(-1, (-1, self.head_width))                # (M, H, E)
                   for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
        x, h = self.post_attention_layernorm(x, attn.o_proj(attend(q, k, v).flatten(1)))
        return x, mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        frequency = c.rope_theta ** -(torch.arange(0, c.head_dim, 2).float() / c.head_dim)
        self.register_buffer("frequency", frequency, persistent=False)

    def rope(self, positions):
        """positions (M,) -> cos, sin (M, E), in fp32."""
        angles = positions[..., None].float() * self.frequency.float()
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()

    def forward(self, x, positions, attend):
        """x (M, D) embedded -> (M, D). attend(layer, q, k, v, rope) -> (M, H, E)."""
        rope, delta = self.rope(positions), None
        for index, layer in enumerate(self.layers):
            x, delta = layer(x, delta, lambda q, k, v: attend(index, q, k, v, rope))
        return self.norm(x, delta)[1]


class Ragged:
    """Where the M tokens that count stand in a padded (B, T) grid, half of which is padding.

    Linear layers see the M tokens alone; only attention sees the grid.
    """

    def __init__(self, mask):
        self.shape, self.places = mask.shape, mask.flatten().nonzero()[:, 0]

    def pack(self, x):
        """(B, T, ...) -> (M, ...)"""
        return x.flatten(0, 1).index_select(0, self.places)

    def pad(self, x):
        """(M, ...) -> (B, T, ...), zero where nothing stands"""
        grid = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:])
        return grid.index_copy(0, self.places, x).unflatten(0, self.shape)


def attention(q, k, v, mask=None):
    """q (B, T, H, E); k, v (B, S, K, E); causal, or by a mask (B, 1, T, S). -> (B, T, H, E)"""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2)


class VLM(nn.Module):
    """A vision-language model. `raw` is its config.json."""

    def __init__(self, raw):
        super().__init__()
        self.raw, c = raw, read_config(raw)
        self.config, self.vocabulary, self.layers = c, c.text.vocab_size, c.text.num_hidden_layers
        self.k_heads, self.head_width = c.text.num_key_value_heads, c.text.head_dim
        self.model = nn.ModuleDict(dict(
            vision_model=Vision(c.vision), text_model=Decoder(c.text),
            connector=nn.ModuleDict(dict(modality_projection=nn.ModuleDict(dict(proj=nn.Linear(
                c.vision.hidden_size * c.scale ** 2, c.text.hidden_size, False)))))))
        self.lm_head = nn.Linear(c.text.hidden_size, self.vocabulary, False)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """Layers start as the identity and tokens as large as pieces of picture, so that the
        residual stream still knows its token when attention by content is to be learnt."""
        nn.init.normal_(self.model.text_model.embed_tokens.weight, std=0.6)
        for table in (self.lm_head, self.model.vision_model.embeddings.position_embedding):
            nn.init.normal_(table.weight, std=0.02)
        for name, weight in self.named_parameters():
            if name.endswith(".weight") and name.split(".")[-2] in LAST_OF_A_LAYER:
                weight.zero_()

    def embed(self, ids, pixels):
        """Tokens, with each image token replaced by its piece of picture. (M,) -> (M, D)"""
        x, places = self.model.text_model.embed_tokens(ids), ids == self.config.image
        if len(pixels):
            folded = pixel_shuffle(self.model.vision_model(pixels), self.config.scale)
            features = self.model.connector.modality_projection.proj(folded).flatten(0, 1)
            if int(places.sum()) != len(features):
                raise ValueError(f"{int(places.sum())} image tokens in the ids, but "
                                 f"{len(features)} features from {len(pixels)} tiles")
            x = x.masked_scatter(places[:, None], features.type_as(x))
        return x

    def read(self, batch):
        """Every prompt in full, causal -> hidden states (M, D), Ragged, and the cache: L pairs of
        keys and values (B, T, K, E), rotated."""
        step, cache = torch.arange(batch.ids.shape[1], device=batch.ids.device), []
        ragged = Ragged(step < batch.lengths[:, None])

        def attend(layer, q, k, v, rope):
            q, k, v = (ragged.pad(x) for x in (rotary(q, *rope), rotary(k, *rope), v))
            cache.append((k, v))
            return ragged.pack(attention(q, k, v))

        x = self.embed(ragged.pack(batch.ids), batch.pixels)
        positions = ragged.pack(step.expand_as(batch.ids))
        return self.model.text_model(x, positions, attend), ragged, cache

    def prefill(self, batch):
        """Reads B prompts once -> the cache that rollouts fork from, with gradient if enabled."""
        return self.read(batch)[2]

    def forward(self, batch):
        """The plain way: whole rows -> hidden states (B, T, D)."""
        hidden, ragged, _ = self.read(batch)
        return ragged.pad(hidden)

    def fork(self, prompts, cache, ids, mask, group):
        """Continues each prompt with its group of rollouts, which attend to it and to themselves.

        ids (R, N), the first column the prompts' last token; mask (R, N) -> hidden states (M, D)
        of the tokens under the mask.
        """
        start = (prompts.lengths - 1).repeat_interleave(group)[:, None]         # (R, 1)
        width, N, ragged = prompts.ids.shape[1], ids.shape[1], Ragged(mask)
        step = torch.arange(N, device=ids.device)
        seen = torch.arange(width, device=ids.device) < start                  # (R, T)
        seen = torch.cat([seen[:, None].expand(-1, N, -1),
                          (step <= step[:, None]).expand(len(ids), -1, -1)], -1)[:, None]

        def attend(layer, q, k, v, rope):
            q, k, v = (ragged.pad(x) for x in (rotary(q, *rope), rotary(k, *rope), v))
            old_k, old_v = (x.repeat_interleave(group, 0) for x in cache[layer])
            k, v = torch.cat([old_k, k], 1), torch.cat([old_v, v], 1)          # (R, T + N, K, E)
            return ragged.pack(attention(q, k, v, seen))

        text = self.model.text_model
        return text(text.embed_tokens(ragged.pack(ids)), ragged.pack(start + step), attend)

    def decode(self, tokens, positions, attend):
        """One token a row against the sampler's cache. (R,), (R,) -> (R, D)"""
        return self.model.text_model(self.model.text_model.embed_tokens(tokens), positions, attend)

    def logits(self, hidden):
        return self.lm_head(hidden)

    def score(self, prompts, ids, mask, group=1, banned=None, temperature=1.0):
        """Log-prob and entropy of every response token: the one scorer of SFT, GRPO and tests.

        prompts: Batch of B; ids (R, N) responses; mask (R, N) True where a token counts
        -> two tensors (R, N), zero where the mask is False. Prompts are read once per group.
        """
        last = prompts.ids.gather(1, (prompts.lengths - 1)[:, None]).repeat_interleave(group, 0)
        inputs = torch.cat([last, ids[:, :-1]], 1)
        hidden = self.fork(prompts, self.prefill(prompts), inputs, mask, group)  # (M, D)
        logprob, entropy = token_logprobs(hidden, self.lm_head.weight, ids[mask], banned,
                                          temperature)
        place = torch.zeros(ids.shape, dtype=logprob.dtype, device=ids.device)
        return place.masked_scatter(mask, logprob), place.masked_scatter(mask, entropy)


# ------------------------------------------------------------------------------- load and save

def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write_text(path, text):
    """Atomic: a reader sees the old file or the new one, whenever the writer is killed."""
    temporary = pathlib.Path(f"{path}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_tensors(path, tensors, metadata=None):
    temporary = f"{path}.new"
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, temporary, metadata or {"format": "pt"})
    os.replace(temporary, path)


def save(model, processor, directory):
    """Writes a Hugging Face checkpoint that transformers, vLLM and TRL open as it is."""
    directory, name = pathlib.Path(directory), dict(processor_class="Idefics3Processor")
    directory.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": model.raw,
        "preprocessor_config.json": dict(
            image_processor_type="Idefics3ImageProcessor", do_convert_rgb=True, do_resize=True,
            size={"longest_edge": processor.longest_edge}, resample=1, do_rescale=True,
            rescale_factor=1 / 255, do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3,
            do_pad=True, do_image_splitting=processor.longest_edge > processor.tile,
            max_image_size={"longest_edge": processor.tile}),
        "processor_config.json": name | dict(image_seq_len=processor.image_tokens),
        "tokenizer_config.json": name | dict(
            tokenizer_class="PreTrainedTokenizerFast", bos_token=data.START, eos_token=data.STOP,
            pad_token=processor.tokenizer.id_to_token(processor.pad),
            clean_up_tokenization_spaces=False),
        "generation_config.json": dict(
            eos_token_id=processor.stop, pad_token_id=processor.pad,
            suppress_tokens=processor.banned(model.vocabulary).nonzero().flatten().tolist())}
    for file, content in files.items():
        write_text(directory / file, json.dumps(content, indent=1))
    write_text(directory / "tokenizer.json", processor.tokenizer.to_str(pretty=True))
    write_text(directory / "chat_template.jinja", data.CHAT_TEMPLATE)
    write_tensors(directory / "model.safetensors", model.state_dict())


def check_tensors(expected, got, where):
    """Strict: every tensor, no other tensor, every shape; or an error that lists what differs."""
    problems = [f"missing {name}" for name in expected if name not in got]
    problems += [f"unexpected {name}" for name in got if name not in expected]
    problems += [f"{name}: expected {list(expected[name].shape)}, got {list(got[name].shape)}"
                 for name in expected if name in got and expected[name].shape != got[name].shape]
    if problems:
        more = f"\n  and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise CheckpointError(f"{where}: {len(problems)} tensors do not fit config.json:\n  "
                              + "\n  ".join(problems[:12]) + more)


def read_file(read, path):
    """read(path), or an error that names the file."""
    if not path.exists():
        raise CheckpointError(f"{path} is missing; expected a run directory, or a downloaded "
                              "checkpoint, with config.json, model.safetensors, tokenizer.json")
    try:
        return read(path)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def load(directory, device="cpu"):
    """-> (VLM, Processor) of a run directory or a downloaded SmolVLM. Strict: see check_tensors."""
    directory, tensors = pathlib.Path(directory), {}
    model = read_file(lambda path: VLM(read_json(path)), directory / "config.json")
    tokenizer = read_file(lambda path: Tokenizer.from_file(str(path)), directory / "tokenizer.json")
    index, names = directory / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        names = sorted(set(read_file(read_json, index)["weight_map"].values()))
    for name in names:
        tensors.update(read_file(load_file, directory / name))
    check_tensors(model.state_dict(), tensors, directory)
    model.load_state_dict(tensors)
    c = model.config.vision
    tokens = (c.image_size // c.patch_size) ** 2 // model.config.scale ** 2
    return model.to(device), data.Processor(tokenizer, c.image_size, tokens)


def fresh(size, examples, seed):
    """A random model of a tabletop size, with a tokenizer trained on the text of the examples."""
    torch.manual_seed(seed)
    processor = data.Processor(data.train_tokenizer(examples), 64, 16)
    return VLM(preset_config(size, processor)), processor
