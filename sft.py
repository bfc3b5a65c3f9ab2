"""Supervised fine-tuning: imitation.

SFT and reinforcement learning follow one gradient, the sum over tokens of

    weight_t * grad log p(y_t | picture, question, y_<t)

Imitation (this file) weighs somebody's answer, each token by w_t >= 0; exploration (grpo.py)
weighs the model's own answers, each by its advantage, of either sign. Here

    loss = sum_t w_t * -log p(y_t) / number of tokens of the step

Pictures, prompts, scorer, decoding and grader are the same in both. First stands what is imitation;
what every run needs (`Run`, optimizers, data order) follows at the end, and grpo.py imports it.

Departs from the paper: Muon on the matrices beside AdamW, a small model, traces written by the
world instead of sampled from a larger model.
"""
import hashlib
import json
import math
import os
import pathlib
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace

import torch
from safetensors.torch import load_file
from tqdm import tqdm

import data
from evaluate import (BASES, CommonConfig, evaluate, load_examples, option, run_command, run_script,
                      summary)
from kernels import QUIET, RANK, WORLD, Sampler, length_mask, own_pieces, summed
from model import (SIZES, CheckpointError, add_lora, fresh, load_checkpoint, read_file, read_json,
                   recompute_activations, save_checkpoint, write_file)

WEIGHTS = {  # name: w_t from the token's probability p, the entropy there and, where known, the
             # token's log-prob under the model that wrote it; all (B, N), without gradient
    "nll": lambda p, *_: torch.ones_like(p),
    "dft": lambda p, *_: p,                                      # dynamic fine-tuning
    "trsft": lambda p, *_: p / p.clamp(min=0.1),                 # 2512.17636: NLL where p >= 0.1
    "luffy": lambda p, *_: p / (p + 0.1),                        # LUFFY's shaping
    # MIFO (2510.04454): only the tokens of the highest entropy; a fifth of each answer: our choice
    "entropy": lambda p, entropy, _: (entropy >= entropy.nanquantile(0.8, -1, True)).to(p),
}


def imitation_loss(logprob, entropy, written, mask, weight):
    """Sum of weighted token losses. (B, N) -> scalar, to be divided by the tokens of the step.
    written: log-probs under the model that wrote the answers, nan where unknown."""
    with torch.no_grad():            # nan: padding is no token, and takes no part in a quantile
        w = WEIGHTS[weight](logprob.exp(), entropy.where(mask, math.nan), written)
    return -(w * logprob)[mask].sum()


@dataclass
class RunConfig(CommonConfig):
    """Options that sft.py and grpo.py share."""
    init: str = option(None, "model to start from (default: the base; sft.py on a file: none)")
    out: str = option(None, "run directory (default: runs/ and what the run is)")
    examples: int = option(2000, "how many questions of the world to use: its first ones", least=1)
    steps: int = option(None, "training steps", least=1)
    lr: float = option(None, "peak learning rate (default: by size, see README)", least=1e-9)
    warmup: int = option(20, "steps until the peak learning rate")
    save_every: int = option(50, "steps between checkpoints", least=1)
    keep: str = option("", "steps after which the model is also kept as OUT/step-N, e.g. 300,600")
    eval_every: int = option(0, "steps between evaluations on val; 0: first and last")
    eval_examples: int = option(240, "questions of an evaluation", least=1)
    resume: bool = option(False, "go on where the run in OUT stopped")
    micro_batch: int = option(0, "questions per pass, gradients add up; 0: a step's")
    recompute: bool = option(False, "run each layer again backward instead of keeping activations")
    freeze_vision: bool = option(False, "train the decoder and what joins the ViT to it alone")
    lora_rank: int = option(0, "of adapters on a frozen decoder; 0: train the weights")
    lora_alpha: float = option(32.0, "adapters are scaled by this over the rank", least=1e-3)
    lora_targets: str = option("q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
                               "which matrices of the decoder get adapters")


@dataclass
class Config(RunConfig):
    """Options of sft.py. steps: by epochs, 2200 for the base."""
    stage: str = option("sft", "base: mixed pretraining from scratch; sft", ("base", "sft"))
    size: str = option("s", "size of a model made from scratch", tuple(SIZES))
    traces: str = option("canonical", f"{', '.join(data.STYLES)}, or a file of rollouts")
    epochs: int = option(3, "passes over the examples", least=1)
    batch: int = option(64, "examples per step", least=1)
    weight: str = option("nll", "token weight", tuple(WEIGHTS))


def imitate(run, step, examples, prompts, responses):
    """One step on somebody's answers: responses [[id]], one for each example -> metrics."""
    c = run.config
    tokens = sum(map(len, responses))            # of the whole step
    sums = torch.zeros(3, device=c.device)       # of the whole step: a GPU is not waited for
    written = [one.sampled[1] if one.sampled[:1] == (ids,) else [math.nan] * len(ids)
               for one, ids in zip(examples, responses)]         # by whom, see imitation_loss
    run.zero_grad()
    for start, stop in own_pieces(0, len(examples), c.micro_batch):
        ids, lengths = data.pad_rows(responses[start:stop], run.processor.pad)
        ids, mask = ids.to(c.device), length_mask(lengths).to(c.device)        # (B, N)
        with run.autocast():
            logprob, entropy = run.model.score(prompts.part(start, stop).to(c.device), ids, mask)
        known, _ = data.pad_rows(written[start:stop], math.nan)
        loss = imitation_loss(logprob, entropy, known.to(c.device), mask, c.weight) / tokens
        loss.backward()
        sums += torch.stack([loss.detach(), entropy.sum(), logprob.detach().sum()])
    loss, entropy, logprob = summed(sums).tolist()
    grad_norm = run.optimizer_step(loss, examples)
    return dict(loss=loss, grad_norm=grad_norm, updates=int(grad_norm > 0),
                entropy=entropy / tokens, logprob=logprob / tokens, tokens=tokens)


def training_examples(c):
    """-> sequence of Example. Of a file of rollouts (evaluate.py --out), the right ones."""
    if c.traces not in data.STYLES:
        return read_traces(c.traces, load_examples(c, "train"))
    if c.data != "world" and c.traces != "canonical":
        raise data.DataError(f"--traces {c.traces}: of the world alone; a file has its own answers")
    if c.data != "world":
        return load_examples(c, "train")
    if c.stage == "base":
        return data.World("base", size=c.steps * c.batch)
    return data.World("train", c.traces, c.examples)


def read_traces(path, examples):
    """The questions of right rollouts of these examples, to be answered as there."""
    def trace(row, where):
        example, response = examples[row["index"]], data.as_text(row["response"])
        if example.question != row["prompt"]:
            raise data.DataError("another question than in --data; expected its --split train")
        sampled = (row["response_ids"], row["logprobs"]) if "logprobs" in row else ()
        kept = replace(example, response=response, sampled=sampled)
        return kept if row["correct"] else None

    right = list(filter(None, data.read_jsonl(path, trace)))
    if not right:
        raise data.DataError(f"{path}: no right answer among its rows")
    return right


def main(c, one_step=imitate):
    c.out = c.out or f"runs/{c.stage}"
    c.steps = c.steps or (2200 if c.stage == "base" and c.data == "world" else None)
    examples = training_examples(c)
    c.steps = c.steps or c.epochs * math.ceil(len(examples) / c.batch)
    if c.stage == "base" or c.init is None and c.data != "world":
        text = [examples[i] for i in range(min(3000, len(examples)))]    # for the tokenizer
        if c.data == "world":
            text += [data.world_example("train", i, "verbose") for i in range(600)]
        model, processor = fresh(c.size, text, c.seed, c.prompt())
        model.to(c.device)
        c.lr = c.lr or 6e-3
    else:
        model, processor = starting_model(c, small=3e-3, published=1e-5)
    run = Run(c, model, processor, decay=True)
    run.train(examples, c.batch, one_step)


# ------------------------------------------------------------ what every run needs, grpo.py's too
def starting_model(c, small, published):
    """-> model and processor; under LoRA in bf16 on CUDA. Without --init, the world's base model,
    made by sft.py --stage base if there is none. Without --lr, the rate is what val chose for small
    models, or what the paper published for large ones, with LoRA ten times as much."""
    if not c.init:
        c.init = "runs/base"
        made = pathlib.Path(c.init) / "run.json"
        if not (made.exists() and read_json(made).get("finished")):
            run_command(f"python sft.py --stage base {BASES['base']} --out {c.init} "
                        f"--device {c.device} --resume")
    dtype = torch.bfloat16 if c.lora_rank and c.device == "cuda" else torch.float32
    model, processor = load_checkpoint(c.init, c.device, dtype, c.prompt())
    if sum(p.numel() for p in model.parameters()) > 5e7:     # larger than the tabletop's models
        c.lr = c.lr or (10 * published if c.lora_rank else published)
    c.lr = c.lr or small
    return model, processor


def trained_parameters(model, c):
    """{name: parameter} of what a run trains, after LoRA, --recompute and --freeze-vision."""
    if c.lora_rank:
        torch.manual_seed(c.seed)
        add_lora(model, c.lora_rank, c.lora_alpha, c.lora_targets)
    if c.recompute:
        recompute_activations(model)
    for name, p in model.named_parameters():
        if c.freeze_vision and re.search(r"vision_model|visual\.(?!merger)", name):
            p.requires_grad_(False)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def orthogonal(x):
    """A matrix with its singular values brought near 1, by five steps of a Newton-Schulz iteration
    (Jordan 2024). (rows, columns) -> the same"""
    if len(x) > x.shape[1]:
        return orthogonal(x.T).T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with AdamW's size of a step, but in fp32: few CPUs multiply in bf16."""
    def __init__(self, matrices, lr):
        super().__init__(matrices, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        [group] = self.param_groups
        for p in group["params"]:
            if p.grad is not None:
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - 0.95)
                update = orthogonal(p.grad.lerp(momentum, 0.95))                 # Nesterov's
                p.sub_(update, alpha=0.2 * max(p.shape) ** 0.5 * group["lr"])


def make_optimizers(trained, lr):
    """{name: its optimizer}: Muon for the matrices of the layers, AdamW for all else and LoRA.

    Both divide the gradient by its own size: a step of GRPO that only 1 group of 32 has a say in
    moves the weights 0.94 times as far as one in which all have (3 seeds, 40 steps, size s, weak
    base, one thread), and teaches less: after those steps 37 % of the answers had the format,
    against 100 %."""
    matrices = {name: p for name, p in trained.items() if p.ndim == 2 and "lora_" not in name
                and re.search(r"layers\.|blocks\.|connector|merger", name)}
    rest = [p for name, p in trained.items() if name not in matrices]
    adamw = torch.optim.AdamW(rest, lr / 3 if matrices else lr, (0.9, 0.95), weight_decay=0.0)
    muon = Muon(matrices.values(), lr) if matrices else None
    return {name: muon if name in matrices else adamw for name in trained}


def lr_factor(step, steps, warmup, decay):
    """The learning rate of a step (0, 1, ...) over its peak: a linear warm-up; with `decay` it
    falls all the while, linearly to a tenth."""
    rising = min(1.0, (step + 1) / max(1, warmup))
    falling = 1 - 0.9 * step / steps if decay else 1.0
    return rising * falling


def batch_indices(count, batch, step, seed):
    """Indices of the examples of a step: a new shuffle in each epoch, from (seed, epoch). The last
    step of an epoch has what is left of it."""
    epoch, place = divmod(step, math.ceil(count / batch))
    order = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=order)[place * batch:(place + 1) * batch].tolist()


def checksum(name):
    """Of a file, or of the weights in a directory; [] of anything else."""
    path = pathlib.Path(name or "world")
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return [hashlib.file_digest(file.open("rb"), "sha256").hexdigest() for file in files]


class Run:
    """A training run and its directory. Draws are functions of (seed, step): no generator has a
    state to be kept. reference: the initial model, where something is measured against it."""
    def __init__(self, config, model, processor, decay, reference=None):
        self.config, self.model, self.processor = config, model, processor
        self.decay, self.reference = decay, reference
        self.step, self.out = 0, pathlib.Path(config.out)        # step: how many are done
        self.options = asdict(config) | {
            f"{name}-content": checksum(getattr(config, name, None))
            for name in ("init", "data", "traces")}
        self.state = self.out / "training" / "state.safetensors"
        torch.backends.cuda.matmul.allow_tf32 = True             # the head's gradient is fp32
        self.trained = trained_parameters(model, config)
        self.optimizers = make_optimizers(self.trained, config.lr)
        for optimizer in set(self.optimizers.values()):
            optimizer.param_groups[0]["peak_lr"] = optimizer.param_groups[0]["lr"]
        self.open_directory()
        self.sampler = Sampler(model, processor.banned(model.vocabulary), processor.stop,
                               torch.bfloat16 if config.device == "cuda" else None)
        path = os.devnull if RANK > 0 else self.out / "metrics.jsonl"
        self.metrics = open(path, "a", buffering=1)

    def open_directory(self):
        """Takes OUT: a new one, or with --resume the run there, where its options are the same."""
        c, path, metrics = self.config, self.out / "run.json", self.out / "metrics.jsonl"
        if not c.resume and metrics.exists():
            sys.exit(f"error: {self.out} already holds a run; --resume it, or choose another --out")
        if c.init and self.out.resolve() == pathlib.Path(c.init).resolve():
            sys.exit(f"error: --out {self.out} is --init, which would be lost; choose another")
        stored = read_file(read_json, path, {}) if c.resume else {}
        for name, value in self.options.items():
            free = ("resume", "device", "save_every", "micro_batch", "recompute")
            may_change = name in free or name == "steps" and not self.decay
            if name in stored and stored[name] != value and not may_change:
                sys.exit(f"error: --{name.replace('_', '-')} was {stored[name]!r} in {self.out}, "
                         f"is {value!r}: another schedule or data; choose another --out")
        summed(torch.zeros(1))       # all processes have looked before one of them writes
        write_file(path, json.dumps(self.options, indent=1))
        rows = []
        if c.resume and self.state.exists():
            self.restore()
            rows = data.read_jsonl(metrics, skip_bad_rows=True)  # a kill may leave half a row
        kept = [row for row in rows if isinstance(row, dict) and row.get("step", 0) <= self.step]
        write_file(metrics, data.jsonl_text(kept))

    def restore(self):
        tensors = read_file(load_file, self.state)
        self.step = int(tensors.pop("step"))
        if {key.rpartition("/")[0] for key in tensors} != self.trained.keys():
            raise CheckpointError(f"{self.state} holds other weights than this run trains")
        for key, tensor in tensors.items():
            name, _, part = key.rpartition("/")      # e.g. «lm_head.weight», «exp_avg»
            p = self.trained[name]
            if part == "weight":
                p.data.copy_(tensor)
            else:                    # AdamW's number of steps, a scalar, stays on the CPU
                self.optimizers[name].state[p][part] = tensor.to(p.device if tensor.ndim else "cpu")

    def is_kept(self):
        return str(self.step) in self.config.keep.replace(" ", "").split(",")

    def save(self):
        """The checkpoint that others open; last, in one atomic file, the state to resume from."""
        if self.is_kept():
            save_checkpoint(self.model, self.processor, self.out / f"step-{self.step}")
        save_checkpoint(self.model, self.processor, self.out)
        tensors = dict(step=torch.tensor(self.step))
        for name, p in self.trained.items():
            tensors[f"{name}/weight"] = p
            for part, tensor in self.optimizers[name].state[p].items():
                tensors[f"{name}/{part}"] = tensor
        write_file(self.state, tensors)
        summed(torch.zeros(1))       # or torchrun would end the one that writes with those that end

    def autocast(self):
        """bf16 on CUDA, over fp32 weights; plain fp32 on a CPU."""
        return torch.autocast(self.config.device, torch.bfloat16, self.config.device != "cpu")

    def zero_grad(self):
        for optimizer in set(self.optimizers.values()):
            optimizer.zero_grad()

    def optimizer_step(self, loss, examples):
        """Clips the gradient and follows it -> its norm. Stops where that, or the loss, is not a
        number, and names the examples."""
        if WORLD > 1:                # a process that had no pass has no gradient
            for p in self.trained.values():
                p.grad = summed(torch.zeros_like(p) if p.grad is None else p.grad)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            ids = ", ".join(example.id for example in examples)
            kept = f"the checkpoint in {self.out} is good" if self.state.exists() else "none saved"
            sys.exit(f"error: step {self.step + 1}: loss {loss} or gradient norm {norm} is not "
                     f"finite; batch: {ids}; {kept}; a lower --lr is the usual cure")
        if norm == 0:                # Muon would go on in its last direction, by a whole step
            return norm
        factor = lr_factor(self.step, self.config.steps, self.config.warmup, self.decay)
        for optimizer in set(self.optimizers.values()):
            optimizer.param_groups[0]["lr"] = factor * optimizer.param_groups[0]["peak_lr"]
            optimizer.step()
        return norm

    def validate(self):
        """Greedy answers on the split val (never trained on, not the test): kept, and one shown."""
        c = self.config
        examples = load_examples(c, "val", c.eval_examples)
        self.sampler.refresh()
        rows = evaluate(self.sampler, self.processor, examples, "val", new_tokens=c.max_new_tokens)
        self.sampler.reserve(1, 1, 1, 1)             # frees the cache and the graphs of that
        figures = summary(rows)
        self.log(step=self.step, **{f"val_{name}": value for name, value in figures.items()})
        write_file(self.out / "answers" / f"step-{self.step}.jsonl", data.jsonl_text(rows))
        low, high = figures["interval"]
        tqdm.write(f"step {self.step}: val accuracy {figures['accuracy']:.1%} [{low:.1%}, "
                   f"{high:.1%}], format {figures['format']:.1%}, {figures['length']:.1f} tokens\n"
                   f"    {rows[0]['prompt']} -> {rows[0]['response']}")

    def log(self, **row):
        self.metrics.write(json.dumps(row) + "\n")

    def train(self, examples, size, one_step):
        """The loop: `one_step(run, step, *what Processor.prepare made)` -> metrics, until all steps
        are done or Ctrl-C. Of a step's `seconds` it `waited` so many until that was ready."""
        c, interrupted = self.config, []
        batches = (batch_indices(len(examples), size, step, c.seed)
                   for step in range(self.step, c.steps))
        before = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
        prepared = self.processor.prefetch(examples, batches, c.device)
        if self.step == 0:           # what would fail at the first save fails before the first step
            save_checkpoint(self.model, self.processor, self.out)
            self.validate()
        bar = tqdm(range(self.step, c.steps), c.out, initial=self.step, total=c.steps,
                   disable=QUIET)
        for step in bar:
            begin = time.perf_counter()
            batch = next(prepared)
            waited = time.perf_counter() - begin
            metrics = one_step(self, step, *batch)
            self.step, seconds = step + 1, time.perf_counter() - begin
            self.log(step=self.step, **metrics, prompt_tokens=batch[1].lengths.sum().item(),
                     waited=waited, seconds=seconds)
            bar.set_postfix({name: f"{value:.3g}" for name, value in list(metrics.items())[:4]})
            last, stopped = self.step == c.steps, summed(torch.tensor(len(interrupted)))
            if last or c.eval_every and self.step % c.eval_every == 0:
                self.validate()
            if last or stopped or self.step % c.save_every == 0 or self.is_kept():
                self.save()
            if stopped:
                sys.exit(f"stopped after step {self.step}; saved; go on with --resume")
        signal.signal(signal.SIGINT, before)
        write_file(self.out / "run.json", json.dumps(self.options | dict(finished=True), indent=1))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
