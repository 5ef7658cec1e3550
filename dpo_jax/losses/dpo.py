"""Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290)."""

from __future__ import annotations

import jax

from dpo_jax.losses.base import Answers
from dpo_jax.types import Array


def dpo(chosen: Answers, rejected: Answers, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Array:
    """−(1−ε) log σ(βΔ) − ε log σ(−βΔ), Δ = s(c) − s(r).

    Eq. 7 of arXiv 2305.18290; with ε > 0 it is the conservative DPO of Mitchell's note "A note on DPO with noisy
    preferences & relationship to IPO" (2023), eq. 3, whose optimum per pair is σ(βΔ) = 1 − ε.

    Args:
      chosen: the preferred answers, [B].
      rejected: the other answers, [B].
      beta: β > 0, strength of the pull to the reference, 1/nats.
      label_smoothing: ε in [0, ½), the share of pairs believed to be labelled the wrong way round.

    Returns:
      float32 [B].
    """
    return logistic(beta * (chosen.shaped_B - rejected.shaped_B), label_smoothing)


def sigmoid_norm(chosen: Answers, rejected: Answers, *, beta: float = 5.0) -> Array:
    """−log σ(β(s(c)/|w| − s(r)/|l|)): DPO of token means.

    Length-normalised DPO of Tülu 3 (Lambert et al. 2024, arXiv 2411.15124, eq. 6). It is :func:`dpo` under the
    reduction ``mean``; its β is larger because a mean over tokens is smaller than a sum.

    Args:
      chosen: the preferred answers, [B].
      rejected: the other answers, [B].
      beta: β > 0, tokens/nat.

    Returns:
      float32 [B].
    """
    return logistic(beta * (chosen.shaped_B - rejected.shaped_B))


def logistic(logits_B: Array, label_smoothing: float | Array = 0.0) -> Array:
    """−(1−ε) log σ(x) − ε log σ(−x): the Bradley–Terry likelihood of labels that are wrong with probability ε."""
    right_B, wrong_B = jax.nn.log_sigmoid(logits_B), jax.nn.log_sigmoid(-logits_B)
    return -(1 - label_smoothing) * right_B - label_smoothing * wrong_B
