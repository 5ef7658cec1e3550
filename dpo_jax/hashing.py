"""Content hashes of arrays: the same however an array lies over devices and processes.

An array's bits are added up modulo 2^64, each word times one odd number for its place along each dimension, so that
every process adds up the parts that it holds, in any order::

    Σ_ij bits(x_ij) · k_0(i) · k_1(j)

An element that changes, be it by one bit, always changes the sum: an odd factor loses none. Changes of several elements
cancel by chance only, once in 2^32 times at the most (multilinear hashing: Carter and Wegman, 1979; Lemire and Kaser,
2014). It guards against storage and memory that fail, not against forgers.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpo_jax.trees import describe, named_leaves

_MASK = 2**64 - 1


def hash_leaves(tree: Any) -> dict[str, str]:
    """A hash of every array with its dtype and shape, by path.

    Args:
      tree: a pytree of arrays. When one of them lies over several processes, all of them must call.

    Returns:
      ``{'params/decoder/kernel': hexadecimal, …}``.
    """
    leaves = named_leaves(tree)
    sums = {name: sum(_sum(part, start) for start, part in own_parts(leaf)) & _MASK for name, leaf in leaves.items()}
    if spans_processes(tree):
        sums = _added_up(leaves, sums)
    return {name: _digest(f"{describe(leaf)} {sums[name]}") for name, leaf in leaves.items()}


def hash_tree(tree: Any) -> str:
    """One sha256 over the hashes of all arrays of a pytree and their names, hexadecimal."""
    return combine(hash_leaves(tree))


def combine(hashes: dict[str, str]) -> str:
    """One sha256 over named hashes, whatever their order, hexadecimal."""
    return _digest(json.dumps(hashes, sort_keys=True))


def spans_processes(tree: Any) -> bool:
    """Whether an array lies over devices of several processes."""
    return any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in jax.tree.leaves(tree))


def own_parts(leaf: Any) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """What of an array this process answers for; of a part that several devices hold, one copy.

    Args:
      leaf: an array.

    Yields:
      (index of its first element, part).
    """
    if not isinstance(leaf, jax.Array):
        yield (0,) * np.ndim(leaf), np.asarray(leaf)
        return
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            yield tuple(part.start or 0 for part in shard.index), np.asarray(shard.data)


def _sum(part: np.ndarray, start: tuple[int, ...]) -> int:
    if not part.size:
        return 0
    shape: tuple[int, ...] = part.shape or (1,)
    start = start or (0,)
    total: np.ndarray = np.ascontiguousarray(part).reshape(shape).view(f"u{min(part.dtype.itemsize, 4)}")
    start = (*start[:-1], start[-1] * (total.shape[-1] // shape[-1]))
    for axis in reversed(range(total.ndim)):
        keys = _keys(axis, start[axis], total.shape[-1])
        rows = total.reshape(-1, total.shape[-1])
        total = np.einsum("ij,j->i", rows, keys).reshape(total.shape[:-1])
    return int(total)


@functools.lru_cache(maxsize=256)
def _keys(axis: int, start: int, count: int) -> np.ndarray:
    """Odd pseudo-random numbers for places along an axis (splitmix64: Steele, Lea and Flood, 2014)."""
    z = (np.arange(start, start + count, dtype=np.uint64) + np.uint64((axis + 1) << 48)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


def _added_up(leaves: dict[str, Any], sums: dict[str, int]) -> dict[str, int]:
    """The sums over all processes; an array that each of them has whole counts once."""
    own = [sums[name] if spans_processes(leaf) or jax.process_index() == 0 else 0 for name, leaf in leaves.items()]
    # In halves: JAX has no 64-bit integers by default.
    found = np.asarray(multihost_utils.process_allgather(np.array(own, np.uint64).view(np.uint32)))
    return dict(zip(leaves, map(int, found.view(np.uint64).sum(axis=0, dtype=np.uint64)), strict=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
