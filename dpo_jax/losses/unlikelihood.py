"""Unlikelihood (Welleck et al. 2019, arXiv 1908.04319) of whole answers, the baseline of the DPO paper."""

from __future__ import annotations

from dpo_jax.losses.base import Answers
from dpo_jax.types import Array


def unlikelihood(chosen: Answers, rejected: Answers, *, unlikelihood_weight: float = 1.0) -> Array:
    """−log π(y_w|x) + α log π(y_l|x).

    The baseline of arXiv 2305.18290, §6: the chosen answer is made more likely, the rejected one less, by a constant
    gradient where DPO's fades once they are told apart. It has no lower bound. The tokens of arXiv 1908.04319, eq. 4,
    pay −log(1 − p) instead, which fades as p does.

    Args:
      chosen: the preferred answers, [B].
      rejected: the other answers, [B].
      unlikelihood_weight: α ≥ 0; the DPO paper takes it from [0, 1].

    Returns:
      float32 [B], nats.
    """
    return unlikelihood_weight * rejected.logp_B - chosen.logp_B
