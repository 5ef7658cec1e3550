"""Asked to stop (SIGTERM from a pod that is taken away, Ctrl-C): once to save and stop, twice to stop at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from dpo_jax import processes

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not finished, and the same command goes on


class Stopped(SystemExit):
    """A run that has saved all and stopped because it was asked to; ends the program with ``EXIT_CODE``."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class StopRequest:
    """Listens for signals inside a ``with`` block.

    >>> with StopRequest() as request:
    ...     for batch in batches:
    ...         if request.agreed():
    ...             save()
    ...             raise Stopped()
    """

    def __init__(self) -> None:
        self._requested, self._poll = False, processes.Poll()
        self._before: dict[signal.Signals, Any] = {}

    def agreed(self) -> bool:
        """Whether any process of the run was asked to stop; all of them get the same answer at the same step.

        Where there are several, a step later: no step waits for the answer.
        """
        return self._poll(self._requested)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # no other thread may listen
            self._before = {number: signal.signal(number, self._listen) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _listen(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._requested:
            _say(f"{name} again: stopping at once; the run goes on from its last checkpoint")
            os._exit(128 + number)
        self._requested = True
        _say(f"{name}: saving after this step or the next, then stopping; once more to stop at once")


def _say(text: str) -> None:
    # Straight to the file: a logger may be in the middle of a line when the signal comes.
    os.write(2, f"\n{text}\n".encode())
