"""The one display of progress: a bar on a terminal, a plain line now and then elsewhere.

All of it goes to stderr, so that stdout holds results alone. Log lines go above a bar, not through it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, Self, TextIO, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Clock = Callable[[], float]


class Progress:
    """How far a loop has come, how fast it goes and how long it will take.

    >>> with Progress(1000, "sft", unit="step") as progress:
    ...     for batch in batches:
    ...         progress.update(loss=1.25)
    """

    def __init__(
        self,
        total: int | None,
        title: str,
        *,
        unit: str = "step",
        start: int = 0,
        process_index: int = 0,
        stream: TextIO | None = None,
        interval: float = 10.0,
        clock: Clock = time.monotonic,
    ):
        """Shows the display.

        Args:
          total: units to be done, those before ``start`` included; None when nobody knows.
          title: what is being done, in a word or two.
          unit: what is counted, in the singular.
          start: units that an earlier run has done.
          process_index: only process 0 shows anything.
          stream: where to; stderr when None.
          interval: seconds, the least time between two plain lines.
          clock: seconds; another one for tests.
        """
        stream = stream or sys.stderr
        self._display: _Display = _Display()
        if process_index == 0 and _is_terminal(stream):
            self._display = _Bar(total, title, unit, start, stream)
        elif process_index == 0:
            self._display = _Lines(total, title, unit, start, stream, interval, clock)

    def update(self, n: int = 1, **numbers: float) -> None:
        """Counts ``n`` more units and shows the numbers, which stay until others of the same name come."""
        self._display.update(n, numbers)

    def close(self) -> None:
        """Shows the last state; a second call does nothing."""
        self._display.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def track(items: Iterable[Item], title: str, total: int | None = None, **options: Any) -> Iterator[Item]:
    """Yields the items and shows how many are done; ``options`` are those of ``Progress``."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(total, title, **options) as progress:
        for item in items:
            yield item
            progress.update()


@contextlib.contextmanager
def stage(
    title: str,
    expected: float | None = None,
    *,
    process_index: int = 0,
    stream: TextIO | None = None,
    clock: Clock = time.monotonic,
) -> Iterator[None]:
    """Says what a stage does and about how long it takes, and at its end how long it took.

    Args:
      title: what is being done: ``Training the reward model``.
      expected: seconds, a rough guess; None when there is none.
      process_index: only process 0 shows anything.
      stream: where to; stderr when None.
      clock: seconds; another one for tests.
    """
    say = _speaker(stream or sys.stderr, process_index)
    begin = clock()
    say(f"{title} …" if expected is None else f"{title} (about {_roughly(expected)}) …")
    try:
        yield
    except BaseException:
        say(f"{title}: stopped after {duration(clock() - begin)}")
        raise
    say(f"{title}: done in {duration(clock() - begin)}")


def duration(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3 min 05 s`` or ``2 h 07 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _roughly(seconds: float) -> str:
    return f"{max(1, round(seconds))} s" if seconds < 90 else f"{round(seconds / 60)} min"


def _is_terminal(stream: TextIO) -> bool:
    """Whether a bar can be drawn: some pseudo-terminals have no size."""
    try:
        return stream.isatty() and min(os.get_terminal_size(stream.fileno())) > 0
    except (OSError, ValueError):
        return False


def _speaker(stream: TextIO, process_index: int) -> Callable[[str], None]:
    def say(line: str) -> None:
        if process_index == 0:
            tqdm.write(line, file=stream)  # above a bar, when one is shown
            stream.flush()

    return say


class _Display:
    """Shows nothing."""

    def update(self, n: int, numbers: dict[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


class _Bar(_Display):
    def __init__(self, total: int | None, title: str, unit: str, start: int, stream: TextIO):
        self._numbers: dict[str, str] = {}
        self._bar = tqdm(
            total=total, desc=title, unit=f" {unit}", initial=start, file=stream, dynamic_ncols=True, mininterval=0.2
        )
        self._above = [_AboveBar(handler, stream) for handler in logging.root.handlers]
        for above in self._above:
            logging.root.removeHandler(above.inner)
            logging.root.addHandler(above)

    def update(self, n: int, numbers: dict[str, float]) -> None:
        self._numbers |= _shown(numbers)
        self._bar.set_postfix(self._numbers, refresh=False)
        self._bar.update(n)

    def close(self) -> None:
        if self._bar.disable:
            return
        self._bar.close()
        for above in self._above:
            logging.root.removeHandler(above)
            logging.root.addHandler(above.inner)


class _AboveBar(logging.Handler):
    """Clears the bar, lets another handler log, and draws the bar again."""

    def __init__(self, inner: logging.Handler, stream: TextIO):
        super().__init__(inner.level)
        self.inner = inner
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self._stream):
            self.inner.handle(record)


class _Lines(_Display):
    def __init__(
        self, total: int | None, title: str, unit: str, start: int, stream: TextIO, interval: float, clock: Clock
    ):
        self._total, self._title, self._unit = total, title, unit
        self._done = start
        self._say = _speaker(stream, 0)
        self._interval, self._clock = interval, clock
        self._begin = self._last_line = clock()
        # The first unit includes compilation, and would spoil the rate: the clock runs from its end.
        self._first: tuple[int, float] | None = None
        self._numbers: dict[str, str] = {}
        self._closed = False
        self._say(f"{title}: {self._count()}")

    def update(self, n: int, numbers: dict[str, float]) -> None:
        self._done += n
        self._numbers |= _shown(numbers)
        now = self._clock()
        if self._first is None:
            self._first = (self._done, now)
        if now - self._last_line >= self._interval:
            self._last_line = now
            self._say(", ".join([f"{self._title}: {self._count()}", *self._speed(now), *self._shown_numbers()]))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        took = f"took {duration(self._clock() - self._begin)}"
        self._say(", ".join([f"{self._title}: {self._count()}", took, *self._shown_numbers()]))

    def _count(self) -> str:
        if self._total is None:
            return f"{self._done} {_plural(self._unit, self._done)}"
        percent = f" ({100 * self._done // self._total} %)" if self._total else ""
        return f"{self._done}/{self._total} {_plural(self._unit, self._total)}{percent}"

    def _speed(self, now: float) -> list[str]:
        if self._first is None or now <= self._first[1] or self._done <= self._first[0]:
            return []
        rate = (self._done - self._first[0]) / (now - self._first[1])
        left = [] if self._total is None else [f"{duration((self._total - self._done) / rate)} left"]
        return [f"{rate:.3g} {_plural(self._unit, 2)}/s", *left]

    def _shown_numbers(self) -> list[str]:
        return [f"{name} {value}" for name, value in self._numbers.items()]


def _shown(numbers: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.4g}" for name, value in numbers.items()}


def _plural(unit: str, count: int) -> str:
    return unit if count == 1 else f"{unit}s"
