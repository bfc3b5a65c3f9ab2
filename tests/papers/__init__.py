"""The systems that this comparison stands among, each one short file with only what its paper
changes; all else is imported.

    python -m tests.papers                  every comparison that is not there yet, and one page
    python -m tests.papers.trapo            that of one paper; options as of evaluate.py study,
                                            but for --preset and --finding
    python -m tests.papers.trapo train ...  one training of it; options as of sft.py or grpo.py

A paper is a Finding, as in evaluate.py: cells, and claims about them. Its trainings are names that
cells may use; cells of the same name are those of the study, and are not made twice.
"""
import base64
import io
import json
import pathlib
import shlex
import sys
from dataclasses import fields, replace

import torch

import evaluate
import grpo
from data import DataError, pad_rows
from evaluate import StudyConfig, run_script
from kernels import Sampler, length_mask
from model import load_checkpoint, read_json, write_file
from tests import report

# what mixtures have to beat: SFT, then GRPO, like them without KL, for the cost of 100 GRPO steps
BAR = "{}/sft/grpo --beta 0 --steps 70"


def register(name, every=10):
    """Lets cells be trained by the `train` of a file here."""
    evaluate.TRAININGS[name] = (f"-m tests.papers.{name} train", f"--eval-every {every}")


def cells_of(finding):
    """All of them, without doubles."""
    return [*dict.fromkeys(sum(finding.cells().values(), []))]


def compare(findings, c):
    """Makes the cells of findings that are not there yet, as `evaluate.py study` does."""
    if (c.preset, c.finding) != (StudyConfig.preset, None):
        raise DataError("--preset and --finding choose cells of evaluate.py study; a paper has its "
                        "own: leave them out")
    cells = sum(map(cells_of, findings), [])
    evaluate.PRESETS["paper-cells"] = evaluate.PRESETS["paper"] | dict(cells=cells)
    evaluate.study(replace(c, preset="paper-cells", finding=None))


def measure(finding, c, **figures):
    """Adds to the cells of a finding in results.json what is measured of their models. figures:
    {name: function of its directory}; what is there already stays."""
    path, names = pathlib.Path(c.out) / "results.json", cells_of(finding)
    results = read_json(path)
    for cell in results["cells"]:
        if cell["cell"] in names and cell["seed"] - c.first_seed in range(c.seeds):
            model = evaluate.unquoted(evaluate.way_to(cell["cell"], c, cell["seed"])[0])
            for name in figures.keys() - cell.keys():
                value = figures[name](model)
                cell[name] = value if value is None else round(value, 4)
                write_file(path, json.dumps(results))


def measured(finding, results, figures):
    """A table of what was measured beside accuracy, means over seeds."""
    cells, rows = evaluate.grouped(results["cells"], "cell"), [["model", *figures]]
    for name in cells_of(finding):
        values = [[cell[figure] for cell in cells.get(name, []) if cell.get(figure) is not None]
                  for figure in figures]
        rows.append([name, *(f"{evaluate.mean(some):.3f}" if some else "" for some in values)])
    return rows


def run_paper(finding, train, Config, doc, page=None, **figures):
    """The command line of a paper's file, and what is measured of its models. page(c, results):
    HTML, to be written beside results.json."""
    name = pathlib.Path(sys.argv[0]).stem

    def training(c):
        c.out = c.out or f"runs/{name}"
        train(c)

    def comparison(c):
        compare([finding], c)
        measure(finding, c, **figures)
        results = report.read_results(pathlib.Path(c.out) / "results.json")
        print(evaluate.text_table(report.verdict_table(results, {"": finding})))
        if figures:
            print(evaluate.text_table(measured(finding, results, figures)))
        if page:
            write_file(pathlib.Path(c.out) / f"{name}.html", page(c, results))

    if sys.argv[1:2] == ["train"] and train:
        run_script(training, Config, doc, sys.argv[2:])
    else:
        run_script(comparison, StudyConfig, doc)


def options_of(c, Config, *but):
    """The options that a Config knows and that are not its defaults, as words of a command."""
    words = ""
    for f in fields(Config):
        value = getattr(c, f.name)
        if f.name not in ("out", "resume", *but) and value != f.default:
            words += f" --{f.name.replace('_', '-')}"
            words += "" if value is True else f" {shlex.quote(str(value))}"
    return words


def row_of(example):
    """A row of a file, for --data."""
    images = []
    for picture in example.pictures():
        file = io.BytesIO()
        picture.save(file, "PNG")
        images.append(dict(bytes=base64.b64encode(file.getvalue()).decode()))
    return dict(id=example.id, question=example.question, answer=example.answer, images=images)


def begin_with(run, examples, shares):
    """What rollouts are given of somebody's answers: of each its first tokens, `shares` (B, G) of
    them. -> (B, G, N), -1 where the model goes on"""
    B, G = shares.shape
    given = torch.full((B, G, run.config.max_new_tokens), -1)
    for b, example in enumerate(examples):
        ids = torch.tensor(run.processor.response_ids(example.response))[:given.shape[2]]
        for g in range(G):
            count = round(shares[b, g].item() * len(ids))
            given[b, g, :count] = ids[:count]
    return given


def recorded(rights):
    """grpo.reward that also writes down, in order, whether each answer is right."""
    def reward(*answer):
        parts = grpo.reward(*answer)
        rights.append(parts.get("accuracy", 0.0))
        return parts
    return reward


@torch.no_grad()
def mean_logprob(directory, examples):
    """Per token, of the answers of some examples under a model."""
    model, processor = load_checkpoint(directory)
    _, prompts, responses = processor.prepare(examples, range(len(examples)))
    ids, lengths = pad_rows(responses, processor.pad)
    mask = length_mask(lengths)
    logprob, _ = model.score(prompts, ids, mask)
    return logprob.sum().item() / mask.sum().item()


def answered(model, processor, examples, *sampling):
    """A model's answers, see `evaluate.evaluate`."""
    sampler = Sampler(model, processor.banned(model.vocabulary), processor.stop)
    return evaluate.evaluate(sampler, processor, examples, "", *sampling)
