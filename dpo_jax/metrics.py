"""Metrics as sums that can be added over micro-batches and devices, and are divided only at the end.

A mean of means is wrong as soon as batches differ in size; a sum of numerators over a sum of denominators never is.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpo_jax.types import Array


@struct.dataclass
class Ratio:
    """numerator / denominator, both summed first; nan when nothing was counted."""

    numerator: Array
    denominator: Array

    def compute(self) -> float:
        denominator = float(self.denominator)
        return float(self.numerator) / denominator if denominator else float("nan")


@struct.dataclass
class Sum:
    """A sum of means over different units, such as pairs and tokens; nan when nothing at all was counted.

    A mean of nothing is no part of it.
    """

    means: tuple[Ratio, ...]

    @property
    def total(self) -> Array:
        """The sum of all numerators, which is finite only where they are."""
        return jnp.sum(jnp.stack([mean.numerator for mean in self.means]))

    def compute(self) -> float:
        counted = [mean.compute() for mean in self.means if float(mean.denominator)]
        return sum(counted) if counted else float("nan")


@struct.dataclass
class Total:
    """A plain sum, such as tokens seen."""

    value: Array

    def compute(self) -> float:
        return float(self.value)


@struct.dataclass
class Correlation:
    """Pearson correlation of two quantities, from their summed moments; nan when one of them does not vary."""

    n: Array
    x: Array
    y: Array
    xx: Array
    yy: Array
    xy: Array

    def compute(self) -> float:
        n, x, y, xx, yy, xy = (float(v) for v in (self.n, self.x, self.y, self.xx, self.yy, self.xy))
        if n == 0:
            return float("nan")
        variances = xx / n - (x / n) ** 2, yy / n - (y / n) ** 2
        # What a constant leaves of its variance is the rounding of fp32 sums.
        if variances[0] <= 1e-6 * xx / n or variances[1] <= 1e-6 * yy / n:
            return float("nan")
        return (xy / n - x / n * y / n) / (variances[0] * variances[1]) ** 0.5


Metrics = Mapping[str, Any]  # name -> Ratio, Sum, Total or Correlation


def mean(values: Array, weights: Array) -> Ratio:
    """Σ w·v / Σ w; a value of weight 0 does not count even when it is not finite."""
    weights = jnp.broadcast_to(weights, values.shape).astype(jnp.float32)
    return Ratio(jnp.sum(jnp.where(weights > 0, values * weights, 0.0)), jnp.sum(weights))


def correlation(x: Array, y: Array, weights: Array) -> Correlation:
    """Correlation of x and y over the places where ``weights`` is not 0."""
    w = (weights > 0).astype(jnp.float32)
    x, y = jnp.where(w > 0, x, 0.0), jnp.where(w > 0, y, 0.0)
    return Correlation(jnp.sum(w), jnp.sum(x), jnp.sum(y), jnp.sum(x * x), jnp.sum(y * y), jnp.sum(x * y))


def merge(a: Metrics, b: Metrics) -> Metrics:
    """Adds two sets of the same metrics."""
    return jax.tree.map(operator.add, a, b)


def compute(metrics: Metrics) -> dict[str, float]:
    """Divides: the numbers that are written."""
    return {name: metric.compute() for name, metric in metrics.items()}
