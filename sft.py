"""Supervised fine-tuning: imitation as a sum of weighted token losses.

    loss = sum_t w_t * l_t / number of tokens,     l_t = -log p(y_t | picture, question, y_<t)

Pictures, prompts, scorer, decoding and grader are those of grpo.py: a diff of the two files is the
difference between imitation and exploration. `Run` is what every training run needs.

Departs from the paper: Muon on the matrices beside AdamW, a small model, traces written by the
world instead of sampled from a larger model.
"""
import json
import math
import pathlib
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tqdm import tqdm

import data
from evaluate import (AskConfig, evaluate, option, pieces, read_rows, run_command, run_script,
                      summary)
from kernels import Sampler, up_to
from model import (SIZES, add_lora, check_tensors, fresh, load, read_json, recompute_activations,
                   save, write)

WEIGHTS = {  # name: w_t from the token's probability p and the entropy there, without gradient
    "nll": lambda p, entropy: torch.ones_like(p),
    "dft": lambda p, entropy: p,                                 # dynamic fine-tuning
    "trsft": lambda p, entropy: p / p.clamp(min=0.1),            # 2512.17636: NLL where p >= 0.1
    "luffy": lambda p, entropy: p / (p + 0.1),                   # LUFFY's shaping
    # MIFO (2510.04454): only the tokens of the highest entropy; a fifth of each answer: our choice
    "entropy": lambda p, entropy: (entropy >= entropy.nanquantile(0.8, -1, True)).to(p),
}


def imitation_loss(logprob, entropy, mask, weight):
    """Sum of weighted token losses. (B, N) -> scalar, to be divided by the tokens of the step."""
    with torch.no_grad():
        w = WEIGHTS[weight](logprob.exp(), entropy.where(mask, math.nan))
    return -(w * logprob)[mask].sum()


@dataclass
class RunConfig(AskConfig):
    """Options that sft.py and grpo.py share."""
    init: str = option(None, "model to start from (default: the base; sft.py on a file: none)")
    out: str = option(None, "run directory (default: runs/ and what the run is)")
    examples: int = option(2000, "how many questions of the world to use: its first ones", least=1)
    steps: int = option(None, "training steps", least=1)
    lr: float = option(None, "peak learning rate (default: by the size of the model, see README)")
    warmup: int = option(20, "steps until the peak learning rate", least=0)
    save_every: int = option(50, "steps between checkpoints", least=1)
    eval_every: int = option(0, "steps between evaluations on val; 0: first and last", least=0)
    eval_examples: int = option(240, "questions of an evaluation", least=1)
    resume: bool = option(False, "go on where the run in OUT stopped")
    micro_batch: int = option(0, "questions per pass, gradients add up; 0: a step's", least=0)
    recompute: bool = option(False, "run each layer again backward instead of keeping activations")
    freeze_vision: bool = option(False, "train the decoder and what joins the ViT to it alone")
    lora_rank: int = option(0, "of adapters on a frozen decoder; 0: train the weights", least=0)
    lora_alpha: float = option(32.0, "adapters are scaled by this over the rank")
    lora_targets: str = option("q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
                               "which matrices of the decoder get adapters")


@dataclass
class Config(RunConfig):
    """Options of sft.py. steps: by epochs, 2000 for the base."""
    stage: str = option("sft", "base: mixed pretraining from scratch; sft", ("base", "sft"))
    size: str = option("s", "size of a model made from scratch", tuple(SIZES))
    traces: str = option("canonical", "canonical, verbose, answer, or a file of rollouts")
    epochs: int = option(3, "passes over the examples", least=1)
    batch: int = option(64, "examples per step", least=1)
    weight: str = option("nll", "token weight", tuple(WEIGHTS))
    keep: str = option("", "steps after which the model is also kept as OUT/step-N, e.g. 300,600")


class Run:
    """What all training shares. Draws are functions of (seed, step): no generator has a state."""
    def __init__(self, config, model, processor, decay):
        self.config, self.model, self.processor = config, model, processor
        self.decay, self.step, self.keep = decay, 0, getattr(config, "keep", "").split(",")
        self.out = pathlib.Path(config.out)
        self.state = self.out / "training" / "state.safetensors"
        if config.lora_rank:
            torch.manual_seed(config.seed)
            add_lora(model, config.lora_rank, config.lora_alpha, config.lora_targets, config.init)
        if config.recompute:
            recompute_activations(model)
        for name, p in model.named_parameters():
            if config.freeze_vision and re.search(r"vision_model|visual\.(?!merger)", name):
                p.requires_grad_(False)
        torch.backends.cuda.matmul.allow_tf32 = True             # the head's gradient is fp32
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizers = make_optimizers(self.trained, config.lr)
        self.claim()
        self.sampler = Sampler(model, processor.banned(model.vocabulary), processor.stop,
                               torch.bfloat16 if config.device == "cuda" else None)
        self.metrics = open(self.out / "metrics.jsonl", "a", buffering=1)

    def claim(self):
        """Takes the run directory: a new one, or with --resume the same options and its state."""
        options, path = asdict(self.config), self.out / "run.json"
        if not self.config.resume and (self.out / "metrics.jsonl").exists():
            sys.exit(f"error: {self.out} already holds a run; --resume it, or choose another --out")
        stored = read_json(path) if self.config.resume and path.exists() else {}
        free = {"resume", "device", "save_every", "micro_batch", "recompute"}
        for name in sorted(set(stored) & set(options) - free):
            if stored[name] != options[name]:
                sys.exit(f"error: --{name.replace('_', '-')}: the run in {self.out} has "
                         f"{stored[name]!r}, now {options[name]!r}; or choose another --out")
        write(path, json.dumps(options, indent=1))
        if self.config.resume and self.state.exists():
            self.restore()
        path = self.out / "metrics.jsonl"            # forgets the rows of steps to be done again
        kept = [line for line in (path.read_text().splitlines() if self.step else [])
                if line.endswith("}") and json.loads(line)["step"] <= self.step]
        write(path, "".join(line + "\n" for line in kept))

    def restore(self):
        tensors = load_file(self.state, device=self.config.device)
        with safe_open(self.state, "pt") as file:
            self.step = int(file.metadata()["step"])
        weights = {n[:-7]: t for n, t in tensors.items() if n.endswith("/weight")}
        check_tensors(self.trained, weights, self.state)
        for name, p in self.trained.items():
            p.data.copy_(weights[name])
        for key, tensor in tensors.items():
            name, _, part = key.rpartition("/")
            if part != "weight":
                self.optimizers[name].state[self.trained[name]][part] = tensor

    def save(self):
        """The checkpoint that others open; last, in one atomic file, the state to resume from."""
        if str(self.step) in self.keep:
            save(self.model, self.processor, self.out / f"step-{self.step}")
        save(self.model, self.processor, self.out)
        tensors = {f"{name}/{key}": tensor for name, p in self.trained.items() for key, tensor
                   in dict(self.optimizers[name].state[p], weight=p).items()}
        write(self.state, tensors, dict(step=str(self.step)))

    def update(self, losses, examples):
        """One optimizer step along the sum of some losses; stops where that is not a number."""
        total, optimizers = 0.0, set(self.optimizers.values())
        for optimizer in optimizers:
            optimizer.zero_grad()
        for loss in losses:
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0).item()
        if not (math.isfinite(total) and math.isfinite(norm)):
            ids = ", ".join(example.id for example in examples)
            sys.exit(f"error: step {self.step + 1}: loss {total} or gradient norm {norm} is not "
                     f"finite; batch: {ids}. The last checkpoint in {self.out} is intact; a lower "
                     "--lr is the usual cure")
        share = min(1.0, (self.step + 1) / max(1, self.config.warmup))
        share *= 1 - 0.9 * self.decay * self.step / self.config.steps         # to a tenth, linear
        for optimizer in optimizers:
            group = optimizer.param_groups[0]
            group["lr"] = share * group.setdefault("peak", group["lr"])
            optimizer.step()
        return dict(loss=total, grad_norm=norm)

    def validate(self):
        """Greedy accuracy on the split val (never trained on, not the test)."""
        c = self.config
        some = data.load_dataset(c.data, "val", c.eval_examples, c.skip_bad_rows)
        self.sampler.refresh()
        figures = summary(evaluate(self.sampler, self.processor, some, "val",
                                   new_tokens=c.max_new_tokens))
        self.write(step=self.step, **{f"val_{k}": v for k, v in figures.items()})
        low, high = figures["interval"]
        tqdm.write(f"step {self.step}: val accuracy {figures['accuracy']:.1%} [{low:.1%}, "
                   f"{high:.1%}], format {figures['format']:.1%}, {figures['length']:.1f} tokens")

    def autocast(self):
        """bf16 on CUDA, over fp32 weights; plain fp32 on a CPU."""
        return torch.autocast(self.config.device, torch.bfloat16, self.config.device != "cpu")

    def write(self, **row):
        self.metrics.write(json.dumps(row) + "\n")

    def train(self, examples, size, one_step):
        """The loop: `one_step(step, *what Processor.prepare made)` -> figures, until all steps are
        done or Ctrl-C. Of a step's `seconds` it `waited` so many until that was ready."""
        c, stop = self.config, []
        batches = (pick(len(examples), size, step, c.seed) for step in range(self.step, c.steps))
        before = signal.signal(signal.SIGINT, lambda *_: stop.append(True))    # workers inherit it
        ahead = iter(self.processor.ahead(examples, batches, c.device))
        if self.step == 0:
            self.validate()
        bar = tqdm(range(self.step, c.steps), c.out, initial=self.step, total=c.steps, disable=None)
        for step in bar:
            begin = time.perf_counter()
            prepared = next(ahead)
            waited = time.perf_counter() - begin
            figures = one_step(step, *prepared)
            self.step, seconds = step + 1, time.perf_counter() - begin
            self.write(step=self.step, **figures, waited=waited, seconds=seconds)
            bar.set_postfix({k: f"{v:.3g}" for k, v in list(figures.items())[:4]})
            last = self.step == c.steps
            if last or c.eval_every and self.step % c.eval_every == 0:
                self.validate()
            if last or stop or self.step % c.save_every == 0 or str(self.step) in self.keep:
                self.save()
            if stop:
                sys.exit(f"stopped after step {self.step}; saved; go on with --resume")
        signal.signal(signal.SIGINT, before)
        write(self.out / "run.json", json.dumps(asdict(c) | dict(finished=True), indent=1))


def make_optimizers(trained, lr):
    """{name: its optimizer}: Muon for the matrices of the layers, AdamW for all else and LoRA."""
    matrices = {n: p for n, p in trained.items() if p.ndim == 2 and "lora_" not in n
                and re.search(r"layers\.|blocks\.|connector|merger", n)}
    rest = [p for n, p in trained.items() if n not in matrices]
    adamw = torch.optim.AdamW(rest, lr / 3 if matrices else lr, (0.9, 0.95), weight_decay=0.0)
    muon = torch.optim.Muon(matrices.values(), lr=lr, weight_decay=0.0,
                            adjust_lr_fn="match_rms_adamw") if matrices else None
    return {name: muon if name in matrices else adamw for name in trained}


def starting_model(c, small, published):
    """-> model and processor; under LoRA in bf16 on CUDA. Without --init, the world's base model,
    made by sft.py --stage base if there is none. Without --lr, the rate is what val chose for small
    models, or what the paper published for large ones, with LoRA ten times as much."""
    base = pathlib.Path("runs/base/run.json")
    if not c.init and not (base.exists() and read_json(base).get("finished")):
        run_command(f"python sft.py --stage base --out runs/base --device {c.device} --resume")
    c.init = c.init or "runs/base"
    thin = c.lora_rank and c.device == "cuda"
    model, processor = load(c.init, c.device, torch.bfloat16 if thin else torch.float32, c.prompt())
    large = sum(p.numel() for p in model.parameters()) > 5e7
    c.lr = c.lr or (published * (10 if c.lora_rank else 1) if large else small)
    return model, processor


def training_examples(c):
    """-> sequence of Example. Of a file of rollouts (evaluate.py --out), the right ones."""
    if c.data != "world" and c.traces != "canonical":
        raise data.DataError(f"--traces {c.traces}: of the world alone; a file has its own answers")
    if c.data != "world":
        return data.load_dataset(c.data, skip_bad_rows=c.skip_bad_rows)
    if c.stage == "base":
        return data.World("base", size=c.steps * c.batch)
    if c.traces in ("canonical", "verbose", "answer"):
        return data.World("train", c.traces, c.examples)
    right = [row for row in read_rows(c.traces) if row.get("correct", True)]
    if not right:
        raise data.DataError(f"{c.traces}: no right answer among its rows")
    return [replace(data.world_example(*row["id"].partition("/")[::2]), response=row["response"])
            for row in right]


def pick(count, batch, step, seed):
    """Indices of the examples of a step: a new shuffle in each epoch, from (seed, epoch)."""
    batch = min(batch, count)
    epoch, place = divmod(step, count // batch)
    order = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=order)[place * batch:(place + 1) * batch].tolist()


def imitate(run, examples, prompts, responses):
    """One optimizer step -> figures over all tokens of the responses."""
    c, tokens, entropies = run.config, sum(map(len, responses)), []

    def losses():
        for i, j in pieces(0, len(examples), c.micro_batch):
            ids, lengths = data.pad_rows(responses[i:j], run.processor.pad)
            ids, mask = ids.to(c.device), up_to(lengths.to(c.device))
            with run.autocast():
                logprob, entropy = run.model.score(prompts.part(i, j).to(c.device), ids, mask)
            entropies.append(entropy.sum().item())
            yield imitation_loss(logprob, entropy, mask, c.weight) / tokens

    figures = run.update(losses(), examples)
    return figures | dict(entropy=sum(entropies) / tokens, tokens=tokens)


def main(c):
    c.out = c.out or f"runs/{c.stage}"
    scratch = c.stage == "base" or c.init is None and c.data != "world"
    c.steps = c.steps or (2000 if c.stage == "base" and c.data == "world" else None)
    examples = training_examples(c)
    c.steps = c.steps or c.epochs * max(1, len(examples) // c.batch)
    if scratch:                      # the tokenizer learns from the text of the first examples
        text = [examples[i] for i in range(min(3000, len(examples)))]
        if c.data == "world":
            text += [data.world_example("train", i, "verbose") for i in range(600)]
        model, processor = fresh(c.size, text, c.seed, c.prompt())
        model.to(c.device)
        c.lr = c.lr or 1e-2
    else:
        model, processor = starting_model(c, small=3e-3, published=1e-5)
    run = Run(c, model, processor, decay=True)
    run.train(examples, c.batch, lambda step, *prepared: imitate(run, *prepared))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
