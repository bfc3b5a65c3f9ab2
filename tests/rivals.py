"""Other people's libraries on our checkpoints: what `python kernels.py --against` compares with.

Each takes the directory of a checkpoint, so weights, prompts and lengths are ours.
"""
import statistics
import tempfile
import time

import torch


def generate(directory, batch, group, new_tokens, dtype):
    """-> a function that samples as many tokens with transformers."""
    from transformers import AutoModelForImageTextToText
    theirs = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype)
    batch = batch.to("cuda" if torch.cuda.is_available() else "cpu")
    theirs, options = theirs.to(batch.ids.device), dict(do_sample=True, top_k=0)
    return lambda: theirs.generate(
        input_ids=batch.ids, attention_mask=torch.ones_like(batch.ids),
        pixel_values=batch.pixels[:, None].to(dtype), num_return_sequences=group,
        min_new_tokens=new_tokens, max_new_tokens=new_tokens, **options)


def median_step(Trainer, Config, directory, rows, **options):
    """Trains ten steps with TRL -> median seconds from the end of a step to the end of the next."""
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        cuda = torch.cuda.is_available()
        config = Config(out, max_steps=10, report_to="none", save_strategy="no", use_cpu=not cuda,
                        bf16=cuda, disable_tqdm=True, logging_steps=99,
                        gradient_checkpointing=False, **{k: v for k, v in options.items()
                                                         if k != "reward_funcs"})
        more = {k: v for k, v in options.items() if k == "reward_funcs"}
        Trainer(AutoModelForImageTextToText.from_pretrained(directory), args=config,
                train_dataset=Dataset.from_list(rows), callbacks=[Clock()],
                processing_class=AutoProcessor.from_pretrained(directory), **more).train()
    return statistics.median(after - before for before, after in zip(ends[1:], ends[2:]))


def grpo(directory, examples, group, new_tokens):
    """Seconds of a GRPO step with TRL; its reward counts a letter, which costs it nothing."""
    from trl import GRPOConfig, GRPOTrainer
    rows = [dict(prompt=[dict(role="user", content=e.question.removeprefix("<image>"))],
                 image=e.images[0]) for e in examples] * 16
    return median_step(
        GRPOTrainer, GRPOConfig, directory, rows, num_generations=group, beta=0.01,
        per_device_train_batch_size=len(examples) * group, max_completion_length=new_tokens,
        generation_kwargs=dict(min_new_tokens=new_tokens),
        reward_funcs=lambda completions, **_: [float(c[0]["content"].count("a"))
                                               for c in completions])


def sft(directory, examples):
    """Seconds of an SFT step with TRL on these rows."""
    from trl import SFTConfig, SFTTrainer
    rows = [dict(images=e.images, prompt=[dict(role="user", content=[
        dict(type="image"), dict(type="text", text=e.question.removeprefix("<image>"))])],
        completion=[dict(role="assistant", content=[dict(type="text", text=e.response)])])
        for e in examples]
    return median_step(SFTTrainer, SFTConfig, directory, rows, max_length=None,
                       per_device_train_batch_size=len(examples))
