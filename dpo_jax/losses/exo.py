"""Efficient Exact Optimization (Ji et al. 2024, arXiv 2402.00856)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dpo_jax.losses.base import Answers
from dpo_jax.types import Array


def exo_pair(chosen: Answers, rejected: Answers, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Array:
    """σ(βΔ)[log σ(βΔ) − log(1−ε)] + σ(−βΔ)[log σ(−βΔ) − log ε], Δ = s(c) − s(r).

    EXO for two answers (arXiv 2402.00856, eq. 16): the reverse KL from the pair's softmax to the labels (1−ε, ε), where
    DPO takes the forward one. It is bounded: a pair that is badly wrong has almost no gradient.

    Args:
      chosen: the preferred answers, [B].
      rejected: the other answers, [B].
      beta: β > 0, 1/nats.
      label_smoothing: ε in (0, ½); at 0 the labels have no density and the loss is infinite.

    Returns:
      float32 [B].
    """
    logits_B = beta * (chosen.shaped_B - rejected.shaped_B)
    log_right_B, log_wrong_B = jax.nn.log_sigmoid(logits_B), jax.nn.log_sigmoid(-logits_B)
    right_B = jnp.exp(log_right_B) * (log_right_B - jnp.log1p(-label_smoothing))
    return right_B + jnp.exp(log_wrong_B) * (log_wrong_B - jnp.log(label_smoothing))
