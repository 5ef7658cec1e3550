"""Checkpoints of a run: its whole state as Orbax arrays, and beside it what the state is a state of.

A checkpoint is written beside its place, sealed with a manifest of hashes, and renamed into place: it is there whole or
not at all. What is read is compared with its hashes, file by file and array by array, since Orbax restores a flipped
bit without a word.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import args as ocp_args

from dpo_jax.integrity import DamagedError, hash_leaves, seal, sync, verify
from dpo_jax.trees import describe, named_leaves

FOLDER = "checkpoints"
META_FILE, STATE_FOLDER = "meta.json", "state"
_INCOMPLETE, _REMOVED, _DAMAGED = ".incomplete-", ".removed-", "damaged-"

Admit = Callable[[Mapping[str, Any]], None]


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
      writes: whether this process, of those of the run, is the one that writes; the others only read.
      then: called in the background when a checkpoint is on the disk.

    Attributes:
      folder: where they lie.
      blocked: seconds that ``save`` and ``wait`` have kept the run waiting.
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
          state: a pytree of arrays on the host.
          meta: what is needed to know what the state belongs to; JSON values.
          score: what ``Retention.best`` compares.

        Raises:
          OSError: the save before this one has failed: no room or no permission.
        """
        if not self._writes:
            return
        self.wait()
        begin = time.monotonic()
        # A copy: on CPUs a host array may be the very buffer that the next step reuses.
        state = jax.tree.map(np.array, state)
        self._pending = self._pool.submit(self._save, step, state, {**meta, "score": score})
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
        """Reads the newest checkpoint that is whole; damaged ones are named and set aside.

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
        steps = steps_in(self.folder)
        for step in reversed(steps):
            try:
                return self.restore(step, like, admit)
            except DamagedError as error:
                if stop_at_damage:
                    raise DamagedError(
                        f"the checkpoint of step {step} is damaged: {error}. Bring it back from a copy, or let the run "
                        "go on from an earlier one: config.checkpoint.on_damage=fall_back"
                    ) from error
                moved = self._set_aside(step)
                logging.error("The checkpoint of step %d is damaged: %s. It is kept as %s.", step, error, moved)
        if steps:
            raise DamagedError(
                f"no checkpoint in {self.folder} is whole: steps {steps} are damaged, and kept as {_DAMAGED}*. Bring "
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

    def _save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        place, incomplete = self.folder / str(step), self.folder / f"{_INCOMPLETE}{step}"
        with _explained(f"cannot save the checkpoint of step {step} in {self.folder}"):
            try:
                write(incomplete, state, {**meta, "step": step})
                incomplete.rename(place)
                sync(self.folder)
            except BaseException:
                shutil.rmtree(incomplete, ignore_errors=True)
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


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, rising."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isascii() and path.name.isdigit())


def write(folder: Path, state: Any, meta: Mapping[str, Any]) -> None:
    """Writes one sealed checkpoint.

    Args:
      folder: its place; must not exist, and its parent must.
      state: a pytree of numpy arrays.
      meta: JSON values.
    """
    folder.mkdir()
    with _alone(ocp.StandardCheckpointHandler) as checkpointer:
        checkpointer.save(folder / STATE_FOLDER, args=ocp_args.StandardSave(state))
    described = {"state": description(state), "sha256": hash_leaves(state)}
    (folder / META_FILE).write_text(json.dumps({**meta, **described}, indent=1) + "\n", encoding="utf-8")
    seal(folder)


def read(folder: Path, like: Any, step: int, admit: Admit | None = None) -> tuple[Any, dict[str, Any]]:
    """Reads one checkpoint, and compares it with its hashes.

    Args:
      folder: where ``write`` wrote.
      like: a pytree of arrays (or their shapes) of the structure that is expected.
      step: the step that it must be of.
      admit: looks at the meta, and raises ValueError when the checkpoint is another run's.

    Returns:
      (state of numpy arrays, meta).

    Raises:
      DamagedError: it is not what was written.
      ValueError: it holds another structure, other shapes or dtypes; both sides are listed.
    """
    meta = read_meta(folder, step)
    if admit is not None:
        admit(meta)
    _check_structure(meta["state"], description(like), folder)
    template = jax.tree.map(lambda a: np.empty(a.shape, a.dtype), like)
    with _damage(folder), _alone(ocp.StandardCheckpointHandler) as checkpointer:
        state = checkpointer.restore(folder / STATE_FOLDER, args=ocp_args.StandardRestore(template))
    _check_hashes(hash_leaves(state), meta["sha256"], folder)
    return state, meta


def read_meta(folder: Path, step: int) -> dict[str, Any]:
    """The meta of a checkpoint whose files are what was written.

    Raises:
      DamagedError: they are not, or it is the checkpoint of another step.
    """
    verify(folder)
    with _damage(folder):
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        found = int(meta["step"])
    if found != step:
        raise DamagedError(f"{folder} holds the checkpoint of step {found}")
    return meta


@dataclass(frozen=True)
class Saved:
    """A run's newest checkpoint, whose files are what was written.

    Attributes:
      folder: where it is.
      meta: what stands beside the state.
    """

    folder: Path
    meta: Mapping[str, Any]

    def params(self, like: Any) -> Any:
        """What was trained, without its optimizer.

        Args:
          like: a pytree of shapes of the parameters that are expected.

        Raises:
          ValueError: it holds another model.
          DamagedError: it is not what was written.
        """
        saved, hashes = (_of_params(self.meta[key]) for key in ("state", "sha256"))
        _check_structure(saved, description({"params": like}), self.folder)
        template = {"params": jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)}
        with _damage(self.folder), _alone(ocp.PyTreeCheckpointHandler) as checkpointer:
            restored = checkpointer.restore(
                self.folder / STATE_FOLDER,
                args=ocp_args.PyTreeRestore({"params": like}, restore_args=template, partial_restore=True),
            )
        _check_hashes(hash_leaves(restored), hashes, self.folder)
        return restored["params"]

    def names(self) -> list[str]:
        """Paths of what was trained."""
        return [name.removeprefix("params/") for name in _of_params(self.meta["state"])]


def open_newest(workdir: Path) -> Saved:
    """The newest checkpoint of another run.

    Raises:
      ValueError: there is none.
      DamagedError: it is not what was written.
    """
    folder = Path(workdir).absolute() / FOLDER
    steps = steps_in(folder)
    if not steps:
        mend = "train that run first, or point init.run at the workdir of a finished one"
        raise ValueError(f"no complete checkpoint in {folder}: {mend}")
    newest = folder / str(steps[-1])
    return Saved(newest, _meta_of_init(newest, steps))


def description(tree: Any) -> dict[str, str]:
    """Dtype and shape of every array by path: ``{'params/kernel': 'float32[4,192]', …}``."""
    return {name: describe(leaf) for name, leaf in named_leaves(tree).items()}


def _of_params(by_name: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in by_name.items() if name.startswith("params/")}


def _alone(handler: Callable[..., Any]) -> ocp.Checkpointer:
    """Orbax in this process, whatever the others are doing: it would wait for them."""
    own = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}"
    )
    return ocp.Checkpointer(handler(multiprocessing_options=options), multiprocessing_options=options)


def _meta_of_init(newest: Path, steps: Sequence[int]) -> dict[str, Any]:
    try:
        return read_meta(newest, steps[-1])
    except DamagedError as error:
        raise DamagedError(
            f"the checkpoint of step {steps[-1]} in {newest.parent} is damaged: {error}. Train that run again, or "
            f"remove the folder {newest.name} to take an earlier one (there are {len(steps) - 1})"
        ) from error


def _score_of(folder: Path) -> float | None:
    try:
        score = json.loads((folder / META_FILE).read_text(encoding="utf-8"))["score"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # damaged; whoever restores it says so
    return score if isinstance(score, int | float) else None


def _check_hashes(got: Mapping[str, str], expected: Mapping[str, str], folder: Path) -> None:
    changed = sorted(name for name in expected.keys() | got.keys() if got.get(name) != expected.get(name))
    if changed:
        raise DamagedError(f"{folder}: {len(changed)} arrays are not what was saved, the first is {changed[0]}")


def _check_structure(got: Mapping[str, str], expected: Mapping[str, str], folder: Path) -> None:
    lines = [f"  only in the checkpoint: {n} {got[n]}" for n in got if n not in expected]
    lines += [f"  only in this run: {n} {expected[n]}" for n in expected if n not in got]
    lines += [
        f"  {n}: the checkpoint has {got[n]}, this run {expected[n]}"
        for n in got
        if n in expected and got[n] != expected[n]
    ]
    if lines:
        shown = lines[:20] + ([f"  … and {len(lines) - 20} more"] if len(lines) > 20 else [])
        raise ValueError(
            "\n".join([f"the checkpoint {folder} is of another model, loss or optimizer:", *shown])
            + "\nuse the config that it was made with, or start in a new workdir"
        )


@contextlib.contextmanager
def _damage(folder: Path) -> Any:
    """What libraries raise for broken files, in many types, is damage."""
    try:
        yield
    except Exception as error:
        raise DamagedError(f"{folder} cannot be read: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _explained(what: str) -> Any:
    """Libraries report a full disk in many types; all are an OSError here."""
    try:
        yield
    except Exception as error:
        mend = "free some space there, make it writable, or choose another --workdir"
        raise OSError(f"{what}: {error}; {mend}. Checkpoints that were there before are whole") from error
