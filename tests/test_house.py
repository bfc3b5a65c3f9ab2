"""The rules of the house: layout, import direction, line budget, what the README says."""
import ast
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODULES = ["kernels", "data", "model", "evaluate", "sft", "grpo"]
CODE = 2300                          # lines of code of the six modules together
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENCODING, tokenize.ENDMARKER)


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def code_lines(path):
    """Lines that are not blank, not a comment and not a docstring."""
    tree, documentation = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node):
            documentation.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    with open(path, "rb") as file:
        used = {line for token in tokenize.tokenize(file.readline) if token.type not in LAYOUT
                for line in range(token.start[0], token.end[0] + 1)}
    return len(used - documentation)


def test_line_budget():
    """A core that grows under a README that says otherwise is how minimal code ends."""
    paths = [ROOT / f"{name}.py" for name in MODULES]
    assert sum(map(code_lines, paths)) <= CODE


def test_function_lengths():
    lengths = []
    for name in MODULES:
        for node in functions(ast.parse((ROOT / f"{name}.py").read_text())):
            length = node.end_lineno - node.lineno + 1
            assert length <= (80 if node.name == "main" else 60), f"{name}.{node.name}: {length}"
            lengths.append(length)
    assert sorted(lengths)[len(lengths) // 2] <= 12


def test_lines_fit():
    for path in [*ROOT.glob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{path.name}:{number} has {len(line)} columns"


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name):
    """kernels, data <- model <- evaluate <- sft <- grpo, at module level."""
    allowed = set(MODULES[:MODULES.index(name)]) - ({"kernels"} if name == "data" else set())
    for node in ast.parse((ROOT / f"{name}.py").read_text()).body:
        names = ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                 else [node.module] if isinstance(node, ast.ImportFrom) else [])
        assert set(names) & set(MODULES) <= allowed


def test_layout():
    """Six modules, tests, README, LICENSE, requirements.txt; nothing else is visible."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    if not listed:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.split() if not line.startswith(".")}
    assert top == {f"{name}.py" for name in MODULES} | {"tests", "README.md", "LICENSE",
                                                         "requirements.txt"}


@pytest.mark.parametrize("words", ["evaluate.py", "evaluate.py study", "sft.py", "grpo.py",
                                   "-m tests.speed", "-m tests.gpu", "-m tests.mutants",
                                   "-m tests.exercise", "-m tests.grade", "-m tests.papers"])
def test_help_explains_every_option(words):
    """Three options once had no help, and the test asked for no more than a dash."""
    done = subprocess.run([sys.executable, *words.split(), "--help"], capture_output=True,
                          text=True, cwd=ROOT, env=dict(os.environ, COLUMNS="300"))
    assert done.returncode == 0, done.stderr
    options = re.findall(r"^  (--[a-z-]+)", done.stdout, re.M)
    assert options
    for name in options:
        value = r"( [A-Z_]+| \{.*?\}| \[.*\])?"
        assert re.search(rf"^  {name}{value}\s+(?!--)\w\S* \S", done.stdout, re.M), name


def written_commands():
    """Of README and EXERCISES, in blocks and in sentences."""
    text = "\n".join((ROOT / name).read_text() for name in ("README.md", "tests/EXERCISES.md"))
    blocks = re.findall(r"```[a-z]*\n(.*?)```", text, re.S)
    lines = [line.split("#")[0] for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`(python [^`]*)`", re.sub("```.*?```", "", text, flags=re.S))
    lines = {" ".join(line.split()) for line in lines}
    return sorted(line for line in lines if re.match(r"python (\w+\.py|-m tests\.)", line)
                  and "tests.papers" not in line)


def test_written_commands_parse():
    """Each has options that exist, with values that they take."""
    import evaluate
    import exercise
    import gpu
    import grade
    import grpo
    import mutants
    import sft
    import speed
    from tests import loophole
    configs = {"evaluate.py": evaluate.Config, "evaluate.py study": evaluate.StudyConfig,
               "sft.py": sft.Config, "grpo.py": grpo.Config,
               "-m tests.loophole": evaluate.StudyConfig,
               "-m tests.loophole train": loophole.Config}
    parsers = {"-m tests.speed": speed.parser, "-m tests.gpu": gpu.parser,
               "-m tests.mutants": mutants.parser, "-m tests.exercise": exercise.parser,
               "-m tests.grade": grade.parser}
    found = written_commands()
    assert len(found) >= 30
    for line in found:
        script = re.match(r"python (-m tests\.\w+( train)?|evaluate\.py( study)?|\w+\.py)", line)[1]
        words = shlex.split(line.removeprefix(f"python {script}"))
        if script in parsers:
            parsers[script]().parse_args(words)
        else:
            evaluate.parse(configs[script], words)


@pytest.mark.parametrize("name", ["README.md", "tests/EXERCISES.md"])
def test_commands_of_a_block_do_not_share_a_directory(name):
    """The second of two that wrote runs/sft said that there is a run already."""
    for block in re.findall(r"```\n(.*?)```", (ROOT / name).read_text(), re.S):
        outs = []
        for line in block.splitlines():
            script = re.match(r"python (sft|grpo)\.py", line)
            if script:
                out = re.search(r"--out (\S+)", line)
                outs.append(out[1] if out else f"runs/{script[1]}")
        assert len(outs) == len({*outs}), outs


def test_readme_is_short_and_ci_runs_its_command():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 300
    command = (ROOT / ".ci" / "run").read_text().strip().splitlines()[-1]
    assert command.split(" && ")[-1] in readme and "requirements.txt" in command
