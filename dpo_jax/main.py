"""Flags of every program: --config=FILE with overrides of its keys, and --workdir."""

from __future__ import annotations

import contextlib
import logging as std_logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from absl import app, flags, logging
from ml_collections import config_flags

from dpo_jax.config import Config, from_config_dict


def main(purpose: str, program: Callable[[Config, Path], Any]) -> None:
    """Parses the command line and runs a program of (config, workdir).

    Args:
      purpose: what the program does; ``--help`` says it.
      program: the program.
    """
    config = config_flags.DEFINE_config_file("config", None, "file of the experiment, such as configs/imdb_dpo.py")
    workdir = flags.DEFINE_string("workdir", None, "folder of this run: made when new, continued when not")
    flags.mark_flags_as_required(["config", "workdir"])

    def start(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
        with user_errors():
            program(from_config_dict(config.value), Path(workdir.value))

    sys.modules["__main__"].__doc__ = f"{purpose}\n\nAny key of the config can be changed: --config.loss.name=ipo"
    app.run(start)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Logs in plain words, and ends on a user's mistake with its one message and exit code 1, without a stack trace."""
    handler = logging.get_absl_handler()
    handler.addFilter(_ours)
    handler.setFormatter(std_logging.Formatter("%(message)s"))
    logging.set_verbosity(logging.INFO)
    tfds.disable_progress_bar()  # its bars would tear those of dpo_jax.progress
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


def _ours(record: std_logging.LogRecord) -> bool:
    """Libraries may warn; what they tell beside that would bury the run's own lines."""
    return record.levelno >= std_logging.WARNING or "site-packages" not in record.pathname
