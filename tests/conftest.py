"""Puts the repository on the path.

`checkpoint` makes what cannot be downloaded here: tiny random checkpoints of the public families,
written by transformers, with a tokenizer that has the families' special tokens.
"""
import dataclasses
import json
import os
import pathlib
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)             # pytest-xdist has a process for each core
os.environ["OMP_NUM_THREADS"] = "1"  # of what a test starts

QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
               "<|image_pad|>"]
QWEN_TEMPLATE = (       # of Qwen2-VL-2B-Instruct, without its branch for videos
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>"
    "system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<|vision_start|>"
    "<|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TEXT = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, rms_norm_eps=1e-6)


def idefics3(transformers, tokenizer, tied):
    return transformers.Idefics3ForConditionalGeneration, transformers.Idefics3Config(
        text_config=dict(model_type="llama", vocab_size=tokenizer.get_vocab_size(), head_dim=16,
                         rope_theta=1e5, pad_token_id=0, tie_word_embeddings=tied, **TEXT),
        vision_config=dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                           num_attention_heads=4, image_size=64, patch_size=16),
        scale_factor=2, image_token_id=tokenizer.token_to_id("<image>"), tie_word_embeddings=tied)


def qwen(transformers, tokenizer, tied, kind, **vision):
    config = getattr(transformers, f"{kind}Config")(
        text_config=dict(vocab_size=tokenizer.get_vocab_size() + 9, tie_word_embeddings=tied,
                         rope_parameters=dict(rope_type="default", rope_theta=1e6,
                                              mrope_section=[2, 3, 3]), **TEXT),
        vision_config=dict(depth=3, num_heads=4, patch_size=14, **vision), tie_word_embeddings=tied,
        image_token_id=tokenizer.token_to_id("<|image_pad|>"))
    return getattr(transformers, f"{kind}ForConditionalGeneration"), config


def qwen2_vl(*some):
    return qwen(*some, "Qwen2VL", embed_dim=64, hidden_size=64, mlp_ratio=2)


def qwen2_5_vl(*some):
    return qwen(*some, "Qwen2_5_VL", hidden_size=64, out_hidden_size=64, intermediate_size=96,
                fullatt_block_indexes=[1], window_size=56)


FAMILIES = dict(idefics3=idefics3, qwen2_vl=qwen2_vl, qwen2_5_vl=qwen2_5_vl)


def widen(batch, extra):
    """The same batch with room for more tokens in every row; positions count on."""
    more = torch.arange(1, extra + 1, device=batch.ids.device)[:, None]
    positions = torch.cat([batch.positions, batch.positions[:, -1:] + more], 1)
    return dataclasses.replace(batch, ids=torch.nn.functional.pad(batch.ids, (0, extra)),
                               positions=positions)


def score_plain(model, prompts, ids, mask, group=1, banned=None, temperature=1.0):
    """The textbook form of `VLM.score`, and its reference: prompt and response in one row, whole
    logits, and no label for the prompt's tokens. One row at a time; slow."""
    logprob, entropy = (model.lm_head.weight.new_zeros(ids.shape) for _ in range(2))
    for r in range(len(ids)):
        prompt = prompts.part(r // group, r // group + 1)
        T, n = int(prompt.lengths), int(mask[r].sum())
        response = ids[r, :n]
        after = torch.arange(1, n + 1, device=ids.device)[:, None]         # (n, 1)
        positions = torch.cat([prompt.positions[:, :T], prompt.positions[:, T - 1:T] + after], 1)
        row = dataclasses.replace(prompt, lengths=prompt.lengths + n, positions=positions,
                                  ids=torch.cat([prompt.ids[:, :T], response[None]], 1))
        hidden, _ = model(row)                                             # (1, T + n, D)
        logits = model.lm_head(hidden[0, T - 1:-1]) / temperature   # (n, V) i predicts i + 1
        if banned is not None:
            logits = logits.masked_fill(banned, -1e30)
        logp = logits.log_softmax(-1)                                      # (n, V)
        logprob[r, :n] = logp.gather(1, response[:, None])[:, 0]
        entropy[r, :n] = -(logp.exp() * logp).sum(-1)
    return logprob, entropy


def picky_model():
    """-> a tiny model that likes banned ids, and its end mark; its processor; what is banned. A
    fresh layer is the identity: here all of them attend."""
    import data
    import model as models
    model, processor = models.fresh("s", [data.base_example(i) for i in range(200)], 0)
    banned = processor.banned(model.vocabulary) | (torch.arange(model.vocabulary) % 8 > 0)
    model.lm_head.weight.data *= torch.where(banned, 30, 10)[:, None]
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn(weight.shape) * (not weight.any())
    return model, processor, banned


@pytest.fixture(scope="session")
def tokenizer():
    """Of the tabletop's text, with the special tokens of every family."""
    import data
    tokenizer = data.train_tokenizer([data.base_example(i) for i in range(300)])
    tiles = [f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)]
    tokenizer.add_special_tokens(QWEN_TOKENS + tiles)
    return tokenizer


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A run directory of size s that has not learnt anything, but attends: a fresh model's layers
    are the identity, and tests on it would not see what attention does."""
    import data
    import model as models
    model, processor = models.fresh("s", [data.base_example(i) for i in range(2000)], 0)
    for weight in model.parameters():
        if not weight.any() and weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.05)
    out = tmp_path_factory.mktemp("start")
    models.save_checkpoint(model, processor, out)
    return out


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    """make(family, tied=False) -> (directory, transformers' model), weights large enough that
    attention looks somewhere."""
    transformers = pytest.importorskip("transformers")

    def make(family, tied=False, seed=0):
        directory = tmp_path / f"{family}-{tied}"
        torch.manual_seed(seed)
        kind, config = FAMILIES[family](transformers, tokenizer, tied)
        theirs = kind(config).eval()
        with torch.no_grad():
            for name, weight in theirs.named_parameters():
                if weight.ndim > 1:
                    weight.normal_(std=1.5 * weight[0].numel() ** -0.5)
                elif name.endswith("bias"):
                    weight.normal_(std=0.3)
        theirs.save_pretrained(directory, max_shard_size="200KB")
        tokenizer.save(str(directory / "tokenizer.json"))
        special = dict(tokenizer_class="PreTrainedTokenizerFast", pad_token="<|endoftext|>",
                       eos_token="<|im_end|>", chat_template=QWEN_TEMPLATE)
        if family != "idefics3":
            (directory / "tokenizer_config.json").write_text(json.dumps(special))
        return directory, theirs

    return make
