"""Checkpoints of a run: which are kept, when they are written, and which is gone on from.

A checkpoint (dpo_jax/snapshot.py) is written beside its place, sealed, and renamed into place: it is there whole or not
at all.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from absl import logging

from dpo_jax import processes
from dpo_jax.hashing import hash_leaves, spans_processes
from dpo_jax.integrity import DamagedError, sync
from dpo_jax.snapshot import META_FILE, Admit, Saved, copy_to_host, newest_saved, read, steps_in, write

FOLDER = "checkpoints"
_INCOMPLETE, _REMOVED, _DAMAGED = ".incomplete-", ".removed-", "damaged-"
_LATE_WRITES, _ATTEMPTS = 0.5, 10  # seconds for late writes to show; times that what they make is removed


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: all that one of these rules asks for, and always the newest.

    Attributes:
      newest: how many of the newest; None keeps all.
      every: those whose step is a multiple of it; None is no such rule.
      best: "min" or "max" keeps that with the smallest or largest score; None is no such rule.
    """

    newest: int | None = None
    every: int | None = None
    best: str | None = None

    def kept(self, scores: Mapping[int, float | None]) -> set[int]:
        """The steps that stay, of those given with their scores."""
        steps = sorted(scores)
        if self.newest is None:
            return set(steps)
        kept = set(steps[-max(self.newest, 1) :])
        if self.every is not None:
            kept |= {step for step in steps if step % self.every == 0}
        rated = {step: score for step, score in scores.items() if score is not None and math.isfinite(score)}
        if self.best is not None and rated:
            kept.add((min if self.best == "min" else max)(sorted(rated), key=rated.__getitem__))
        return kept


class Checkpoints:
    """The checkpoints of the one run that owns a workdir. Saves go on in the background, one at a time.

    Args:
      workdir: the run's folder.
      retention: which checkpoints stay.
      writes: whether this process, of those of the run, is the one that keeps the folder in order. The others only
        read, and write their parts of arrays that lie over all processes.
      then: called in the background when a checkpoint is on the disk.

    Attributes:
      folder: where they lie.
      blocked: seconds that ``save`` and ``wait`` have kept the run waiting.

    Raises:
      OSError: they cannot be written there.
    """

    def __init__(
        self,
        workdir: Path,
        retention: Retention = Retention(),
        *,
        writes: bool = True,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = Path(workdir).absolute() / FOLDER
        self.blocked = 0.0
        self._retention, self._writes, self._then = retention, writes, then
        with _explained(f"cannot write to {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
        for pattern in (f"{_INCOMPLETE}*", f"{_REMOVED}*") if writes else ():
            for leftover in self.folder.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)
        if writes:
            _check_renames(self.folder)
        self._scores = {step: _score_of(self.folder / str(step)) for step in steps_in(self.folder)}
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint."""
        return max(steps_in(self.folder), default=None)

    def save(self, step: int, state: Any, meta: Mapping[str, Any], score: float | None = None) -> None:
        """Copies a state and saves it in the background.

        Args:
          step: updates done; also the position in the data, whose batches are a function of (seed, step).
          state: a pytree of arrays, on the host or over devices. Those over several processes are saved when all call.
          meta: what is needed to know what the state belongs to; JSON values.
          score: what ``Retention.best`` compares.

        Raises:
          OSError: the save before this one has failed: no room or no permission.
        """
        together = spans_processes(state)
        if not (self._writes or together):
            return
        self.wait()
        begin = time.monotonic()
        state = copy_to_host(state)
        # Processes add their hashes up by a program of their devices, which the steps must not come between.
        hashes = hash_leaves(state) if together else None
        self._pending = self._pool.submit(self._save, step, state, {**meta, "score": score}, hashes)
        self.blocked += time.monotonic() - begin

    def wait(self) -> None:
        """Returns when the last save is on the disk.

        Raises:
          OSError: it has failed; earlier checkpoints are whole.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            begin = time.monotonic()
            pending.result()
            self.blocked += time.monotonic() - begin

    def restore(self, step: int, like: Any, admit: Admit | None = None) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint back; see :func:`read`."""
        return read(self.folder / str(step), like, step, admit)

    def restore_newest(
        self, like: Any, admit: Admit | None = None, *, stop_at_damage: bool = False
    ) -> tuple[Any, dict[str, Any]] | None:
        """Reads the newest checkpoint that is whole; damaged ones are named and set aside. All processes must call.

        Args:
          like: as of :func:`read`.
          admit: as of :func:`read`.
          stop_at_damage: whether to raise at the first damaged one instead.

        Returns:
          (state, meta), None when there is no checkpoint.

        Raises:
          ValueError: the checkpoint is of another model or another run.
          DamagedError: it is damaged, and so are all before it, or ``stop_at_damage`` is set.
        """
        found = steps_in(self.folder)
        # The first process tells the step, since it sets damaged checkpoints aside.
        while (step := processes.told_by_first(lambda: max(steps_in(self.folder), default=-1))) >= 0:
            try:
                return self.restore(step, like, admit)
            except DamagedError as error:
                if stop_at_damage:
                    raise DamagedError(
                        f"the checkpoint of step {step} is damaged: {error}. Bring it back from a copy, or let the run "
                        "go on from an earlier one: config.checkpoint.on_damage=fall_back"
                    ) from error
                if self._writes:
                    moved = self._set_aside(step)
                    logging.error("The checkpoint of step %d is damaged: %s. It is kept as %s.", step, error, moved)
        if found:
            raise DamagedError(
                f"no checkpoint in {self.folder} is whole: steps {found} are damaged, and kept as {_DAMAGED}*. Bring "
                "one back from a copy, or choose another --workdir to start anew"
            )
        return None

    def close(self) -> None:
        """Waits for the last save; a second call does nothing."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        # A save that fails must not hide the error that ended the run.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self.close()

    def _save(self, step: int, state: Any, meta: dict[str, Any], hashes: Mapping[str, str] | None) -> None:
        place, incomplete = self.folder / str(step), self.folder / f"{_INCOMPLETE}{step}"
        with _explained(f"cannot save the checkpoint of step {step} in {self.folder}"):
            try:
                write(incomplete, state, {**meta, "step": step}, hashes)
                if not self._writes:
                    return
                incomplete.rename(place)
                sync(self.folder)
            except BaseException:
                if self._writes:
                    _remove_for_good(incomplete)
                raise
        self._scores[step] = meta["score"]
        self._remove_old()
        self._then()

    def _remove_old(self) -> None:
        for step in set(self._scores) - self._retention.kept(self._scores):
            del self._scores[step]
            removed = self.folder / f"{_REMOVED}{step}"
            with contextlib.suppress(OSError):  # the next run tries again; the new checkpoint is what matters
                (self.folder / str(step)).rename(removed)
                shutil.rmtree(removed)

    def _set_aside(self, step: int) -> Path:
        self._scores.pop(step, None)
        taken = sum(1 for _ in self.folder.glob(f"{_DAMAGED}{step}*"))
        moved = self.folder / (f"{_DAMAGED}{step}" + (f"-{taken}" if taken else ""))
        with _explained(f"cannot set the damaged checkpoint of step {step} aside"):
            (self.folder / str(step)).rename(moved)
        return moved


def open_newest(workdir: Path) -> Saved:
    """The newest checkpoint of another run; see :func:`dpo_jax.snapshot.newest_saved`."""
    return newest_saved(Path(workdir).absolute() / FOLDER)


def _check_renames(folder: Path) -> None:
    """Renames a folder that holds another, as the end of a save does: not every mounted bucket can.

    Raises:
      OSError: it cannot be done here.
    """
    probe, renamed = folder / f"{_INCOMPLETE}probe", folder / f"{_REMOVED}probe"
    with _explained(f"cannot write to {folder}"):
        (probe / "part").mkdir(parents=True)
        (probe / "part" / "file").touch()
    try:
        probe.rename(renamed)
    except OSError as error:
        raise OSError(
            f"cannot rename folders in {folder}, as every checkpoint is: {error}; mount a bucket with a hierarchical "
            "namespace (gcloud storage buckets create --enable-hierarchical-namespace), or choose a --workdir on a "
            "local disk"
        ) from error
    finally:
        for place in (probe, renamed):
            shutil.rmtree(place, ignore_errors=True)


def _remove_for_good(folder: Path) -> None:
    """Removes what a failed save has left. Orbax raises its first error while other writes go on, and make it anew."""
    for _ in range(_ATTEMPTS):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(_LATE_WRITES)
        if not folder.exists():
            return


def _score_of(folder: Path) -> float | None:
    try:
        score = json.loads((folder / META_FILE).read_text(encoding="utf-8"))["score"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # damaged; whoever restores it says so
    return score if isinstance(score, int | float) else None


@contextlib.contextmanager
def _explained(what: str) -> Any:
    """Libraries report a full disk in many types; all are an OSError here."""
    try:
        yield
    except Exception as error:
        mend = "free some space there, make it writable, or choose another --workdir"
        raise OSError(f"{what}: {error}; {mend}. Checkpoints that were there before are whole") from error
