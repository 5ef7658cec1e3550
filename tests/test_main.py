"""The command line: one message and an exit code for each mistake, help that helps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_jax import main
from dpo_jax.main import command
from tests import tiny_run

CONFIG = "--config=configs/imdb_dpo.py"


@pytest.mark.parametrize("error", [ValueError("a loss"), OSError("a disk"), FloatingPointError("a number")])
def test_a_mistake_ends_with_its_message_alone(error: Exception) -> None:
    with pytest.raises(SystemExit) as exit_, command():
        raise error
    assert exit_.value.code == f"error: {error}"  # Python prints a text to stderr, and exits with 1


def test_where_there_are_gpus_programs_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    with command():
        assert os.environ["XLA_FLAGS"] == "--xla_gpu_enable_triton_gemm=true"
    monkeypatch.setattr(main, "_DRIVER", tmp_path)
    with command():
        assert os.environ["XLA_FLAGS"] == "--xla_gpu_enable_triton_gemm=true --xla_gpu_deterministic_ops=true"


def test_a_mistake_of_ours_keeps_its_trace() -> None:
    with pytest.raises(KeyError), command():
        raise KeyError("ours")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([CONFIG, "--config.loss.nme=ipo"], 2, ["error: --config: ", 'Did you mean "name" instead of "nme"?']),
        ([CONFIG, "--config.data.batch_size=many"], 2, ["error: ", "batch_size", "many"]),
        ([CONFIG, "--config.optim.learning_rate=-1"], 1, ["error: config.optim.learning_rate is -1.0"]),
    ],
)
def test_mistakes_are_told_in_one_message(arguments: list[str], code: int, words: list[str], tmp_path: Path) -> None:
    done = tiny_run.call(*arguments, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("program", "arguments", "words"),
    [
        ("train", [], "--config and --workdir are needed, such as python -m dpo_jax.train"),
        ("train", [CONFIG], "--config and --workdir are needed"),
        ("train", [CONFIG, "--workdir=runs/x", "once", "more"], "unexpected arguments: once more"),
        ("sweep", ["--workdir=runs/x"], "--config and --workdir are needed"),
        ("audit", ["--workdir=runs/x"], "--data is needed"),
        ("report", [], "--workdir is needed"),
        ("export", [], "--workdir is needed; --out is needed"),
        ("sample", ["--workdir=runs/x", "--rows=many"], "flag --rows=many"),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(program: str, arguments: list[str], words: str) -> None:
    done = tiny_run.call(*arguments, program=f"dpo_jax.{program}")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {words}") and "--help" in line
    assert done.returncode == 2 and done.stdout == ""


def test_ctrl_c_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_, command():
        raise KeyboardInterrupt
    assert exit_.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_an_audit_ends_with_one_line_too(tmp_path: Path) -> None:
    done = tiny_run.call(f"--data={tmp_path / 'no.jsonl'}", f"--workdir={tmp_path}", program="dpo_jax.audit")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no data files at") and done.returncode == 1


@pytest.mark.parametrize("program", ["dpo_jax.train", "dpo_jax.prefer"])
def test_help_says_what_it_does_and_how(program: str) -> None:
    done = tiny_run.call("--help", program=program)
    for words in (
        f"python -m {program} --config=configs/imdb_",
        "--config.loss.name=ipo",
        "configs/base.py",
        "--workdir",
    ):
        assert words in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0
    assert ("--replay" in done.stdout) == (program == "dpo_jax.train")


COUNTED = """
import jax, jax.numpy as jnp
from dpo_jax.main import command
found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event))

def many(x):  # takes long enough to compile to be worth keeping
    for i in range(40):
        x = jnp.sort(jnp.sin(x) @ jnp.cos(x) / (i + 1), axis=i % 2)
    return x

with command():
    value = jax.jit(many)(jnp.eye(9)).sum()
print(sum(event.endswith("compilation_cache/cache_hits") for event in found), value)
"""


def test_what_is_compiled_is_kept_for_the_next_start_and_damage_costs_time_alone(tmp_path: Path) -> None:
    surroundings = {**tiny_run.environment(), "XDG_CACHE_HOME": str(tmp_path)}
    del surroundings["JAX_COMPILATION_CACHE_DIR"]

    def run() -> list[str]:
        """[programs that were read instead of compiled, the result]"""
        arguments = [sys.executable, "-c", COUNTED]
        done = subprocess.run(arguments, env=surroundings, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    first = run()
    programs = list((tmp_path / "dpo_jax" / "programs").glob("*-cache"))
    assert first[0] == "0" and len(programs) == 1
    assert run() == ["1", first[1]]
    programs[0].write_bytes(programs[0].read_bytes()[:1000])  # as of a process that was killed while it wrote
    assert run() == first
    surroundings["XDG_CACHE_HOME"] = str(programs[0])  # where no folder can be made
    assert run() == first
