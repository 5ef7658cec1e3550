"""The command line: one message and an exit code for each mistake, help that helps."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_jax.main import user_errors
from tests import tiny_run

CONFIG = "--config=configs/imdb_dpo.py"


@pytest.mark.parametrize("error", [ValueError("a loss"), OSError("a disk"), FloatingPointError("a number")])
def test_a_mistake_ends_with_its_message_alone(error: Exception) -> None:
    with pytest.raises(SystemExit) as exit_, user_errors():
        raise error
    assert exit_.value.code == f"error: {error}"  # Python prints a text to stderr, and exits with 1


def test_a_mistake_of_ours_keeps_its_trace() -> None:
    with pytest.raises(KeyError), user_errors():
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


def test_missing_flags_are_asked_for() -> None:
    done = tiny_run.call()
    assert done.returncode == 1
    assert "--config and --workdir are needed, such as python -m dpo_jax.train" in done.stderr + done.stdout


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
    assert ("--replay" in done.stdout) == (program == "dpo_jax.train")
