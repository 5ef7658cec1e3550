"""Identity Preference Optimization (Azar et al. 2023, arXiv 2310.12036)."""

from __future__ import annotations

import jax.numpy as jnp

from dpo_jax.losses.base import Answers
from dpo_jax.types import Array


def ipo(chosen: Answers, rejected: Answers, *, beta: float = 0.1) -> Array:
    """(Δ − 1/(2τ))², Δ = s(c) − s(r), τ = β.

    Eq. 17 of arXiv 2310.12036, with summed log-probabilities as in the paper; ``reduction='mean'`` gives the
    token-averaged form that some libraries use.

    Args:
      chosen: the preferred answers, [B].
      rejected: the other answers, [B].
      beta: τ > 0 of the paper, strength of the pull to the reference, 1/nats.

    Returns:
      float32 [B], nats².
    """
    return jnp.square(chosen.shaped_B - rejected.shaped_B - 1 / (2 * beta))
