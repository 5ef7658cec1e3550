"""DiscoPOP, a loss found by a language model (Lu et al. 2024, arXiv 2406.08414)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dpo_jax.losses.base import Answers
from dpo_jax.losses.divergences import MAX_EXPONENT
from dpo_jax.types import Array


def discopop(chosen: Answers, rejected: Answers, *, beta: float = 0.1, temperature: float = 0.05) -> Array:
    """−(1−m) log σ(L) + m e^(−L), L = βΔ, m = σ(L/τ), Δ = s(c) − s(r).

    The log-ratio modulated loss, eq. 5 of arXiv 2406.08414.

    Args:
      chosen: the preferred answers, [B].
      rejected: the other answers, [B].
      beta: β > 0, 1/nats; the paper's runs take 0.05.
      temperature: τ > 0, how sharply the loss turns from logistic to exponential at L = 0.

    Returns:
      float32 [B].
    """
    logits_B = beta * (chosen.shaped_B - rejected.shaped_B)
    logistic_B = -jax.nn.sigmoid(-logits_B / temperature) * jax.nn.log_sigmoid(logits_B)
    # m·e^(−L) as one power: for L → −∞ the factors are 0 and ∞, their product is not (τ < 1 sends it to 0).
    exponent_B = jax.nn.log_sigmoid(logits_B / temperature) - logits_B
    return logistic_B + jnp.exp(jnp.minimum(exponent_B, MAX_EXPONENT))
