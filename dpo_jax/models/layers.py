"""Pieces that the model families share: attention over a TokenBatch's rows or a key/value cache, and how they are joined."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from dpo_jax.types import Array


@struct.dataclass
class Cache:
    """Keys and values of the tokens seen so far, in the model's compute dtype.

    Attributes:
      key: [N, R, T, K, E], one entry for each layer and cache slot.
      value: [N, R, T, K, E].
    """

    key: Array
    value: Array


def training_mask(group_RL: Array, branch_RL: Array) -> Array:
    """Who attends to whom in a row, bool [R, L, L]: [r, query, key].

    A query sees a key iff both belong to the same group (≠ 0), the key is not later, and the key is of the prompt (branch
    0) or of the query's own branch.
    """
    length = group_RL.shape[1]
    causal_LL = jnp.tril(jnp.ones((length, length), bool))
    same_group = group_RL[:, :, None] == group_RL[:, None, :]
    visible = (branch_RL[:, None, :] == 0) | (branch_RL[:, :, None] == branch_RL[:, None, :])
    real = (group_RL != 0)[:, None, :]
    return causal_LL[None] & same_group & visible & real


def attend(q_RQHE: Array, k_RTKE: Array, v_RTKE: Array, mask_RQT: Array) -> Array:
    """Softmax attention with grouped key/value heads; softmax in fp32 whatever the dtype of the operands.

    A query that sees nothing (padding) gets the mean of the values, which nobody reads.

    Args:
      q_RQHE: queries.
      k_RTKE: keys, H a multiple of K.
      v_RTKE: values.
      mask_RQT: bool, which keys a query sees.

    Returns:
      [R, Q, H, E] in the dtype of the queries.
    """
    rows, queries, heads, size = q_RQHE.shape
    groups = k_RTKE.shape[2]
    q = (q_RQHE * size**-0.5).reshape(rows, queries, groups, heads // groups, size)
    scores = jnp.einsum("rqkge,rtke->rkgqt", q, k_RTKE, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_RQT[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_RTKE.dtype)
    out = jnp.einsum("rkgqt,rtke->rqkge", weights, v_RTKE)
    return out.reshape(rows, queries, heads, size)


def append(cache_RTKE: Array, new_RQKE: Array, start: Array) -> Array:
    """Writes the new keys (or values) into the cache from slot ``start`` on, the same for all rows."""
    return jax.lax.dynamic_update_slice_in_dim(cache_RTKE, new_RQKE, start, axis=1)
