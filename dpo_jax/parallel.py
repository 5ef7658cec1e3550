"""Where programs meet devices: the only module that calls jit or pmap."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import jax_utils

from dpo_jax.steps import Axis


class DataParallel:
    """Parameters on every device, the batch split over all of them; one program, compiled by pmap.

    Attributes:
      axis: to be handed to the steps that are compiled here.
      traces: how often each compiled function has been traced, by name; once is right.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None) -> None:
        self.devices = list(devices) if devices is not None else jax.local_devices()
        self.axis = Axis("batch")
        self.traces: collections.Counter[str] = collections.Counter()

    def train_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles (state, batch, hyper) → (state, metrics); the state's buffers are reused."""
        return self._pmap(step, "train_step", donate_argnums=0)

    def eval_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles (state, batch, hyper) → metrics."""
        return self._pmap(step, "eval_step")

    def row_function(self, fn: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Compiles ``fn(params, *rows)``: parameters are on every device, rows of the other arguments split over them.

        The number of rows must divide by the devices; results come back as numpy arrays of all rows.
        """
        mapped = self._pmap(fn, name)

        def call(params: Any, *rows: Any) -> Any:
            out = mapped(params, *(self._split(r) for r in rows))
            return jax.tree.map(lambda a: np.asarray(a).reshape(-1, *a.shape[2:]), out)

        return call

    def replicate(self, tree: Any) -> Any:
        return jax_utils.replicate(tree, self.devices, self.axis.name)

    def unreplicate(self, tree: Any) -> Any:
        """One copy, on the host."""
        return jax.tree.map(lambda a: np.asarray(a.addressable_data(0))[0], tree)

    def shard(self, batch: Any, micro_batches: int) -> Any:
        """Rows [R, …] → [devices, micro-batches, R / (devices · micro-batches), …], in order."""
        shape = (len(self.devices), micro_batches, -1)
        return jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]), batch)

    def _split(self, rows: Any) -> Any:
        return jax.tree.map(lambda a: a.reshape(len(self.devices), -1, *a.shape[1:]), rows)

    def _pmap(self, fn: Callable[..., Any], name: str, donate_argnums: Any = ()) -> Callable[..., Any]:
        @functools.wraps(fn)
        def counted(*args: Any) -> Any:
            self.traces[name] += 1  # runs while tracing only
            return fn(*args)

        return jax.pmap(counted, axis_name=self.axis.name, devices=self.devices, donate_argnums=donate_argnums)


def run_compiled(fn: Callable[..., Any], *args: Any) -> Any:
    """``fn(*args)`` as one program that is run once; on its own, each operation would be compiled by itself."""
    return jax.jit(fn)(*args)


def check_divides(batch_size: int, micro_batches: int, devices: int) -> None:
    """Raises ValueError unless a batch splits evenly over devices and micro-batches."""
    parts = devices * micro_batches
    if batch_size % parts:
        lower, upper = batch_size // parts * parts, -(-batch_size // parts) * parts
        nearest = f"{lower} or {upper}" if lower else str(upper)
        raise ValueError(
            f"data.batch_size {batch_size} does not divide over {devices} devices × {micro_batches} micro-batches "
            f"(train.micro_batches); the nearest that do are {nearest}"
        )
