"""A trace of some steps for XProf and TensorBoard: what devices and host did, operation by operation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import logging

FOLDER = "profile"
_WARM_UP, _STEPS = 3, 5


class Profile:
    """Traces five steps of a run, after three that compile and fill the pipeline.

    Args:
      folder: where the trace goes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0

    def around(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The step, traced when it is its turn. Devices are waited for once, at the end of the trace."""

        def traced(*args: Any) -> Any:
            if self._count == _WARM_UP:
                jax.profiler.start_trace(str(self._folder))
            with jax.profiler.StepTraceAnnotation("train", step_num=self._count):
                result = step(*args)
            self._count += 1
            if self._count == _WARM_UP + _STEPS:
                jax.block_until_ready(result)
                self._stop()
            return result

        return traced

    def close(self) -> None:
        """Ends a trace of a run that was shorter."""
        if _WARM_UP < self._count < _WARM_UP + _STEPS:
            self._stop()
        elif self._count <= _WARM_UP:
            logging.warning("Warning: the run had %d steps left; a trace begins after %d.", self._count, _WARM_UP)

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        taken = self._count - _WARM_UP
        logging.info("a trace of %d steps is in %s; tensorboard --logdir shows it", taken, self._folder)
