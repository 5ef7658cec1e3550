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
    """z = max(0, mean log-ratio of answers after other examples' prompts), the paper's estimate of KL(policy ‖ reference).

    The mismatched (prompt, answer) pairs are formed over the global batch (§4.1 of arXiv 2402.01306), so that z depends
    neither on the number of devices nor on micro-batches.
    """
    return {"reference_point": jnp.maximum(0.0, masked_mean(mismatched_ratio_B, mismatched_mask_B))}, state
