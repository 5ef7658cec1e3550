"""DPO-Positive, the loss of Smaug (Pal et al. 2024, arXiv 2402.13228)."""

from __future__ import annotations

import jax

from dpo_jax.losses.base import Answers
from dpo_jax.types import Array


def dpop(chosen: Answers, rejected: Answers, *, beta: float = 0.1, penalty: float = 5.0) -> Array:
    """−log σ(βΔ − λ max(0, ref_w − logp_w)), Δ = s(c) − s(r).

    arXiv 2402.13228, §3: pays for a chosen answer that has become less likely than under the reference. The paper
    writes the penalty inside the bracket that β multiplies, so that λ = β·λ_paper; its λ_paper = 50 is 5 at β = 0.1.

    Args:
      chosen: the preferred answers, [B].
      rejected: the other answers, [B].
      beta: β > 0, 1/nats.
      penalty: λ ≥ 0, 1/nats.

    Returns:
      float32 [B].
    """
    fallen_B = jax.nn.relu(-chosen.ratio_B)
    return -jax.nn.log_sigmoid(beta * (chosen.shaped_B - rejected.shaped_B) - penalty * fallen_B)
