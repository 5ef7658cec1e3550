"""Where programs meet devices: the only module that calls jit or pmap."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo_jax.ahead import Begun, Prepared
from dpo_jax.allocator import keep_freed_pages
from dpo_jax.placing import gathered, is_one_number, own_rows, place, placed_copy, row_groups
from dpo_jax.sharding import AXES, ROWS, Names, Placement
from dpo_jax.state import ALONE, Axis

_AXIS = "batch"


class DataParallel:
    """Parameters on every device, the batch split over all of them; one program, compiled by pmap.

    Attributes:
      devices: of all processes.
      axis: to be handed to the steps that are compiled here.
      parts: how many parts the rows of a batch are split into.
      row_parts: how many parts those of a ``row_function`` are split into: each process has its own rows there.
      process: (index, count) of this process among those that read different rows.
      traces: how often each compiled function has been traced, by name; once is right.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None) -> None:
        self.devices = list(devices) if devices is not None else jax.devices()
        _prepare(self.devices)
        self.parts = len(self.devices)
        self.axis = Axis(_AXIS) if self.parts > 1 else ALONE  # a sum over one device would be a copy
        self.traces: collections.Counter[str] = collections.Counter()
        own = {d.process_index for d in self.devices}
        self.process = (sorted(own).index(jax.process_index()), len(own)) if jax.process_index() in own else (0, 1)
        self._local = [d for d in self.devices if d.process_index == jax.process_index()]
        self.row_parts = len(self._local)

    def train_step(self, step: Callable[..., Any]) -> Prepared:
        """Compiles (state, batch, hyper) → (state, metrics); the state's buffers are reused."""
        whole = len(self._local) == len(self.devices)
        return Prepared(self._pmap(step, "train_step", donate_argnums=0), whole)

    def eval_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles (state, batch, hyper) → metrics."""
        return self._pmap(step, "eval_step")

    def row_function(self, fn: Callable[..., Any], name: str) -> Callable[..., Begun[Any]]:
        """Compiles ``fn(params, *rows)``: parameters are on every device, rows of the other arguments split over them.

        The number of rows must divide by the devices; the result is numpy arrays of all rows. Each process computes all
        rows that it is given, on devices of its own.
        """
        mapped = self._pmap(fn, name)

        def begin(params: Any, *rows: Any) -> Begun[Any]:
            out = mapped(params, *(self._split(r) for r in rows))
            return Begun(lambda: jax.tree.map(own_rows, out))

        return begin

    def replicate(self, tree: Any) -> Any:
        """Copies on every device."""
        return _on_each(tree, self._local, _AXIS)

    def unreplicate(self, tree: Any) -> Any:
        """One copy, on the host."""
        return jax.tree.map(lambda a: np.asarray(a.addressable_data(0))[0], tree)

    def once(self, tree: Any) -> Any:
        """Each array once, to be saved: a copy on the host."""
        return self.unreplicate(tree)

    def targets(self, shapes: Any) -> Any:
        """Where arrays in files are to be read to: the host, from where ``replicate`` takes it."""
        return shapes

    def shard(self, batch: Any, micro_batches: int) -> Any:
        """This process's rows [R, …] → [devices, micro-batches, R / (devices · micro-batches), …], in order."""
        shape = (len(self._local), micro_batches, -1)
        return jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]), batch)

    def shapes(self, state: Any, batch: Any, hyper: Any, micro_batches: int) -> tuple[Any, Any, Any]:
        """What the train step is called with, as shapes; ``batch`` holds the rows of all processes."""
        count = len(self.devices)

        def copies(a: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((count, *a.shape), a.dtype)

        def rows(a: Any) -> jax.ShapeDtypeStruct:
            size = a.shape[0] // (count * micro_batches)
            return jax.ShapeDtypeStruct((count, micro_batches, size, *a.shape[1:]), a.dtype)

        return jax.tree.map(copies, state), jax.tree.map(rows, batch), jax.tree.map(copies, hyper)

    def part_shape(self, leaf: Any) -> tuple[int, ...]:
        """Of one of :meth:`shapes`, what a device holds."""
        return leaf.shape[1:]

    def _split(self, rows: Any) -> Any:
        return jax.tree.map(lambda a: a.reshape(len(self._local), -1, *a.shape[1:]), rows)

    def _pmap(self, fn: Callable[..., Any], name: str, donate_argnums: Any = ()) -> Callable[..., Any]:
        counted = _counted(fn, name, self.traces)
        return jax.pmap(counted, axis_name=_AXIS, devices=self.devices, donate_argnums=donate_argnums)


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
        return _on_each(tree, self.devices, self.AXIS)

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


class MeshParallel:
    """One program over a mesh of devices: rows split over data and fsdp, parameters over fsdp and tensor, by jit.

    What mirrors the parameters (gradients, the optimizer's moments, a reference) is split as they are. The interface is
    :class:`DataParallel`'s.

    Args:
      devices: of all processes.
      shape: devices along each axis.
      axes: logical names of the model's parameters, by path.
    """

    def __init__(self, devices: Sequence[jax.Device], shape: Mapping[str, int], axes: Mapping[str, Names]) -> None:
        self.devices = list(devices)
        _prepare(self.devices)
        # On TPUs, neighbours in the mesh are neighbours in the torus.
        sizes = [shape[name] for name in AXES]
        grid = mesh_utils.create_device_mesh(sizes, self.devices, allow_split_physical_axes=True)
        self.mesh = Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))
        self.parts = self.row_parts = shape["data"] * shape["fsdp"]
        self.axis = Axis(parts=self.parts)
        self.placement = Placement(axes, shape)
        self.traces: collections.Counter[str] = collections.Counter()
        self._own_parts, self.process = row_groups(grid.reshape(self.parts, -1))

    def train_step(self, step: Callable[..., Any]) -> Prepared:
        """Compiles (state, batch, hyper) → (state, metrics); the state's buffers are reused."""
        whole = self._sharding(PartitionSpec())
        return Prepared(self._jit(step, "train_step", lambda state: (self.shardings(state), whole), donate_argnums=0))

    def eval_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles (state, batch, hyper) → metrics."""
        return self._jit(step, "eval_step", lambda state: self._sharding(PartitionSpec()))

    def row_function(self, fn: Callable[..., Any], name: str) -> Callable[..., Begun[Any]]:
        """Compiles ``fn(params, *rows)``; every process gives the same rows, and gets numpy arrays of all of them."""
        compiled = self._jit(fn, name, lambda params: self._sharding(PartitionSpec()))
        rows_sharding = self._sharding(PartitionSpec(ROWS))

        def begin(params: Any, *rows: Any) -> Begun[Any]:
            out = compiled(params, *jax.tree.map(lambda a: place(a, rows_sharding), rows))
            return Begun(lambda: jax.tree.map(np.asarray, out))

        return begin

    def shardings(self, tree: Any) -> Any:
        """Where each array of a tree of parameters, or of what mirrors them, lies."""
        return jax.tree.map(self._sharding, self.placement.of(tree))

    def replicate(self, tree: Any) -> Any:
        """Places a tree; each device gets its part. What lies there already stays. Processes must hold the same."""
        return jax.tree.map(place, tree, self.shardings(tree))

    def unreplicate(self, tree: Any) -> Any:
        """All parts put together, on the host."""
        return jax.tree.map(gathered, tree)

    def once(self, tree: Any) -> Any:
        """Each array once, to be saved: as it lies over the devices; nothing is moved."""
        return tree

    def targets(self, shapes: Any) -> Any:
        """Where arrays in files are to be read to: each process's parts, straight onto its devices."""
        return jax.tree.map(_shaped, shapes, self.shardings(shapes))

    def shard(self, batch: Any, micro_batches: int) -> Any:
        """This process's rows [R, …] → [micro-batches, rows of all processes / micro-batches, …] over the devices."""
        sharding = self._sharding(self.rows_spec)
        return jax.tree.map(lambda a: self._place_rows(a.reshape(micro_batches, -1, *a.shape[1:]), sharding), batch)

    @property
    def rows_spec(self) -> PartitionSpec:
        """Of batches: [micro-batches, rows, …]."""
        return PartitionSpec(None, ROWS)

    def shapes(self, state: Any, batch: Any, hyper: Any, micro_batches: int) -> tuple[Any, Any, Any]:
        """What the train step is called with, as shapes; ``batch`` holds the rows of all processes."""
        split = self._sharding(self.rows_spec)

        def rows(a: Any) -> jax.ShapeDtypeStruct:
            shape = (micro_batches, a.shape[0] // micro_batches, *a.shape[1:])
            return jax.ShapeDtypeStruct(shape, a.dtype, sharding=split)

        return self.targets(state), jax.tree.map(rows, batch), self.targets(hyper)

    def part_shape(self, leaf: Any) -> tuple[int, ...]:
        """Of one of :meth:`shapes`, what a device holds."""
        return leaf.sharding.shard_shape(leaf.shape)

    def _place_rows(self, rows: np.ndarray, sharding: NamedSharding) -> jax.Array:
        own, size = self._own_parts, rows.shape[1] // len(self._own_parts)
        shape = (rows.shape[0], size * self.parts, *rows.shape[2:])

        def part(index: Any) -> np.ndarray:
            place = own.index((index[1].start or 0) // size)
            return rows[:, place * size : (place + 1) * size]

        return jax.make_array_from_callback(shape, sharding, part)

    def _sharding(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def _jit(self, fn: Callable[..., Any], name: str, out: Callable[[Any], Any], donate_argnums: Any = ()) -> _Compiled:
        counted = _counted(fn, name, self.traces)
        make = functools.partial(jax.jit, counted, donate_argnums=donate_argnums)
        return _Compiled(self.mesh, lambda first: make(out_shardings=out(first)))


Parallel = DataParallel | MeshParallel


class _Compiled:
    """A function whose results lie where its first argument says, traced for a mesh.

    Args:
      mesh: the devices.
      make: first argument → compiled function; called once for each structure of it.
    """

    def __init__(self, mesh: Mesh, make: Callable[[Any], Any]) -> None:
        self._mesh, self._make = mesh, make
        self._made: dict[Any, Any] = {}

    def __call__(self, first: Any, *rest: Any) -> Any:
        with jax.set_mesh(self._mesh):
            return self._for(first)(first, *rest)

    def lower(self, first: Any, *rest: Any) -> Any:
        """The program before it is compiled, for arrays or their shapes."""
        with jax.set_mesh(self._mesh):
            return self._for(first).lower(first, *rest)

    def _for(self, first: Any) -> Any:
        structure = jax.tree.structure(first)
        if structure not in self._made:
            self._made[structure] = self._make(first)
        return self._made[structure]


def _counted(fn: Callable[..., Any], name: str, traces: collections.Counter[str]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def counted(*args: Any) -> Any:
        traces[name] += 1  # runs while tracing only
        return fn(*args)

    return counted


def _prepare(devices: Sequence[jax.Device]) -> None:
    if devices[0].platform == "cpu":
        keep_freed_pages()


def _on_each(tree: Any, devices: Sequence[jax.Device], axis: str) -> Any:
    """Copies on every device, [devices, …], laid out as programs over ``axis`` leave their results."""
    sharding = NamedSharding(Mesh(np.array(devices), (axis,)), PartitionSpec(axis))
    fill = jax.jit(jnp.full, static_argnums=0, out_shardings=sharding)

    def spread(leaf: Any) -> jax.Array:
        shape = (len(devices), *np.shape(leaf))
        return fill(shape, leaf.flat[0]) if is_one_number(leaf) else placed_copy(leaf, shape, sharding)

    return jax.tree.map(spread, tree)


def _shaped(array: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


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
