"""A token from logits: drawn from their distribution, from the likeliest part of it, or the likeliest."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dpo_jax.types import Array


def keep_likeliest(logits_RV: Array, top_k: int | None, top_p: float | None) -> Array:
    """Logits with −∞ outside of the ``top_k`` likeliest tokens, and of those outside of the nucleus of mass ``top_p``.

    The nucleus (arXiv 1904.09751) holds a token iff the likelier ones add up to less than ``top_p``; tokens as likely
    as its last one stay.
    """
    if top_k is not None and top_k < logits_RV.shape[1]:
        least_R1 = jax.lax.top_k(logits_RV, top_k)[0][:, -1:]
        logits_RV = jnp.where(logits_RV < least_R1, -jnp.inf, logits_RV)
    if top_p is not None and top_p < 1:
        sorted_RV = jnp.sort(logits_RV, axis=1)[:, ::-1]
        p_RV = jax.nn.softmax(sorted_RV, axis=1)
        kept_RV = jnp.cumsum(p_RV, axis=1) - p_RV < top_p
        least_R1 = jnp.min(jnp.where(kept_RV, sorted_RV, jnp.inf), axis=1, keepdims=True)
        logits_RV = jnp.where(logits_RV < least_R1, -jnp.inf, logits_RV)
    return logits_RV


def likeliest_token(logits_RV: Array) -> Array:
    """The first of the likeliest tokens, int32 [R], as ``argmax`` finds it, which CPUs run through number by number."""
    logits_RGB = _in_blocks(logits_RV, -jnp.inf)
    g_R = jnp.argmax(jnp.max(logits_RGB, axis=2), axis=1)
    return (g_R * logits_RGB.shape[2] + jnp.argmax(_block(logits_RGB, g_R), axis=1)).astype(jnp.int32)


def draw_token(logits_RV: Array, uniform_R: Array) -> Array:
    """Draws from softmax(logits) by inverting its distribution function: first that of blocks, then one block's.

    Far cheaper than Gumbel noise over the vocabulary, which needs R·V random numbers.

    Args:
      logits_RV: float32.
      uniform_R: float32 in [0, 1).

    Returns:
      int32 [R]; never a token of probability 0.
    """
    p_RV = jnp.exp(logits_RV - jnp.max(logits_RV, axis=1, keepdims=True))
    p_RGB = _in_blocks(p_RV, 0.0)
    mass_RG = jnp.sum(p_RGB, axis=2)
    g_R, rest_R = _invert(mass_RG, uniform_R * jnp.sum(mass_RG, axis=1))
    v_R, _ = _invert(_block(p_RGB, g_R), rest_R)
    return (g_R * p_RGB.shape[2] + v_R).astype(jnp.int32)


def _in_blocks(x_RV: Array, filler: float) -> Array:
    """[R, G, B], about √V blocks of √V, the last one filled up."""
    rows, vocab = x_RV.shape
    size = int(vocab**0.5)
    filled = jnp.pad(x_RV, ((0, 0), (0, -vocab % size)), constant_values=filler)
    return filled.reshape(rows, -1, size)


def _block(x_RGB: Array, g_R: Array) -> Array:
    """Each row's block of number g, [R, B]."""
    return jnp.take_along_axis(x_RGB, g_R[:, None, None], axis=1)[:, 0]


def _invert(mass_RN: Array, point_R: Array) -> tuple[Array, Array]:
    """The entry in whose share of the mass a point lies, and how far into it. Rounding may put the point past the end:
    the last entry with any mass is taken then."""
    upper_RN = jnp.cumsum(mass_RN, axis=1)
    last_R = mass_RN.shape[1] - 1 - jnp.argmax(mass_RN[:, ::-1] > 0, axis=1)
    index_R = jnp.minimum(jnp.sum(upper_RN <= point_R[:, None], axis=1), last_R)
    below_R = jnp.take_along_axis(upper_RN - mass_RN, index_R[:, None], axis=1)[:, 0]
    return index_R, jnp.maximum(point_R - below_R, 0.0)
