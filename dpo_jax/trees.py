"""Named flattening of pytrees, and a two-way comparison of their structures."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path: ``{'decoder/mlp/kernel': array, …}``."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def describe(leaf: Any) -> str:
    """``float32[4,192]`` for an array or a shape struct."""
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def structure_diff(got: Any, expected: Any) -> list[str]:
    """What differs between two trees of arrays: names, shapes and dtypes; empty when they agree.

    >>> structure_diff({'a': np.zeros(2, np.float32)}, {'b': np.zeros(3, np.float32)})
    ['unexpected a: float32[2]', 'missing b: float32[3]']
    """
    got, expected = named_leaves(got), named_leaves(expected)
    unexpected = [f"unexpected {name}: {describe(got[name])}" for name in got if name not in expected]
    missing = [f"missing {name}: {describe(expected[name])}" for name in expected if name not in got]
    changed = [
        f"{name}: got {describe(got[name])}, expected {describe(expected[name])}"
        for name in got
        if name in expected and describe(got[name]) != describe(expected[name])
    ]
    return unexpected + missing + changed


def parameter_count(params: Any) -> int:
    """Number of scalars in a tree of arrays."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
