"""Contrastive Preference Optimization (Xu et al. 2024, arXiv 2401.08417)."""

from __future__ import annotations

from dpo_jax.losses.base import Answers
from dpo_jax.losses.dpo import logistic
from dpo_jax.losses.sft import sft
from dpo_jax.types import Array


def cpo(
    chosen: Answers,
    rejected: Answers,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    nll_weight: float = 1.0,
) -> Array:
    """−(1−ε) log σ(x) − ε log σ(−x) + α·NLL(chosen), x = β(logp_w − logp_l).

    Eq. 3 of arXiv 2401.08417: DPO under a uniform reference, with a likelihood term in its place.

    Args:
      chosen: the preferred answers, [B].
      rejected: the other answers, [B].
      beta: β > 0, 1/nats.
      label_smoothing: ε in [0, ½).
      nll_weight: α ≥ 0, weight of the token-mean negative log-likelihood of the chosen answers.

    Returns:
      float32 [B].
    """
    pairs_B = logistic(beta * (chosen.logp_B - rejected.logp_B), label_smoothing)
    return pairs_B + likelihood(chosen, rejected, nll_weight=nll_weight)


def likelihood(chosen: Answers, rejected: Answers, *, nll_weight: float, **_: float) -> Array:
    """α·NLL(chosen), the part of ``cpo`` that is a mean over tokens, [B]."""
    del rejected
    return nll_weight * sft(chosen)
