"""The rules of the house: layout, import direction, line budget, what the README says."""
import ast
import pathlib
import re
import shlex
import subprocess
import sys
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODULES = ["kernels", "data", "model", "evaluate", "sft", "grpo"]
CODE, PHYSICAL = 2000, 2700
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
    assert sum(len(path.read_text().splitlines()) for path in paths) <= PHYSICAL


def test_function_lengths():
    lengths = []
    for name in MODULES:
        for node in functions(ast.parse((ROOT / f"{name}.py").read_text())):
            length = node.end_lineno - node.lineno + 1
            assert length <= (80 if node.name == "main" else 60), f"{name}.{node.name}: {length}"
            lengths.append(length)
    assert sorted(lengths)[len(lengths) // 2] <= 12


def test_lines_fit():
    for path in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]:
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
    assert top <= {f"{name}.py" for name in MODULES} | {"tests", "README.md", "LICENSE",
                                                         "requirements.txt"}


@pytest.mark.parametrize("name", ["evaluate", "sft", "grpo", "kernels"])
def test_help(name):
    """--help of every script ends well and explains every option."""
    done = subprocess.run([sys.executable, ROOT / f"{name}.py", "--help"], capture_output=True,
                          text=True)
    assert done.returncode == 0 and "--" in done.stdout, done.stderr


def readme_commands():
    blocks = re.findall(r"```[a-z]*\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return sorted({line for line in lines if re.match(r"python \w+\.py", line)})


def test_readme_commands_parse():
    """Every command of the README has options that exist, with values that they take."""
    import evaluate
    import grpo
    import sft
    found = readme_commands()
    assert len(found) >= 5
    for line in found:
        script, *words = shlex.split(line)[1:]
        config = {"evaluate.py": evaluate.Config, "sft.py": sft.Config,
                  "grpo.py": grpo.Config}.get(script)
        if words[:1] == ["study"]:
            config, words = evaluate.StudyConfig, words[1:]
        if config:
            evaluate.parse(config, words)


def test_readme_is_short_and_ci_runs_its_command():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) < 200
    command = (ROOT / ".ci" / "run").read_text().strip().splitlines()[-1]
    assert command.split(" && ")[-1] in readme and "requirements.txt" in command
