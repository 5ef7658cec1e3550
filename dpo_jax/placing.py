"""Arrays onto devices, and back to the host."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding


def is_one_number(leaf: Any) -> bool:
    """Whether numpy broadcasts one number: it is filled in where it is to lie, without a whole array on the way."""
    return isinstance(leaf, np.ndarray) and leaf.size > 1 and not any(leaf.strides)


def placed_copy(array: Any, shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """A copy of an array in devices' own memory: steps write to what they are given."""
    if isinstance(array, jax.Array):
        return jax.device_put(jnp.broadcast_to(array, shape), sharding, may_alias=False)
    array = np.asarray(array)  # once: each time, a number that is no array would lie somewhere else
    placed = jax.device_put(np.broadcast_to(array, shape), sharding, may_alias=False)
    if sharding.mesh.devices.flat[0].platform != "cpu":
        return placed
    # CPUs take numpy's memory as it lies all the same where it is aligned; a step, which cannot write to that, would
    # copy it. One array after the other: copies are begun sooner than they are made, and would lie in memory twice.
    jax.block_until_ready(placed)
    lent = placed.addressable_data(0).unsafe_buffer_pointer() == array.ctypes.data
    return jax.block_until_ready(jax.device_put(placed, sharding, may_alias=False)) if lent else placed


def copied(tree: Any) -> Any:
    """A copy of arrays: of those over several devices on these, of others on the host."""

    def copy(array: Any) -> Any:
        if not isinstance(array, jax.Array) or len(array.sharding.device_set) == 1:
            return np.array(array)
        parts = [jnp.copy(part.data) for part in array.addressable_shards]
        return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)

    return jax.tree.map(copy, tree)


def place(array: Any, sharding: NamedSharding) -> jax.Array:
    """The array with its parts where they are to lie; what lies there already stays as it is."""
    if isinstance(array, jax.Array) and array.sharding == sharding:
        return array
    if isinstance(array, jax.Array) and jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(place(jax.random.key_data(array), sharding), impl=jax.random.key_impl(array))
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def row_groups(grid: np.ndarray) -> tuple[list[int], tuple[int, int]]:
    """Which parts of a batch this process's devices hold, and its (index, count) among groups of processes.

    Args:
      grid: devices, [parts, devices that hold the same part].

    Raises:
      ValueError: processes hold parts that overlap without being the same.
    """
    parts: dict[int, set[int]] = {}
    for part, devices in enumerate(grid):
        for device in devices:
            parts.setdefault(device.process_index, set()).add(part)
    groups = sorted({tuple(sorted(own)) for own in parts.values()})
    if sum(map(len, groups)) != len(grid) or len({len(group) for group in groups}) != 1:
        raise ValueError(
            f"the mesh of {len(grid)} row parts × {grid.shape[1]} devices splits rows unevenly over {len(parts)} "
            "processes: choose parallel.tensor so that it divides the devices of a process, or is a multiple of them"
        )
    own = tuple(sorted(parts.get(jax.process_index(), set(groups[0]))))
    return list(own), (groups.index(own), len(groups))


def own_rows(mapped: jax.Array) -> np.ndarray:
    """What this process's devices have computed, joined in their order."""
    shards = sorted(mapped.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data)[0] for shard in shards])


def gathered(array: jax.Array) -> np.ndarray:
    """All parts put together. What each device holds whole is read as it is: to gather it, a program would stand in
    line behind the next step, and whoever looks at a step's numbers would wait for that one."""
    return np.asarray(array) if array.is_fully_replicated else multihost_utils.process_allgather(array, tiled=True)
