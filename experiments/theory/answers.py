"""Answers of one token, as a bandit gives them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dpo_jax.losses import Answers


def make_answers(logp_B: jax.Array, reference_B: jax.Array) -> Answers:
    """Answers with the given log-probabilities under policy and reference, nats."""
    ones_B = jnp.ones_like(logp_B)
    return Answers(
        logp_B=logp_B,
        reference_B=reference_B,
        shaped_B=logp_B - reference_B,
        sum_B=logp_B,
        count_B=ones_B,
        prompt_sum_B=0 * ones_B,
        score_B=0 * ones_B,
        mean_count=jnp.float32(1.0),
        mean_full_count=jnp.float32(1.0),
    )
