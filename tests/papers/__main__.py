"""python -m tests.papers: makes every comparison that is not there yet, and one page of them all,
papers.html, beside results.json. Options as of evaluate.py study,
but for --preset and --finding."""
import importlib
import pathlib

from evaluate import StudyConfig, run_script, text_table
from model import write_file
from tests import report
from tests.papers import compare, measure, measured

NAMES = sorted(path.stem for path in pathlib.Path(__file__).parent.glob("[a-z]*.py"))
PAPERS = {name: importlib.import_module(f"tests.papers.{name}") for name in NAMES}
FINDINGS = {name: paper.FINDING for name, paper in PAPERS.items()}
MEASURES = {name: getattr(paper, "MEASURES", {}) for name, paper in PAPERS.items()}


def page(results):
    """Claims first, then a figure of each split of each paper."""
    text = f"{report.HEAD}<h1>The related systems</h1>"
    text += report.html_table(report.verdict_table(results, FINDINGS))
    for name, paper in PAPERS.items():
        text += f"<h2>{name}: {paper.FINDING.question}</h2><pre>{paper.__doc__}</pre>"
        text += "".join(report.charts(results, name, FINDINGS))
        if MEASURES[name]:
            text += report.html_table(measured(paper.FINDING, results, MEASURES[name]))
    return text


def main(c):
    compare(FINDINGS.values(), c)
    for name, finding in FINDINGS.items():
        measure(finding, c, **MEASURES[name])
    results = report.read_results(pathlib.Path(c.out) / "results.json")
    print(text_table(report.verdict_table(results, FINDINGS)))
    write_file(pathlib.Path(c.out) / "papers.html", page(results))


if __name__ == "__main__":
    run_script(main, StudyConfig, __doc__)
