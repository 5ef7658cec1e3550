"""Kahneman–Tversky Optimization (Ethayarajh et al. 2024, arXiv 2402.01306)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.losses.base import Answers, masked_mean
from dpo_jax.types import Array


def kto(
    answers: Answers,
    desirable_B: Array,
    *,
    reference_point: Array,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Array:
    """λ_D (1 − σ(β(c − z))) for a desirable answer, λ_U (1 − σ(β(z − r))) for an undesirable one.

    Eq. 8 of arXiv 2402.01306. The paper advises to keep λ_D n_D / (λ_U n_U) in [1, 4/3] (§4.2).

    Args:
      answers: answers of either kind, [B].
      desirable_B: bool, which of them are desirable.
      reference_point: z, nats, given by :func:`reference_point` without a gradient.
      beta: β > 0, risk aversion, 1/nats.
      desirable_weight: λ_D > 0.
      undesirable_weight: λ_U > 0.

    Returns:
      float32 [B].
    """
    sign_B = jnp.where(desirable_B, 1.0, -1.0)
    weight_B = jnp.where(desirable_B, desirable_weight, undesirable_weight)
    return weight_B * (1 - jax.nn.sigmoid(beta * sign_B * (answers.ratio_B - reference_point)))


def reference_point(
    state: dict[str, Array], units: None, mask_B: None, mismatched_ratio_B: Array, mismatched_mask_B: Array, **_: Any
) -> tuple[dict[str, Array], dict[str, Array]]:
    """z = max(0, mean log-ratio of answers after other examples' prompts).

    The paper's estimate of KL(policy ‖ reference), §4.1 of arXiv 2402.01306. The mismatched (prompt, answer) pairs are
    formed over the global batch, so that z depends neither on the number of devices nor on micro-batches.
    """
    return {"reference_point": jnp.maximum(0.0, masked_mean(mismatched_ratio_B, mismatched_mask_B))}, state


def weight_warning(
    desirable: int, undesirable: int, *, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> str | None:
    """Says so when λ_D n_D / (λ_U n_U) is outside [1, 4/3], the range that §4.2 of arXiv 2402.01306 advises.

    Args:
      desirable: n_D, desirable answers in the data.
      undesirable: n_U, undesirable ones.
      desirable_weight: λ_D.
      undesirable_weight: λ_U.

    Returns:
      A warning with a λ_D that would do, or None when all is well.
    """
    if desirable == 0 or undesirable == 0:
        kind = "desirable" if desirable == 0 else "undesirable"
        return f"the data has no {kind} answers: kto then only learns to make every answer more, or less, likely"
    ratio = desirable_weight * desirable / (undesirable_weight * undesirable)
    if 1 - 1e-6 <= ratio <= 4 / 3 + 1e-6:
        return None
    low = undesirable_weight * undesirable / desirable
    return (
        f"kto: desirable_weight*n_D / (undesirable_weight*n_U) = {desirable_weight:g}*{desirable} / "
        f"({undesirable_weight:g}*{undesirable}) = {ratio:.3g}, outside [1, 1.33]; "
        f"a desirable_weight between {low:.3g} and {low * 4 / 3:.3g} would balance the two kinds"
    )
