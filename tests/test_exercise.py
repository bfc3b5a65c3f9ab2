"""The exercises: every hole is noticed by the tests that judge it; `python -m tests.exercise
--verify` also tries wrong answers, and takes a quarter of an hour."""
import ast
import re
import subprocess
import sys

import pytest

from tests import exercise, mutants

KNOWN = exercise.exercises()


def test_there_are_twelve():
    """Each a row with a question and minutes; its tests exist, and two wrong answers at least."""
    text = (exercise.ROOT / "tests" / "EXERCISES.md").read_text()
    rows = re.findall(r"^\| \d+ \|.*", text, re.M)
    assert len(rows) == len(KNOWN) == 12
    assert all(re.search(r"\? \| \d+ \|$", row) for row in rows)
    for one in KNOWN.values():
        file, words = re.fullmatch(r'(tests/\w+\.py) -k "(.*)"', one.tests).groups()
        names = re.findall(r"^def (test_\w+)", (exercise.ROOT / file).read_text(), re.M)
        for word in words.split(" or "):
            assert any(word in name for name in names), (one.name, word)
        assert len(exercise.wrong_answers(one)) >= 2, one.name


@pytest.mark.parametrize("name", KNOWN)
def test_a_hole_leaves_signature_and_docstring(name):
    """And nothing else of it; the rest of the module is as it was."""
    text = (exercise.ROOT / KNOWN[name].file).read_text()
    holed = exercise.punched(text, name)
    first, end = exercise.body_of(holed, name)
    assert [line.strip() for line in holed.splitlines()[first:end]] == [exercise.HOLE]
    assert ast.get_docstring(ast.parse(holed)) == ast.get_docstring(ast.parse(text))
    before, after = exercise.body_of(text, name)
    lines, holed = text.splitlines(), holed.splitlines()
    assert holed[:before] == lines[:before] and holed[first + 1:] == lines[after:]
    assert lines[before - 1].endswith('"""'), "it has a docstring, which says what is asked"


@pytest.fixture(scope="module")
def class_copy(tmp_path_factory):
    """A copy without any of the bodies, which git knows."""
    directory = tmp_path_factory.mktemp("exercises") / "class"
    done = subprocess.run([sys.executable, "-m", "tests.exercise", "--copy", directory],
                          cwd=exercise.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.parametrize("name", KNOWN)
def test_a_hole_is_noticed(class_copy, name):
    """By a test that reaches it, not by an error elsewhere. The other holes are filled."""
    one, path = KNOWN[name], class_copy / KNOWN[name].file
    holed = {other.file: (class_copy / other.file).read_text() for other in KNOWN.values()}
    for file in holed:
        (class_copy / file).write_text((exercise.ROOT / file).read_text())
    path.write_text(exercise.punched(path.read_text(), name))
    quick = exercise.Exercise(one.name, f"-x {one.tests}")
    failed, said = exercise.judge(quick, class_copy)
    for file, text in holed.items():
        (class_copy / file).write_text(text)
    assert len(failed) == 1 and failed != ["nothing ran"]
    assert "NotImplementedError" in said


def test_wrong_answers_are_noticed():
    """Of a quick exercise: its own body passes, two wrong ones do not."""
    judged = list(exercise.verify(KNOWN["sft.orthogonal"]))
    assert len(judged) == 4 and all(rightly for _, rightly in judged)


def test_work_is_not_lost(tmp_path, monkeypatch, capsys):
    """A changed file is not touched; a hole can be undone, and is found by --check."""
    root = mutants.copy_of(tmp_path / "mine")
    for words in (["init", "-q"], ["add", "-A"],
                  ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "c"]):
        subprocess.run(["git", *words], cwd=root, check=True)
    one, path = KNOWN["grpo.kl_estimate"], root / "grpo.py"

    def run(*words):
        return subprocess.run([sys.executable, "-m", "tests.exercise", *words], cwd=root,
                              capture_output=True, text=True)

    assert run(one.name, "--check").stdout.endswith("all of its tests pass\n")
    assert run(one.name).returncode == 0 and exercise.HOLE in path.read_text()
    checked = run(one.name, "--check")
    assert checked.returncode and "test_kl_estimators" in checked.stderr
    holed = path.read_text()
    again = run("grpo.surrogate")
    assert again.returncode and "commit it first" in again.stderr and path.read_text() == holed
    subprocess.run(["git", "checkout", "-q", "grpo.py"], cwd=root, check=True)
    assert exercise.HOLE not in path.read_text()
    assert mutants.FAULTS and run("grpo.nothing").returncode == 2
