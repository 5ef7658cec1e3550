"""Scores s(x) of a log-ratio x for f-divergences other than the reverse KL (Wang et al. 2023, arXiv 2309.16240).

DPO's Δ becomes s(c) − s(r), where s(x) = f′(e^x) up to a constant (Theorem 1 of the paper). The constants here make
s(0) = 0: they cancel in every difference, and leave the losses that read s(c) on its own at rest where policy and
reference agree.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dpo_jax.types import Array

# e^80 is the last power of ten that survives a product with β in fp32; past it the score is flat.
MAX_EXPONENT = 80.0


def reverse_kl(ratio_B: Array, alpha: Array) -> Array:
    """x: the reverse KL, which is DPO's own."""
    return ratio_B


def forward_kl(ratio_B: Array, alpha: Array) -> Array:
    """1 − e^(−x): the forward KL, f(u) = −log u."""
    return -jnp.expm1(jnp.minimum(-ratio_B, MAX_EXPONENT))


def jensen_shannon(ratio_B: Array, alpha: Array) -> Array:
    """log 2 + log σ(x): the Jensen–Shannon divergence."""
    return jnp.log(2.0) + jax.nn.log_sigmoid(ratio_B)


def alpha_divergence(ratio_B: Array, alpha: Array) -> Array:
    """(e^((α−1)x) − 1)/(α−1): the α-divergence, the reverse KL at α = 1 and the forward one at 0, as TRL counts α.

    The paper counts it from the other side: its f′(u) = (1 − u^(−α))/α is this at 1 − α.
    """
    order = jnp.asarray(alpha, jnp.float32) - 1
    is_limit = jnp.abs(order) < 1e-6
    # The branch not taken must stay finite as well, or its gradient would poison the other one.
    order = jnp.where(is_limit, 1.0, order)
    powers_B = jnp.expm1(jnp.minimum(order * ratio_B, MAX_EXPONENT)) / order
    return jnp.where(is_limit, ratio_B, powers_B)


DIVERGENCES: dict[str, Callable[[Array, Array], Array]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jensen_shannon": jensen_shannon,
    "alpha": alpha_divergence,
}
