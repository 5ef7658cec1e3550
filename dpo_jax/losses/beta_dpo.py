"""DPO with a dynamic β (Wu et al. 2024, arXiv 2407.08639)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.losses.base import Answers, masked_mean
from dpo_jax.types import Array

# The dynamic β may not reach 0, where the loss would forget the pairs.
MIN_BETA = 1e-3


def beta_dpo(
    chosen: Answers,
    rejected: Answers,
    *,
    batch_beta: Array,
    beta: float = 0.1,
    adaptation: float = 0.6,
    momentum: float = 0.9,
) -> Array:
    """−log σ(β_b Δ), β_b = β(1 + α(M_b − M₀)), Δ = s(c) − s(r).

    The batch-level β of arXiv 2407.08639: M_b is the batch's mean Δ (nats, as in the authors' code) and M₀ its running
    mean, so that a batch of easily told pairs is given a larger β. The paper's filter, which drops a random fifth of
    the pairs, is left out: the loss would depend on a random draw.

    Args:
      chosen: the preferred answers, [B].
      rejected: the other answers, [B].
      batch_beta: β_b, given by :func:`dynamic_beta` without a gradient.
      beta: β > 0, 1/nats.
      adaptation: α ≥ 0; 0 is plain DPO.
      momentum: share of M₀ that stays at each step, in [0, 1).

    Returns:
      float32 [B].
    """
    return -jax.nn.log_sigmoid(batch_beta * (chosen.shaped_B - rejected.shaped_B))


def dynamic_beta(
    state: dict[str, Array],
    units: tuple[Answers, Answers],
    mask_B: Array,
    *_: Any,
    beta: Array,
    adaptation: Array,
    momentum: Array,
    update: bool,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """β_b of the global batch, and the running mean M₀, which takes in the batch before it is used.

    M₀ starts at 0, where Δ does. In evaluation (``update`` false) it is the one that training has left.
    """
    chosen, rejected = units
    margin = masked_mean(chosen.shaped_B - rejected.shaped_B, mask_B)
    threshold = state["threshold"]
    if update:
        threshold = momentum * threshold + (1 - momentum) * margin
    batch_beta = jnp.maximum(beta * (1 + adaptation * (margin - threshold)), jnp.minimum(beta, MIN_BETA))
    return {"batch_beta": batch_beta}, {"threshold": threshold}


INITIAL_THRESHOLD = {"threshold": 0.0}
