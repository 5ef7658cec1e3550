"""Dense attention over whole rows, in pairs of a block of queries and a block of keys.

In a packed row most pairs of blocks hold no key that a query of theirs sees; a loop visits the others alone. With its
running maximum and sum (arXiv 1805.02867) the scores of one pair exist at a time, and the pass back computes them again
from each query's normalizer (arXiv 2205.14135, algorithm 4).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.models.config import ATTENDED
from dpo_jax.models.layers import named, soft_cap
from dpo_jax.sharding import by_device
from dpo_jax.types import Array

BLOCK = 128  # most queries and keys of a pair of blocks
_UNSEEN = jnp.finfo(jnp.float32).min

_wide = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def flash(
    q_RLHE: Array, k_RLKE: Array, v_RLKE: Array, mask_RLL: Array, *, scale: float, cap: float | None = None
) -> Array:
    """Softmax attention with grouped key/value heads; softmax and sums in fp32 whatever the dtype of the operands.

    Args:
      q_RLHE: queries.
      k_RLKE: keys, H a multiple of K.
      v_RLKE: values.
      mask_RLL: bool, which keys a query sees. A query that sees none (padding) gets a mean of some values, which nobody
        reads, and passes nothing back.
      scale: what multiplies q·k.
      cap: c of c·tanh(score / c) for the scores; None leaves them alone.

    Returns:
      [R, L, H, E] in the dtype of the queries.
    """
    queries, keys = ("rows", None, "heads", None), ("rows", None, "kv_heads", None)
    local = by_device(functools.partial(_attend_rows, cap=cap), (queries, keys, keys, ("rows", None, None)), queries)
    return local(q_RLHE * scale, k_RLKE, v_RLKE, mask_RLL)


def block_count(length: int) -> int:
    """Into how many blocks rows are cut."""
    return -(-length // BLOCK)


def _attend_rows(q_RLHE: Array, k_RLKE: Array, v_RLKE: Array, mask_RLL: Array, cap: float | None) -> Array:
    rows, length, heads, size = q_RLHE.shape
    groups, blocks = k_RLKE.shape[2], block_count(length)
    missing = -length % blocks
    q_RLKGE = q_RLHE.reshape(rows, length, groups, heads // groups, size)
    q_RKGLE = _pad(q_RLKGE.transpose(0, 2, 3, 1, 4), missing, 3)
    k_RKLE, v_RKLE = (_pad(a.swapaxes(1, 2), missing, 2) for a in (k_RLKE, v_RLKE))
    out_RKGLE = _attend(q_RKGLE, k_RKLE, v_RKLE, _pad(_pad(mask_RLL, missing, 1), missing, 2), blocks, cap)
    return out_RKGLE[:, :, :, :length].transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q_RKGLE: Array, k_RKLE: Array, v_RKLE: Array, mask_RLL: Array, blocks: int, cap: float | None) -> Array:
    return _forward(q_RKGLE, k_RKLE, v_RKLE, mask_RLL, blocks, cap)[0]


def _forward(
    q_RKGLE: Array, k_RKLE: Array, v_RKLE: Array, mask_RLL: Array, blocks: int, cap: float | None
) -> tuple[Array, tuple]:
    # Kept as they are read here: turned, and head by head.
    q_RKGLE, k_RKLE, v_RKLE = (named(a, ATTENDED) for a in (q_RKGLE, k_RKLE, v_RKLE))

    def visit(i: Any, j: Any, seen: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = (_part(a, i, blocks, 3) for a in seen)
        scores = _scores(q_RKGLE, k_RKLE, i, j, blocks, cap)
        masked = jnp.where(_mask(mask_RLL, i, j, blocks), scores, _UNSEEN)
        higher = jnp.maximum(top, jnp.max(masked, axis=-1, keepdims=True))
        weights, fade = jnp.exp(masked - higher), jnp.exp(top - higher)
        total = fade * total + jnp.sum(weights, axis=-1, keepdims=True)
        values = _part(v_RKLE, j, blocks, 2)
        out = fade * out + _wide("rkgqt,rkte->rkgqe", weights.astype(values.dtype), values)
        return tuple(_with_part(a, b, i, blocks, 3) for a, b in zip(seen, (higher, total, out), strict=True))  # type: ignore[return-value]

    column = (*q_RKGLE.shape[:-1], 1)
    nothing = jnp.full(column, _UNSEEN), jnp.zeros(column, jnp.float32), jnp.zeros(q_RKGLE.shape, jnp.float32)
    top, total, out = _visit_pairs(mask_RLL, blocks, visit, nothing)
    out = named((out / total).astype(q_RKGLE.dtype), ATTENDED)
    normalizer = named(top + jnp.log(total), ATTENDED)
    return out, (q_RKGLE, k_RKLE, v_RKLE, mask_RLL, out, normalizer)


def _backward(blocks: int, cap: float | None, saved: tuple, dout_RKGLE: Array) -> tuple:
    q_RKGLE, k_RKLE, v_RKLE, mask_RLL, out, normalizer = saved
    wide_dout = dout_RKGLE.astype(jnp.float32)
    mean_slope = jnp.sum(out.astype(jnp.float32) * wide_dout, axis=-1, keepdims=True)  # Σ_t weight_t · ∂/∂weight_t

    def visit(i: Any, j: Any, grads: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        scores = _scores(q_RKGLE, k_RKLE, i, j, blocks, cap)
        queries, dout = (_part(a, i, blocks, 3) for a in (q_RKGLE, dout_RKGLE))
        keys, values = (_part(a, j, blocks, 2) for a in (k_RKLE, v_RKLE))
        # Masked inside of the exponential: outside, CPUs read the mask once more, transposed, for the values' gradient.
        rise = scores - _part(normalizer, i, blocks, 3)
        weights = jnp.exp(jnp.where(_mask(mask_RLL, i, j, blocks), rise, -jnp.inf))
        dweights = _wide("rkgqe,rkte->rkgqt", dout, values)
        slope = 1.0 if cap is None else 1.0 - jnp.square(scores / cap)
        dscores = (weights * (dweights - _part(mean_slope, i, blocks, 3)) * slope).astype(keys.dtype)
        dq, dk, dv = grads
        dq = _add_part(dq, _wide("rkgqt,rkte->rkgqe", dscores, keys), i, blocks, 3)
        dk = _add_part(dk, _wide("rkgqt,rkgqe->rkte", dscores, queries), j, blocks, 2)
        dv = _add_part(dv, _wide("rkgqt,rkgqe->rkte", weights.astype(dout.dtype), dout), j, blocks, 2)
        return dq, dk, dv

    operands = q_RKGLE, k_RKLE, v_RKLE
    zeros = tuple(jnp.zeros(a.shape, jnp.float32) for a in operands)
    grads = _visit_pairs(mask_RLL, blocks, visit, zeros)
    return *(g.astype(a.dtype) for g, a in zip(grads, operands, strict=True)), None


_attend.defvjp(_forward, _backward)


def _visit_pairs(mask_RLL: Array, blocks: int, visit: Callable[[Any, Any, Any], Any], carry: Any) -> Any:
    """``visit(i, j, carry)`` for each block j of keys of which some query of block i sees one, in any row."""
    if blocks == 1:
        return visit(0, 0, carry)
    size = mask_RLL.shape[1] // blocks
    seen_IJ = jnp.any(mask_RLL.reshape(-1, blocks, size, blocks, size), axis=(0, 2, 4))
    visited_IJ = seen_IJ | jnp.eye(blocks, dtype=bool)  # a query that sees nothing has something to divide by
    query_P, key_P = jnp.nonzero(visited_IJ, size=blocks**2, fill_value=0)
    return jax.lax.fori_loop(0, jnp.sum(visited_IJ), lambda p, c: visit(query_P[p], key_P[p], c), carry)


def _scores(q_RKGLE: Array, k_RKLE: Array, i: Any, j: Any, blocks: int, cap: float | None) -> Array:
    queries, keys = _part(q_RKGLE, i, blocks, 3), _part(k_RKLE, j, blocks, 2)
    return soft_cap(_wide("rkgqe,rkte->rkgqt", queries, keys), cap)


def _mask(mask_RLL: Array, i: Any, j: Any, blocks: int) -> Array:
    return _part(_part(mask_RLL, i, blocks, 1), j, blocks, 2)[:, None, None]


def _part(array: Array, i: Any, blocks: int, axis: int) -> Array:
    size = array.shape[axis] // blocks
    return jax.lax.dynamic_slice_in_dim(array, i * size, size, axis)


def _with_part(array: Array, part: Array, i: Any, blocks: int, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(array, part, i * (array.shape[axis] // blocks), axis)


def _add_part(array: Array, part: Array, i: Any, blocks: int, axis: int) -> Array:
    return _with_part(array, _part(array, i, blocks, axis) + part, i, blocks, axis)


def _pad(array: Array, missing: int, axis: int) -> Array:
    return jnp.pad(array, [(0, missing if a == axis else 0) for a in range(array.ndim)])
