"""A run directory is a Hugging Face checkpoint, loads strictly; a shared prompt changes nothing."""
import copy
import json
import os
import subprocess
import sys
from dataclasses import replace

import conftest
import pytest
import torch
from conftest import FAMILIES, ROOT, score_plain
from PIL import Image
from safetensors.torch import load_file, save_file
from speed import peak

import data
import kernels
import model as models


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A saved run directory of size s, and what was saved."""
    torch.manual_seed(0)
    model, processor = models.fresh("s", [data.base_example(i) for i in range(300)], 0)
    directory = tmp_path_factory.mktemp("run")
    models.save_checkpoint(model, processor, directory)
    return model, processor, directory


def questions(processor, count=6):
    """Pictures and plain text, of different lengths."""
    return [data.world_example(("test", "text")[i % 2], i) for i in range(count)]


def test_transformers_opens_a_run(made):
    """Logits, prompt ids, pixels and greedy tokens of AutoModel and AutoProcessor are ours."""
    transformers = pytest.importorskip("transformers")
    model, processor, directory = made
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(directory).eval()
    their_processor = transformers.AutoProcessor.from_pretrained(directory)
    sampler = kernels.Sampler(model, processor.banned(model.vocabulary), processor.stop)
    for example in questions(processor):
        batch = processor.batch([example])
        text = example.question.replace(data.IMAGE, "")
        content = [{"type": "image"}] * len(example.images) + [{"type": "text", "text": text}]
        prompt = their_processor.apply_chat_template([{"role": "user", "content": content}],
                                                     add_generation_prompt=True)
        inputs = their_processor(text=prompt, images=example.images or None, return_tensors="pt",
                                 add_special_tokens=False)
        assert inputs["input_ids"].tolist() == batch.ids.tolist()
        if example.images:
            assert torch.equal(inputs["pixel_values"][0], batch.pixels)
        with torch.no_grad():
            expected, got = theirs(**inputs).logits, model.lm_head(model(batch)[0])
        assert (expected - got).abs().max() < 1e-4
        tokens = theirs.generate(**inputs, do_sample=False, max_new_tokens=12)[0]
        ours = sampler.generate(batch, 1, 12, 0.0)
        count = int(ours.lengths[0])
        assert tokens[batch.ids.shape[1]:][:count].tolist() == ours.ids[0, :count].tolist()


def plain_inputs(processor, batch):
    """What transformers' forward takes of a batch of one prompt."""
    inputs = dict(input_ids=batch.ids)
    if isinstance(processor, data.QwenProcessor):
        inputs["mm_token_type_ids"] = (batch.ids == processor.image).int()
        if len(batch.pixels):
            grids = torch.cat([torch.ones_like(batch.grids[:, :1]), 2 * batch.grids], 1)
            inputs |= dict(pixel_values=batch.pixels, image_grid_thw=grids)
    elif len(batch.pixels):
        inputs["pixel_values"] = batch.pixels[None]
    return inputs


def pictured(*sizes, text="What is {}?"):
    """A question about random pictures of these sizes."""
    noise = torch.Generator().manual_seed(sum(map(sum, sizes)))
    images = [Image.fromarray(torch.randint(256, (h, w, 3), generator=noise,
                                            dtype=torch.uint8).numpy()) for w, h in sizes]
    return data.Example("x", text.format(" and ".join([data.IMAGE] * len(sizes))), "1",
                        images=images)


QUESTIONS = [pictured((100, 60)), pictured((64, 64), (200, 50), (33, 90)), pictured(),
             pictured((300, 300), text="{}Count.")]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_that_of_transformers(checkpoint, family, tied):
    """Logits to 1e-4 and greedy tokens to the token, pictures of many shapes, the sampler
    included: after a picture, Qwen's positions count on from its larger side."""
    directory, theirs = checkpoint(family, tied)
    ours, processor = models.load_checkpoint(directory)
    sampler = kernels.Sampler(ours, torch.zeros(ours.vocabulary, dtype=torch.bool), -1)
    for example in QUESTIONS:
        batch = processor.batch([example])
        inputs = plain_inputs(processor, batch)
        with torch.no_grad():
            expected, got = theirs(**inputs).logits, ours.lm_head(ours(batch)[0])
        assert (expected - got).abs().max() < 1e-4 * max(1, expected.abs().max())
        tokens = theirs.generate(**inputs, do_sample=False, min_new_tokens=12, max_new_tokens=12)
        assert tokens[0, batch.ids.shape[1]:].tolist() == sampler.generate(batch, 1, 12, 0.0
                                                                           ).rows()[0]
    together = sampler.generate(processor.batch(QUESTIONS), 1, 12, 0.0).rows()
    assert together[-1] == tokens[0, batch.ids.shape[1]:].tolist()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_we_save_opens_in_transformers(checkpoint, tmp_path, family, tied):
    """Under the hub's names, with every tensor found, none left over, and the same logits."""
    transformers = pytest.importorskip("transformers")
    directory, theirs = checkpoint(family, tied)
    ours, processor = models.load_checkpoint(directory)
    models.save_checkpoint(ours, processor, tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == {
        name for path in directory.glob("*.safetensors") for name in load_file(path)}
    again, report = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "again", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = plain_inputs(processor, processor.batch(QUESTIONS[:1]))
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, theirs(**inputs).logits)


def read(path):
    return json.loads(path.read_text())


def flat(raw):
    """config.json of a Qwen as on the hub: no text_config, and what rope is called there."""
    raw = copy.deepcopy(raw)
    text = raw.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= dict(rope_theta=rope["rope_theta"], torch_dtype=text.pop("dtype", "float32"),
                 rope_scaling=dict(type="mrope", mrope_section=rope["mrope_section"]))
    return text | raw


@pytest.mark.parametrize("family", FAMILIES)
def test_hub_config(checkpoint, family):
    """Hub files leave out what equals a default, Qwen's are flat, and name things otherwise."""
    directory, theirs = checkpoint(family, True)
    raw = read(directory / "config.json")
    for key in ("layer_norm_eps", "hidden_act", "num_channels", "in_channels",
                "spatial_merge_size", "patch_size" if family != "idefics3" else ""):
        raw["vision_config"].pop(key, None)
    raw = raw if family == "idefics3" else flat(raw)
    (directory / "config.json").write_text(json.dumps(raw))
    ours, processor = models.load_checkpoint(directory)
    batch = processor.batch(QUESTIONS[:1])
    with torch.no_grad():
        expected = theirs(**plain_inputs(processor, batch)).logits
        assert torch.allclose(expected, ours.lm_head(ours(batch)[0]), atol=1e-3)


def test_round_trip(made):
    model, processor, directory = made
    again, other = models.load_checkpoint(directory)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert other.banned(model.vocabulary).equal(processor.banned(model.vocabulary))
    assert (other.stop, other.pad, other.image) == (processor.stop, processor.pad, processor.image)


@pytest.mark.parametrize("damage, words", [
    (lambda t: t.pop("lm_head.weight"), ["Missing", '"lm_head.weight"']),
    (lambda t: t.update(extra=torch.zeros(1)), ["Unexpected", '"extra"']),
    (lambda t: t.update({"lm_head.weight": torch.zeros(3, 2)}),
     ["size mismatch for lm_head.weight", "[3, 2]"]),
])
def test_loading_is_strict(tmp_path, made, damage, words):
    """strict=False loads nothing and trains from noise: every difference is an error, by name."""
    model, processor, _ = made
    models.save_checkpoint(model, processor, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(models.CheckpointError) as error:
        models.load_checkpoint(tmp_path)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("name, content", [
    ("model.safetensors", b"not tensors"), ("config.json", b"{"), ("tokenizer.json", b"{}"),
    ("config.json", b'{"model_type": "bert"}')])
def test_broken_files_are_named(tmp_path, made, name, content):
    model, processor, _ = made
    models.save_checkpoint(model, processor, tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(models.CheckpointError, match=name):
        models.load_checkpoint(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(models.CheckpointError, match=name):
        models.load_checkpoint(tmp_path)


def responses(processor, examples, group):
    """Right and made-up answers of different lengths for each example."""
    texts = [processor.response_ids(e.response)[:3 + 5 * g] for e in examples for g in range(group)]
    ids, lengths = data.pad_rows(texts, processor.pad)
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def in_double(processor):
    """The same processor, with pictures in fp64."""
    double, batch = copy.copy(processor), processor.batch
    double.batch = lambda some: replace(batch(some), pixels=batch(some).pixels.double())
    return double


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompt_gives_the_same_gradients(checkpoint, family):
    """The prompt is read once per group: log-probs and every gradient as the plain way (fp64)."""
    model, processor = models.load_checkpoint(checkpoint(family)[0])
    model, processor = model.double(), in_double(processor)
    examples = [replace(example, response=f"<answer>{i} and 7</answer>" * i)
                for i, example in enumerate(QUESTIONS)]
    ids, mask = responses(processor, examples, 2)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    weight = torch.rand(ids.shape, dtype=torch.double)
    logprob, entropy = model.score(processor.batch(examples), ids, mask, 2)
    shared = gradients((logprob * weight).sum())
    textbook = score_plain(model, processor.batch(examples), ids, mask, 2)
    plain = gradients((textbook[0] * weight).sum())
    for got, expected in zip((logprob, entropy), textbook):
        assert torch.allclose(got, expected, atol=1e-9) and not got[~mask].any()
    for name in plain:
        assert torch.allclose(plain[name], shared[name], atol=1e-8), name
    models.recompute_activations(model)
    logprob, _ = model.score(processor.batch(examples), ids, mask, 2)
    again = gradients((logprob * weight).sum())
    assert all(torch.equal(again[name], shared[name]) for name in shared)


def test_recomputing_keeps_less(checkpoint):
    """Bytes that autograd keeps for backward, counted as they are saved."""
    model, processor = models.load_checkpoint(checkpoint("qwen2_vl")[0])
    ids, mask = responses(processor, QUESTIONS, 2)
    batch, kept = processor.batch(QUESTIONS), []
    for thrifty in (False, True):
        if thrifty:
            models.recompute_activations(model)
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x: sizes.setdefault(x.data_ptr(), (x.nbytes, x))[1], lambda x: x):
            model.score(batch, ids, mask, 2)
        parameters = {p.data_ptr() for p in model.parameters()}
        kept.append(sum(size for place, (size, _) in sizes.items() if place not in parameters))
    assert kept[1] < 0.5 * kept[0]


def test_recomputing_frees_what_it_made():
    """Keys and values of all layers were held by the function that takes them, which every layer
    keeps until backward ends: twice the memory, and no saved tensor told of it."""
    model, processor = models.fresh("m", [data.base_example(i) for i in range(300)], 0)
    batch, ids = processor.batch([data.world_example("train", 1)]), torch.full((16, 128), 9)

    def step():
        model.score(batch, ids, ids > 0, 16)[0].sum().backward()

    step()                           # makes the gradients
    held = peak(step)
    models.recompute_activations(model)
    assert peak(step) < 0.35 * held


@pytest.mark.parametrize("family", FAMILIES)
def test_lora(checkpoint, tmp_path, family):
    """It starts as the model that it adapts, trains the adapter alone, is merged on save, and is
    what peft makes of the same matrices."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    directory, _ = checkpoint(family)
    model, processor = models.load_checkpoint(directory)
    batch = processor.batch(QUESTIONS[:2])
    with torch.no_grad():
        before = model.lm_head(model(batch)[0])
    models.add_lora(model, 3, 6.0, "q_proj,v_proj,down_proj")
    assert torch.equal(model.lm_head(model(batch)[0]), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 3 * 2 and all("lora_" in name for name in trained)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    with torch.no_grad():
        adapted = model.lm_head(model(batch)[0])
        with models.without_adapters(model) as initial:
            assert torch.equal(initial.lm_head(initial(batch)[0]), before)
        assert torch.equal(model.lm_head(model(batch)[0]), adapted)
    assert (adapted - before).abs().max() > 0.1
    models.save_checkpoint(model, processor, tmp_path / "out")
    again, _ = models.load_checkpoint(tmp_path / "out")
    with torch.no_grad():
        assert torch.allclose(again.lm_head(again(batch)[0]), adapted, atol=1e-4)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(directory)
    decoder = "language_model" if model.config.qwen else "text_model"
    config = peft.LoraConfig(r=3, lora_alpha=6.0,
                             target_modules=rf".*{decoder}.*\.(q_proj|v_proj|down_proj)")
    theirs = peft.get_peft_model(theirs, config).eval()
    matrices = {f"base_model.model.{name}": p for name, p in model.state_dict().items()
                if "lora_" in name}
    assert not peft.set_peft_model_state_dict(theirs, matrices).unexpected_keys
    one = processor.batch(QUESTIONS[:1])
    with torch.no_grad():
        assert torch.allclose(theirs(**plain_inputs(processor, one)).logits,
                              model.lm_head(model(one)[0]), atol=1e-3)


def test_an_error_does_not_leave_a_model_without_its_adapters(start):
    """The switch was once one of the class: an error in between switched all adapters off."""
    def enabled(model):
        return {layer.enabled for layer in model.modules() if isinstance(layer, models.LoRA)}

    model, other = (models.load_checkpoint(start)[0] for _ in range(2))
    for each in (model, other):
        models.add_lora(each, 2, 4.0, "q_proj")
    with pytest.raises(RuntimeError), models.without_adapters(model):
        assert enabled(model) == {False} and enabled(other) == {True}, "of this model alone"
        raise RuntimeError("out of memory")
    assert enabled(model) == {True}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_score_is_its_textbook_form(start, temperature):
    """With banned ids and a temperature, for one answer a prompt and for groups."""
    model, processor = models.load_checkpoint(start)
    examples, banned = questions(processor), processor.banned(model.vocabulary)
    for group in (1, 3):
        ids, mask = responses(processor, examples, group)
        ask = processor.batch(examples), ids, mask, group, banned, temperature
        for got, expected in zip(model.score(*ask), score_plain(model, *ask)):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_lora_on_nothing_is_an_error(checkpoint):
    model, _ = models.load_checkpoint(checkpoint("idefics3")[0])
    with pytest.raises(models.CheckpointError, match="--lora-targets query"):
        models.add_lora(model, 4, 8.0, "query")


def test_prompt_is_stored(made, tmp_path):
    """A system line, an instruction and an answer format: whoever loads a run asks as it did."""
    model, processor, directory = made
    example = data.world_example("test", 0)
    style = dict(system="Be brief.", instruction="Think first.", answer_format="boxed")
    _, asked = models.load_checkpoint(directory, prompt=style)
    assert "System: Be brief." in asked.prompt(example)[0]
    assert "\nThink first.<end_of_utterance>" in asked.prompt(example)[0]
    assert asked.decode(asked.response_ids("<answer>3</answer>")) == "\\boxed{3}"
    models.save_checkpoint(model, asked, tmp_path)
    _, again = models.load_checkpoint(tmp_path)
    assert again.style == asked.style and again.prompt(example)[0] == asked.prompt(example)[0]
    assert models.load_checkpoint(directory)[1].style == data.PROMPT


def test_a_tied_head_may_be_stored(checkpoint):
    """Some trainers write the head of a tied model too; transformers takes it, and so do we."""
    directory, theirs = checkpoint("qwen2_vl", True)
    (directory / "model.safetensors.index.json").unlink()
    tensors = {name: tensor for path in directory.glob("*.safetensors")
               for name, tensor in load_file(path).items()}
    save_file(tensors | {"lm_head.weight": theirs.lm_head.weight.detach().clone()},
              directory / "model.safetensors")
    model, _ = models.load_checkpoint(directory)
    assert model.lm_head.weight is model.decoder.embed_tokens.weight


def test_files_of_other_trainings(checkpoint, tmp_path):
    """Left behind by others: truncation and padding in tokenizer.json, which cut prompts short, and
    pictures' sizes inside processor_config.json, which win over preprocessor_config.json."""
    directory, _ = checkpoint("idefics3")
    _, processor = models.load_checkpoint(directory)
    expected = processor.batch(QUESTIONS[:2]).ids
    processor.tokenizer.enable_truncation(5)
    processor.tokenizer.enable_padding(length=9)
    processor.tokenizer.save(str(directory / "tokenizer.json"))
    inner = dict(image_processor_type="Idefics3ImageProcessor", size={"longest_edge": 2048})
    (directory / "processor_config.json").write_text(json.dumps(dict(image_processor=inner)))
    model, processor = models.load_checkpoint(directory)
    assert torch.equal(processor.batch(QUESTIONS[:2]).ids, expected)
    models.save_checkpoint(model, processor, tmp_path / "again")
    stored = json.loads((tmp_path / "again" / "processor_config.json").read_text())
    assert stored["image_processor"] == inner | dict(size={"longest_edge": 64},
                                                     do_image_splitting=False)


def test_a_wrong_tokenizer_is_an_error(made, checkpoint):
    directory, _ = checkpoint("qwen2_vl")
    made[1].tokenizer.save(str(directory / "tokenizer.json"))
    with pytest.raises(models.CheckpointError, match="image_pad.* is None"):
        models.load_checkpoint(directory)


def test_end_mark_counts_and_padding_does_not(made):
    """pad = eos once masked the end mark out of the loss: models then never learnt to stop."""
    model, processor, _ = made
    example = data.world_example("train", 0)
    ids = processor.response_ids(example.response)
    assert ids[-1] == processor.stop and processor.stop != processor.pad
    padded, lengths = data.pad_rows([ids, ids[:2]], processor.pad)
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    batch = processor.batch([example, example])
    logprob, _ = model.score(batch, padded, mask)
    assert logprob[0, len(ids) - 1] != 0 and (logprob[1, 2:] == 0).all()
    changed = padded.clone()
    changed[1, 2:] = 7
    assert torch.equal(model.score(batch, changed, mask)[0], logprob)


# ------------------------------------------------- keys of config.json that change the arithmetic
OTHER = dict(        # where a number doubled or a word changed is not another plausible value
    hidden_act="gelu", model_type="other", layer_types=["sliding_attention", "full_attention"],
    rms_norm_eps=1e-2, layer_norm_eps=1e-2, sliding_window=2, fullatt_block_indexes=[0, 2],
    rope_parameters=dict(rope_type="default", rope_theta=300.0, mrope_section=[4, 2, 2]),
    quantization_config=dict(quant_method="fp8"), dtype="bfloat16", partial_rotary_factor=0.5)
BY_TYPE = {bool: lambda x: not x, int: lambda x: 2 * x, float: lambda x: 10 * x + 0.1,
           str: lambda x: x + "x", list: lambda x: x[::-1], dict: lambda x: {}}


def edits(raw, classes, common):
    """(name, config.json) with one key changed, or left out: each key of transformers' classes but
    those that all its classes have in common, and keys of older files."""
    older = ("quantization_config", "partial_rotary_factor", "mlp_bias", "attention_bias", "dtype",
             "tie_word_embeddings", "model_type")
    for part in (None, "text_config", "vision_config"):
        own, known = (raw[part], classes[part]) if part else (raw, classes)
        for key in [*known.keys() - common - {"text_config", "vision_config"}, *older]:
            value = known.get(key)
            other = OTHER[key] if key in OTHER else BY_TYPE.get(type(value), lambda x: 3)(value)
            without = {name: own[name] for name in own if name != key}
            for changed in (without | {key: other}, without):
                yield (part, key, changed.get(key)), raw | {part: changed} if part else changed


def off(directory):
    """How far our logits are from those of transformers; None where load refuses, 0 where
    transformers does."""
    transformers = pytest.importorskip("transformers")
    try:
        ours, processor = models.load_checkpoint(directory)
    except models.CheckpointError:
        return None
    batch = processor.batch(QUESTIONS[:1])
    inputs = plain_inputs(processor, batch)
    with torch.no_grad():
        try:
            expected = transformers.AutoModelForImageTextToText.from_pretrained(
                directory, dtype=torch.float32).eval()(**inputs).logits
        except Exception:            # a config that has no meaning there
            return 0
        got = ours.lm_head(ours(batch)[0])
    return float((expected - got).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family, shape", [
    ("idefics3", dict), ("qwen2_vl", dict), ("qwen2_5_vl", flat)])
def test_no_key_of_a_config_loads_with_other_logits(checkpoint, family, shape):
    """Keys that change the arithmetic were not read, and a fine-tune of another rope or activation
    trained from logits that were off by their own size, without a word. Each is refused or right,
    for every key of transformers' own classes."""
    directory, theirs = checkpoint(family)
    path, far = directory / "config.json", {}
    common = set(type(theirs.config).__mro__[1]().to_dict())
    for name, raw in edits(read(path), theirs.config.to_dict(), common):
        can = "rope_parameters" in raw.get("text_config", {})
        path.write_text(json.dumps(shape(raw) if can else raw))
        far[str(name)] = off(directory)
    assert sum(value is not None for value in far.values()) > 30, "it loads at all"
    assert not {name: value for name, value in far.items() if (value or 0) > 1e-4}


YARN = dict(factor=4.0, original_max_position_embeddings=32)
ROPES = [dict(rope_type="linear", factor=4.0), dict(type="dynamic", factor=4.0),
         dict(rope_type="yarn", **YARN), dict(type="yarn", **YARN),
         dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, **YARN)]


@pytest.mark.parametrize("where", ["rope_parameters", "rope_scaling", "rope_scaling beside"])
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: " ".join(list(rope)[:1] + [
    value for value in rope.values() if isinstance(value, str)]))
@pytest.mark.parametrize("family", ["idefics3", "qwen2_vl"])
def test_other_ropes_are_refused_by_name(checkpoint, family, rope, where):
    """Long contexts: model cards say to add rope_scaling to config.json, in which newer versions
    of transformers keep rope_parameters already. It was read as if nothing had been added."""
    directory, _ = checkpoint(family)
    raw = read(directory / "config.json")
    text = raw["text_config"]
    old = text["rope_parameters"] if where.endswith("beside") else text.pop("rope_parameters")
    text[where.split()[0]] = {k: old[k] for k in old if k != "rope_type"} | rope
    (directory / "config.json").write_text(json.dumps(raw))
    kind = rope.get("rope_type") or rope["type"]
    with pytest.raises(models.CheckpointError, match=f"config.json.*rope_type is '{kind}'"):
        models.load_checkpoint(directory)


@pytest.mark.parametrize("key, value", [
    ("hidden_act", "gelu"), ("use_sliding_window", True), ("partial_rotary_factor", 0.5),
    ("quantization_config", {"quant_method": "awq", "bits": 4})])
@pytest.mark.parametrize("shape", [dict, flat])
def test_keys_that_are_not_computed_are_named(checkpoint, shape, key, value):
    """The message says which key of config.json it is, so that a person can look it up."""
    directory, _ = checkpoint("qwen2_vl")
    raw = read(directory / "config.json")
    raw["text_config"][key] = value
    (directory / "config.json").write_text(json.dumps(shape(raw)))
    with pytest.raises(models.CheckpointError, match=f"config.json.*{key} is "):
        models.load_checkpoint(directory)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_of_its_own_is_not_dropped(checkpoint, family):
    """Adapters merged into the head of a model whose config still says tied: transformers uses that
    head; here the embedding was taken in its place."""
    directory, _ = checkpoint(family, True)
    shards = sorted(directory.glob("*.safetensors"))
    tensors = {k: v for shard in shards for k, v in load_file(shard).items()}
    embedding = next(v for k, v in tensors.items() if "embed_tokens" in k)
    save_file(tensors | {"lm_head.weight": embedding + torch.randn(embedding.shape)},
              directory / "model.safetensors", {"format": "pt"})
    assert (off(directory) or 0) < 1e-4


@pytest.mark.parametrize("rope", [None, {}, dict(rope_type="default")])
def test_sections_of_a_rope_that_is_left_out(checkpoint, monkeypatch, rope):
    """`"rope_scaling": null` in a Qwen's config.json: transformers takes M-RoPE's default sections,
    16, 24 and 24; here pictures were read as one long line of text."""
    monkeypatch.setattr(conftest, "TEXT", conftest.TEXT | dict(
        hidden_size=256, num_attention_heads=2, num_key_value_heads=1))
    monkeypatch.setitem(FAMILIES, "wide", lambda *some: conftest.qwen(
        *some, "Qwen2VL", embed_dim=64, hidden_size=256, mlp_ratio=2))
    directory, _ = checkpoint("wide")
    raw = flat(read(directory / "config.json")) | dict(rope_scaling=rope)
    (directory / "config.json").write_text(json.dumps(raw))
    assert (off(directory) or 0) < 1e-4


@pytest.mark.parametrize("family, part, key", [
    ("idefics3", None, "image_token_id"), ("idefics3", None, "vision_config"),
    ("idefics3", "text_config", "vocab_size"), ("idefics3", "text_config", "hidden_size"),
    ("qwen2_vl", "text_config", "num_attention_heads"), ("qwen2_vl", None, "image_token_id"),
    ("qwen2_5_vl", "text_config", "num_hidden_layers")])
def test_a_missing_key_is_named(checkpoint, family, part, key):
    """It said "config.json cannot be read: 'image_token_id'", which is not a message for a
    person."""
    directory, _ = checkpoint(family)
    raw = read(directory / "config.json")
    del (raw[part] if part else raw)[key]
    (directory / "config.json").write_text(json.dumps(raw))
    with pytest.raises(models.CheckpointError, match=f"config.json: a key is missing: .*{key}"):
        models.load_checkpoint(directory)


def with_dtype(directory, **given):
    raw = read(directory / "config.json")
    raw = {k: v for k, v in raw.items() if "dtype" not in k} | given
    (directory / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("given, dtype", [
    (dict(torch_dtype="torch.bfloat16"), torch.bfloat16), (dict(dtype="bfloat16"), torch.bfloat16),
    (dict(torch_dtype="float16"), torch.float16), (dict(dtype=None), torch.float32),
    (dict(dtype="torch.float16", torch_dtype="float32"), torch.float16), ({}, torch.float32)])
def test_spellings_of_a_dtype(checkpoint, given, dtype):
    """"torch.bfloat16" loaded, trained, and was a traceback at the first save."""
    transformers = pytest.importorskip("transformers")
    directory, _ = checkpoint("idefics3")
    with_dtype(directory, **given)
    models.save_checkpoint(*models.load_checkpoint(directory), directory)
    assert {t.dtype for t in load_file(directory / "model.safetensors").values()} == {dtype}
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(directory, dtype="auto")
    assert theirs.dtype == dtype
    assert next(models.load_checkpoint(directory)[0].parameters()).dtype == torch.float32


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["auto", "bf16", "float", "int8", "float64", "Tensor", 5, ["x"]])
def test_a_dtype_that_cannot_be_saved_is_refused_at_load(checkpoint, key, value):
    """Steps were lost: what fails at the first save has to fail before the first step."""
    directory, _ = checkpoint("idefics3")
    with_dtype(directory, **{key: value})
    with pytest.raises(models.CheckpointError, match="config.json.*dtype"):
        models.load_checkpoint(directory)


# ------------------------------------------------- tokens that stand beside tokenizer.json alone
def stand_beside(directory, where, tokens):
    """Takes tokens out of tokenizer.json, and all that follow <|image_pad|>, and writes `tokens`
    {name: special} with the ids from there on to another file. -> {name: id}"""
    stored = read(directory / "tokenizer.json")
    first = next(t["id"] for t in stored["added_tokens"] if t["content"] == "<|image_pad|>")
    stored["added_tokens"] = [t for t in stored["added_tokens"] if t["id"] < first]
    (directory / "tokenizer.json").write_text(json.dumps(stored))
    ids = {token: first + i for i, token in enumerate(tokens)}
    config = read(directory / "tokenizer_config.json")
    if where != "added_tokens_decoder":
        (directory / "added_tokens.json").write_text(json.dumps(ids if where != "both" else {
            "<|image_pad|>": first}))
    if where != "added_tokens.json":
        config["added_tokens_decoder"] = {
            place: dict(content=token, special=tokens[token], lstrip=False, rstrip=False,
                        normalized=False, single_word=False) for token, place in ids.items()}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return ids


BESIDE = pytest.mark.parametrize("where", ["added_tokens_decoder", "added_tokens.json", "both"])


@BESIDE
def test_tokens_beside_the_tokenizer(checkpoint, tmp_path, where):
    """<|image_pad|> and a user's own token, not in tokenizer.json: training stopped at once, or the
    token was split. Ids are those of transformers, here and in what is saved."""
    transformers = pytest.importorskip("transformers")
    directory, _ = checkpoint("qwen2_vl")
    ids = stand_beside(directory, where, {"<|image_pad|>": True, "<mine>": False, "<|x|>": True})
    text, again = "The <|image_pad|> of<mine> 3<|x|>, <mine>", tmp_path / "again"
    expected = transformers.AutoTokenizer.from_pretrained(directory)(text)["input_ids"]
    assert set(ids.values()) < set(expected)
    model, processor = models.load_checkpoint(directory)
    batch = processor.batch(QUESTIONS[:1])
    assert (batch.ids == ids["<|image_pad|>"]).sum() == 4 * 2, "100x60 pixels"
    models.save_checkpoint(model, processor, again)
    for tokenizer in (processor, models.load_checkpoint(again)[1]):
        assert tokenizer.encode(text) == expected
        assert [tokenizer.encode(token) for token in ids] == [[place] for place in ids.values()]
    for kind in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        assert kind.from_pretrained(again)(text)["input_ids"] == expected


@BESIDE
@pytest.mark.parametrize("token", ["<mine>", "<answer>"])
def test_a_token_of_ones_own_may_be_said(checkpoint, where, token):
    """A user's own token was banned from sampling, split in rows and left out of answers, as if it
    were one of the special tokens that only prompts may hold. So was a token of tokenizer.json
    that added_tokens.json lists once more."""
    directory, _ = checkpoint("qwen2_vl")
    known = models.load_checkpoint(directory)[1].tokenizer.token_to_id(token)
    ids = stand_beside(directory, where, {"<|image_pad|>": True, "<mine>": False})
    if known is not None and where == "added_tokens.json":
        (directory / where).write_text(json.dumps(ids | {token: known}))
    model, processor = models.load_checkpoint(directory)
    place = processor.tokenizer.token_to_id(token)
    assert processor.response_ids(token) == [place, processor.stop]
    assert processor.decode([place]) == token
    assert not processor.banned(model.vocabulary)[place]
    assert processor.banned(model.vocabulary)[ids["<|image_pad|>"]]


def test_tokens_that_are_listed_twice_keep_their_kind(checkpoint, tmp_path):
    """added_tokens.json of older trainers lists all of tokenizer.json's tokens again: special ones
    became sayable, or <answer> became special, here and in what was saved."""
    directory, _ = checkpoint("qwen2_vl")
    stored = {token["content"]: token for token in read(directory / "tokenizer.json")[
        "added_tokens"]}
    (directory / "added_tokens.json").write_text(json.dumps(
        {word: token["id"] for word, token in stored.items()}))
    model, processor = models.load_checkpoint(directory)
    models.save_checkpoint(model, processor, tmp_path / "again")
    again = read(tmp_path / "again" / "tokenizer.json")["added_tokens"]
    assert {token["content"]: token for token in again} == stored
    banned = processor.banned(model.vocabulary)
    assert all(banned[token["id"]] == (token["special"] and word != processor.STOP)
               for word, token in stored.items())


@pytest.mark.parametrize("flags", [dict(lstrip=False), dict(lstrip=True), dict(special=True),
                                   dict(lstrip=True, rstrip=True)], ids=str)
def test_the_kind_of_a_token_is_that_of_tokenizer_config(checkpoint, flags):
    """Where both files have a token, transformers takes the spaces around it and whether it is
    special from added_tokens_decoder: read otherwise, the same text has other ids."""
    transformers = pytest.importorskip("transformers")
    directory, _ = checkpoint("qwen2_vl")
    place = next(token["id"] for token in read(directory / "tokenizer.json")["added_tokens"]
                 if token["content"] == "<answer>")
    token = dict(content="<answer>", lstrip=False, rstrip=False, normalized=False,
                 single_word=False, special=False) | flags
    (directory / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="PreTrainedTokenizerFast", added_tokens_decoder={place: token})))
    _, processor = models.load_checkpoint(directory)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert processor.encode("So <answer> 3") == theirs("So <answer> 3")["input_ids"]
    own = processor.tokenizer.get_added_tokens_decoder()[place]
    assert own.special == theirs.added_tokens_decoder[place].special == token["special"]


@BESIDE
@pytest.mark.parametrize("shift", [-3, 1, 3])
def test_a_token_with_another_id_is_an_error(checkpoint, where, shift):
    """A token that would get another id than its file says is another row of the embedding."""
    directory, _ = checkpoint("qwen2_vl")
    place = stand_beside(directory, where, {"<|image_pad|>": True, "<mine>": False})["<mine>"]
    for path in (directory / "tokenizer_config.json", directory / "added_tokens.json"):
        if path.exists():
            path.write_text(path.read_text().replace(str(place), str(place + shift)))
    with pytest.raises(models.CheckpointError, match=r"is not token \d+"):
        models.load_checkpoint(directory)


# ------------------------------------------------------------------------ one set of weights
@pytest.mark.parametrize("family", FAMILIES)
def test_one_set_of_weights_after_a_save(checkpoint, family):
    """Saved over a downloaded checkpoint of several shards: their index stayed, the old weights
    were loaded, and the training was lost without a word."""
    transformers = pytest.importorskip("transformers")
    directory, theirs = checkpoint(family)
    for name in ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin",
                 "pytorch_model.bin.index.json", "model.safetensors.new"):
        (directory / name).write_text("{}")
    assert (directory / "model.safetensors.index.json").exists()
    model, processor = models.load_checkpoint(directory)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    models.save_checkpoint(model, processor, directory)
    assert [path.name for path in directory.iterdir() if "model" in path.name] == [
        "model.safetensors"]
    again, _ = models.load_checkpoint(directory)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, again.get_parameter(name)), name
    opened = transformers.AutoModelForImageTextToText.from_pretrained(directory).eval()
    batch = processor.batch(QUESTIONS[:1])
    with torch.no_grad():
        far = opened(**plain_inputs(processor, batch)).logits - model.lm_head(model(batch)[0])
    assert far.abs().max() < 1e-3


def test_weights_beside_an_old_index(checkpoint):
    """Killed between the new weights and the removal of the old: the new ones count."""
    directory, _ = checkpoint("qwen2_vl")
    model, processor = models.load_checkpoint(directory)
    torch.nn.init.zeros_(model.lm_head.weight)
    before = {path: path.read_bytes() for path in directory.glob("model*")}
    models.save_checkpoint(model, processor, directory)
    for path, content in before.items():
        path.write_bytes(content)
    assert not models.load_checkpoint(directory)[0].lm_head.weight.any()


SIDE_FILES = {
    "README.md": "---\nlicense: mit\n---\n# Größe √2 😀\n", "LICENSE": "MIT\n\n  as is\n",
    "merges.txt": "#version: 0.2\nĠ t\nĠ a\n", "vocab.json": '{"Ġt": 0, "é": 1}',
    "added_tokens.json": '{"<|im_end|>": ID}', "video_preprocessor_config.json": '{"fps": 2.0}',
    "chat_template.jinja": "{% for m in messages %}\n{{ m }}ü{% endfor %}",
    "chat_template.json": '{"chat_template": "{{ \\"ß\\" }}"}',
    "special_tokens_map.json": '{"eos_token": {"content": "<|im_end|>", "lstrip": false}}',
    "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast", "k": [1, null]}'}


@pytest.mark.parametrize("name", SIDE_FILES)
def test_side_files_survive_a_save(checkpoint, tokenizer, tmp_path, name):
    """What a user needs again to publish or to convert was not in the directory that was saved:
    the model card, the licence, the slow tokenizer's vocabulary."""
    directory, _ = checkpoint("qwen2_vl")
    content = SIDE_FILES[name].replace("ID", str(tokenizer.token_to_id("<|im_end|>")))
    (directory / name).write_text(content, encoding="utf-8")
    models.save_checkpoint(*models.load_checkpoint(directory), tmp_path / "out")
    parse = json.loads if name.endswith(".json") else str
    text = (tmp_path / "out" / name).read_text(encoding="utf-8")
    assert parse(text) == parse(content)


def test_own_keys_of_files_that_are_changed_survive(checkpoint, tmp_path):
    """Only picture sizes and ends are ours; the rest of these files is left as it came."""
    directory, _ = checkpoint("qwen2_vl")
    for name in ("preprocessor_config.json", "generation_config.json", "config.json"):
        stored = read(directory / name) if (directory / name).exists() else {}
        (directory / name).write_text(json.dumps(stored | {"my_own": {"key": [1, "ü"]}}))
    models.save_checkpoint(*models.load_checkpoint(directory), tmp_path / "out")
    for name in ("preprocessor_config.json", "generation_config.json", "config.json"):
        assert read(tmp_path / "out" / name)["my_own"] == {"key": [1, "ü"]}


# ---------------------------------------------------------------------------- hostile directories
def refused(directory, name):
    """Loading is one error, of one kind, that names the file."""
    with pytest.raises(models.CheckpointError) as error:
        models.load_checkpoint(directory)
    assert name in str(error.value)


NO_OBJECT = [b"[]", b"null", b"3", b'"text"', b"{", b"", b"\xff\xfe{}", b"[" * 10 ** 5, b"\0"]


@pytest.mark.parametrize("content", NO_OBJECT, ids=lambda content: repr(content[:6]))
@pytest.mark.parametrize("name", [
    "config.json", "prompt.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json",
    "preprocessor_config.json", "special_tokens_map.json", "vocab.json",
    "model.safetensors.index.json"])
def test_files_that_hold_no_object(checkpoint, name, content):
    """Half of a download, a list, another encoding: each was a traceback of its own."""
    directory, _ = checkpoint("qwen2_vl")
    (directory / name).write_bytes(content)
    refused(directory, name)


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "merges.txt", "chat_template.jinja"])
def test_side_texts_in_another_encoding(checkpoint, name):
    """Latin-1 in a model card was a traceback in the middle of loading."""
    directory, _ = checkpoint("idefics3")
    (directory / name).write_bytes("Größe".encode("latin-1"))
    refused(directory, name)


@pytest.mark.parametrize("index", [
    {}, {"weight_map": []}, {"weight_map": None}, {"weight_map": {"lm_head.weight": None}},
    {"weight_map": {"lm_head.weight": 3}}, {"weight_map": {"a": ["b"]}}, {"weight_map": "x"}])
def test_a_malformed_index(checkpoint, index):
    directory, _ = checkpoint("qwen2_vl")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(directory, "model.safetensors.index.json")


@pytest.mark.parametrize("name", [
    "../elsewhere/{shard}", "{outside}/{shard}", "sub/../../elsewhere/{shard}", ".", "..", "/", ""])
def test_an_index_cannot_name_files_elsewhere(checkpoint, tmp_path, name):
    """A downloaded index could name any file of the machine as a shard, which was then opened. The
    shards lie outside here, under names that the directory lacks, and are good."""
    directory, _ = checkpoint("qwen2_vl")
    index = read(directory / "model.safetensors.index.json")
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (directory / "sub").mkdir()
    for shard in set(index["weight_map"].values()):
        (directory / shard).rename(outside / shard)
    index["weight_map"] = {tensor: name.format(shard=shard, outside=outside)
                           for tensor, shard in index["weight_map"].items()}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(directory, str(directory))


@pytest.mark.parametrize("family", FAMILIES)
def test_links_of_a_hub_cache(checkpoint, tmp_path, family):
    """A hub's cache holds links to blobs outside the snapshot: these load, and a save replaces the
    links and leaves the blobs, which other snapshots share."""
    directory, _ = checkpoint(family)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(directory.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../blobs/{number}")
    before = {path: path.read_bytes() for path in blobs.iterdir()}
    models.save_checkpoint(*models.load_checkpoint(directory), directory)
    assert before == {path: path.read_bytes() for path in blobs.iterdir()}
    models.load_checkpoint(directory)


def number(value, dtype=torch.float32):
    return lambda tensor: torch.full_like(tensor, value, dtype=dtype)


def one(value):
    def change(tensor):
        tensor.view(-1)[-1] = value
        return tensor
    return change


@pytest.mark.parametrize("change", [
    one(float("nan")), one(float("inf")), one(float("-inf")), number(float("nan"), torch.bfloat16),
    number(1, torch.int8), number(1, torch.int64), number(1, torch.bool),
    number(1, torch.float8_e4m3fn), number(1, torch.complex64)],
    ids="nan inf -inf bf16 int8 int64 bool fp8 complex".split())
@pytest.mark.parametrize("shards", [False, True])
def test_weights_that_are_no_finite_numbers(checkpoint, change, shards):
    """A run that diverged, or a quantized file whose config does not say so: the first loss was
    NaN, or a traceback far from the file."""
    directory, _ = checkpoint("idefics3")
    if not shards:
        models.save_checkpoint(*models.load_checkpoint(directory), directory)
    path = next(path for path in sorted(directory.glob("*.safetensors"))
                if "lm_head.weight" in load_file(path))
    tensors = load_file(path)
    tensors["lm_head.weight"] = change(tensors["lm_head.weight"])
    save_file(tensors, path, {"format": "pt"})
    refused(directory, path.name)


def run(code, *arguments):
    """What a process of its own prints, or the error that it ends with; it may take a minute."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, timeout=60,
                          capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return done.stdout


PIPES = """
import os, pathlib, sys, model
directory = pathlib.Path(sys.argv[1])
for path in [directory / name for name in sys.argv[2:]]:
    old = path.read_bytes() if path.exists() else None
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    try:
        model.load_checkpoint(directory)
    except model.CheckpointError as error:
        print(path.name in str(error))
    path.unlink()
    if old:
        path.write_bytes(old)
"""


def test_a_pipe_is_an_error_and_not_waited_for(checkpoint):
    """Reading a FIFO waits for a writer who never comes."""
    directory, _ = checkpoint("qwen2_vl")
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json",
             "prompt.json", "README.md", "model.safetensors", "model.safetensors.index.json")
    assert run(PIPES, directory, *names).split() == ["True"] * len(names)


# ------------------------------------------------------------------------------ how files are kept
@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_weights_have_the_permissions_of_their_neighbours(made, tmp_path, mask, mode):
    """model.safetensors alone was private: a group could open all of a run but its weights."""
    model, processor, _ = made
    before = os.umask(mask)
    try:
        models.save_checkpoint(model, processor, tmp_path)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        path.name: mode for path in tmp_path.iterdir()}


FULL = """
import resource, sys, model
loaded = model.load_checkpoint(sys.argv[1])
for limit in (100, 20_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        model.save_checkpoint(*loaded, sys.argv[1])
    except OSError as error:
        print(error.strerror)
"""


def test_a_full_disk(made, tmp_path):
    """No room for a config, or for the weights: an OSError as of any file (safetensors had one of
    its own), and what was saved before is whole."""
    model, processor, _ = made
    models.save_checkpoint(model, processor, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert run(FULL, tmp_path) == "File too large\n" * 2
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    models.load_checkpoint(tmp_path)


def test_a_full_device(tmp_path):
    """/dev/full behind the link to the new file: the old one stays, for a text and for tensors."""
    path = tmp_path / "config.json"
    path.write_text("old")
    (tmp_path / "config.json.new").symlink_to("/dev/full")
    for content in ("new", {"x": torch.ones(9)}):
        with pytest.raises(OSError, match="No space left"):
            models.write_file(path, content)
        assert path.read_text() == "old"


def test_sizes():
    """The tabletop presets have the sizes that the README gives."""
    _, processor = models.fresh("s", [data.base_example(i) for i in range(3000)], 0)
    counts = {size: sum(p.numel() for p in models.VLM(
        models.preset_config(size, processor)).parameters()) for size in models.SIZES}
    limits = {"xs": 0.1e6, "s": 0.33e6, "m": 1.57e6, "l": 8.2e6}
    assert counts == {size: pytest.approx(count, rel=0.03) for size, count in limits.items()}


@pytest.mark.parametrize("size", models.SIZES)
def test_heads_of_a_preset(size):
    """16 wide in both halves, and keys for each head of the decoder: so the base was calibrated."""
    _, processor = models.fresh("s", [data.base_example(i) for i in range(300)], 0)
    config = models.preset_config(size, processor)
    text, vision = config["text_config"], config["vision_config"]
    assert text["head_dim"] == 16 == vision["hidden_size"] // vision["num_attention_heads"]
    assert text["num_attention_heads"] == text["num_key_value_heads"] == text["hidden_size"] // 16


def test_a_place_starts_as_its_row_and_its_column():
    """Of 64 unrelated vectors a model of size s learned late, or never, where a thing is."""
    model, _ = models.fresh("s", [data.base_example(i) for i in range(300)], 0)
    table = model.model.vision_model.embeddings.position_embedding.weight.detach().view(8, 8, -1)
    rows, columns = table - table[:1], table - table[:, :1]
    torch.testing.assert_close(rows, rows[:, :1].expand_as(rows))
    torch.testing.assert_close(columns, columns[:1].expand_as(columns))
    assert table.std() > 0.5 and rows[1:].std() > 0.5 and columns[:, 1:].std() > 0.5
