"""The whole comparison in small, as a user runs it: one command, resumable, with its reports."""
import html
import html.parser
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import data
import evaluate

ROOT = pathlib.Path(__file__).parents[1]
EASYVQA = ROOT.parent / "shared" / "data" / "easyvqa"


def run(*words):
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="")
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=environment,
                          capture_output=True, text=True)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    done = run("evaluate.py", "study", "--preset", "smoke", "--out", out, "--device", "cpu")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (out / "said.txt").write_text(done.stdout)
    return out


def test_every_cell_is_there(out):
    """Base, SFT, GRPO, SFT -> GRPO, for the weak and the strong base, with command and interval."""
    cells = json.loads((out / "results.json").read_text())["cells"]
    assert [(c["strength"], c["method"]) for c in cells] == [
        ("strong", "base"), ("weak", "base"), ("weak", "sft"), ("weak", "grpo"),
        ("weak", "sft-grpo"), ("strong", "sft"), ("strong", "grpo"), ("strong", "sft-grpo")]
    said = (out / "said.txt").read_text()
    for cell in cells:
        assert cell["evaluation"] in said and (cell["command"] or "") in said
        for split in ("test", "ood", "text"):
            low, high = cell["splits"][split]["interval"]
            assert low <= cell["splits"][split]["accuracy"] <= high
        if cell["method"].endswith("grpo"):
            assert {"reward", "held_out", "accuracy", "format"} <= set(cell["curve"]["points"][0])
            assert cell["curve"]["regret"] >= 0


def test_study_goes_on_where_it_stopped(out):
    """Nothing is trained twice; a cell that is missing is made again, the others stay."""
    path = out / "results.json"
    results = json.loads(path.read_text())
    again = run("evaluate.py", "study", "--preset", "smoke", "--out", out, "--device", "cpu")
    assert again.returncode == 0 and "$ python" not in again.stdout
    path.write_text(json.dumps(results | dict(cells=results["cells"][:-1])))
    again = run("evaluate.py", "study", "--preset", "smoke", "--out", out, "--device", "cpu")
    assert again.stdout.count("$ python") == 2
    restored = json.loads(path.read_text())["cells"]
    assert [c["splits"] for c in restored] == [c["splits"] for c in results["cells"]]


class Links(html.parser.HTMLParser):
    """Collects every address that a page refers to."""

    def __init__(self):
        super().__init__()
        self.found, self.tags = [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.found += [value for name, value in attributes if name in ("src", "href")]


def test_report_is_self_contained_and_escapes(out):
    """Everything that a model wrote is escaped: a script in an answer stays text."""
    results = json.loads((out / "results.json").read_text())
    name = results["cells"][-1]["name"]
    path = out / "answers" / f"{name}.jsonl"
    rows = data.read_jsonl(path)
    evil = "<script>alert(1)</script>"
    rows[0]["response"] = f"<think>{evil}</think><answer>{evil}</answer>"
    rows[1]["response"] = f"{evil}<img src=x onerror=alert(1)>"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = evaluate.report(**results)
    links = Links()
    links.feed(page)
    assert "script" not in links.tags and "&lt;script&gt;" in page
    assert links.found and all(link.startswith("data:image/png;base64,") for link in links.found)
    assert {"svg", "table", "img"} <= links.tags
    assert re.search("class=(faithful|lucky|right|wrong)", page)


def test_report_has_every_command_and_figure(out):
    """The table of the page is that of the terminal, made from the same results."""
    page, said = (out / "report.html").read_text(), (out / "said.txt").read_text()
    cells = json.loads((out / "results.json").read_text())["cells"]
    text = html.unescape(page)
    for cell in cells:
        assert cell["evaluation"] in text and (cell["command"] or "") in text
    for row in evaluate.main_table(cells):
        assert "<tr><td>" + "<td>".join(row) + "<" in page
        assert all(value in said for value in row)
    accuracy = 100 * cells[2]["splits"]["test"]["accuracy"]
    assert f"{cells[2]['name']}<td>{accuracy:.1f} [" in page


@pytest.mark.skipif(not EASYVQA.exists(), reason="the easyvqa data are not beside the repository")
def test_real_pictures_run_through_sft_grpo_and_evaluation(tmp_path):
    """easyvqa: pictures that nobody here drew, from scratch, through all three scripts."""
    rows = [line for line in (EASYVQA / "train.jsonl").read_text().splitlines()[:96]]
    train = EASYVQA / "train.jsonl"
    assert len(rows) == 96
    done = run("sft.py", "--data", train, "--size", "s", "--steps", "3", "--eval-examples", "8",
               "--batch", "16", "--out", tmp_path / "sft", "--device", "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    done = run("grpo.py", "--data", train, "--init", tmp_path / "sft", "--steps", "2", "--prompts",
               "4", "--eval-examples", "8", "--out", tmp_path / "grpo", "--device", "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    done = run("evaluate.py", "--data", EASYVQA / "test.jsonl", "--model", tmp_path / "grpo",
               "--limit", "20", "--out", tmp_path / "rows.jsonl", "--device", "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = data.read_jsonl(tmp_path / "rows.jsonl")
    assert len(rows) == 20 and rows[0]["faithful"] is None
