"""Hashes of arrays: every bit counts, the devices that an array lies over do not."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax.hashing import hash_leaves, hash_tree


def test_hashes_know_bits_shapes_dtypes_and_names() -> None:
    array = np.arange(6, dtype=np.float32)
    changed = array.copy()
    changed.view(np.uint32)[3] ^= 1
    trees = [
        {"a": array},
        {"b": array},
        {"a": changed},
        {"a": array.reshape(2, 3)},
        {"a": array.view(np.int32)},
        {"a": np.float32(0)},
        {"a": array.astype("bfloat16")},
    ]
    assert len({hash_tree(tree) for tree in trees}) == len(trees)
    assert hash_tree({"a": array, "b": changed}) == hash_tree({"b": changed.copy(), "a": array[::1]})
    assert list(hash_leaves({"a": {"b": array}})) == ["a/b"]


def test_one_element_that_changes_is_always_noticed() -> None:
    """Every bit of every element of 2-D arrays of words of 1 to 8 bytes, one after the other."""
    for dtype in (np.int8, np.float16, np.float32, np.float64):
        array = np.arange(6, dtype=dtype).reshape(2, 3)
        seen = {hash_tree(array)}
        for bit in range(8 * array.nbytes):
            changed = array.copy()
            changed.reshape(-1).view(np.uint8)[bit // 8] ^= 1 << bit % 8
            seen.add(hash_tree(changed))
        assert len(seen) == 1 + 8 * array.nbytes


def test_places_count() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    moved = [array, array[::-1], array[:, ::-1], np.roll(array, 1), array[[1, 0, 2]], array * 0]
    assert len({hash_tree(a) for a in moved}) == len(moved)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((4, 6, 8), P("a", "b", "c")),
        ((4, 6, 8), P(None, "b", ("a", "c"))),
        ((16,), P(("c", "a", "b"))),
        ((4, 6), P()),
        ((), P()),
        ((0, 4), P()),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_devices_do_not_count(shape: tuple[int, ...], spec: P, dtype: str) -> None:
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("a", "b", "c"))
    array = np.asarray(50 * np.random.default_rng(0).normal(size=shape)).astype(dtype)
    assert hash_tree(jax.device_put(array, NamedSharding(mesh, spec))) == hash_tree(array)
