"""Sequence Likelihood Calibration (Zhao et al. 2023, arXiv 2305.10425), normalised by the reference as in RSO."""

from __future__ import annotations

import jax

from dpo_jax.losses.base import Answers
from dpo_jax.types import Array


def hinge(chosen: Answers, rejected: Answers, *, beta: float = 0.1) -> Array:
    """max(0, 1 − βΔ), Δ = s(c) − s(r).

    SLiC's rank calibration (§2 of arXiv 2305.10425) on log-ratios, the form of RSO (Liu et al. 2023, arXiv 2309.06657).
    A pair whose margin has passed 1 has no gradient.

    Args:
      chosen: the preferred answers, [B].
      rejected: the other answers, [B].
      beta: β > 0, 1/nats; 1/β is the margin asked for.

    Returns:
      float32 [B].
    """
    return jax.nn.relu(1 - beta * (chosen.shaped_B - rejected.shaped_B))
