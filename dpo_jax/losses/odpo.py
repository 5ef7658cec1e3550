"""DPO with an offset (Amini et al. 2024, arXiv 2402.10571)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dpo_jax.losses.base import Answers
from dpo_jax.types import Array


def odpo(chosen: Answers, rejected: Answers, *, beta: float = 0.1, offset_scale: float = 1.0) -> Array:
    """−log σ(βΔ − α log(score_w − score_l)), Δ = s(c) − s(r).

    The offset of arXiv 2402.10571 with f = log: the more an answer is preferred, the larger the margin asked for.

    Args:
      chosen: the preferred answers with their annotators' scores, [B].
      rejected: the other answers, [B].
      beta: β > 0, 1/nats.
      offset_scale: α ≥ 0. Where the scores do not put the chosen answer first (a tie, or data without scores) the
        logarithm has no value, and the pair has no offset: plain DPO.

    Returns:
      float32 [B].
    """
    gap_B = chosen.score_B - rejected.score_B
    offset_B = offset_scale * jnp.where(gap_B > 0, jnp.log(jnp.where(gap_B > 0, gap_B, 1.0)), 0.0)
    return -jax.nn.log_sigmoid(beta * (chosen.shaped_B - rejected.shaped_B) - offset_B)
