"""Kills a real training at random moments, starts it again with the same command, and counts what was lost.

    python -m tests.chaos --kills=50

A killed run that has been continued to its end is compared with an uninterrupted one, byte by byte: parameters,
optimizer state and running statistics by their hashes, metrics.jsonl, samples and summary. Half of the kills
(SIGKILL, which no process can see coming) fall at any moment after the start, half while a checkpoint is being written.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess as Process
from pathlib import Path
from typing import Any

from absl import app, flags

from dpo_jax import train
from dpo_jax.config import Config
from tests import tiny_run

# Many checkpoints, none of them at a line of metrics; epochs end in the middle of a batch.
BASE = {"train.steps": 24, "checkpoint.every": 2, "eval.every": 7, "checkpoint.keep": 2}
VARIANTS = {
    "sft": {"loss.name": "sft"},
    "dpo": {"loss.name": "dpo"},
    "kto": {"loss.name": "kto"},
    "tr_dpo": {"loss.name": "dpo", "reference.sync_every": 3},
    "beta_dpo": {"loss.name": "beta_dpo"},
    "lora": {"loss.name": "dpo", "lora.rank": 2, "lora.dropout": 0.25},
    "store": {"loss.name": "kto", "reference.store": "{run}.store"},  # killed while it is written, too
}

_FORK = multiprocessing.get_context("fork")

_KILLS = flags.DEFINE_integer("kills", 50, "how often a training is killed, at least")
_SEED = flags.DEFINE_integer("seed", 0, "of the moments")
_VARIANTS = flags.DEFINE_list("variants", list(VARIANTS), f"what is trained, in turn: {', '.join(VARIANTS)}")


@dataclass
class Tally:
    """What happened: kills, how many of them inside a save, runs brought to their end, and differences found."""

    kills: int = 0
    in_saves: int = 0
    runs: int = 0
    losses: int = 0


def main(argv: list[str]) -> None:
    del argv
    with tempfile.TemporaryDirectory(prefix="chaos_") as folder:
        tally = run(Path(folder), _KILLS.value, _VARIANTS.value, _SEED.value)
    print(
        f"{tally.kills} kills, {tally.in_saves} of them while a checkpoint was written; {tally.runs} runs continued to "
        f"their end; losses: {tally.losses}"
    )
    sys.exit(bool(tally.losses))


def run(folder: Path, kills: int, variants: list[str], seed: int) -> Tally:
    """Trains the variants in turn until there have been enough kills.

    Args:
      folder: an empty one.
      kills: how many, at least.
      variants: names of ``VARIANTS``.
      seed: of the moments.

    Returns:
      What happened.
    """
    rng, tally = random.Random(seed), Tally()
    expected: dict[str, tuple[dict[str, bytes], float]] = {}
    for number in itertools.count():
        variant = variants[number % len(variants)]
        if variant not in expected:
            expected[variant] = _uninterrupted(folder, variant)
        reference, seconds = expected[variant]
        workdir = folder / f"run{number}"
        _to_the_end(folder, variant, workdir, rng, tally, kills, seconds)
        tally.runs += 1
        tally.losses += _differences(variant, tiny_run.results(workdir), reference)
        print(f"{variant}: {tally}", flush=True)
        if tally.kills >= kills and number + 1 >= len(variants):
            return tally


def _start(folder: Path, variant: str, workdir: Path) -> Process:
    """A training in a process of its own. It is forked: what takes time before a run begins is done already."""
    changes = {key: _filled(value, workdir) for key, value in VARIANTS[variant].items()}
    answers = 1 if changes["loss.name"] in ("sft", "kto") else 2
    data = folder / f"data{answers}"
    if not data.is_dir():
        data.mkdir()
        # In a process of its own too: a library that has started threads cannot be forked.
        writer = _FORK.Process(target=tiny_run.write_data, args=(data,), kwargs={"answers": answers})
        writer.start()
        writer.join()
    config = tiny_run.make_config(data, **BASE, **changes)
    process = _FORK.Process(target=_train, args=(config, workdir))
    process.start()
    return process


def _filled(value: Any, workdir: Path) -> Any:
    return value.format(run=workdir) if isinstance(value, str) else value


def _train(config: Config, workdir: Path) -> None:
    log = os.open(_log(workdir), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    train.run(config, workdir)


def _log(workdir: Path) -> Path:
    return workdir.with_suffix(".log")


def _uninterrupted(folder: Path, variant: str) -> tuple[dict[str, bytes], float]:
    """The results, and how long it takes from the first file to the end."""
    workdir = folder / f"whole_{variant}"
    process = _start(folder, variant, workdir)
    _wait_for_start(workdir, process)
    begin = time.monotonic()
    _check_ended(process, variant, workdir)
    return tiny_run.results(workdir), time.monotonic() - begin


def _check_ended(process: Process, variant: str, workdir: Path) -> None:
    process.join()
    if process.exitcode != 0:
        end = _log(workdir).read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{variant} in {workdir} ended with {process.exitcode}:\n{end}")


def _to_the_end(
    folder: Path, variant: str, workdir: Path, rng: random.Random, tally: Tally, kills: int, seconds: float
) -> None:
    """Starts a run again and again, and kills it, until it has finished."""
    for attempt in itertools.count():
        process = _start(folder, variant, workdir)
        # Late attempts are left alone, so that every run comes to its end.
        if attempt < 8 and tally.kills < kills:
            _wait_for_start(workdir, process)
            if attempt % 2:
                _wait_for_save(workdir, process, rng)
            else:
                _sleep(process, rng.uniform(0, seconds))
            if process.is_alive():
                tally.in_saves += bool(_saving(workdir))
                process.kill()
                process.join()
                tally.kills += 1
                continue
        _check_ended(process, variant, workdir)
        return


def _wait_for_start(workdir: Path, process: Process) -> None:
    """Until the run has its lock: before that, a kill hits imports alone."""
    lock = workdir / ".lock"
    before = lock.read_bytes() if lock.exists() else b""
    while process.is_alive() and not (lock.exists() and lock.read_bytes() not in (before, b"")):
        time.sleep(0.005)


def _wait_for_save(workdir: Path, process: Process, rng: random.Random) -> None:
    for _ in range(rng.randrange(1, 4)):
        while process.is_alive() and not _saving(workdir):
            time.sleep(0.001)
        _sleep(process, rng.uniform(0, 0.1))


def _saving(workdir: Path) -> list[Path]:
    return list((workdir / "checkpoints").glob(".incomplete-*"))


def _sleep(process: Process, seconds: float) -> None:
    end = time.monotonic() + seconds
    while process.is_alive() and time.monotonic() < end:
        time.sleep(0.002)


def _differences(variant: str, got: dict[str, bytes], expected: dict[str, bytes]) -> int:
    names = sorted(name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name))
    steps = [json.loads(line)["step"] for line in got["metrics.jsonl"].splitlines()]
    if steps != sorted(set(steps)):
        names.append("order of metrics.jsonl")
    for name in names:
        print(f"LOST in {variant}: {name}")
    return len(names)


if __name__ == "__main__":
    app.run(main)
