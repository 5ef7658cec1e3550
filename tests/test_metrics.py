"""Metrics: hand-computed values, and the same numbers however a batch is cut."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.metrics import Correlation, Ratio, Sum, Total, compute, correlation, mean, merge


def test_mean():
    ratio = mean(jnp.array([1.0, 2.0, 4.0]), jnp.array([1.0, 0.0, 3.0]))
    assert (float(ratio.numerator), float(ratio.denominator)) == (13.0, 4.0)
    assert ratio.compute() == 3.25


def test_mean_broadcasts_a_scalar_weight():
    assert mean(jnp.array([[1.0, 2.0], [3.0, 6.0]]), jnp.ones(())).compute() == 3.0


def test_mean_of_booleans_is_a_share():
    assert mean(jnp.array([True, False, True, True]), jnp.array([True, True, True, False])).compute() == pytest.approx(
        2 / 3
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_value_without_weight_does_not_count(bad):
    values, weights = jnp.array([1.0, bad, 3.0]), jnp.array([1.0, 0.0, 1.0])
    assert mean(values, weights).compute() == 2.0
    assert correlation(jnp.array([1.0, bad, 3.0]), jnp.array([2.0, bad, 4.0]), weights).compute() == pytest.approx(1.0)


def test_value_with_weight_counts_even_when_it_is_not_finite():
    assert math.isnan(mean(jnp.array([1.0, math.nan]), jnp.ones(2)).compute())


def test_a_sum_of_means_leaves_out_those_of_nothing_but_not_those_that_are_not_finite():
    of_pairs, of_tokens, of_nothing = Ratio(6.0, 2.0), Ratio(5.0, 10.0), Ratio(0.0, 0.0)
    assert Sum((of_pairs, of_tokens)).compute() == 3.5
    assert Sum((of_pairs, of_nothing)).compute() == 3.0
    assert math.isnan(Sum((of_nothing, of_nothing)).compute())
    assert math.isnan(Sum((of_pairs, Ratio(math.nan, 3.0))).compute())
    twice = merge({"loss": Sum((of_pairs, of_tokens))}, {"loss": Sum((Ratio(0.0, 1.0), Ratio(5.0, 2.0)))})
    assert compute(twice)["loss"] == pytest.approx(2.0 + 10 / 12)
    assert [math.isfinite(Sum((of_pairs, Ratio(x, 1.0))).total) for x in (1.0, math.inf, -math.inf)] == [
        True,
        False,
        False,
    ]


def test_nothing_counted_is_nan():
    assert math.isnan(mean(jnp.array([1.0, 2.0]), jnp.zeros(2)).compute())
    assert math.isnan(correlation(jnp.array([1.0, 2.0]), jnp.array([1.0, 3.0]), jnp.zeros(2)).compute())


@pytest.mark.parametrize(
    ("y", "expected"),
    [
        ([2.0, 4.0, 6.0, 8.0], 1.0),
        ([8.0, 6.0, 4.0, 2.0], -1.0),
        ([1.0, -1.0, -1.0, 1.0], 0.0),
        # Deviations (-1.5, -.5, .5, 1.5) and (-1.5, .5, -.5, 1.5): 4 / (√5 · √5).
        ([1.0, 3.0, 2.0, 4.0], 0.8),
    ],
)
def test_correlation(y, expected):
    x = jnp.array([1.0, 2.0, 3.0, 4.0])
    assert correlation(x, jnp.array(y), jnp.ones(4)).compute() == pytest.approx(expected, abs=1e-6)


def test_correlation_without_variation_is_nan():
    assert math.isnan(correlation(jnp.array([1.0, 2.0, 3.0]), jnp.array([5.0, 5.0, 5.0]), jnp.ones(3)).compute())


def test_correlation_equals_that_of_numpy():
    rng = np.random.default_rng(0)
    x = rng.normal(size=200).astype(np.float32)
    y = (0.3 * x + rng.normal(size=200)).astype(np.float32)
    counted = rng.random(200) < 0.7
    expected = np.corrcoef(x[counted].astype(np.float64), y[counted].astype(np.float64))[0, 1]
    assert correlation(jnp.array(x), jnp.array(y), jnp.array(counted)).compute() == pytest.approx(expected, abs=1e-5)


def test_merge_adds():
    a = {"loss": Ratio(1.0, 2.0), "tokens": Total(3.0), "r": Correlation(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)}
    b = {"loss": Ratio(2.0, 4.0), "tokens": Total(4.0), "r": Correlation(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)}
    merged = merge(a, b)
    assert merged == {"loss": Ratio(3.0, 6.0), "tokens": Total(7.0), "r": Correlation(2.0, 3.0, 4.0, 5.0, 6.0, 7.0)}
    assert compute({"loss": merged["loss"], "tokens": merged["tokens"]}) == {"loss": 0.5, "tokens": 7.0}


def test_merging_is_not_a_mean_of_means():
    """Batches of 1 and 3 values, means 4 and 0: together 1, where the mean of means says 2."""
    merged = merge({"loss": mean(jnp.array([4.0]), jnp.ones(1))}, {"loss": mean(jnp.zeros(3), jnp.ones(3))})
    assert compute(merged) == {"loss": 1.0}


@settings(max_examples=20)  # each shape compiles anew
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(0, 2**16))
def test_merged_shards_equal_the_whole(sizes, seed):
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    # Small integers, whose sums are exact in fp32 in any order.
    x, y, weights = (rng.integers(0, 9, n).astype(np.float32) for _ in range(3))

    def measure(part: slice):
        return {
            "mean": mean(x[part], weights[part]),
            "total": Total(jnp.sum(jnp.asarray(weights[part]))),
            "correlation": correlation(x[part], y[part], weights[part]),
        }

    ends = np.cumsum(sizes)
    shards = [measure(slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, functools.reduce(merge, shards), measure(slice(None))))


def test_metrics_are_sums_across_devices():
    values = jnp.arange(16.0).reshape(8, 2)
    weights = (values % 3 > 0).astype(jnp.float32)
    on_devices = jax.pmap(lambda v, w: jax.lax.psum({"m": mean(v, w)}, "i"), axis_name="i")(values, weights)
    whole = {"m": mean(values, weights)}
    assert compute(jax.tree.map(lambda leaf: leaf[0], on_devices)) == compute(whole)
