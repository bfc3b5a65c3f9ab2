"""A run directory is a Hugging Face checkpoint, loads strictly; a shared prompt changes nothing."""
import copy
import json

import pytest
import torch
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
    models.save(model, processor, directory)
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
            expected, got = theirs(**inputs).logits, model.logits(model(batch))
        assert (expected - got).abs().max() < 1e-4
        tokens = theirs.generate(**inputs, do_sample=False, max_new_tokens=12)[0]
        ours = sampler.generate(batch, 1, 12, 0.0)
        count = int(ours.lengths[0])
        assert tokens[batch.ids.shape[1]:][:count].tolist() == ours.ids[0, :count].tolist()


def test_loads_what_transformers_saved(tmp_path, made):
    """A checkpoint that transformers wrote, in shards, with keys equal to its defaults left out."""
    transformers = pytest.importorskip("transformers")
    _, processor, _ = made
    size = processor.tokenizer.get_vocab_size()
    config = transformers.Idefics3Config(
        text_config=dict(model_type="llama", vocab_size=size, hidden_size=64, intermediate_size=128,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         rms_norm_eps=1e-5, rope_theta=1e5, pad_token_id=0),
        vision_config=dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                           num_attention_heads=4, image_size=64, patch_size=8),
        scale_factor=2, image_token_id=processor.image)
    torch.manual_seed(1)
    theirs = transformers.Idefics3ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    raw = json.loads((tmp_path / "config.json").read_text())
    for key in ("layer_norm_eps", "hidden_act", "num_channels"):
        raw["vision_config"].pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    processor.tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours, processor = models.load(tmp_path)
    batch = processor.batch([data.world_example("test", 0)])
    with torch.no_grad():
        expected = theirs(input_ids=batch.ids, pixel_values=batch.pixels[None]).logits
        assert (expected - ours.logits(ours(batch))).abs().max() < 1e-4
    models.save(ours, processor, tmp_path / "again")
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    assert torch.equal(again.lm_head.weight, theirs.lm_head.weight)


def test_round_trip(made):
    model, processor, directory = made
    again, other = models.load(directory)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert other.banned(model.vocabulary).equal(processor.banned(model.vocabulary))
    assert (other.stop, other.pad, other.image) == (processor.stop, processor.pad, processor.image)


@pytest.mark.parametrize("damage, words", [
    (lambda t: t.pop("lm_head.weight"), ["missing lm_head.weight"]),
    (lambda t: t.update(extra=torch.zeros(1)), ["unexpected extra"]),
    (lambda t: t.update({"lm_head.weight": torch.zeros(3, 2)}), ["lm_head.weight", "got [3, 2]"]),
])
def test_loading_is_strict(tmp_path, made, damage, words):
    """strict=False loads nothing and trains from noise: every difference is an error, by name."""
    model, processor, _ = made
    models.save(model, processor, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(models.CheckpointError) as error:
        models.load(tmp_path)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("name, content", [
    ("model.safetensors", b"not tensors"), ("config.json", b"{"), ("tokenizer.json", b"{}"),
    ("config.json", b'{"model_type": "bert"}')])
def test_broken_files_are_named(tmp_path, made, name, content):
    model, processor, _ = made
    models.save(model, processor, tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(models.CheckpointError, match=name):
        models.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(models.CheckpointError, match=name):
        models.load(tmp_path)


def responses(processor, examples, group):
    """Right and made-up answers of different lengths for each example."""
    texts = [processor.response_ids(e.response)[:3 + 5 * g] for e in examples for g in range(group)]
    ids, lengths = data.pad_rows(texts, processor.pad)
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def plain_score(model, processor, examples, ids, mask, group):
    """Log-probs the plain way: prompt and answer in one row, a full softmax."""
    rows = []
    for r in range(len(ids)):
        batch = processor.batch([examples[r // group]])
        width, answer = batch.ids.shape[1], ids[r][mask[r]]
        batch = data.Batch(torch.cat([batch.ids[0], answer])[None],
                           torch.tensor([width + len(answer)]), batch.pixels)
        logp = model.logits(model(batch))[0, width - 1:-1].log_softmax(-1)
        rows.append(logp.gather(1, answer[:, None])[:, 0])
    return rows


def test_shared_prompt_gives_the_same_gradients(made):
    """The prompt is read once per group: log-probs and every gradient as the plain way (fp64)."""
    model, processor = copy.deepcopy(made[0]).double(), made[1]
    examples = questions(processor, 3)
    ids, mask = responses(processor, examples, 2)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    weight = torch.rand(ids.shape, dtype=torch.double)
    batch = processor.batch(examples)
    batch.pixels = batch.pixels.double()
    logprob, _ = model.score(batch, ids, mask, 2)
    shared = gradients((logprob * weight).sum())
    to_double = processor.batch
    processor_double = copy.copy(processor)
    processor_double.batch = lambda some: data.Batch(*(
        x.double() if x.is_floating_point() else x for x in vars(to_double(some)).values()))
    rows = plain_score(model, processor_double, examples, ids, mask, 2)
    plain = gradients(sum((row * weight[r][mask[r]]).sum() for r, row in enumerate(rows)))
    for r, row in enumerate(rows):
        assert torch.allclose(logprob[r][mask[r]], row, atol=1e-9)
    for name in plain:
        assert torch.allclose(plain[name], shared[name], atol=1e-9), name


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
    with pytest.raises(ValueError, match="17 image tokens .* 16 features"):
        model(batch)


def test_sizes():
    """The tabletop presets have the sizes that the README gives."""
    _, processor = models.fresh("s", [data.base_example(i) for i in range(3000)], 0)
    counts = {size: sum(p.numel() for p in models.VLM(
        models.preset_config(size, processor)).parameters()) for size in models.SIZES}
    assert 0.2e6 < counts["s"] < 0.4e6 < 1.2e6 < counts["m"] < 1.6e6 < 6e6 < counts["l"] < 8e6
