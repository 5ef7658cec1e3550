"""Self-Play Preference Optimization (Wu et al. 2024, arXiv 2405.00675)."""

from __future__ import annotations

import jax.numpy as jnp

from dpo_jax.losses.base import Answers
from dpo_jax.types import Array


def sppo_hard(chosen: Answers, rejected: Answers, *, beta: float = 1e-3) -> Array:
    """(s(c) − 1/(2β))² + (s(r) + 1/(2β))².

    Eq. 4.7 of arXiv 2405.00675 with hard labels: the chosen answer wins with probability 1, and β = 1/η.

    Args:
      chosen: the preferred answers, [B].
      rejected: the other answers, [B].
      beta: β > 0, 1/nats; the paper's η = 1000 makes it 0.001, so that each log-ratio is sent 500 nats away.

    Returns:
      float32 [B], nats².
    """
    target = 1 / (2 * beta)
    return jnp.square(chosen.shaped_B - target) + jnp.square(rejected.shaped_B + target)
