"""Scores s(x) of a log-ratio x for f-divergences other than the reverse KL (Wang et al. 2023, arXiv 2309.16240).

DPO's Δ becomes s(c) − s(r), where s is f′ of the divergence at e^x, up to a constant.
"""

from __future__ import annotations

from collections.abc import Callable


from dpo_jax.types import Array


def reverse_kl(ratio_B: Array, alpha: Array) -> Array:
    """x: the reverse KL, which is DPO's own."""
    return ratio_B


DIVERGENCES: dict[str, Callable[[Array, Array], Array]] = {"reverse_kl": reverse_kl}
