"""Simple Preference Optimization (Meng et al. 2024, arXiv 2405.14734)."""

from __future__ import annotations

import jax

from dpo_jax.losses.base import Answers
from dpo_jax.types import Array


def simpo(chosen: Answers, rejected: Answers, *, beta: float = 2.0, gamma: float = 1.0) -> Array:
    """−log σ(β(logp_w/|w| − logp_l/|l|) − γ).

    Eq. 6 of arXiv 2405.14734. There is no likelihood term; write ``simpo + 0.1*sft`` to have one.

    Args:
      chosen: the preferred answers, [B].
      rejected: the other answers, [B].
      beta: β > 0, tokens/nat; the authors take 2 to 2.5 and, on some models, 10.
      gamma: γ ≥ 0, the target margin of rewards; the authors keep γ/β in [0.25, 0.5].

    Returns:
      float32 [B].
    """
    return -jax.nn.log_sigmoid(beta * (chosen.logp_B - rejected.logp_B) - gamma)
