"""Labels that are flipped: the expected loss of robust DPO is DPO's loss on the clean labels (arXiv 2403.00409)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.losses.dpo import dpo
from dpo_jax.losses.robust import robust
from dpo_jax.types import Array
from experiments.theory.answers import make_answers

BETA = 1.0


@dataclass(frozen=True)
class Flips:
    """Losses by [ε, margin]; ``sampled`` is a mean over drawn labels, ``error`` its standard error."""

    epsilons: tuple[float, ...]
    margins: np.ndarray
    clean: np.ndarray
    expected: np.ndarray
    plain: np.ndarray
    sampled: np.ndarray
    error: np.ndarray

    def largest_error(self) -> list[float]:
        """max over margins of |E[robust] − clean|, for each ε."""
        return [float(e) for e in np.abs(self.expected - self.clean).max(1)]

    def largest_deviation(self) -> list[float]:
        """max over margins of |sampled − clean| in standard errors, for each ε."""
        return [float(e) for e in (np.abs(self.sampled - self.clean) / self.error).max(1)]


def run(epsilons: tuple[float, ...], draws: int, progress: Callable[[int], None]) -> Flips:
    """Exact expectations over the two labels, and means over drawn ones."""
    # None is 0, where both labels cost the same and there is nothing to average.
    margins = jnp.linspace(-6.0, 6.0, 24)
    columns = [_one(epsilon, margins, draws, i, progress) for i, epsilon in enumerate(epsilons)]
    clean, expected, plain, sampled, error = (np.asarray(c) for c in zip(*columns, strict=True))
    return Flips(epsilons, np.asarray(margins), clean, expected, plain, sampled, error)


def _one(
    epsilon: float, margins: jax.Array, draws: int, number: int, progress: Callable[[int], None]
) -> tuple[Array, ...]:
    first, second = make_answers(margins, 0 * margins), make_answers(0 * margins, 0 * margins)
    right, wrong = (robust(*pair, beta=BETA, label_smoothing=epsilon) for pair in ((first, second), (second, first)))
    clean, reversed_ = (dpo(*pair, beta=BETA) for pair in ((first, second), (second, first)))
    flipped = jax.random.bernoulli(jax.random.key(number), epsilon, (draws, 1))
    drawn = jnp.where(flipped, wrong[None], right[None])
    progress(1)
    return (
        clean,
        (1 - epsilon) * right + epsilon * wrong,
        (1 - epsilon) * clean + epsilon * reversed_,
        jnp.mean(drawn, 0),
        jnp.std(drawn, 0) / jnp.sqrt(draws),
    )
