"""Hashes of arrays: every bit counts, the devices that an array lies over do not."""

from __future__ import annotations

import numpy as np

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
