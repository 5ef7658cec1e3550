"""Kills a real training at random moments, starts it again with the same command, and counts what was lost.

    python -m tests.chaos --kills=50

A killed run that has been continued to its end is compared with an uninterrupted one, byte by byte: parameters,
optimizer state and running statistics by their hashes, metrics.jsonl, samples and summary. Half of the kills
(SIGKILL, which no process can see coming) fall at any moment after the start, half while a checkpoint is being written.
"""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from absl import app, flags

from tests import tiny_run

# Many checkpoints, none of them at a line of metrics; epochs end in the middle of a batch.
BASE = {"train.steps": 24, "checkpoint.every": 2, "eval.every": 7, "checkpoint.keep": 2}
VARIANTS = {
    "sft": {"loss.name": "sft"},
    "dpo": {"loss.name": "dpo"},
    "kto": {"loss.name": "kto"},
    "tr_dpo": {"loss.name": "dpo", "reference.sync_every": 3},
    "beta_dpo": {"loss.name": "beta_dpo"},
}

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


def _command(folder: Path, variant: str, workdir: Path) -> list[str]:
    answers = 1 if variant in ("sft", "kto") else 2
    data = folder / f"data{answers}"
    if not data.is_dir():
        data.mkdir()
        tiny_run.write_data(data, answers=answers)
    config = tiny_run.write_config(folder / f"{variant}.py", data, **BASE, **VARIANTS[variant])
    return tiny_run.command(f"--config={config}", f"--workdir={workdir}")


def _start(command: list[str], workdir: Path) -> subprocess.Popen[bytes]:
    with _log(workdir).open("ab") as log:
        return subprocess.Popen(command, cwd=tiny_run.ROOT, env=tiny_run.environment(), stdout=log, stderr=log)


def _log(workdir: Path) -> Path:
    return workdir.with_suffix(".log")


def _uninterrupted(folder: Path, variant: str) -> tuple[dict[str, bytes], float]:
    """The results, and how long it takes from the first file to the end."""
    workdir = folder / f"whole_{variant}"
    process = _start(_command(folder, variant, workdir), workdir)
    _wait_for_start(workdir, process)
    begin = time.monotonic()
    if process.wait() != 0:
        raise RuntimeError(f"the uninterrupted run of {variant} failed")
    return tiny_run.results(workdir), time.monotonic() - begin


def _to_the_end(
    folder: Path, variant: str, workdir: Path, rng: random.Random, tally: Tally, kills: int, seconds: float
) -> None:
    """Starts a run again and again, and kills it, until it has finished."""
    for attempt in itertools.count():
        process = _start(_command(folder, variant, workdir), workdir)
        # Late attempts are left alone, so that every run comes to its end.
        if attempt < 8 and tally.kills < kills:
            _wait_for_start(workdir, process)
            if attempt % 2:
                _wait_for_save(workdir, process, rng)
            else:
                _sleep(process, rng.uniform(0, seconds))
            if process.poll() is None:
                tally.in_saves += bool(_saving(workdir))
                process.send_signal(signal.SIGKILL)
                process.wait()
                tally.kills += 1
                continue
        if process.wait() != 0:
            end = _log(workdir).read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{variant} ended with {process.returncode} after {tally.kills} kills:\n{end}")
        return


def _wait_for_start(workdir: Path, process: subprocess.Popen[bytes]) -> None:
    """Until the run has its lock: before that, a kill hits imports alone."""
    lock = workdir / ".lock"
    before = lock.read_bytes() if lock.exists() else b""
    while process.poll() is None and not (lock.exists() and lock.read_bytes() not in (before, b"")):
        time.sleep(0.005)


def _wait_for_save(workdir: Path, process: subprocess.Popen[bytes], rng: random.Random) -> None:
    for _ in range(rng.randrange(1, 4)):
        while process.poll() is None and not _saving(workdir):
            time.sleep(0.001)
        _sleep(process, rng.uniform(0, 0.1))


def _saving(workdir: Path) -> list[Path]:
    return list((workdir / "checkpoints").glob(".incomplete-*"))


def _sleep(process: subprocess.Popen[bytes], seconds: float) -> None:
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
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
