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


class Population:
    """Independent runs side by side: each device steps its own members by one vmapped program; nothing is exchanged.

    Args:
      members: how many.
      devices: what they are spread over; those without a member stay idle.

    Attributes:
      devices: those in use.
      traces: how often the step has been traced; once for batches that all members share, once for those of their own.
    """

    AXIS = "population"

    def __init__(self, members: int, devices: Sequence[jax.Device]) -> None:
        self.devices = list(devices)[:members]
        self.members, self.seats = members, -(-members // len(self.devices))
        self.traces: collections.Counter[str] = collections.Counter()

    def train_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles (state, common, batch, hyper) → (state, metrics) of one member into a step of all of them.

        Args:
          step: ``common`` is what all members read and none changes.

        Returns:
          step(states, common, batches, hypers, same) with arguments from ``stack``, ``replicate`` and ``batches``;
          ``same`` tells whether all members read one batch.
        """
        compiled = {same: self._compile(step, same) for same in (True, False)}
        return lambda states, common, batches, hypers, same: compiled[same](states, common, batches, hypers)

    def stack(self, trees: Sequence[Any]) -> Any:
        """Trees of all members → leaves [devices, seats, …] on them; seats that are over hold the last member again."""
        filled = [*trees, *[trees[-1]] * (len(self.devices) * self.seats - len(trees))]
        shape = len(self.devices), self.seats
        stacked = jax.tree.map(lambda *a: np.stack(a).reshape(*shape, *np.shape(a[0])), *filled)
        # Where the step leaves its results: arrays from elsewhere would be compiled for once more.
        mesh = jax.sharding.Mesh(np.array(self.devices), (self.AXIS,))
        return jax.device_put(stacked, jax.NamedSharding(mesh, jax.P(self.AXIS)))

    def replicate(self, tree: Any) -> Any:
        """What all members read, on every device."""
        return jax_utils.replicate(tree, self.devices, self.AXIS)

    def batches(self, batches: Sequence[Any], micro_batches: int) -> Any:
        """Rows [R, …] of the batch that all read → [micro-batches, R', …]; of each member's: [devices, seats, …]."""
        split = [jax.tree.map(lambda a: a.reshape(micro_batches, -1, *a.shape[1:]), batch) for batch in batches]
        return self.stack(split) if len(split) > 1 else split[0]

    def member(self, states: Any, seat: int) -> Any:
        """The state of one member, on the host: a copy, since the next step reuses the buffers."""
        device, place = divmod(seat, self.seats)
        return jax.tree.map(lambda a: np.array(np.asarray(a.addressable_data(device))[0, place]), states)

    def fetch(self, metrics: Any) -> Any:
        """Metrics of all members → numpy arrays [members, …]."""
        return jax.tree.map(lambda a: np.asarray(a).reshape(-1, *a.shape[2:])[: self.members], metrics)

    def _compile(self, step: Callable[..., Any], same: bool) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            self.traces["own batches" if not same else "one batch"] += 1  # runs while tracing only
            return step(*args)

        side_by_side = jax.vmap(counted, in_axes=(0, None, None if same else 0, 0))
        in_axes = (0, 0, None if same else 0, 0)
        return jax.pmap(side_by_side, axis_name=self.AXIS, in_axes=in_axes, devices=self.devices, donate_argnums=0)


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
