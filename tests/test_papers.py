"""The related systems: the arithmetic of each from its formula, and a smoke run of every file."""
import ast
import collections
import dataclasses
import functools
import importlib
import json
import math
import pathlib
import random
import shlex
import subprocess
import sys
import threading
import types

import pytest
import torch

import data
import evaluate
import grpo
import model as models
import sft
from conftest import score_plain
from tests import papers
from tests.papers import (__main__ as all_papers, acereason, heals, mifo, openvlthinker, pear,
                          preserves, quagmires, synergy, trapo, umr, vlaa)

FILES = sorted((pathlib.Path(__file__).parent / "papers").glob("[a-z]*.py"))
TINY = dict(device="cpu", steps=2, prompts=4, group=4, max_new_tokens=8, eval_examples=2,
            examples=16, warmup=0, lr=1e-3)


def config(module, start, out, **changes):
    known = {f.name for f in dataclasses.fields(module.Config)}
    tiny = {name: value for name, value in TINY.items() if name in known}
    return module.Config(**dict(tiny, init=str(start), out=str(out)) | changes)


def run_of(module, start, out, **changes):
    c = config(module, start, out, **changes)
    return sft.Run(c, *sft.starting_model(c, None, None), decay=False)


def metrics(out):
    return data.read_jsonl(out / "metrics.jsonl")


# ------------------------------------------------------------------------------------ the house
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_paper_is_a_page(path):
    """At most 80 lines of code; a header with the paper's number and its sentence."""
    tree = ast.parse(path.read_text())
    header, code = ast.get_docstring(tree), set()
    for node in ast.walk(tree):
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if hasattr(node, "lineno") and not docstring and not isinstance(node, ast.Constant):
            code |= {node.lineno, node.end_lineno} if hasattr(node, "body") else set(
                range(node.lineno, node.end_lineno + 1))
    lines = path.read_text().splitlines()
    code = {i for i in code if i > len(header.splitlines()) and lines[i - 1].strip()}
    assert len(code) <= 80
    assert "Its sentence: " in header and "arXiv " in header.replace("(", "")


@pytest.mark.parametrize("name", all_papers.NAMES)
def test_cells_of_a_paper_parse(name):
    """With options that exist; each model has a directory of its own, the study's among them."""
    finding, c = all_papers.FINDINGS[name], evaluate.StudyConfig(preset="paper", device="cpu")
    configs = {"sft.py": sft.Config, "grpo.py": grpo.Config, "evaluate.py": evaluate.Config}
    known, owners = papers.cells_of(finding), {}
    for cell in known + evaluate.PRESETS["paper"]["cells"]:
        assert owners.setdefault(evaluate.way_to(cell, c, 0)[0], cell) == cell
    for command in sum((evaluate.commands_of(cell, c, 0) for cell in known), []):
        _, script, *words = shlex.split(command)
        Config = configs.get(script)
        if script == "-m":
            file, train, *words = words
            Config = importlib.import_module(file).Config
            assert train == "train"
        assert evaluate.parse(Config, words).device == "cpu"


def test_a_paper_knows_its_trainings_alone():
    """MIFO's file once needed that of another paper to be imported by somebody: here a process for
    each of them imports no other."""
    code = ("import importlib, os, evaluate\nfrom tests.papers import cells_of\n"
            "c = evaluate.StudyConfig(preset='paper')\n"
            f"for name in {all_papers.NAMES}:\n"
            "    if os.fork() == 0:\n"
            "        paper = importlib.import_module(f'tests.papers.{name}')\n"
            "        ways = [evaluate.way_to(cell, c, 0) for cell in cells_of(paper.FINDING)]\n"
            "        os._exit(len(ways) < 4)\n"
            "    assert os.wait()[1] == 0, name\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=pathlib.Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr


def test_cells_of_all_papers_have_directories_of_their_own():
    """«@middle+grpo» and «@middle/grpo» once had the same."""
    c, owners = evaluate.StudyConfig(device="cpu"), {}
    for finding in all_papers.FINDINGS.values():
        for cell in papers.cells_of(finding):
            assert owners.setdefault(evaluate.way_to(cell, c, 0)[0], cell) == cell


def test_claims_are_of_cells_that_run_and_the_page_shows_them():
    rng, made = random.Random(0), []
    names = dict.fromkeys(sum(map(papers.cells_of, all_papers.FINDINGS.values()), []))
    for seed in range(6):
        for cell in names:
            whole = dict(accuracy=rng.random(), interval=[0.1, 0.9])
            figures = {name: rng.random() for some in all_papers.MEASURES.values() for name in some}
            made.append(dict(cell=cell, seed=seed, trace_logprob=-rng.random(), **figures,
                             splits={split: whole for split in ("test", "ood", "text")}))
    page = all_papers.page(dict(cells=made))
    for name, finding in all_papers.FINDINGS.items():
        assert finding.question in page and all(claim in page for claim in finding.claims)
        assert all(f">{series}</text>" in page for series in finding.series)
    assert page.count("<svg") == sum(len(one.splits) for one in all_papers.FINDINGS.values())


def test_measures_are_kept(tmp_path, monkeypatch):
    """What is there is not measured again; other seeds and cells are left alone."""
    cells = [dict(cell=cell, seed=seed) for cell in ("weak/sft", "weak/trapo") for seed in (1, 2)]
    (tmp_path / "results.json").write_text(json.dumps(dict(cells=cells)))
    c = evaluate.StudyConfig(out=str(tmp_path), first_seed=2)
    looked = []
    finding = types.SimpleNamespace(cells=lambda: {"": ["weak/trapo"]})

    def length(directory):
        looked.append(directory)
        return len(directory.name)

    for _ in range(2):
        papers.measure(finding, c, length=length)
    assert looked == [tmp_path / "seed-2" / "weak-trapo"]
    kept = json.loads((tmp_path / "results.json").read_text())
    assert [cell.get("length") for cell in kept["cells"]] == [None, None, None, 10]
    assert papers.measured(finding, kept, ["length"]) == [["model", "length"],
                                                          ["weak/trapo", "10.000"]]


# ---------------------------------------------------------------------------------------- PEAR
def test_mean_logprob_is_that_of_the_textbook(start):
    """Per token, the end mark among them, padding not."""
    model, processor = models.load_checkpoint(start)
    examples = [data.world_example("val", i) for i in range(4)]
    ids, lengths = data.pad_rows([processor.response_ids(one.response) for one in examples], 0)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    expected, _ = score_plain(model, processor.batch(examples), ids, mask, 1, None, 1.0)
    got = papers.mean_logprob(start, examples)
    assert got == pytest.approx(expected[mask].mean().item(), abs=1e-4)


def pear_inputs(ratios):
    """p, entropy, written of one answer of these log-ratios, padded by two."""
    written = torch.tensor([[-1.0] * len(ratios) + [math.nan] * 2])
    p = (written + torch.tensor([[*ratios, 0.0, 0.0]])).nan_to_num(0).exp()
    return p, torch.zeros_like(p).where(~written.isnan(), math.nan), written


def test_pear_of_a_models_own_traces_discounts_alone():
    p, entropy, written = pear_inputs([0.0] * 5)
    expected = [pear.GAMMA ** (4 - t) for t in range(5)]
    assert pear.suffix(p, entropy, written)[0, :5].tolist() == pytest.approx(expected)
    assert pear.sequence(p, entropy, written)[0, :5].tolist() == pytest.approx([1] * 5)
    unknown = torch.full_like(written, math.nan)
    assert pear.suffix(p, entropy, unknown)[0, :5].tolist() == pytest.approx(expected)


def test_pear_by_hand():
    """Clipped ratios: those after a token, of the whole answer, after its block of four."""
    p, entropy, written = pear_inputs([0.1, 0.2, 9.0, -9.0, 0.05, 0.02])
    d = [0.1, 0.2, 0.3, -0.08, 0.05, 0.02]
    suffix = [math.exp(sum(d[t + 1:])) * pear.GAMMA ** (5 - t) for t in range(6)]
    assert pear.suffix(p, entropy, written)[0, :6].tolist() == pytest.approx(suffix)
    assert pear.sequence(p, entropy, written)[0, 0].item() == pytest.approx(math.exp(sum(d)))
    blocks = [suffix[3]] * 4 + [1.0] * 2
    assert pear.block(p, entropy, written)[0, :6].tolist() == pytest.approx(blocks)
    p, entropy, written = pear_inputs([9.0] * 40)
    assert pear.suffix(p, entropy, written)[0, 0].item() == pytest.approx(math.exp(5))


def test_pear_needs_a_writer():
    """The world's own traces have no log-probs: without them all weights would be the discounts."""
    for style in data.STYLES:
        with pytest.raises(data.DataError, match=f"{style}: expected a file of rollouts"):
            pear.train(pear.Config(traces=style))


# ------------------------------------------------------------------------------------- TRAPO
def test_given_shares_of_traces(tmp_path, start):
    run = run_of(synergy, start, tmp_path, max_new_tokens=40)
    examples = [data.world_example("train", i) for i in range(2)]
    ids = [run.processor.response_ids(one.response) for one in examples]
    given = papers.begin_with(run, examples, torch.tensor([[0.0, 0.5], [1.0, 0.2]]))
    told = [[x for x in row if x >= 0] for row in given.flatten(0, 1).tolist()]
    assert told == [[], ids[0][:round(len(ids[0]) / 2)], ids[1], ids[1][:round(len(ids[1]) / 5)]]
    assert given.shape == (2, 2, 40)


@pytest.mark.parametrize("solved", [False, True])
@pytest.mark.parametrize("prefix_loss", ["trsft", "nll"])
def test_trapo_helps_where_a_question_is_not_solved(tmp_path, start, monkeypatch, prefix_loss,
                                                    solved):
    """{4, 2, 1, 1} rollouts with {0, .2, .5, 1} of the trace, their tokens weighted as imitation,
    all other tokens by the advantage; of a solved question all are free."""
    run = run_of(trapo, start, tmp_path, group=8, prefix_loss=prefix_loss, max_new_tokens=40)
    examples = [data.world_example("train", i) for i in range(2)]
    monkeypatch.setattr(grpo, "grade", lambda response, example, _: types.SimpleNamespace(
        correct=solved or response == example.response, parsed=True, formatted=True))
    rollouts, mask, weight, figures = trapo.rollout(run, 0, examples, run.processor.batch(examples))
    for b, example in enumerate(examples):
        ids = run.processor.response_ids(example.response)
        for g, share in enumerate([0, 0, 0, 0, 0.2, 0.2, 0.5, 1]):
            row, count = 8 * b + g, 0 if solved else round(share * len(ids))
            assert rollouts.ids[row, :count].tolist() == ids[:count]
            p = rollouts.logprobs[row, :count].exp()
            expected = p / p.clamp(min=0.1) if prefix_loss == "trsft" else torch.ones_like(p)
            assert torch.equal(weight[row, :count], expected)
            assert (expected[p >= 0.1] == 1).all()
            free = weight[row, count:].unique()
            assert len(free) <= 1 and (solved or count == 40 or abs(
                free.item() - ((g == 7) - 1 / 8)) < 1e-6 or len(ids) == count)
    assert (figures["given"] == 0) == solved
    assert mask.any() != solved                      # groups of equal reward are dropped


def test_given_tokens_carry_no_policy_gradient(tmp_path, start, monkeypatch):
    """A progressive step whose answers are the whole trace has nothing to learn from; a mixed one
    learns it as imitation does."""
    for mode, moves in (("progressive", False), ("mixed", True)):
        run = run_of(synergy, start, tmp_path / mode, mode=mode, group=2, max_new_tokens=40, beta=0)
        batch = run.processor.prepare(data.World("train"), range(2))
        before = [p.clone() for p in run.model.parameters()]
        rollouts, *_ = synergy.guided(run, 0, *batch[:2])
        told = [rollouts.rows()[row] for row in ((0, 1, 2, 3) if mode == "progressive" else (1, 3))]
        assert told == [ids for ids in batch[2] for _ in range(len(told) // 2)]
        figures = grpo.explore(run, 0, *batch, rollout=synergy.guided)
        assert (figures["updates"] == 1) == moves
        assert all(map(torch.equal, before, run.model.parameters())) != moves


# -------------------------------------------------------------------------------- the others
def test_mifo_leaves_what_rl_moved_most(tmp_path, start):
    """Bit for bit, under Muon and AdamW; the rest moves. A tenth of all entries."""
    run, step = run_of(mifo, start, tmp_path, group=2), mifo.Mifo()
    batch = run.processor.prepare(data.World("train"), range(4))
    before = {name: p.detach().clone() for name, p in run.trained.items()}
    step.start = before
    with torch.no_grad():
        for i, p in enumerate(run.trained.values()):
            p += 1e-3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    step.remember(run)
    moved = {name: (p - before[name]).abs() for name, p in run.trained.items()}
    frozen, after_rl = step.frozen(0.1), {name: p.clone() for name, p in run.trained.items()}
    count = sum(int(entries.sum()) for entries in frozen.values())
    assert count == pytest.approx(0.1 * sum(p.numel() for p in moved.values()), rel=1e-3)
    assert (min(moved[name][entries].min() for name, entries in frozen.items() if entries.any())
            >= max(moved[name][~entries].max() for name, entries in frozen.items()))
    step.buffer = {one.id: one for one in batch[0]}
    step(run, mifo.PHASE, *batch)
    assert all(torch.equal(p[frozen[name]], after_rl[name][frozen[name]])
               for name, p in run.trained.items())
    assert any(not torch.equal(p, after_rl[name]) for name, p in run.trained.items())
    assert step.frozen(0) == {}


def test_mifo_learns_failures(tmp_path, start, monkeypatch):
    """Questions that a group solves seldomer than the threshold; an empty buffer is no lesson."""
    run, step = run_of(mifo, start, tmp_path), mifo.Mifo()
    examples, *batch = run.processor.prepare(data.World("train"), range(4))
    easy = {examples[0].id, examples[2].id}
    monkeypatch.setattr(grpo, "grade", lambda response, example, _: types.SimpleNamespace(
        correct=example.id in easy, parsed=True, formatted=True))
    assert "reward" in step(run, mifo.PHASE, examples, *batch)
    assert [*step.buffer] == [examples[1].id, examples[3].id]
    figures = step(run, 2 * mifo.PHASE - 1, examples, *batch)
    assert "reward" not in figures and not step.buffer
    assert figures["tokens"] == sum(len(batch[1][i]) for i in (1, 3))


def test_mifo_learns_all_failures_in_turn(tmp_path, start, monkeypatch):
    """Its steps once began again with the first batch, so some failures were learnt thrice."""
    run, step, taught = run_of(mifo, start, tmp_path), mifo.Mifo(), []
    step.buffer = {i: one for i, one in enumerate(data.World("train", size=6))}
    monkeypatch.setattr(sft, "imitate", lambda run, step, lessons, *_: taught.extend(lessons) or {})
    for place in range(3):
        step(run, mifo.PHASE + place, *run.processor.prepare(data.World("train"), range(4)))
    assert taught == 2 * [*step.buffer.values()]


@pytest.mark.parametrize("share", [0.0, 1.0, 0.5])
def test_merging_none_and_all_gives_the_two_models(start, share):
    one, other = (models.load_checkpoint(start)[0] for _ in range(2))
    with torch.no_grad():
        for p in other.parameters():
            p += 0.1 * torch.randn(p.shape)
    before = [p.clone() for p in one.parameters()]
    synergy.merged(one, other, share)
    for mine, old, new in zip(one.parameters(), before, other.parameters()):
        assert torch.allclose(mine, (1 - share) * old + share * new, atol=1e-6)


def test_levels_part_all_questions():
    levels = [synergy.level([True] * n + [False] * (16 - n)) for n in range(17)]
    assert [levels.count(name) for name in synergy.LEVELS] == [5, 4, 3, 3, 2]
    assert levels == sorted(levels, reverse=True)


def test_restored_vectors():
    """None: the late matrix; all: the early one's vectors with the late one's values; some: these
    values still. Once vectors of both stood in one basis, not orthogonal, and half of what a model
    knew out of distribution was gone by that alone."""
    torch.manual_seed(0)
    late, early = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    torch.testing.assert_close(heals.restored(late, early, 0), late)
    whole = heals.restored(late, early, 4)
    assert torch.allclose(torch.linalg.svdvals(whole), torch.linalg.svdvals(late))
    assert heals.angles(whole, early).max() < 1e-3
    U, _, Vt = torch.linalg.svd(early, full_matrices=False)
    diagonal = U.T @ whole @ Vt.T
    assert torch.allclose(diagonal, torch.linalg.svdvals(late).diag(), atol=1e-9)
    part = heals.restored(late, early, 2)
    torch.testing.assert_close(torch.linalg.svdvals(part), torch.linalg.svdvals(late))
    first = torch.linalg.svd(part, full_matrices=False)
    for got, expected in ((first[0], U), (first[2].T, Vt.T)):
        assert torch.allclose((got.T @ expected).abs()[:2, :2], torch.eye(2).double(), atol=1e-9)


def test_angles_of_a_rotation():
    """A plane turned by 30 degrees within four dimensions, values as they were."""
    values, turn = torch.tensor([4.0, 3.0, 2.0, 1.0]).double().diag(), torch.eye(4).double()
    cos, sin = math.cos(math.pi / 6), math.sin(math.pi / 6)
    turn[0, 0], turn[0, 2], turn[2, 0], turn[2, 2] = cos, -sin, sin, cos
    got = heals.angles(values, turn @ values).sort()[0].tolist()
    assert got == pytest.approx([0, 0, 0, 30], abs=1e-4)


def test_temperature_follows_the_entropy_and_survives_a_resume(tmp_path, start):
    """Stopped after two of four steps, it goes on at the temperature of a run never stopped."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    same = dict(first_budget=0, target_entropy=9.0)
    acereason.train(config(acereason, start, whole, steps=4, **same))
    acereason.train(config(acereason, start, parts, steps=2, **same))
    acereason.train(config(acereason, start, parts, steps=4, resume=True, **same))
    rows = [[row for row in metrics(out) if "reward" in row] for out in (whole, parts)]
    temperatures = [[1.0] + [row["next_temperature"] for row in some] for some in rows]
    assert temperatures[0] == temperatures[1] and len(rows[0]) == 4
    for row, old, new in zip(rows[0], temperatures[0], temperatures[0][1:]):
        assert new == pytest.approx(old * math.exp(0.1 * (9 - row["entropy"]))) and new > old


def test_a_short_budget_comes_first(tmp_path, start, monkeypatch):
    """There, answers that were cut have no loss; evaluation has the whole budget throughout."""
    seen = []
    monkeypatch.setattr(grpo, "explore", lambda run, step, *_: seen.append(
        (run.config.max_new_tokens, run.config.overlong)) or dict(entropy=0.3))
    run = run_of(acereason, start, tmp_path, steps=4, first_budget=4)
    for step in range(4):
        acereason.one_step(run, step)
        assert (run.config.max_new_tokens, run.config.overlong) == (8, "keep")
    assert seen == [(4, "mask")] * 2 + [(8, "keep")] * 2


def test_judge_gradients_are_those_of_the_published_losses():
    """Cross-entropy of yes against no, InfoNCE of the logit of yes; swapped, they are neither."""
    torch.manual_seed(0)
    z = torch.randn(2, 3, 4, dtype=torch.double, requires_grad=True)       # yes, no; 3 pictures
    s = (z[0] - z[1]).sigmoid()
    published = dict(sft=-s[:, 0].log().sum() - (1 - s[:, 1:]).log().sum(),
                     contrastive=-z[0].log_softmax(1)[:, 0].sum())
    for kind, loss in published.items():
        expected, = torch.autograd.grad(loss, z, retain_graph=True)
        got, = torch.autograd.grad(umr.judge_loss(*z, kind, kind), z, retain_graph=True)
        torch.testing.assert_close(got, expected)
    swapped, = torch.autograd.grad(umr.judge_loss(*z, "sft", "contrastive"), z, retain_graph=True)
    assert not swapped[1].any() and torch.allclose(swapped[0, :, 0], s[:, 0] - 1)


def test_one_description_fits():
    """The others differ in one thing, which stands in a place of its own. They once held colours of
    shapes that no picture of training has, which text alone gives away, and one text twice."""
    for i in range(30):
        example = data.world_example("train", i)
        for seed in range(4):
            scene = umr.changed(random.Random(seed), [example.scene])
            assert sum(a[:4] != b[:4] for a, b in zip(scene, example.scene)) == 1
            assert len({one[2:4] for one in scene}) == len(scene)
            assert not {one[:2] for one in scene} & data.HELD_OUT
        assert len({one.question for one in umr.candidates(example, 16)}) == 16
        first, *others = umr.candidates(example, 4)
        assert data.describe(example.scene) in first.question
        assert all(one.question != first.question for one in others)
        assert all(one.images is example.images for one in others)


def test_filtered_answers_are_right_short_and_without_filler():
    """Short among its family: else all of the longest family would go."""
    rows = [dict(correct=correct, response_ids=[0] * length, response=text, family=family)
            for correct, length, text, family in (
                (True, 3, "a", "sum"), (True, 5, "b", "sum"), (True, 9, "c", "sum"),
                (False, 2, "d", "sum"), (True, 4, f"{data.FILLERS[0]}. e", "sum"),
                (True, 30, "f", "cost"))]
    assert [row["response"] for row in openvlthinker.filtered(rows)] == ["a", "f"]


def test_mixed_rows_have_all_types_and_their_golds(tmp_path):
    """Numbers, words, letters, boxes; each gold answer is right, and of letters the text, too."""
    path, rows = tmp_path / "mixed.jsonl", [vlaa.mixed_row(i) for i in range(48)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = data.read_examples(str(path), check=evaluate.check_gold)
    for i, example in enumerate(examples):
        truth = data.world_example("train", i)
        assert evaluate.judge(truth.answer, example) is True
        assert example.pictures()[0].tobytes() == truth.images[0].tobytes()
    letters = [one for one in examples if one.choices]
    assert 12 <= len(letters) <= 20 and sum(one.box for one in examples) == 8
    assert {one.answer for one in letters} == {*"ABCD"}
    for example in examples:         # as a model writes it, a box without spaces
        answer = data.world_example(*example.id.split("/")).answer
        said = example.answer if example.choices else answer
        parts = vlaa.reward(f"<answer>{said}</answer>", 3, example, "tags", vlaa.Config())
        assert parts["reward"] == 1, said


def test_exact_reward_compares_texts():
    c = vlaa.Config(device="cpu")
    example = data.Example("", "?", "0.5")
    for response, typed, exact in (("<answer>1/2</answer>", 1, 0), ("<answer>0.5</answer>", 1, 1),
                                   ("<answer>3</answer>", 0, 0)):
        assert grpo.reward(response, 3, example, "tags", c)["reward"] == typed
        assert vlaa.reward(response, 3, example, "tags", c)["reward"] == exact


# -------------------------------------------------------------------------------- smoke runs
@pytest.mark.parametrize("module, more", [
    (acereason, {}), (mifo, {}), (pear, {}), (synergy, dict(mode="interleaved")),
    (synergy, dict(mode="progressive")), (synergy, dict(mode="mixed")), (trapo, dict(group=8)),
    (umr, dict(batch=2)), (vlaa, dict(typed="exact"))],
    ids=lambda one: getattr(one, "__name__", None) and one.__name__.split(".")[-1])
def test_training_of_a_paper(tmp_path, start, module, more):
    """Two steps, from the command line's function on; a checkpoint that opens."""
    out = tmp_path / "run"
    c = config(module, start, out, **more)
    if module is pear:
        sft.main(c)
    elif module is umr:
        sft.main(c, umr.one_step)
    else:
        module.train(c)
    assert [row["step"] for row in metrics(out) if "loss" in row] == [1, 2]
    assert json.loads((out / "run.json").read_text())["finished"]
    models.load_checkpoint(out)
    if module is umr:
        assert 0 < umr.mrr(out, 4, pictures=3) <= 1
        assert all(row["grad_norm"] > 0 for row in metrics(out) if "loss" in row)


def test_measures_of_a_model(tmp_path, start, monkeypatch):
    """Every figure beside accuracy, of a trained model and its base."""
    monkeypatch.setattr(synergy, "levels_of", functools.partial(synergy.levels_of, count=12))
    home = tmp_path / "seed-0"
    for name in ("base", "strong-sft-epochs-1", "strong-sft"):
        sft.main(sft.Config(init=str(start), out=str(home / name), device="cpu", steps=1, batch=4,
                            examples=4, eval_examples=2, warmup=0,
                            lr=1e-9 if name == "base" else 1e-2))
    model = home / "strong-sft"
    assert heals.turned(model) > heals.turned(home / "base") < 1e-1
    assert heals.stretched(model) > heals.stretched(home / "base") == 0
    assert 0 <= heals.restored_ood(model, count=6) <= 1
    assert 0 <= vlaa.mixed(model, count=4) <= 1
    assert preserves.captions(model, 4) < 0 < quagmires.trace_loss(model, 4)
    early = home / "strong-sft-epochs-1"             # whose own vectors change nothing
    rows = papers.answered(*models.load_checkpoint(early), data.World("ood", size=30))
    assert heals.restored_ood(early, 30) == evaluate.summary(rows)["accuracy"]
    shares = quagmires.pass_at(model, 2, 16)
    assert 0 <= shares[1] <= shares[16] <= 1
    rows = [dict(split="test", index=i, correct=i % 2 == 0) for i in range(8)]
    (model / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    levels = synergy.levels_of(home / "base")
    assert len(levels) == 12
    known = {name: synergy.at_level(model, name) for name in synergy.LEVELS}
    for name, share in known.items():
        mine = [i % 2 == 0 for i in range(8) if levels[i] == name]
        assert share == (sum(mine) / len(mine) if mine else None)


def test_rounds_of_commands(tmp_path, start, monkeypatch):
    """Round 0 explores from the base; each round imitates the last policy's filtered answers from
    the base, and explores again."""
    said = []

    def run_command(command):
        said.append(command)
        if "evaluate.py" in command:
            path = pathlib.Path(shlex.split(command)[shlex.split(command).index("--out") + 1])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(dict(correct=True, response_ids=[1], response="x",
                                            family="sum")) + "\n")

    monkeypatch.setattr(openvlthinker, "run_command", run_command)
    monkeypatch.setattr(grpo, "main", lambda c: said.append(f"the last from {c.init}"))
    c = config(openvlthinker, start, tmp_path)
    openvlthinker.train(c)
    kinds = [command.split()[1] for command in said[:-1]]
    assert kinds == ["grpo.py", "evaluate.py", "sft.py", "grpo.py", "evaluate.py", "sft.py"]
    assert said[-1] == f"the last from {tmp_path}/sft-2"
    assert f"--model {tmp_path}/grpo-0" in said[1] and f"--model {tmp_path}/grpo-1" in said[4]
    starts = [str(start), str(start), f"{tmp_path}/sft-1", str(start)]
    trained = [command for command in said[:-1] if "evaluate.py" not in command]
    for command, init in zip(trained, starts):
        script, *words = shlex.split(command)[1:]
        got = evaluate.parse({"grpo.py": grpo.Config, "sft.py": sft.Config}[script], words)
        assert got.init == init and got.resume
        if script == "sft.py":       # however many answers the filter has left
            assert got.steps == sft.Config.epochs * math.ceil(c.examples / sft.Config.batch)
        fields = {f.name for f in dataclasses.fields(type(got) if "grpo" in script else
                                                     sft.RunConfig)}
        for name in fields - {"init", "out", "resume", "steps", "lr", "eval_every"}:
            assert getattr(got, name) == getattr(c, name), name


def test_merged_rounds_and_halves_cost_what_their_parts_cost(tmp_path, start, monkeypatch):
    """A training that has several: their tokens add up in the study's results."""
    for name in ("strong-pear/a", "strong-pear/b"):
        sft.main(sft.Config(init=str(start), out=str(tmp_path / "seed-0" / name), device="cpu",
                            steps=2, batch=4, examples=8, eval_examples=2, warmup=0))
    model = tmp_path / "seed-0" / "strong-pear"
    for name in ("model.safetensors", "run.json"):
        (model / name).write_bytes((model / "a" / name).read_bytes())
    (model / "answers.jsonl").write_text(json.dumps(dict(
        split="test", family="all", index=0, correct=True, formatted=True, parsed=True,
        response_ids=[1], truncated=False, faithful=None)) + "\n")
    monkeypatch.setattr(evaluate, "make", lambda *_: None)
    monkeypatch.setattr(evaluate, "run_command", lambda *_: None)
    c = evaluate.StudyConfig(out=str(tmp_path), preset="paper", device="cpu")
    cell = evaluate.run_cell("strong/pear", c, 0, collections.defaultdict(threading.Lock))
    steps = [row for name in "ab" for row in metrics(model / name) if "loss" in row]
    assert len(steps) == 4 and cell["trained"] == sum(row["tokens"] for row in steps)
    assert cell["sampled"] == 0 and cell["trace_logprob"] == steps[2]["logprob"]


def test_a_comparison_from_its_command_line(tmp_path, monkeypatch, capfd):
    """Base, both trainings, their mean, evaluation, report, what is measured beside, verdict."""
    tiny = " --examples 8 --eval-examples 2 --max-new-tokens 8"
    monkeypatch.setitem(evaluate.PRESETS, "paper", dict(
        test="--limit 6 --max-new-tokens 8", base=f" --steps 2 --batch 4{tiny}",
        synergy=f" --steps 2 --prompts 2 --group 2{tiny}"))
    finding = evaluate.Finding(
        "?", "base", ("strong",), ("test",), {"base": "{}", "merged": "{}/synergy --mode merged"},
        {"it gains": lambda a: a("strong/synergy --mode merged") - a("strong")})
    words = ["synergy.py", "--out", str(tmp_path / "my study"), "--device", "cpu"]
    words += ["--first-seed", "3"]
    monkeypatch.setattr("sys.argv", words)
    papers.run_paper(finding, None, None, "", size=lambda directory: len(str(directory)))
    said = capfd.readouterr().out
    model = tmp_path / "my study" / "seed-3" / "strong-synergy-mode-merged"
    assert "it gains" in said and f"{len(str(model))}.000" in said
    assert said.count("\n$ python -m tests.papers.synergy train --init ") == 1
    one, *parts = (models.load_checkpoint(path)[0].state_dict()["lm_head.weight"]
                   for path in (model, model / "sft", model / "grpo"))
    assert torch.allclose(one, sum(parts) / 2) and not torch.equal(*parts)
    papers.run_paper(finding, None, None, "")
    assert "train --init" not in capfd.readouterr().out      # nothing is made twice
    for more in (["--preset", "smoke"], ["--finding", "capacity"]):
        monkeypatch.setattr("sys.argv", words + more)
        with pytest.raises(SystemExit, match="leave them out"):          # once without a word
            papers.run_paper(finding, None, None, "")
