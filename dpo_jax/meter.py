"""How fast a run goes and what that costs: rates, waiting, compiling, memory; nothing that a run would repeat."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np

from dpo_jax.types import CHOSEN, REJECTED, PreferenceBatch

_COMPILED = "/jax/core/compile/backend_compile_duration"  # what jax reports for each program that XLA compiles
Count = defaultdict[str, float]
_RATES = ("tokens", "useful_tokens", "positions", "examples")


class Meter:
    """Rates over the time spent training: without compilation (the first step), evaluation and what stood before.

    All of it is counted on the host, from batches before they leave it and from when the numbers of a step arrive; the
    devices are asked for nothing.

    Args:
      answers: A, answers of an example.
      processes: of the run, each of which makes its share of the rows.
      flops: useful floating-point operations of the rows of a batch; None leaves MFU out.
      peak: FLOP/s of all chips together.
      clock: seconds; another one for tests.
    """

    def __init__(
        self,
        answers: int,
        *,
        processes: int = 1,
        flops: Callable[[PreferenceBatch], float] | None = None,
        peak: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._answers, self._processes, self._flops, self._peak = answers, processes, flops, peak
        self._clock = clock
        self._begun: deque[Count] = deque()  # steps whose numbers have not come yet
        self._since: float | None = None
        self._window, self._total = Count(float), Count(float)

    def begin(self, make: Callable[[], PreferenceBatch]) -> PreferenceBatch:
        """Takes the batch of the next step from the pipeline, and counts it and the wait for it."""
        asked = self._clock()
        batch = make()
        count = Count(float, wait=self._clock() - asked, steps=1)
        own = int(np.isin(batch.answers.role_RS, (CHOSEN, REJECTED)).sum())
        count["examples"] = self._processes * own / self._answers
        for rows in filter(None, (batch.answers, batch.mismatched)):
            count["positions"] += self._processes * rows.tokens_RL.size
            count["useful_tokens"] += self._processes * int(np.count_nonzero(rows.group_RL))
        if self._flops is not None:
            count["flops"] += self._processes * self._flops(batch)
        self._begun.append(count)
        return batch

    def end(self, tokens: float) -> None:
        """Counts a step whose numbers have come; ``tokens`` are those of answers that it trained on."""
        now, count = self._clock(), self._begun.popleft()
        if self._since is not None:
            count |= {"seconds": now - self._since, "tokens": tokens}
            for name, value in count.items():
                self._window[name] += value
                self._total[name] += value
        self._since = now

    def restart(self) -> None:
        """Leaves out the time since the last step."""
        if self._since is not None:
            self._since = self._clock()

    def window(self) -> dict[str, float]:
        """Rates since this was last asked for; empty when no step has been timed."""
        window, self._window = self._window, Count(float)
        return self._rates(window) | _memory()

    def total(self) -> dict[str, float]:
        """Rates of all steps."""
        return self._rates(self._total)

    def _rates(self, count: Mapping[str, float]) -> dict[str, float]:
        if not count["seconds"]:
            return {}
        rates = {f"{name}_per_second": count[name] / count["seconds"] for name in _RATES}
        rates["step_seconds"], rates["data_wait_seconds"] = (count[c] / count["steps"] for c in ("seconds", "wait"))
        if self._flops is not None and self._peak:
            rates["mfu"] = count["flops"] / count["seconds"] / self._peak
        return rates


class Compilations:
    """Counts the programs that are compiled inside a ``with`` block."""

    def __init__(self) -> None:
        self._count, self._seconds = 0, 0.0

    def numbers(self) -> dict[str, float]:
        return {"compilations": self._count, "compile_seconds": self._seconds}

    def __enter__(self) -> Self:
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with contextlib.suppress(ValueError, AssertionError):  # somebody has cleared all listeners
            jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILED:
            self._count, self._seconds = self._count + 1, self._seconds + duration_secs


def _memory() -> dict[str, float]:
    """Memory of the first device in use now, and the most so far, bytes; CPUs do not tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"hbm_bytes": "bytes_in_use", "hbm_peak_bytes": "peak_bytes_in_use"}
    return {name: stats[key] for name, key in names.items() if key in stats}
