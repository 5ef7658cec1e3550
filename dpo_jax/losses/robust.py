"""Robust DPO (Ray Chowdhury et al. 2024, arXiv 2403.00409)."""

from __future__ import annotations

import jax

from dpo_jax.losses.base import Answers
from dpo_jax.types import Array


def robust(chosen: Answers, rejected: Answers, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Array:
    """[−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1−2ε), Δ = s(c) − s(r).

    §3.1 of arXiv 2403.00409: an unbiased estimate. Its expectation over labels that are flipped with probability ε is
    DPO's loss on the clean labels. It is unbounded below, unlike :func:`dpo_jax.losses.dpo.dpo`.

    Args:
      chosen: the preferred answers, [B].
      rejected: the other answers, [B].
      beta: β > 0, 1/nats.
      label_smoothing: ε in [0, ½), the share of labels that are flipped.

    Returns:
      float32 [B].
    """
    logits_B = beta * (chosen.shaped_B - rejected.shaped_B)
    right_B, wrong_B = jax.nn.log_sigmoid(logits_B), jax.nn.log_sigmoid(-logits_B)
    return (-(1 - label_smoothing) * right_B + label_smoothing * wrong_B) / (1 - 2 * label_smoothing)
