"""Length-regularised DPO (Park et al. 2024, arXiv 2403.19159)."""

from __future__ import annotations

import jax

from dpo_jax.losses.base import Answers
from dpo_jax.types import Array


def r_dpo(chosen: Answers, rejected: Answers, *, beta: float = 0.1, length_penalty: float = 0.01) -> Array:
    """−log σ(βΔ + α(|w| − |l|)), Δ = s(c) − s(r).

    arXiv 2403.19159. Maximising E[ρ] − α|y| − β KL gives ρ = β log(π/π_ref) + α|y| + const, so the difference of
    lengths enters with a plus: a longer chosen answer is partly explained by its length and pulls less. With a minus (α
    < 0) length would be rewarded.

    Args:
      chosen: the preferred answers, [B].
      rejected: the other answers, [B].
      beta: β > 0, 1/nats.
      length_penalty: α, reward per token; positive makes answers shorter.

    Returns:
      float32 [B].
    """
    lengths_B = length_penalty * (chosen.count_B - rejected.count_B)
    return -jax.nn.log_sigmoid(beta * (chosen.shaped_B - rejected.shaped_B) + lengths_B)
