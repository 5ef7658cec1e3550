"""Odds Ratio Preference Optimization (Hong et al. 2024, arXiv 2403.07691)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dpo_jax.losses.base import Answers
from dpo_jax.types import Array

# The rounding of an fp32 log-softmax. Nearer to probability 1 the odds are noise, and at 1 they are infinite.
MAX_LOGP = -1e-7


def orpo(chosen: Answers, rejected: Answers, *, beta: float = 0.1) -> Array:
    """NLL(prompt + chosen) − β log σ(o), o = (w̄ − l̄) − (log(1 − e^w̄) − log(1 − e^l̄)).

    Eq. 6 and 7 of arXiv 2403.07691; w̄ and l̄ are log-probabilities per token, and o is the logarithm of the odds
    ratio. The likelihood term is a mean over the tokens of prompt and chosen answer, as in the authors' code.

    Args:
      chosen: the preferred answers, [B].
      rejected: the other answers, [B].
      beta: the paper's λ > 0, weight of the odds-ratio term.

    Returns:
      float32 [B], nats per token.
    """
    log_odds_ratio_B = log_odds(chosen.logp_B) - log_odds(rejected.logp_B)
    return likelihood(chosen, rejected) - beta * jax.nn.log_sigmoid(log_odds_ratio_B)


def likelihood(chosen: Answers, rejected: Answers, **_: float) -> Array:
    """NLL(prompt + chosen), the part of ``orpo`` that is a mean over tokens, [B]."""
    del rejected
    return -((chosen.prompt_sum_B + chosen.sum_B) / chosen.mean_full_count)


def log_odds(logp_B: Array) -> Array:
    """x − log(1 − e^x), the logarithm of p/(1−p) for p = e^x; finite at x = 0."""
    return logp_B - jax.nn.log1mexp(-jnp.minimum(logp_B, MAX_LOGP))
