"""The folder of a run: whose it is, who works in it, and whether it is finished."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from dpo_jax import __version__
from dpo_jax.config import Config, differences, from_dict, to_json
from dpo_jax.data.pipeline import Pipeline, source_fingerprint
from dpo_jax.integrity import sync
from dpo_jax.sources import Dataset

CONFIG_FILE, SUMMARY_FILE, LOCK_FILE = "config.json", "summary.json", ".lock"
_ANEW = "choose another --workdir, or remove that one to start anew"


@contextlib.contextmanager
def owned(workdir: Path, config: Config) -> Iterator[None]:
    """Makes a workdir a config's own, and keeps other processes out of it while the block runs.

    Args:
      workdir: the folder; made when it does not exist.
      config: the experiment.

    Raises:
      ValueError: it belongs to another config; the keys that differ are listed. One in which nothing was done yet, such
        as that of a start that failed, belongs to nobody.
      OSError: it cannot be written, or another process works in it.
    """
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((workdir / LOCK_FILE).open("a+", encoding="utf-8"))
        except OSError as error:
            raise _unwritable(workdir, error) from error
        _take(lock, workdir)
        _claim(workdir, config)
        yield


def read_config(workdir: Path) -> Config:
    """The config of a run.

    Raises:
      OSError: the folder holds no run.
      ValueError: a config that this version does not understand.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} is no workdir of a run: it has no config.json")
    return from_dict(json.loads(path.read_text(encoding="utf-8")))


def finished(workdir: Path) -> dict[str, float] | None:
    """The summary of a finished run, None when it is not finished."""
    path = workdir / SUMMARY_FILE
    return _read_json(path) if path.is_file() else None


def check_owner(workdir: Path, config: Config) -> None:
    """Refuses the workdir of another config.

    Raises:
      ValueError: it belongs to one; the keys that differ are listed.
    """
    if (lines := _differences(workdir, config)) and _anything_done(workdir):
        raise ValueError("\n  ".join([f"the workdir {workdir} belongs to another config:", *lines]) + f"\n{_ANEW}")


def finish(workdir: Path, summary: Mapping[str, float]) -> None:
    """Marks a run as finished."""
    write_atomically(workdir / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")


def identity(config: Config, data: Dataset, batches: Pipeline) -> dict[str, Any]:
    """What must be the same for a checkpoint to be this run's: code, config, tokenizer, data and its order."""
    train = batches.fingerprint()
    return {
        "version": __version__,
        "config": _experiment(json.loads(to_json(config))),
        "tokenizer": _hash(data.tokenizer.backend_tokenizer.to_str()),
        "data": {"train": train["data"], "held_out": source_fingerprint(data.held_out), "order": train["pipeline"]},
    }


def check_identity(saved: Mapping[str, Any], own: Mapping[str, Any], folder: Path) -> None:
    """Refuses a checkpoint of another run.

    Raises:
      ValueError: code, config, tokenizer or data differ; both sides are listed.
    """
    saved = {**saved, "config": _experiment(saved["config"])}
    lines = differences(own, saved, "run")
    if lines:
        raise ValueError(
            "\n  ".join(
                [f"the checkpoints in {folder} were made by another run (here: this run; there: they):", *lines]
            )
            + f"\nbring back the data, the tokenizer, the code or the config that they were made with; or {_ANEW}"
        )


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all, even after a loss of power."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
    except OSError as error:
        raise _unwritable(path.parent, error) from error


def _take(lock: TextIO, workdir: Path) -> None:
    try:
        # The system lets go of it when the process ends, however it ends.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        raise OSError(
            f"{holder} is at work in the workdir {workdir}: wait for it, stop it, or choose another --workdir"
        ) from error
    lock.seek(0)
    lock.truncate()
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()


def _claim(workdir: Path, config: Config) -> None:
    check_owner(workdir, config)
    if _differences(workdir, config) or not (workdir / CONFIG_FILE).is_file():
        write_atomically(workdir / CONFIG_FILE, to_json(config))


def _differences(workdir: Path, config: Config) -> list[str]:
    """Keys in which a workdir's config is another one; none where it has no config yet."""
    path = workdir / CONFIG_FILE
    if not path.is_file():
        return []
    return differences(_experiment(json.loads(to_json(config))), _experiment(_read_json(path)))


def _anything_done(workdir: Path) -> bool:
    files = (path for path in workdir.rglob("*") if path.name not in (CONFIG_FILE, LOCK_FILE) and path.is_file())
    return any(path.stat().st_size for path in files)


def _experiment(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that decide what a run computes: not those that say which devices compute it."""
    return {key: value for key, value in config.items() if key not in ("parallel", "plan")}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OSError(f"{path} cannot be read: {error}. Bring it back from a copy; or {_ANEW}") from error
    if not isinstance(content, dict):
        raise OSError(f"{path} is damaged: expected a JSON object. Bring it back from a copy; or {_ANEW}")
    return content


def _unwritable(workdir: Path, error: OSError) -> OSError:
    reason = error.strerror or str(error)
    return OSError(f"cannot write to the workdir {workdir}: {reason}; make it writable or choose another")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
