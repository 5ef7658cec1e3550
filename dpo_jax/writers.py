"""Where the numbers of a run go: ``metrics.jsonl``, ``timings.jsonl`` and TensorBoard events.

``metrics.jsonl`` holds one line for each step, in order, and only what an identical run would write again; speeds and
durations, which never repeat, go to ``timings.jsonl``. A number that is not finite is written as ``null``, since JSON
knows no nan and strict parsers refuse it; TensorBoard gets it as it is.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

METRICS_FILE = "metrics.jsonl"
TIMINGS_FILE = "timings.jsonl"
TENSORBOARD_DIR = "tensorboard"

_OTHER_WORKDIR = "or choose another --workdir"
_MENDS = {
    errno.ENOSPC: f"free some space there, {_OTHER_WORKDIR}",
    errno.EDQUOT: f"free some space there, {_OTHER_WORKDIR}",
    errno.EACCES: f"make it writable, {_OTHER_WORKDIR}",
    errno.EPERM: f"make it writable, {_OTHER_WORKDIR}",
    errno.EROFS: f"make it writable, {_OTHER_WORKDIR}",
    errno.EEXIST: f"a file stands where a folder is needed: move it away, {_OTHER_WORKDIR}",
    errno.ENOTDIR: f"a file stands where a folder is needed: move it away, {_OTHER_WORKDIR}",
}


class Writer:
    """Takes the numbers of a run. This one drops them: it is what every process but the first holds."""

    def write(self, step: int, values: Mapping[str, Any], prefix: str = "") -> None:
        """Writes numbers of a step.

        Several calls for one step are one line; what belongs to a step is written before the next step's and before
        ``flush``.

        Args:
          step: optimizer steps done when the numbers were measured; never less than in the call before.
          values: name -> a float, an int or a zero-dimensional array.
          prefix: written before each name, with a slash between: ``eval/loss``.

        Raises:
          ValueError: the step is already written, or the step has that name already.
          OSError: the disk is full, or the file may not be written.
        """

    def write_timings(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes numbers that an identical run would not repeat: speeds, durations, memory. As ``write`` otherwise."""

    def flush(self) -> None:
        """Returns when the lines written so far would survive a loss of power: called before a checkpoint is saved."""

    def close(self) -> None:
        """Flushes and closes the files; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        # A full disk must not hide the error that ended the run.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self.close()


def make_writer(workdir: str | os.PathLike[str], resume_step: int | None = None, process_index: int = 0) -> Writer:
    """Opens the files of a run, cut back to the step that it goes on from.

    Args:
      workdir: local folder of the run; made when it does not exist.
      resume_step: step of the restored checkpoint, whose numbers are kept; None starts the files anew.
      process_index: only process 0 writes; the others get a writer that drops everything.

    Returns:
      The writer, to be used in a ``with`` statement.

    Raises:
      ValueError: a damaged line in the middle of a file.
      OSError: the folder or a file cannot be written.
    """
    if process_index != 0:
        return Writer()
    return RunWriter(Path(workdir), resume_step)


class RunWriter(Writer):
    """Writes metrics.jsonl, timings.jsonl and TensorBoard events into one folder."""

    def __init__(self, workdir: Path, resume_step: int | None = None):
        self._metrics = JsonlWriter(workdir / METRICS_FILE, resume_step)
        self._timings = JsonlWriter(workdir / TIMINGS_FILE, resume_step)
        self._board = TensorBoardWriter(workdir / TENSORBOARD_DIR, resume_step)

    def write(self, step: int, values: Mapping[str, Any], prefix: str = "") -> None:
        self._metrics.write(step, values, prefix)
        self._board.write(step, values, prefix)

    def write_timings(self, step: int, values: Mapping[str, Any]) -> None:
        self._timings.write(step, values)
        self._board.write(step, values, "timing")

    def flush(self) -> None:
        for writer in (self._metrics, self._timings, self._board):
            writer.flush()

    def close(self) -> None:
        # All three are closed even when the first one fails; its error is the one that is raised.
        with contextlib.ExitStack() as stack:
            for writer in (self._board, self._timings, self._metrics):
                stack.callback(writer.close)


class JsonlWriter(Writer):
    """Writes one JSON object a line, a line for each step, the key ``step`` first and the others sorted.

    The line of a step leaves the process as soon as a later step is written, or at ``flush``.
    """

    def __init__(self, path: Path, resume_step: int | None = None):
        self._path = path
        self._step: int | None = None
        self._pending: dict[str, float | None] = {}
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._last = truncate_after(path, resume_step)
            self._file = path.open("ab", buffering=0)

    def write(self, step: int, values: Mapping[str, Any], prefix: str = "") -> None:
        named = {_join(prefix, name): _finite(value) for name, value in values.items()}
        self._turn_to(int(step))
        twice = sorted(named.keys() & (self._pending.keys() | {"step"}))
        if twice:
            raise ValueError(f"{self._path}: step {step} has {', '.join(twice)} already; give each number its own name")
        self._pending.update(named)

    def _turn_to(self, step: int) -> None:
        if self._step is not None and step > self._step:
            self._emit()
        earliest = self._step if self._step is not None else 0 if self._last is None else self._last + 1
        if step < earliest:
            raise ValueError(
                f"{self._path}: got numbers of step {step}, expected step {earliest} or later; "
                "write steps in order, and all numbers of a step before flush()"
            )
        self._step = step

    def _emit(self) -> None:
        if self._step is None:
            return
        line = json.dumps({"step": self._step} | dict(sorted(self._pending.items())), allow_nan=False) + "\n"
        self._last, self._step, self._pending = self._step, None, {}
        view = memoryview(line.encode())
        with _explained(self._path):
            while view:  # a nearly full disk takes a part of the line
                view = view[self._file.write(view) :]

    def flush(self) -> None:
        self._emit()
        with _explained(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file.closed:
            return
        try:
            self.flush()
        finally:
            self._file.close()


class TensorBoardWriter(Writer):
    """Writes scalars as TensorBoard events, in this thread: a queue would hang on a full disk instead of raising."""

    def __init__(self, folder: Path, resume_step: int | None = None):
        self._path = folder
        self._closed = False
        with _explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # The library names files by whole seconds: a run that restarts within one would write over its own events.
            self._events = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
            # TensorBoard hides what earlier files hold from this step on.
            start = SessionLog(status=SessionLog.START)
            first_step = 0 if resume_step is None else resume_step + 1
            self._events.write_event(Event(wall_time=time.time(), step=first_step, session_log=start))
            self._events.flush()

    def write(self, step: int, values: Mapping[str, Any], prefix: str = "") -> None:
        scalars = [Summary.Value(tag=_join(prefix, name), simple_value=float(value)) for name, value in values.items()]
        with _explained(self._path):
            self._events.write_event(Event(wall_time=time.time(), step=int(step), summary=Summary(value=scalars)))

    def write_timings(self, step: int, values: Mapping[str, Any]) -> None:
        self.write(step, values, "timing")

    def flush(self) -> None:
        with _explained(self._path):
            self._events.flush()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with _explained(self._path):
            self._events.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Reads what a writer wrote, one dict a step; ``null`` becomes nan, and a torn last line is left out.

    Raises:
      ValueError: a damaged line that is not the last one, or steps that are not in order; the line is named.
      FileNotFoundError: there is no such file.
    """
    return [record for record, _ in _records(Path(path))]


def split_lines(text: str) -> list[str]:
    """Lines of a JSONL file: they end with a line feed alone, and their strings may hold other separators (U+0085,
    U+2028), at which ``str.splitlines`` would cut them."""
    return text.removesuffix("\n").split("\n") if text else []


def truncate_after(path: Path, step: int | None) -> int | None:
    """Cuts off the lines after a step, and a last line that was torn when the run was killed.

    Args:
      path: a file of ``JsonlWriter``; it may not exist yet.
      step: the last step to keep; None keeps nothing.

    Returns:
      The last step that is left, None when the file holds no line.

    Raises:
      ValueError: a damaged line that is not the last one, or steps that are not in order.
    """
    if not path.exists():
        return None
    last, size = (None, 0) if step is None else _last_record(path, step)
    # Steps are in order, so that a cut is enough: it cannot fail half-way, and works on a full disk.
    if path.stat().st_size != size:
        os.truncate(path, size)
    return last


def _last_record(path: Path, step: int) -> tuple[int | None, int]:
    """The last step up to ``step``, and the offset of the end of its line."""
    last, size = None, 0
    for record, end in _records(path):
        if record["step"] > step:
            break  # whatever follows is cut off, damaged or not
        last, size = int(record["step"]), end
    return last, size


def _records(path: Path) -> Iterator[tuple[dict[str, float], int]]:
    """Yields each whole line and the offset of its end."""
    with path.open("rb") as file:
        lines = file.readlines()
    end, last = 0, -1
    for number, line in enumerate(lines, start=1):
        end += len(line)
        record = _parse(line)
        if record is None and number == len(lines):
            return
        if record is None or record["step"] <= last:
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with a step above {last}, got {line[:80]!r}; "
                "repair or remove the line, or move the file away"
            )
        last = int(record["step"])
        yield record, end


def _parse(line: bytes) -> dict[str, float] | None:
    """The record of a line, None when the line is torn or damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    return {name: math.nan if value is None else value for name, value in record.items()}


def _join(prefix: str, name: str) -> str:
    return f"{prefix}/{name}" if prefix else name


def _finite(value: Any) -> float | None:
    number = value if type(value) is int else float(value)
    return number if math.isfinite(number) else None


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        mend = _MENDS.get(error.errno or 0, f"look at the disk, {_OTHER_WORKDIR}")
        raise OSError(error.errno, f"cannot write the run's metrics: {reason}; {mend}", str(path)) from error
