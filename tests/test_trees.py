"""Names of leaves, and what differs between two trees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from dpo_jax.trees import describe, named_leaves, parameter_count, structure_diff


@struct.dataclass
class State:
    params: dict
    steps: list


def test_names_of_leaves():
    state = State(params={"decoder": {"mlp": {"kernel": 1}, "bias": 2}}, steps=[3, (4,)])
    assert named_leaves(state) == {
        "params/decoder/bias": 2,
        "params/decoder/mlp/kernel": 1,
        "steps/0": 3,
        "steps/1/0": 4,
    }


def test_no_leaves():
    assert named_leaves({"a": None, "b": {}}) == {}


@pytest.mark.parametrize(
    "leaf", [np.zeros((4, 192), np.float32), jnp.zeros((4, 192)), jax.ShapeDtypeStruct((4, 192), jnp.float32)]
)
def test_describe(leaf):
    assert describe(leaf) == "float32[4,192]"


def test_describe_scalar_and_bfloat16():
    assert describe(jnp.zeros((), jnp.bfloat16)) == "bfloat16[]"


def test_equal_structures():
    tree = {"a": np.zeros(2, np.float32), "b": {"c": np.zeros((2, 3), np.int32)}}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    assert structure_diff(tree, shapes) == []


def test_both_directions_are_reported():
    got = {"both": np.zeros(1), "head": {"bias": np.zeros(2, np.float32)}}
    expected = {"both": np.zeros(1), "head": {"kernel": np.zeros((3, 2), np.float32)}}
    assert structure_diff(got, expected) == ["unexpected head/bias: float32[2]", "missing head/kernel: float32[3,2]"]


@pytest.mark.parametrize(
    ("leaf", "text"),
    [
        (np.zeros((2, 3), np.float16), "a: got float16[2,3], expected float32[2,3]"),
        (np.zeros((3, 2), np.float32), "a: got float32[3,2], expected float32[2,3]"),
    ],
)
def test_shape_and_dtype_are_compared(leaf, text):
    assert structure_diff({"a": leaf}, {"a": np.zeros((2, 3), np.float32)}) == [text]


def test_parameter_count():
    assert parameter_count({"a": np.zeros((4, 5)), "b": {"c": jnp.zeros(3), "d": np.float32(1)}}) == 24
    assert parameter_count({}) == 0
