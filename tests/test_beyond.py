"""A run directory goes on in TRL, and what TRL saves comes back; tests/onward.py does it."""
import json
import pathlib
import runpy
import shutil
import subprocess
import sys

import pytest
import torch

import data
import evaluate
from model import VLM, load_checkpoint, preset_config, save_checkpoint

ROOT = pathlib.Path(__file__).parents[1]
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
CPU = dict(max_steps=2, per_device_train_batch_size=4, report_to="none", save_strategy="no",
           bf16=False, use_cpu=True, disable_tqdm=True, learning_rate=1e-3)
WAYS = dict(sft={}, grpo=dict(num_generations=4, max_completion_length=8))


def asked(example, processor):
    """The text of a question after its picture, as a run of ours asks it."""
    text = f"{example.question}\n{processor.style['instruction']}"
    return text.removeprefix(data.IMAGE).removesuffix("\n")


def check_saved(saved, before):
    """What TRL saved is another model than `before` (a directory), and ours and transformers'
    agree on it: ids and pixels of a prompt, logits, what is never sampled."""
    model, processor = load_checkpoint(saved)
    _, earlier = load_checkpoint(before)
    old, new = (load_checkpoint(place)[0].state_dict() for place in (before, saved))
    assert old.keys() == new.keys() and any(not torch.equal(old[name], new[name]) for name in old)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(saved).eval()
    example = data.world_example("test", 0)
    batch = processor.batch([example])
    assert torch.equal(batch.ids, earlier.batch([example]).ids)
    content = [dict(type="image", image=example.images[0]),
               dict(type="text", text=asked(example, processor))]
    inputs = transformers.AutoProcessor.from_pretrained(saved).apply_chat_template(
        [dict(role="user", content=content)], add_generation_prompt=True, tokenize=True,
        return_dict=True, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], batch.ids)
    assert torch.equal(inputs["pixel_values"][0], batch.pixels)
    with torch.no_grad():
        expected, got = theirs(**inputs).logits, model.lm_head(model(batch)[0])
    assert (expected - got).abs().max() < 1e-4
    banned = processor.banned(model.vocabulary).nonzero()[:, 0].tolist()
    assert theirs.generation_config.suppress_tokens == banned


def tied_copy(start, directory):
    """The run directory `start` with one matrix for embedding and head."""
    model, processor = load_checkpoint(start)
    tied = VLM(preset_config("s", processor) | dict(tie_word_embeddings=True))
    weights = model.state_dict()     # the head's are small: an embedding's allow one token only
    weights["model.text_model.embed_tokens.weight"] = weights["lm_head.weight"]
    tied.load_state_dict(weights)
    save_checkpoint(tied, processor, directory)
    return directory


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tied", [False, True])
def test_trl_trains_a_run_directory_and_we_open_what_it_saves(start, tmp_path, way, tied):
    """Side files that only our save wrote, a head that is tied: a run would end in TRL."""
    directory = tied_copy(start, tmp_path / "tied") if tied else start
    examples = [data.world_example("train", i) for i in range(8)]
    rows = [dict(images=one.images, prompt=[dict(role="user", content=[
        dict(type="image"), dict(type="text", text=one.question.removeprefix(data.IMAGE))])],
        completion=[dict(role="assistant", content=[dict(type="text", text=one.response)])])
        for one in examples]
    Trainer, Config = dict(sft=(trl.SFTTrainer, trl.SFTConfig),
                           grpo=(trl.GRPOTrainer, trl.GRPOConfig))[way]
    more = dict(reward_funcs=lambda completion_ids, **_: [float(sum(ids)) for ids in completion_ids]
                ) if way == "grpo" else {}
    out = str(tmp_path / "out")
    trainer = Trainer(str(directory), args=Config(out, **CPU, **WAYS[way]), **more,
                      train_dataset=datasets.Dataset.from_list(rows))
    trainer.train()
    trainer.save_model()
    check_saved(out, directory)
    assert load_checkpoint(out)[0].config.tied == tied


def test_only_our_prompt_file_is_lost(start, tmp_path):
    """README says that prompt.json is all that has to be copied."""
    model, processor = load_checkpoint(start, prompt=dict(instruction="Think.", longest_edge=128))
    save_checkpoint(model, processor, tmp_path / "ours")
    opened = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    opened.save_pretrained(tmp_path / "theirs")
    transformers.AutoProcessor.from_pretrained(tmp_path / "ours").save_pretrained(
        tmp_path / "theirs")
    example, expected = data.world_example("test", 0), processor
    assert load_checkpoint(tmp_path / "theirs")[1].style == data.PROMPT
    shutil.copy(tmp_path / "ours" / "prompt.json", tmp_path / "theirs")
    got = load_checkpoint(tmp_path / "theirs")[1]
    assert got.style == expected.style and got.style["instruction"] == "Think."
    assert torch.equal(got.batch([example]).ids, expected.batch([example]).ids)


# ------------------------------------------------------------------------ tests/onward.py, rewards
@pytest.mark.parametrize("way", WAYS)
def test_onward_on_two_processes(start, tmp_path, way):
    """A file of ours, asked with an instruction, trained by two processes, and evaluated with the
    commands that follow."""
    pytest.importorskip("accelerate")
    script = ROOT / "tests" / "onward.py"
    model, processor = load_checkpoint(start, prompt=dict(instruction="Think."))
    save_checkpoint(model, processor, tmp_path / "start")
    rows = []
    for index in range(12):
        one = data.world_example("train", index)
        one.images[0].save(tmp_path / f"{index}.png")
        answer = json.loads(one.answer) if one.box else one.answer
        rows.append(dict(images=[f"{index}.png"], problem=one.question, answer=answer,
                         response=one.response))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = (f"--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no "
               f"--cpu {script} {way} start rows.jsonl --output_dir out --max_steps 2 "
               "--per_device_train_batch_size 4 --report_to none --save_strategy no "
               "--use_cpu true --bf16 false").split()
    for name, value in WAYS[way].items():
        options += [f"--{name}", str(value)]
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options]
    done = subprocess.run(launch, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copy(tmp_path / "start" / "prompt.json", tmp_path / "out")
    if way == "sft":                 # every answer of a random model is wrong, so GRPO stands still
        check_saved(tmp_path / "out", tmp_path / "start")
    assert load_checkpoint(tmp_path / "out")[1].style["instruction"] == "Think."
    command = "evaluate.py --model out --data rows.jsonl --limit 4 --max-new-tokens 8 --out a.jsonl"
    script, *words = command.split()
    done = subprocess.run([sys.executable, ROOT / script, *words], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = data.read_jsonl(tmp_path / "a.jsonl")
    assert len(answers) == 4
    assert all("Think." in processor.decode(row["prompt_ids"]) for row in answers)


@pytest.mark.parametrize("style", [{}, dict(instruction="Think.", system="Be brief.",
                                            answer_format="boxed")])
def test_rows_of_the_script_are_ours(start, tmp_path, monkeypatch, style):
    """Prompt and response that TRL learns are, token for token, those that sft.py learns."""
    model, processor = load_checkpoint(start, prompt=style)
    save_checkpoint(model, processor, tmp_path)
    monkeypatch.setattr(sys, "argv", ["onward.py", "grpo", str(tmp_path), "world"])
    space = runpy.run_path(str(ROOT / "tests" / "onward.py"))
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path)
    for index in range(3):
        one = space["examples"][index]
        row = space["row"](index, one)
        prompt, whole = (theirs(images=row["images"], text=theirs.apply_chat_template(
            messages, add_generation_prompt=generate), add_special_tokens=False)["input_ids"][0]
            for messages, generate in ((row["prompt"], True),
                                       (row["prompt"] + row["completion"], False)))
        assert prompt == processor.batch([one]).ids[0].tolist()
        assert whole == prompt + processor.response_ids(one.response) + processor.encode("\n")
        boxed = style.get("answer_format") == "boxed"
        said = [f"\\boxed{{{one.answer}}}" if boxed else f"<answer>{one.answer}</answer>", "no"]
        completions = [[dict(role="assistant", content=text)] for text in said]
        assert space["reward"](completions=completions, index=[index] * 2) == [1, 0]


def test_rewards_of_other_engines():
    """1 for a right answer, 0 for a wrong one, in the form that each engine wants."""
    space = runpy.run_path(str(ROOT / "tests" / "rewards.py"))
    cases = [("<think>2.</think><answer>3</answer>", "3", 1), ("\\boxed{\\frac{1}{2}}", "1/2", 1),
             (f"<think>{'so ' * 200}</think><answer>3</answer>", "3", 1),
             ("<answer>4</answer>", "3", 0), ("", "3", 0), ("yes " * 200, "yes", 0),
             ("<answer>[0, 0, 9, 10]</answer>", "[0, 0, 10, 10]", 1),
             ("<answer>[8, 8, 9, 10]</answer>", "[0, 0, 10, 10]", 0)]
    for response, gold, right in cases:
        assert space["compute_score"]("ours", response, gold, {}) == right
    inputs = [dict(response=response, response_length=9, ground_truth=gold)
              for response, gold, _ in cases]
    assert [score["overall"] for score in space["batch"](inputs)] == [right for *_, right in cases]
    for index in range(12):
        one = data.world_example("test", index)
        assert space["compute_score"]("ours", one.response, one.answer) == 1
        assert evaluate.grade(one.response, one).correct
