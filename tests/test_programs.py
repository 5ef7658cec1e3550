"""All programs of the package and of experiments/ take their command lines alike: help that helps, short mistakes."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny_run
from tests.test_imports import PEERS, read_sources

# Started by other programs, with all they need in one argument.
WORKERS = PEERS | {"experiments.speed.ours"}
SOURCES = {
    name.removesuffix(".__main__"): text
    for name, text in read_sources("dpo_jax", "experiments").items()
    if '\nif __name__ == "__main__":\n' in text and name not in WORKERS
}
WRAPPERS = {"main", "launch", "command"}

# A child for each program, of one process that has imported what takes long.
CALLS = """
import json, os, runpy, sys
import dpo_jax.main, dpo_jax.train

def call(name, argument, out):
    if not (child := os.fork()):
        file = os.open(out, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.argv = [name, argument]
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code = repr(error)
        if isinstance(code, str):
            print(code)
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else code is not None)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

folder, argument, *names = sys.argv[1:]
print(json.dumps({name: call(name, argument, os.path.join(folder, name)) for name in names}))
"""


def call_all(argument: str, folder: Path) -> dict[str, tuple[int, str]]:
    """{program: (its exit code, what it printed)}"""
    command = [sys.executable, "-c", CALLS, str(folder), argument, *SOURCES]
    done = subprocess.run(command, cwd=tiny_run.ROOT, env=tiny_run.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    return {name: (codes[name], (folder / name).read_text(encoding="utf-8")) for name in SOURCES}


def test_help_of_every_program_says_what_it_does(tmp_path: Path) -> None:
    assert len(SOURCES) > 25
    for name, (code, text) in call_all("--help", tmp_path).items():
        assert code == 0 and name in text and "help" in text, f"{name} ended with {code}: {text}"


def test_no_program_takes_a_flag_that_it_does_not_know(tmp_path: Path) -> None:
    for name, (code, text) in call_all("--no_such_flag=1", tmp_path).items():
        assert code == 2 and "error: " in text.splitlines()[-1], f"{name} ended with {code}: {text}"


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"dpo_jax.losses"}))  # which takes nothing that could be wrong
def test_every_program_tells_mistakes_in_one_line(name: str) -> None:
    nodes = ast.walk(ast.parse(SOURCES[name]))
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "dpo_jax.main"]
    assert WRAPPERS & {alias.name for node in froms for alias in node.names}, "run it inside dpo_jax.main.command()"


def test_what_cannot_be_read_is_told_in_one_line(tmp_path: Path) -> None:
    nothing = str(tmp_path / "nothing")
    for program, arguments, words in (
        ("experiments.speed.table", [nothing], "No such file"),
        ("experiments.data.positions", [f"--data={nothing}"], "no data files at"),
        ("experiments.smollm2.make_model", [f"--wheel={nothing}", f"--out={nothing}"], "names 0 wheels"),
        ("experiments.populations.speed", [f"--imdb={nothing}"], "there are no pairs in"),
    ):
        done = tiny_run.call(*arguments, program=program)
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ") and words in line and done.returncode == 1
