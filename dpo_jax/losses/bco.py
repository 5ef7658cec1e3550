"""Binary Classifier Optimization (Jung et al. 2024, arXiv 2404.04656)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.losses.base import Answers
from dpo_jax.types import Array


def bco_pair(chosen: Answers, rejected: Answers, *, shift: Array, beta: float = 0.1) -> Array:
    """−log σ(βs(c) − δ) − log σ(−(βs(r) − δ)).

    §4 of arXiv 2404.04656 on a pair: a classifier whose logit is the reward, moved by the reward shift δ.

    Args:
      chosen: the preferred answers, [B].
      rejected: the other answers, [B].
      shift: δ, given by :func:`reward_shift` without a gradient.
      beta: β > 0, 1/nats; the paper's runs take 0.01.

    Returns:
      float32 [B].
    """
    chosen_B, rejected_B = beta * chosen.shaped_B - shift, beta * rejected.shaped_B - shift
    return -jax.nn.log_sigmoid(chosen_B) - jax.nn.log_sigmoid(-rejected_B)


def bco_unpaired(answers: Answers, desirable_B: Array, *, shift: Array, beta: float = 0.1) -> Array:
    """−log σ(βs − δ) for a desirable answer, −log σ(−(βs − δ)) for an undesirable one.

    §4 of arXiv 2404.04656, answer by answer.

    Args:
      answers: answers of either kind, [B].
      desirable_B: bool, which of them are desirable.
      shift: δ, given by :func:`reward_shift` without a gradient.
      beta: β > 0, 1/nats; the paper's runs take 0.01.

    Returns:
      float32 [B].
    """
    sign_B = jnp.where(desirable_B, 1.0, -1.0)
    return -jax.nn.log_sigmoid(sign_B * (beta * answers.shaped_B - shift))


def reward_shift(
    state: dict[str, Array], units: tuple[Any, ...], mask_B: Array, *_: Any, beta: Array, update: bool, **__: Any
) -> tuple[dict[str, Array], dict[str, Array]]:
    """δ = the mean reward of all answers seen so far, this batch included; the paper's reward shift.

    The mean is over answers, not over batches, so that it does not depend on how answers were batched. In evaluation
    (``update`` false) δ is the one that training has left.
    """
    if not update:
        return {"shift": state["mean"]}, state
    answers = [unit for unit in units if isinstance(unit, Answers)]
    new = jnp.float32(len(answers)) * jnp.sum(mask_B)
    rewards = sum(jnp.sum(jnp.where(mask_B, beta * a.shaped_B, 0.0)) for a in answers)
    count = state["count"] + new
    mean = state["mean"] + (rewards - new * state["mean"]) / jnp.maximum(count, 1.0)
    return {"shift": mean}, {"count": count, "mean": mean}


# What ``reward_shift`` remembers: how many answers, and their mean reward.
INITIAL_SHIFT = {"count": 0.0, "mean": 0.0}
