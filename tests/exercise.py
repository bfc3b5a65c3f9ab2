"""python -m tests.exercise grpo.surrogate: takes the body of a function out of your copy, for you
to write it again. The exercises are the rows of tests/EXERCISES.md.

    --check         runs the tests that judge it, and says what is missing
    --copy DIR      all of them: a copy of the repository without these bodies, for a class
    --verify        of each, or of one: its tests pass, fail without the body, and with wrong ones
"""
import argparse
import ast
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

from tests import mutants

ROOT = pathlib.Path(__file__).parents[1]
HOLE = "raise NotImplementedError"


class Exercise(NamedTuple):
    """A row of EXERCISES.md: a function, and what pytest is asked to judge it."""
    name: str                        # module.function or module.Class.method
    tests: str

    @property
    def file(self):
        return self.name.partition(".")[0] + ".py"


def exercises():
    """-> {name: Exercise}"""
    rows = re.findall(r"^\| \d+ \| `([\w.]+)` \| `([^`]+)` \|",
                      (ROOT / "tests" / "EXERCISES.md").read_text(), re.M)
    return {name: Exercise(name, tests) for name, tests in rows}


def body_of(text, name):
    """-> the lines of a function's body below its docstring: first, last + 1, from 0."""
    _, *parts = name.split(".")
    node = ast.parse(text)
    for part in parts:
        node = next(one for one in node.body if getattr(one, "name", None) == part)
    first = node.body[bool(ast.get_docstring(node))]
    return first.lineno - 1, node.end_lineno


def punched(text, name):
    """The text of a module with a hole where that function's body was."""
    lines = text.splitlines(keepends=True)
    first, end = body_of(text, name)
    indent = re.match(" *", lines[first])[0]
    return "".join([*lines[:first], f"{indent}{HOLE}\n", *lines[end:]])


def judge(exercise, root=ROOT):
    """Runs its tests -> the names of those that fail, and what pytest said."""
    command = f"{sys.executable} -m pytest -q -p no:cacheprovider {exercise.tests}"
    done = subprocess.run(command, shell=True, cwd=root, capture_output=True, text=True)
    failed = re.findall(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", done.stdout, re.M)
    return failed or ["nothing ran"] * (done.returncode != 0), done.stdout + done.stderr


def wrong_answers(exercise):
    """The faults of tests/mutants.py that lie in its body, but those of several processes."""
    text = (ROOT / exercise.file).read_text()
    first, end = body_of(text, exercise.name)
    return [fault for fault in mutants.FAULTS
            if fault.file == exercise.file and fault.tests != mutants.PROCESSES
            and first <= text[:text.index(fault.old)].count("\n") < end]


def verify(exercise):
    """Yields, of its own body, of none and of each wrong one, whether it is judged rightly."""
    yield "as it is", not judge(exercise)[0]
    text = (ROOT / exercise.file).read_text()
    hole = mutants.Fault(exercise.file, "a hole", text, punched(text, exercise.name))
    for fault in [hole, *wrong_answers(exercise)]:
        yield fault.what, mutants.kill(fault._replace(tests=exercise.tests)) is not None


def take_out(exercise):
    """Makes the hole, where git can bring back what was there."""
    path = ROOT / exercise.file
    changed = subprocess.run(["git", "status", "--porcelain", exercise.file], cwd=ROOT,
                             capture_output=True, text=True)
    if changed.stdout or changed.returncode:
        sys.exit(f"error: {exercise.file} is changed, or git does not know it: commit it first, "
                 f"or your work would be lost")
    path.write_text(punched(path.read_text(), exercise.name))
    print(f"{exercise.file}: write {exercise.name} again, by its docstring; then\n"
          f"    python -m tests.exercise {exercise.name} --check\n"
          f"    git checkout {exercise.file}        brings ours back")


def check(exercise):
    failed, said = judge(exercise)
    if failed:
        print(said[-3000:])
        sys.exit(f"{exercise.name}: {len(failed)} tests fail: {', '.join(failed)}")
    print(f"{exercise.name}: all of its tests pass")


def parser():
    made = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("name", nargs="?", choices=[*exercises()], help="which one")
    made.add_argument("--check", action="store_true", help="run its tests")
    made.add_argument("--copy", help="directory for a copy without any of the bodies")
    made.add_argument("--verify", action="store_true", help="judge the judges")
    return made


def main():
    args, known = parser().parse_args(), exercises()
    if args.copy:
        root = mutants.copy_of(args.copy)
        for exercise in known.values():
            path = root / exercise.file
            path.write_text(punched(path.read_text(), exercise.name))
    elif args.verify:
        wrong = 0
        for exercise in [known[args.name]] if args.name else known.values():
            for what, rightly in verify(exercise):
                wrong += not rightly
                word = "ok" if rightly else "NOT NOTICED"
                print(f"{exercise.name:24} {what:50} {word}", flush=True)
        sys.exit(wrong > 0)
    elif args.name:
        (check if args.check else take_out)(known[args.name])
    else:
        parser().print_help()


if __name__ == "__main__":
    main()
