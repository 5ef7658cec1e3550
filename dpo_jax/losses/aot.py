"""Alignment via Optimal Transport (Melnyk et al. 2024, arXiv 2406.05882)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from dpo_jax.losses.base import Answers
from dpo_jax.losses.dpo import logistic
from dpo_jax.types import Array


def aot(
    chosen: Answers, rejected: Answers, *, partner_B: Array, beta: float = 0.1, label_smoothing: float = 0.0
) -> Array:
    """−(1−ε) log σ(βd) − ε log σ(−βd), d = sort(logp_w − logp_l) − sort(ref_w − ref_l) over the batch.

    The paired variant of arXiv 2406.05882 (§3): the policy's margins are to dominate the reference's in distribution,
    so that the k-th smallest of one meets the k-th smallest of the other.

    Args:
      chosen: the preferred answers, [B].
      rejected: the other answers, [B].
      partner_B: int32, where the reference margin of the same rank stands, given by :func:`match_margins`.
      beta: β > 0, 1/nats.
      label_smoothing: ε in [0, ½).

    Returns:
      float32 [B], at the place of the policy's margin.
    """
    reference_B = chosen.reference_B - rejected.reference_B
    return logistic(beta * (chosen.logp_B - rejected.logp_B - reference_B[partner_B]), label_smoothing)


def aot_unpaired(
    chosen: Answers, rejected: Answers, *, partner_B: Array, beta: float = 0.1, label_smoothing: float = 0.0
) -> Array:
    """−(1−ε) log σ(βd) − ε log σ(−βd), d = sort(c) − sort(r) over the batch.

    The unpaired variant of arXiv 2406.05882 (§3): the log-ratios of chosen answers are to dominate those of rejected
    ones.

    Args:
      chosen: the preferred answers, [B].
      rejected: the other answers, [B], not necessarily to the same prompts.
      partner_B: int32, where the rejected log-ratio of the same rank stands, given by :func:`match_ratios`.
      beta: β > 0, 1/nats.
      label_smoothing: ε in [0, ½).

    Returns:
      float32 [B], at the place of the chosen answer.
    """
    return logistic(beta * (chosen.ratio_B - rejected.ratio_B[partner_B]), label_smoothing)


def match_margins(
    state: dict[str, Array], units: tuple[Answers, Answers], mask_B: Array, *_: Any, **__: Any
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Pairs policy margins with reference margins of the same rank, over the global batch."""
    chosen, rejected = units
    policy_B, reference_B = chosen.logp_B - rejected.logp_B, chosen.reference_B - rejected.reference_B
    return {"partner_B": _match_ranks(policy_B, reference_B, mask_B)}, state


def match_ratios(
    state: dict[str, Array], units: tuple[Answers, Answers], mask_B: Array, *_: Any, **__: Any
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Pairs chosen log-ratios with rejected log-ratios of the same rank, over the global batch."""
    chosen, rejected = units
    return {"partner_B": _match_ranks(chosen.ratio_B, rejected.ratio_B, mask_B)}, state


def _match_ranks(x_B: Array, y_B: Array, mask_B: Array) -> Array:
    """partner with sort(x)_k = x[i] and sort(y)_k = y[partner[i]]; unused places sort last, among themselves."""
    order_x_B, order_y_B = (jnp.argsort(jnp.where(mask_B, a, jnp.inf)) for a in (x_B, y_B))
    return jnp.zeros_like(order_x_B).at[order_x_B].set(order_y_B)
