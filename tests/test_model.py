"""A run directory is a Hugging Face checkpoint, loads strictly; a shared prompt changes nothing."""
import copy
import json
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES
from PIL import Image
from safetensors.torch import load_file, save_file

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


@pytest.mark.parametrize("family", FAMILIES)
def test_hub_config(checkpoint, family):
    """Hub files leave out what equals a default, Qwen's are flat, and name things otherwise."""
    directory, theirs = checkpoint(family, True)
    raw = json.loads((directory / "config.json").read_text())
    for key in ("layer_norm_eps", "hidden_act", "num_channels", "in_channels",
                "spatial_merge_size", "patch_size" if family != "idefics3" else ""):
        raw["vision_config"].pop(key, None)
    if family != "idefics3":
        text = raw.pop("text_config")
        rope = text.pop("rope_parameters")
        text |= dict(rope_theta=rope["rope_theta"], torch_dtype=text.pop("dtype", "float32"),
                     rope_scaling=dict(type="mrope", mrope_section=rope["mrope_section"]))
        raw = text | raw
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
    textbook = model.score_plain(processor.batch(examples), ids, mask, 2)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_lora(checkpoint, tmp_path, family):
    """It starts as the model that it adapts, trains the adapter alone, is merged on save, and is
    what peft makes of the adapter's files."""
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
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "out" / "adapter").eval()
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
        for got, expected in zip(model.score(*ask), model.score_plain(*ask)):
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


def test_image_tokens_and_features_must_match(made):
    """A sampled placeholder makes re-scoring die: the message counts both sides."""
    model, processor, _ = made
    batch = processor.batch([data.world_example("test", 0)])
    batch.ids[0, -1] = processor.image
    with pytest.raises(ValueError, match="17 image tokens, but 16 features"):
        model(batch)


def test_sizes():
    """The tabletop presets have the sizes that the README gives."""
    _, processor = models.fresh("s", [data.base_example(i) for i in range(3000)], 0)
    counts = {size: sum(p.numel() for p in models.VLM(
        models.preset_config(size, processor)).parameters()) for size in models.SIZES}
    assert 0.2e6 < counts["s"] < 0.4e6 < 1.2e6 < counts["m"] < 1.6e6 < 6e6 < counts["l"] < 8e6
