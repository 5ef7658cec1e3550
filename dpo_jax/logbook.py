"""The numbers of a run on their way from the devices to the files, and what of them a checkpoint must remember."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging

from dpo_jax import metrics as metrics_lib
from dpo_jax.guards import SKIPPED, Watch
from dpo_jax.meter import Meter
from dpo_jax.writers import Writer

KINDS = {
    kind.__name__: kind for kind in (metrics_lib.Ratio, metrics_lib.Sum, metrics_lib.Total, metrics_lib.Correlation)
}


class Logbook:
    """Metrics of steps, fetched one step late, so that the devices never wait for the host.

    Args:
      writer: where lines go.
      fetch: brings metrics from the devices.
      every: steps between two lines.
      last: the run's last step, which has a line in any case.
      watch: warns of odd numbers.
      meter: knows how fast it goes.
      durations: gives seconds by name, to be written beside the rates.

    Attributes:
      meter: the same; whoever takes batches takes them through it.
      latest: the last number of every metric, and its step.
      skipped: steps that were not finite.
    """

    def __init__(
        self,
        writer: Writer,
        fetch: Callable[[Any], Any],
        *,
        every: int,
        last: int,
        watch: Watch,
        meter: Meter,
        durations: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self._writer, self._fetch, self._watch = writer, fetch, watch
        self._durations = durations
        self._every, self._last, self.meter = every, last, meter
        self._pending: tuple[int, Any] | None = None
        self._window: metrics_lib.Metrics | None = None
        self._tokens = 0.0
        self.latest: dict[str, float] = {}
        self.skipped = 0

    def memory(self) -> dict[str, Any]:
        """What a run that goes on from here must know to write the lines that this one would have; JSON values."""
        window = None if self._window is None else {name: _to_json(m) for name, m in self._window.items()}
        known = {"tokens": self._tokens, "window": window, "latest": self.latest, "skipped": self.skipped}
        return known | {"watch": self._watch.memory()}

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Goes on from what ``memory`` gave."""
        window = memory["window"]
        self._window = None if window is None else {name: _from_json(m) for name, m in window.items()}
        self._tokens, self.latest, self.skipped = memory["tokens"], dict(memory["latest"]), memory["skipped"]
        self._watch.remember(memory["watch"])

    def add(self, step: int, metrics: Any) -> dict[str, float]:
        """Takes the metrics of a step, still on the devices; returns the numbers of the step before it."""
        numbers = self.flush()
        self._pending = step, metrics
        return numbers

    def flush(self) -> dict[str, float]:
        """Waits for the last step, and writes a line when one is due.

        Returns:
          Its numbers by name; empty when there is none, or when it has been flushed before.
        """
        if self._pending is None:
            return {}
        (step, metrics), self._pending = self._pending, None
        metrics = self._fetch(metrics)
        tokens = metrics["tokens"].compute()
        self.skipped += int(metrics[SKIPPED].compute())
        self._tokens += tokens
        self.meter.end(tokens)
        self._window = metrics if self._window is None else metrics_lib.merge(self._window, metrics)
        numbers = metrics_lib.compute(metrics)
        if step == 1:
            self._warn(self._watch.first_step(numbers))
        if step % self._every == 0 or step == self._last:
            self._write_window(step)
        return numbers

    def evaluate(self, prefix: str, step: int, numbers: Mapping[str, float]) -> None:
        """Writes what an evaluator found."""
        self._write(step, numbers, prefix)

    def sync(self) -> None:
        """Returns when all lines so far would survive a loss of power."""
        self._writer.flush()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count as training."""
        try:
            yield
        finally:
            self.meter.restart()

    def report(self) -> None:
        """Says how fast it went."""
        rates = self.meter.total()
        if rates:
            logging.info("%s", ", ".join(f"{name.replace('_', ' ')} {rate:.3g}" for name, rate in rates.items()))

    def _write_window(self, step: int) -> None:
        numbers = metrics_lib.compute(self._window or {})
        self._window = None
        self._write(step, {**numbers, "tokens": self._tokens, SKIPPED: self.skipped}, "train")
        self._warn(self._watch.look(step, numbers))
        self._writer.write_timings(step, {**self.meter.window(), **self._durations()})

    def _write(self, step: int, numbers: Mapping[str, float], prefix: str) -> None:
        self._writer.write(step, numbers, prefix)
        self.latest |= {f"{prefix}/{name}": float(value) for name, value in numbers.items()} | {"step": step}

    @staticmethod
    def _warn(sentences: Iterator[str]) -> None:
        for sentence in sentences:
            logging.warning("Warning: %s.", sentence)


def _to_json(metric: Any) -> Any:
    if isinstance(metric, tuple):
        return {"of": [_to_json(part) for part in metric]}
    if not dataclasses.is_dataclass(metric):
        return float(metric)
    return [type(metric).__name__, *(_to_json(getattr(metric, f.name)) for f in dataclasses.fields(metric))]


def _from_json(value: Any) -> Any:
    match value:
        case {"of": parts}:
            return tuple(map(_from_json, parts))
        case [kind, *fields]:
            return KINDS[kind](*map(_from_json, fields))
    return np.asarray(value, np.float32)
