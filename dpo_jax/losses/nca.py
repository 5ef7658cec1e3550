"""Noise Contrastive Alignment (Chen et al. 2024, arXiv 2402.05369)."""

from __future__ import annotations

import jax

from dpo_jax.losses.base import Answers
from dpo_jax.types import Array


def nca_pair(chosen: Answers, rejected: Answers, *, beta: float = 0.1) -> Array:
    """−log σ(βs(c)) − ½ log σ(−βs(c)) − ½ log σ(−βs(r)).

    NCA for two answers of which one is wholly preferred (§4.1 of arXiv 2402.05369). It fixes the reward itself and not
    only the margin: the chosen answer's settles at βs(c) = log 2.

    Args:
      chosen: the preferred answers, [B].
      rejected: the other answers, [B].
      beta: β > 0, 1/nats; the paper's runs take 0.01.

    Returns:
      float32 [B].
    """
    chosen_B, rejected_B = beta * chosen.shaped_B, beta * rejected.shaped_B
    noise_B = jax.nn.log_sigmoid(-chosen_B) + jax.nn.log_sigmoid(-rejected_B)
    return -jax.nn.log_sigmoid(chosen_B) - 0.5 * noise_B
