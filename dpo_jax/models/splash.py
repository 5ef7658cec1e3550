"""Attention over whole rows on TPUs by JAX's splash kernel: no [L, L] exists, and blocks that nobody sees cost nothing.

The kernel compares a query's segment with a key's, and positions in the row. Answers of one prompt are segments of
their own; so that each of them sees the prompt, the keys of a row are followed by copies of it, one for each answer::

    row                 prompt a  answer a1  answer a2  prompt b  answer b1 …
    segments of keys    a         a1         a2         b         b1          the row itself: causal
                        a1        .          .          b1        .           copies, each seen by all of an answer
                        a2        .          .          b2        .
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from dpo_jax.models.config import ATTENDED
from dpo_jax.models.sight import LONGEST, Sight, Spans, blocks_between, find_spans, pad_positions
from dpo_jax.sharding import by_device
from dpo_jax.types import Array

BLOCK = 512  # queries and keys of a tile
_NOBODY = -1


def splash(
    q_RLHE: Array,
    k_RLKE: Array,
    v_RLKE: Array,
    spans: Spans,
    *,
    window: Array | None = None,
    scale: float,
    cap: float | None = None,
    block: int = BLOCK,
    interpret: bool = False,
) -> Array:
    """Softmax attention with grouped key/value heads; softmax and sums in fp32.

    Rows and heads that lie on different devices are attended to where they lie.

    Args:
      q_RLHE: queries.
      k_RLKE: keys, H a multiple of K.
      v_RLKE: values.
      spans: who sees whom.
      window: int32 scalar, how many of the latest positions are seen; None is all.
      scale: what multiplies q·k.
      cap: c of c·tanh(score / c) for the scores; None leaves them alone.
      block: queries and keys of a tile, a multiple of 128.
      interpret: runs on CPUs, slowly.

    Returns:
      [R, L, H, E] in the dtype of the queries; padding sees itself.

    Raises:
      ValueError: rows of more positions than can be told apart.
    """
    length = q_RLHE.shape[1]
    block = min(block, -(-length // 128) * 128)
    padded = -(-length // block) * block
    if padded > LONGEST:
        raise ValueError(f"rows have {length} positions, the kernel takes {LONGEST}: set config.model.attention=dense")
    settings: dict[str, Any] = dict(block=block, cap=cap, interpret=interpret)

    def attend_rows(q: Array, k: Array, v: Array, spans: Spans, window: Array | None) -> Array:
        heads_first = tuple(pad_positions(a, padded).swapaxes(1, 2) for a in (q, k, v))
        out_RHLE = jax.lax.map(
            lambda row: _attend_row(*row, window=window, **settings), (*heads_first, spans.padded(padded))
        )
        return out_RHLE[:, :, :length].swapaxes(1, 2)

    queries, keys = ("rows", None, "heads", None), ("rows", None, "kv_heads", None)
    local = by_device(attend_rows, (queries, keys, keys, ("rows", None), ()), queries)
    return local(q_RLHE * scale, k_RLKE, v_RLKE, spans, window)


def visited_pairs(sight: Sight, window: int | None, block: int = BLOCK) -> int:
    """How many pairs of query and key the kernel computes a score for, over all rows: whole blocks."""
    length = sight.group_RL.shape[1]
    block = min(block, -(-length // 128) * 128)
    spans = find_spans(sight).padded(-(-length // block) * block)
    return int(jnp.sum(_visited(spans, window, block))) * block**2


def _attend_row(
    q_HLE: Array,
    k_KLE: Array,
    v_KLE: Array,
    spans: Spans,
    *,
    window: Array | None,
    block: int,
    cap: float | None,
    interpret: bool,
) -> Array:
    copies, length = _copies(spans), spans.own.shape[0]
    visited_IJ = _visited(spans, window, block)
    index = jnp.arange(length, dtype=jnp.int32)
    code_L: Any = index if window is None else index + spans.lowest(window) * LONGEST
    info: Any = functools.partial(MaskInfo, mask_next=None, partial_mask_blocks=None, q_sequence=code_L)
    tiles_IJ = visited_IJ.astype(jnp.int32)[None]
    next_key, next_query = (jax.lax.broadcasted_iota(jnp.int32, tiles_IJ.shape, axis) for axis in (2, 1))
    forward = info(data_next=next_key, block_mask=tiles_IJ)
    backward = info(data_next=next_query, block_mask=tiles_IJ)
    attend: Any = kernel.SplashAttentionKernel(
        forward,
        forward,
        backward,
        block_sizes=_block_sizes(block),
        is_mqa=False,
        save_residuals=False,
        mask_value=kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=cap,
        residual_checkpoint_name=ATTENDED,
        mask_function=_mask_function(length, copies, window is not None),
        interpret=interpret,
    )
    copied = [jnp.where(spans.branch == 0, spans.segment + b, _NOBODY) for b in range(1, copies + 1)]
    segments = kernel.SegmentIds(jnp.asarray(spans.segment), jnp.concatenate([spans.segment, *copied]))
    repeated_k, repeated_v = (jnp.concatenate([a] * (1 + copies), axis=1) for a in (k_KLE, v_KLE))
    return attend(q_HLE, repeated_k, repeated_v, segment_ids=segments)


def _visited(spans: Spans, window: Array | int | None, block: int) -> Array:
    """Which blocks of keys hold one that some query of a block sees, bool [..., I, J]; J counts the copies too."""
    lowest, end = spans.lowest(window), jnp.arange(1, spans.own.shape[-1] + 1)
    parts = [blocks_between(jnp.maximum(spans.own, lowest), jnp.broadcast_to(end, lowest.shape), block, block)]
    for b in range(1, _copies(spans) + 1):
        parts.append(blocks_between(lowest, jnp.where(spans.branch == b, spans.prompt_end, 0), block, block))
    return jnp.concatenate(parts, axis=-1)


def _copies(spans: Spans) -> int:
    return spans.branches if spans.branches > 1 else 0


@functools.cache
def _mask_function(length: int, copies: int, windowed: bool) -> Callable[[Any, Any], Any]:
    """(code of a query, index of a key) → whether it is seen, segments apart; compared by identity when compiled."""

    def causal(query: Any, key: Any) -> Any:
        return (key <= query) | (key >= length) if copies else key <= query

    def in_window(code: Any, key: Any) -> Any:
        place = key
        for _ in range(copies):
            place = jnp.where(place >= length, place - length, place)
        return (place <= code % LONGEST) & (place >= code // LONGEST)

    return in_window if windowed else causal


def _block_sizes(block: int) -> kernel.BlockSizes:
    return kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
