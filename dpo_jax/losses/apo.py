"""Anchored Preference Optimization (D'Oosterlinck et al. 2024, arXiv 2408.06266)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dpo_jax.losses.base import Answers
from dpo_jax.types import Array


def apo_zero(chosen: Answers, rejected: Answers, *, beta: float = 0.1) -> Array:
    """1 − σ(βc) + σ(βr).

    Eq. 7 of arXiv 2408.06266: raises the chosen answer and lowers the rejected one, for data better than the policy.

    Args:
      chosen: the preferred answers, [B].
      rejected: the other answers, [B].
      beta: β > 0, 1/nats.

    Returns:
      float32 [B].
    """
    return jax.nn.sigmoid(-beta * chosen.ratio_B) + jax.nn.sigmoid(beta * rejected.ratio_B)


def apo_down(chosen: Answers, rejected: Answers, *, beta: float = 0.1) -> Array:
    """σ(βc) + 1 − σ(βΔ), Δ = s(c) − s(r).

    Eq. 8 of arXiv 2408.06266: lowers both answers, the rejected one more, for data worse than the policy.

    Args:
      chosen: the preferred answers, [B].
      rejected: the other answers, [B].
      beta: β > 0, 1/nats.

    Returns:
      float32 [B].
    """
    margin_B = chosen.shaped_B - rejected.shaped_B
    return jax.nn.sigmoid(beta * chosen.ratio_B) + jax.nn.sigmoid(-beta * margin_B)


def apo_zero_unpaired(
    answers: Answers,
    desirable_B: Array,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Array:
    """λ_D (1 − σ(βc)) for a desirable answer, λ_U σ(βr) for an undesirable one.

    Eq. 7 of arXiv 2408.06266 taken answer by answer: KTO whose reference point is 0.

    Args:
      answers: answers of either kind, [B].
      desirable_B: bool, which of them are desirable.
      beta: β > 0, 1/nats.
      desirable_weight: λ_D > 0.
      undesirable_weight: λ_U > 0.

    Returns:
      float32 [B].
    """
    sign_B = jnp.where(desirable_B, 1.0, -1.0)
    weight_B = jnp.where(desirable_B, desirable_weight, undesirable_weight)
    return weight_B * jax.nn.sigmoid(-beta * sign_B * answers.ratio_B)
