"""python -m tests.mutants: breaks one line at a time, and prints which test notices.

A test that cannot fail is worse than none. Each fault is a line of the six modules, or of
report.py, and a wrong one in its place; it is put into a copy of the repository, and the tests of
that file run there until one fails. All of them take about half an hour on two cores; `--only WORD`
takes those whose file or description has the word. tests/test_mutants.py runs those of `rollout`
and `explore`.
"""
import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
LIMIT = 300                          # seconds; a fault may also make something endless


class Fault(NamedTuple):
    file: str                        # whose line is broken
    what: str                        # what goes wrong
    old: str                         # a piece of the file that stands there once
    new: str
    tests: str = ""                  # what to run, where the file's own tests are slow


STEP = "tests/test_grpo.py -k 'textbook or noise or seeds or masked or dropped or kl or trained'"
LOOP = "tests/test_sft.py -k 'textbook or rate or lr or clip or validation or heart or order'"
GIVEN = "tests/test_kernels.py -k given"
MUON = "tests/test_sft.py -k 'muon or orthogonal'"
SAMPLER = "tests/test_kernels.py"
CAPTURE = "tests/test_emulated.py -k 'captured or refresh or shape'"
SCORE = "tests/test_model.py -k 'score or shared or end_mark or lora or adapters'"
PROCESSES = "tests/test_processes.py"
BASE = "tests/test_data.py -k base"
STUDY = "tests/test_study.py -k 'way or course or gains or t_interval or holm or command or unfin'"
FAULTS = [
    # the wiring of a GRPO step, and its objective
    Fault("grpo.py", "answers graded against another question",
          "examples[r // c.group]", "examples[r % len(examples)]", STEP),
    Fault("grpo.py", "advantages given to other answers",
          "c.advantage).view(-1, 1)", "c.advantage).T.reshape(-1, 1)", STEP),
    Fault("grpo.py", "the same noise in every step",
          "c.prompts * (step + 1_000_003 * c.seed)", "c.prompts * 1_000_003 * c.seed", STEP),
    Fault("grpo.py", "the same noise in every run",
          "(step + 1_000_003 * c.seed)", "step", STEP),
    Fault("grpo.py", "the sampler keeps its first weights",
          "    run.sampler.refresh()\n", "", STEP),
    Fault("grpo.py", "sampled at the temperature, trained without it",
          "run.sampler.banned, c.temperature)", "run.sampler.banned)", STEP),
    Fault("grpo.py", "trained without the ban on tokens",
          "c.group, run.sampler.banned, c.temp", "c.group, None, c.temp", STEP),
    Fault("grpo.py", "only the first minibatch is trained on",
          "    for start, stop in minibatches:", "    for start, stop in minibatches[:1]:", STEP),
    Fault("grpo.py", "gradients of minibatches add up",
          "        run.zero_grad()\n", "        run.zero_grad() if start == 0 else None\n", STEP),
    Fault("grpo.py", "weights of tokens are those of each pass",
          "loss = (loss * weights[rows].type_as(loss)).sum()",
          "loss = (loss * token_weights(mask[rows], c.aggregation, c.max_new_tokens)).sum()",
          STEP),
    Fault("grpo.py", "token weights over all minibatches",
          "token_weights(mask[whole], c.aggregation, c.max_new_tokens)",
          "token_weights(mask, c.aggregation, c.max_new_tokens)[whole]", STEP),
    Fault("grpo.py", "old policy is the current one",
          "token_loss(logprob, old[rows],", "token_loss(logprob, logprob.detach(),", STEP),
    Fault("grpo.py", "the KL is to the model itself",
          "with without_adapters(run.reference) as", "with without_adapters(run.model) as", STEP),
    Fault("grpo.py", "the reference is the model in training",
          "copy.deepcopy(model).requires_grad_(False)", "model", STEP),
    Fault("grpo.py", "dropped groups are the others",
          "mask & ~equal", "mask & equal", STEP),
    Fault("grpo.py", "finished answers are masked, not the cut ones",
          "mask & rollouts.finished", "mask & ~rollouts.finished", STEP),
    Fault("grpo.py", "a step without its optimizer",
          "norms.append(run.optimizer_step(summed(loss_sum).item(), examples[start:stop]))",
          "norms.append(1.0)", STEP),
    Fault("grpo.py", "a process knows its own log-probs alone",
          "    summed(new) ", "    new ", PROCESSES),
    Fault("grpo.py", "a process knows its own reference alone",
          "return summed(logprobs)", "return logprobs", PROCESSES),
    Fault("grpo.py", "the policy minimises its reward",
          "return -torch.minimum(w * advantage, clipped * advantage)",
          "return torch.minimum(w * advantage, clipped * advantage)"),
    Fault("grpo.py", "clipped on the wrong side",
          "-torch.minimum(w", "-torch.maximum(w"),
    Fault("grpo.py", "the KL pushes away",
          "loss + c.beta * kl", "loss - c.beta * kl"),
    Fault("grpo.py", "the KL of the other direction",
          "d = logprob - reference", "d = reference - logprob"),
    Fault("grpo.py", "advantage is always 0",
          "(rewards - rewards.nanmean(1, keepdim=True)).nan_to_num()",
          "(0 * rewards).nan_to_num()"),
    Fault("grpo.py", "mean over the batch, not the group",
          "rewards - rewards.nanmean(1, keepdim=True)", "rewards - rewards.nanmean()"),
    Fault("grpo.py", "biased std",
          "keepdim=True) / others).sqrt()", "keepdim=True) / (others + 1)).sqrt()"),
    Fault("grpo.py", "unknown rewards are siblings at the mean",
          "rewards.isfinite().sum(1, keepdim=True) - 1", "torch.tensor(rewards.shape[1] - 1)"),
    Fault("grpo.py", "a rounding is a signal",
          "    rewards = rewards - rewards.nan_to_num(math.inf).amin(1, keepdim=True)\n", ""),
    Fault("grpo.py", "the KL alone is a whole step of Muon",
          "            run.zero_grad()                              # small",
          "            pass                                         # small"),
    Fault("grpo.py", "sampler and trainer may be two models", "if gap_mean > 0.2:", "if False:"),
    Fault("grpo.py", "GSPO: sum instead of mean",
          "log_w.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1) * mask",
          "log_w.sum(1, keepdim=True) * mask"),
    Fault("grpo.py", "CISPO: gradient through the weight",
          "-w.detach().clamp", "-w.clamp"),
    Fault("grpo.py", "Dr. GRPO: over the tokens there are",
          'if how == "token" else len(mask) * longest)',
          'if how == "token" else lengths.sum())'),
    Fault("grpo.py", "importance weight upside down",
          "(old - sampled).exp()", "(sampled - old).exp()"),
    Fault("grpo.py", "format is rewarded as much as the answer",
          "c.format_weight * parts", "1.0 * parts"),
    Fault("grpo.py", "the strict reward is lenient",
          'if c.grader == "lenient":', "if True:", "tests/test_grpo.py -k 'lenient or parts'"),
    Fault("grpo.py", "a failing grader rewards",
          "dict(reward=math.nan)", "dict(reward=0.0)"),
    # imitation, and what every run needs
    Fault("sft.py", "loss per example",
          "/ tokens       # of the whole step", "/ len(examples)", LOOP),
    Fault("sft.py", "loss per pass",
          "mask, c.weight) / tokens", "mask, c.weight) / mask.sum()", LOOP),
    Fault("sft.py", "unlearns",
          "return -(w * logprob)", "return (w * logprob)", LOOP),
    Fault("sft.py", "DFT: gradient through its weight",
          "    with torch.no_grad():            # nan", "    if True:            # nan", LOOP),
    Fault("sft.py", "TrSFT without its trust region",
          "p.clamp(min=0.1)", "p.clamp(min=0.2)", LOOP),
    Fault("sft.py", "entropy over padding, too",
          "entropy.where(mask, math.nan)", "entropy", LOOP),
    Fault("sft.py", "responses of other questions",
          "responses[start:stop]", "responses[::-1][start:stop]", LOOP),
    Fault("sft.py", "no warm-up",
          "min(1.0, (step + 1) / max(1, warmup))", "1.0", LOOP),
    Fault("sft.py", "no decay",
          "1 - 0.9 * step / steps", "1", LOOP),
    Fault("sft.py", "the rate shrinks step by step",
          'factor * optimizer.param_groups[0]["peak_lr"]',
          'factor * optimizer.param_groups[0]["lr"]', LOOP),
    Fault("sft.py", "no clipping",
          "self.trained.values(), 1.0)", "self.trained.values(), 1e9)", LOOP),
    Fault("sft.py", "AdamW at Muon's rate",
          "lr / 3 if matrices else lr", "lr", LOOP),
    Fault("kernels.py", "given tokens are drawn over",
          ".where(given < 0, given)", "", GIVEN),
    Fault("kernels.py", "what was given last is given again",
          "self.given[:, :B] = given.movedim(2, 0)",
          "self.given[:, :B] = torch.maximum(self.given[:, :B], given.movedim(2, 0))", GIVEN),
    Fault("sft.py", "Muon without its momentum",
          "orthogonal(p.grad.lerp(momentum, 0.95))", "orthogonal(p.grad)", MUON),
    Fault("sft.py", "a tall matrix is turned over",
          "return orthogonal(x.T).T", "return orthogonal(x.T.flip(1)).T", MUON),
    Fault("sft.py", "validation on train",
          '"val", c.eval_examples', '"train", c.eval_examples', LOOP),
    Fault("sft.py", "validation of the first model",
          "        self.sampler.refresh()\n", "", LOOP),
    Fault("sft.py", "one order in every epoch",
          "seed * 1_000_003 + epoch", "seed * 1_000_003", LOOP),
    Fault("sft.py", "traces that are wrong are kept",
          'response=response) if row["correct"] else None',
          "response=response)", 'tests/test_sft.py -k rollouts'),
    Fault("sft.py", "traces of other questions",
          'if example.question != row["prompt"]:', "if False:", "tests/test_sft.py -k traces"),
    Fault("sft.py", "an epoch drops its last part",
          "divmod(step, math.ceil(count / batch))", "divmod(step, max(1, count // batch))",
          "tests/test_sft.py -k epoch"),
    Fault("sft.py", "a gradient of zero is a step",
          "        if norm == 0:", "        if False:", "tests/test_sft.py -k zero"),
    Fault("sft.py", "a run may start over the model that it came from",
          "if c.init and self.out.resolve() ==", "if False and self.out.resolve() ==",
          "tests/test_sft.py -k overwritten"),
    Fault("sft.py", "the data may have changed on resume",
          "checksum(config.data)}", "[]}", "tests/test_sft.py -k started"),
    Fault("sft.py", "the reference may have changed on resume",
          "checksum(config.init),", "[],", "tests/test_sft.py -k started"),
    Fault("sft.py", "SFT goes on where its rate has fallen",
          'name == "steps" and not self.decay', 'name == "steps"', "tests/test_sft.py -k longer"),
    Fault("sft.py", "nothing is saved before the first step",
          "            save_checkpoint(self.model, self.processor, self.out)\n            self.v",
          "            self.v", "tests/test_sft.py -k first_save"),
    Fault("sft.py", "resume forgets the optimizer",
          'self.optimizers[name].state[p][part] = tensor.to(p.device if tensor.ndim else "cpu")',
          "pass", 'tests/test_sft.py -k killed'),
    Fault("sft.py", "each process follows its own gradient",
          "p.grad = summed(", "p.grad = (", PROCESSES),
    Fault("sft.py", "a process ends before the run is saved",
          "        summed(torch.zeros(1))       # or", "        # or", PROCESSES),
    Fault("sft.py", "one process stops alone",
          "summed(torch.tensor(len(interrupted)))", "len(interrupted)", PROCESSES),
    Fault("sft.py", "every process writes metrics",
          "os.devnull if RANK > 0 else self.out", "os.devnull if False else self.out", PROCESSES),
    Fault("sft.py", "a run is overwritten",
          "not c.resume and metrics.exists()", "False", "tests/test_sft.py -k second_run"),
    Fault("sft.py", "a loss that is not finite goes on",
          "not (math.isfinite(loss) and", "not (True or", "tests/test_sft.py -k number"),
    # the model and its scorer
    Fault("model.py", "the last token of a prompt is seen twice",
          "per_rollout(length_mask(last,", "per_rollout(length_mask(last + 1,", SCORE),
    Fault("model.py", "an answer sees what follows",
          "device=device).tril()",
          "device=device)", SCORE),
    Fault("model.py", "positions start again",
          "positions = start + torch.arange(N", "positions = 0 * start + torch.arange(N", SCORE),
    Fault("model.py", "rollouts of interleaved prompts",
          "return x.repeat_interleave(group, 0)", "return x.repeat(group, *[1] * (x.ndim - 1))",
          SCORE),
    Fault("model.py", "the prompt has no gradient",
          "_, cache = self(prompts)", "_, cache = torch.no_grad()(self.forward)(prompts)", SCORE),
    Fault("model.py", "patches shuffled in another order",
          "(side, r, side, r)).transpose(2, 3)", "(side, r, side, r)).transpose(2, 4)"),
    Fault("model.py", "key heads in another order",
          "x.repeat_interleave(per_head, 2)",
          "x.repeat(1, 1, per_head, 1)"),
    Fault("model.py", "no rope on keys",
          "(ragged.pad(x) for x in (rotary(q, *rope), rotary(k, *rope), v))",
          "(ragged.pad(x) for x in (rotary(q, *rope), k, v))"),
    Fault("model.py", "LoRA not scaled on save",
          "self.weight + self.scale * (", "self.weight + (", SCORE),
    Fault("model.py", "adapters stay off after an error",
          "    try:\n        yield model\n    finally:\n",
          "    if True:\n        yield model\n    if True:\n", SCORE),
    Fault("model.py", "a missing tensor is no error",
          "model.load_state_dict(tensors, assign=True)",
          "model.load_state_dict(tensors, assign=True, strict=False)"),
    Fault("model.py", "tokens of other files are not read",
          "tokenizer.add_tokens([AddedToken(**token)])", "pass"),
    Fault("model.py", "old shards stay beside new weights",
          "        old.unlink(missing_ok=True)", "        pass"),
    Fault("model.py", "another arithmetic loads",
          "        if part.get(key, only) != only:", "        if False:"),
    Fault("model.py", "weights that are not finite load",
          "tensor.itemsize > 1 and tensor.isfinite().all())", "tensor.itemsize > 1)"),
    Fault("model.py", "a shard outside of the directory is read",
          "{pathlib.Path(name).name for name in", "{name for name in"),
    # the grader and the figures
    Fault("evaluate.py", "every answer is right",
          "    return False if kind(BOX_2D",
          "    return True or kind(BOX_2D"),
    Fault("evaluate.py", "an answer is right if the gold is in it",
          'if answer == gold != "" or',
          "if gold in answer or"),
    Fault("evaluate.py", "x = 3 is y = 3",
          'name.replace(" ", "") != wanted_name.replace(" ", ""):', "False:"),
    Fault("evaluate.py", "any four numbers are a box",
          "box = example.box or re.search", "box = BOX.fullmatch(gold) or re.search"),
    Fault("evaluate.py", "a large number is about the same",
          "/ 10 ** 13 if isinstance(given, float) else 0", "/ 10 ** 13"),
    Fault("evaluate.py", "a gold answer may be none of the choices",
          "or choices and chosen(clean(gold), choices) is None:", "or False:"),
    Fault("evaluate.py", "what cannot be read is a wrong answer",
          "return False if kind(BOX_2D", "return False if True or kind(BOX_2D"),
    Fault("evaluate.py", "answers with equal ids are one question",
          'grouped(rows, "index")', 'grouped(rows, "id")'),
    Fault("evaluate.py", "--out replaces a link",
          "pathlib.Path(c.out).write_text(", "write_file(c.out, "),
    Fault("evaluate.py", "an option may be nan",
          "not least <= value <= most:", "(value < least or value > most):"),
    Fault("evaluate.py", "another unit is the same number",
          "if unit and wanted_unit and unit != wanted_unit:",
          "if False:"),
    Fault("evaluate.py", "sums left to the reader count as worked out",
          "ast.Mult) and not mixed:",
          "ast.Mult) and False:"),
    Fault("evaluate.py", "a number may be as deep as it likes",
          "depth == MAX_DEPTH or operation",
          "operation"),
    Fault("evaluate.py", "half of a box is enough",
          "area(shared) / union > 0.5",
          "area(shared) / area(a) > 0.5"),
    Fault("evaluate.py", "rounded where nobody asked",
          "return abs(wanted) / 1000",
          "return abs(wanted) / 10"),
    Fault("evaluate.py", "the letter of another choice",
          'chr(ord("a") + place)',
          'chr(ord("b") + place)'),
    Fault("evaluate.py", "faithful without a claim",
          "correct and bool(claims) and all(claims)", "correct and all(claims)"),
    Fault("evaluate.py", "faithful with one true step",
          "bool(claims) and all(claims)", "any(claims)"),
    Fault("evaluate.py", "tags inside a thought are formatted",
          'and not re.search(r"</?(think|answer)>", found[1] + found[2])', ""),
    Fault("evaluate.py", "intervals count samples",
          "interval=wilson(accuracy * n, n)", "interval=wilson(accuracy * len(rows), len(rows))"),
    Fault("evaluate.py", "pass@k with replacement",
          "1 - math.comb(n - right, k) / math.comb(n, k)", "1 - (1 - right / n) ** k"),
    Fault("evaluate.py", "answers of other prompts",
          "b = r // samples", "b = r % len(asked)"),
    # the sampler and the log-probs
    Fault("kernels.py", "the loss ignores the temperature",
          "banned, 1 / (temperature or 1))", "banned, 1)", SAMPLER),
    Fault("kernels.py", "no noise: always the likeliest token",
          "self.noisy.fill_(temperature > 0)", "self.noisy.fill_(False)", SAMPLER),
    Fault("kernels.py", "every process makes every pass",
          "[RANK::WORLD]", "[::1]", PROCESSES),
    Fault("kernels.py", "a process knows its own rollouts alone",
          "(summed(x).flatten", "(x.flatten", PROCESSES),
    Fault("kernels.py", "every member of a group gets the same noise",
          "mix(seeds ^ mix(member + 0x5EED))", "mix(seeds ^ mix(0 * member + 0x5EED))", SAMPLER),
    Fault("kernels.py", "the same noise at every token",
          "gumbel(mix(keys ^ mix(generated.int())), len(weight))", "gumbel(mix(keys), len(weight))",
          SAMPLER),
    Fault("kernels.py", "a banned token may be drawn",
          ".mul_(inverse_temperature).masked_fill_(banned, NEGATIVE)",
          ".mul_(inverse_temperature)", SAMPLER),
    Fault("kernels.py", "what follows the end counts",
          "stops.cumsum(1) - stops.long() > 0", "stops.cumsum(1) > 9", SAMPLER),
    Fault("kernels.py", "the end mark does not count",
          "stops.cumsum(1) - stops.long() > 0", "stops.cumsum(1) > 0", SAMPLER),
    Fault("kernels.py", "a copy of the weights is never refreshed",
          "            mine.copy_(theirs)", "            pass", SAMPLER),
    Fault("kernels.py", "rollouts start one token late in position",
          "positions = (self.last_position + self.generated)",
          "positions = (self.last_position + self.generated + 1)", SAMPLER),
    Fault("kernels.py", "the prompt's last token is seen twice",
          "length_mask(last[:, 0], T)", "length_mask(last[:, 0] + 1, T)", SAMPLER),
    Fault("kernels.py", "members see each other's tokens",
          "slot[:, None, None].expand(*self.mask.shape[:3], 1)",
          "slot.expand(*self.mask.shape[:3], -1)", SAMPLER),
    Fault("kernels.py", "the chunks' gradients of the head are summed in bf16",
          "hidden.dtype\n    if torch.is_autocast", "hidden.dtype\n    if not torch.is_autocast",
          SAMPLER),
    Fault("kernels.py", "large logits are held until backward",
          "    if len(hidden) > rows:", "    if False:", SAMPLER),
    Fault("kernels.py", "a graph outlives its buffers",
          "self.graphs, self.cache = {}, None", "self.cache = None", CAPTURE),
    Fault("kernels.py", "a graph knows the temperature it was captured at",
          "self.inverse_temperature.fill_(1 / (temperature or 1))",
          "self.inverse_temperature = torch.full((1,), 1 / (temperature or 1))", CAPTURE),
    Fault("kernels.py", "a place is handed on with its old tokens visible",
          "        self.mask[groups] = NEGATIVE\n", "", SAMPLER),
    # the world, the rows and the tokens
    # the study
    Fault("evaluate.py", "the points of a run forget what was spent before",
          "spent, points, since = Counter(spent)", "spent, points, since = Counter()", STUDY),
    Fault("evaluate.py", "a reward is the mean of all steps so far",
          "        since = []\n    return points", "    return points", STUDY),
    Fault("evaluate.py", "sampling costs nothing",
          'passes = 3 + ("reward" in row)', "passes = 3", STUDY),
    Fault("evaluate.py", "all seeds start from one base",
          '{c.out}/seed-{seed}"', '{c.out}/seed-0"', STUDY),
    Fault("evaluate.py", "a changed command is not run again",
          'came_by.read_text() != "\\n".join(commands)', "False", STUDY),
    Fault("evaluate.py", "only the last command may change",
          'came_by.read_text() != "\\n".join(commands)', 'commands[-1] not in came_by.read_text()',
          STUDY),
    Fault("tests/report.py", "one seed more than there is",
          "(ANGLES.cos() ** (n - 2))", "(ANGLES.cos() ** (n - 1))", STUDY),
    Fault("tests/report.py", "half of a p-value",
          "p = 1 - within[", "p = 0.5 - 0.5 * within[", STUDY),
    Fault("tests/report.py", "after a claim that fails others stand",
          'stands = stands and row["p"] * left < 0.05', 'stands = row["p"] * left < 0.05', STUDY),
    Fault("tests/report.py", "no correction for many claims",
          'row["p"] * left < 0.05', 'row["p"] < 0.05', STUDY),
    Fault("evaluate.py", "the best of a run is its last",
          "regret=max(held_out) - held_out[-1]", "regret=max(held_out) - max(held_out)", STUDY),
    # the world
    Fault("data.py", "a base reasons more before a picture than in words",
          "(0.25 if words else 0.12)", "(0.12 if words else 0.25)"),
    Fault("data.py", "the base has seen the test",
          'world_example("train", 10_000_000', 'world_example("test", 10_000_000', BASE),
    Fault("data.py", "few pairs are counted",
          "rng.choice((0, 4))", "rng.choice((4, 4))", "tests/test_data.py -k pairs"),
    Fault("data.py", "the base reasons alike whatever the steps",
          '* example.response.count(".")', "* 3", BASE),
    Fault("model.py", "a place is one of 64",
          "table.copy_(table[:, :1] + table[:1])", "table.copy_(table)",
          "tests/test_model.py -k place_starts"),
    Fault("data.py", "rows stand for columns",
          'f"({thing.column},{thing.row})"', 'f"({thing.row},{thing.column})"'),
    Fault("data.py", "boxes of the grid are read by row",
          'f"[{thing.column},{thing.row},', 'f"[{thing.row},{thing.column},'),
    Fault("grpo.py", "a part of a number earns the lenient reward",
          "or example.answer in numbers", "or example.answer in response",
          "tests/test_grpo.py -k lenient"),
    Fault("data.py", "scenes of the test are trained on",
          "test=[0], ood", "test=range(8), ood"),
    Fault("data.py", "training shows held-out pairs",
          "(7, 9, PAIRS) if split == \"ood\" else (2, 6, KNOWN)", "(7, 9, PAIRS)"),
    Fault("data.py", "every step is true",
          "return holds(**values)", "return True"),
    Fault("data.py", "a filler is a true step",
          "None if part in FILLERS", "True if part in FILLERS"),
    Fault("data.py", "a picture from outside the data directory",
          ".resolve().relative_to(root)", ".resolve()"),
    Fault("data.py", "the end mark is not learnt",
          "self.encode(self.LEAD + self.plain(text)) + [self.stop]",
          "self.encode(self.LEAD + self.plain(text))"),
    Fault("data.py", "a special token in an answer ends it",
          "self.encode(self.LEAD + self.plain(text))", "self.encode(self.LEAD + text)"),
    Fault("data.py", "a special token in a question is one",
          "map(self.plain, example.question.split(IMAGE))", "example.question.split(IMAGE)"),
    Fault("data.py", "photographs lie on their side",
          "        image = ImageOps.exif_transpose(image)\n", ""),
    Fault("data.py", "transparency is black",
          'Image.new("RGBA", image.size, "white")', 'Image.new("RGBA", image.size, "black")'),
    Fault("data.py", "16 bits of grey are white",
          'if image.mode.startswith("I"):', "if False:"),
    Fault("data.py", "a field with a picture is dropped",
          "in filter(UNREAD.fullmatch, row", "in filter(None, [] and row"),
    Fault("data.py", "a chat beside other fields is dropped",
          '|[A-J]|messages|"', '|[A-J]|"', "tests/test_data.py -k 'bad_rows or dropped'"),
    Fault("data.py", "<image 1> is text",
          "    if stray or question.count", "    if question.count"),
    Fault("data.py", "one of two answers is dropped",
          "if any(value != values[0] for value in values):", "if False:"),
    Fault("data.py", "what stands in a thought is the answer",
          '_, _, text = text.rpartition("</think>")', "pass"),
    Fault("data.py", "all is trained on",
          "dict(train=examples[:kept] or examples,", "dict(train=examples,"),
    Fault("data.py", "placeholders may be sampled",
          "if token.special)}", "if not token.special)}"),
    Fault("data.py", "pictures of the prompts before",
          "self.counts[:start].sum(0)", "self.counts[:0].sum(0)"),
    Fault("data.py", "positions after a picture do not jump",
          "positions[stop:] += max(rows, columns) - rows * columns", "positions[stop:] += 0"),
]


def kill(fault):
    """-> the test that fails with this fault in the code, «endless», or None: it survives."""
    with tempfile.TemporaryDirectory() as directory:
        copy = pathlib.Path(directory) / "copy"
        ignored = shutil.ignore_patterns(".git", "runs", "__pycache__", ".pytest_cache", ".venv")
        shutil.copytree(ROOT, copy, ignore=ignored)
        path = copy / fault.file
        text = path.read_text(encoding="utf-8")
        assert text.count(fault.old) == 1, f"{fault.file}: not once: {fault.old!r}"
        path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        tests = fault.tests or f"tests/test_{fault.file}"
        command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider {tests}"
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        try:
            done = subprocess.run(command, shell=True, cwd=copy, env=environment, timeout=LIMIT,
                                  stdin=subprocess.DEVNULL, capture_output=True, text=True)
        except subprocess.TimeoutExpired:
            return "endless"
    found = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.M)
    assert done.returncode in (0, 1, 2), done.stdout[-2000:] + done.stderr[-2000:]
    return found[1] if done.returncode else None


def parser():
    made = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", default="", help="those whose file or description has this word")
    made.add_argument("--jobs", type=int, default=2, help="how many at a time (default: 2)")
    return made


def main():
    args = parser().parse_args()
    faults = [fault for fault in FAULTS if args.only in fault.file + " " + fault.what]
    survivors = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for fault, killer in zip(faults, pool.map(kill, faults)):
            survivors += killer is None
            print(f"{fault.file:12} {fault.what:50} {killer or 'SURVIVES'}", flush=True)
    print(f"{len(faults)} faults, {survivors} survivors")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
