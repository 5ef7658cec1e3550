"""Devices: rows are split in order and come back in order, programs are compiled once."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from dpo_jax.parallel import DataParallel, check_divides


def test_batches_are_sharded_in_order() -> None:
    parallel = DataParallel(jax.devices()[:2])
    sharded = parallel.shard({"a": np.arange(24).reshape(12, 2)}, 3)["a"]
    assert sharded.shape == (2, 3, 2, 2)
    np.testing.assert_array_equal(sharded.reshape(12, 2), np.arange(24).reshape(12, 2))


@pytest.mark.parametrize("devices", [1, 4])
def test_rows_come_back_in_order(devices: int) -> None:
    parallel = DataParallel(jax.devices()[:devices])
    double = parallel.row_function(lambda params, rows: {"out": rows * params}, "double")
    params = parallel.replicate(np.float32(2))
    for _ in range(2):
        got = double(params, np.arange(8, dtype=np.float32))["out"]
        np.testing.assert_array_equal(got, 2 * np.arange(8))
    assert parallel.traces == {"double": 1}


def test_a_tree_survives_the_devices() -> None:
    parallel = DataParallel(jax.devices()[:4])
    tree = {"a": np.arange(3), "b": None, "c": np.float32(1.5)}
    back = parallel.unreplicate(parallel.replicate(tree))
    np.testing.assert_array_equal(back["a"], tree["a"])
    assert back["b"] is None and back["c"] == np.float32(1.5)


@pytest.mark.parametrize(("batch", "micro", "devices"), [(8, 1, 1), (8, 2, 4), (24, 3, 8)])
def test_batches_that_divide(batch: int, micro: int, devices: int) -> None:
    check_divides(batch, micro, devices)


@pytest.mark.parametrize(
    ("batch", "micro", "devices", "nearest"), [(10, 2, 4, "8 or 16"), (3, 1, 4, "4"), (7, 2, 1, "6 or 8")]
)
def test_batches_that_do_not_divide_are_told_what_would(batch: int, micro: int, devices: int, nearest: str) -> None:
    with pytest.raises(
        ValueError, match=f"does not divide over {devices} devices × {micro} micro-batches.* {nearest}$"
    ):
        check_divides(batch, micro, devices)
