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
from flax import struct
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from dpo_jax.models.config import ATTENDED
from dpo_jax.sharding import by_device
from dpo_jax.types import Array

BLOCK = 512  # queries and keys of a tile
LONGEST = 2**15  # positions of a row
_NOBODY = -1


@struct.dataclass
class Sight:
    """Who attends to whom in rows that are looked at whole; says what ``training_mask`` says, in O(L).

    Tokens of a group lie side by side, its prompt first, each answer's tokens side by side.

    Attributes:
      group_RL: as of TokenBatch.
      branch_RL: as of TokenBatch.
      branches: the largest branch; 1 where no group has several answers.
    """

    group_RL: Array
    branch_RL: Array
    branches: int = struct.field(pytree_node=False)


@struct.dataclass
class _Spans:
    """int32 [L], for each token of a row.

    Attributes:
      segment: its own.
      own: first token of the segment.
      prompt: first token of its group.
      prompt_end: past the last token of the prompt that it sees as a copy; ``prompt`` where there is none.
      lowest: first token of the row that its window lets it see.
    """

    segment: Array
    own: Array
    prompt: Array
    prompt_end: Array
    lowest: Array


def splash(
    q_RLHE: Array,
    k_RLKE: Array,
    v_RLKE: Array,
    sight: Sight,
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
      sight: who sees whom.
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
    settings: dict[str, Any] = dict(branches=sight.branches, block=block, cap=cap, interpret=interpret)

    def attend_rows(q: Array, k: Array, v: Array, group: Array, branch: Array, window: Array | None) -> Array:
        heads_first = tuple(_pad(a, padded).swapaxes(1, 2) for a in (q, k, v))
        rows = (*heads_first, _pad(group, padded), _pad(branch, padded))
        out_RHLE = jax.lax.map(lambda row: _attend_row(*row, window=window, **settings), rows)
        return out_RHLE[:, :, :length].swapaxes(1, 2)

    queries, keys, tokens = ("rows", None, "heads", None), ("rows", None, "kv_heads", None), ("rows", None)
    local = by_device(attend_rows, (queries, keys, keys, tokens, tokens, ()), queries)
    return local(q_RLHE * scale, k_RLKE, v_RLKE, sight.group_RL, sight.branch_RL, window)


def visited_pairs(group_RL: Array, branch_RL: Array, branches: int, window: int | None, block: int = BLOCK) -> int:
    """How many pairs of query and key the kernel computes a score for, over all rows: whole blocks."""
    length = group_RL.shape[1]
    block = min(block, -(-length // 128) * 128)
    padded = -(-length // block) * block

    def count(group: Array, branch: Array) -> Array:
        spans = _spans(group, branch, branches, window)
        return jnp.sum(_visited(spans, branch, branches, block))

    counts = jax.vmap(count)(_pad(jnp.asarray(group_RL), padded), _pad(jnp.asarray(branch_RL), padded))
    return int(jnp.sum(counts)) * block**2


def _attend_row(
    q_HLE: Array,
    k_KLE: Array,
    v_KLE: Array,
    group_L: Array,
    branch_L: Array,
    *,
    window: Array | None,
    branches: int,
    block: int,
    cap: float | None,
    interpret: bool,
) -> Array:
    spans = _spans(group_L, branch_L, branches, window)
    copies = _copies(branches)
    visited_IJ = _visited(spans, branch_L, branches, block)
    index = jnp.arange(group_L.shape[0], dtype=jnp.int32)
    code_L: Any = index if window is None else index + spans.lowest * LONGEST
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
        mask_function=_mask_function(group_L.shape[0], copies, window is not None),
        interpret=interpret,
    )
    copied = [jnp.where(branch_L == 0, spans.segment + b, _NOBODY) for b in range(1, copies + 1)]
    segments = kernel.SegmentIds(jnp.asarray(spans.segment), jnp.concatenate([spans.segment, *copied]))
    repeated_k, repeated_v = (jnp.concatenate([a] * (1 + copies), axis=1) for a in (k_KLE, v_KLE))
    return attend(q_HLE, repeated_k, repeated_v, segment_ids=segments)


def _spans(group_L: Array, branch_L: Array, branches: int, window: Array | int | None) -> _Spans:
    index = jnp.arange(group_L.shape[0], dtype=jnp.int32)
    branch_L = branch_L if _copies(branches) else jnp.zeros_like(branch_L)

    def latest(starts: Array) -> Array:
        return jax.lax.cummax(jnp.where(starts, index, 0))

    def changed(a: Array) -> Array:
        return (index == 0) | (a != jnp.roll(a, 1))

    padding = group_L == 0
    new_group = changed(group_L) | padding
    prompt, own = latest(new_group), latest(new_group | changed(branch_L))
    first_answer = (branch_L > 0) & (new_group | (jnp.roll(branch_L, 1) == 0))
    prompt_end = jnp.where(branch_L > 0, latest(first_answer), prompt)
    # Distances count positions of a sequence: prompt, then this answer.
    shift = jnp.where(branch_L > 0, own - prompt_end, 0)
    if window is None:
        lowest = prompt
    else:
        reach = jnp.maximum(index - window + 1, -LONGEST)
        lowest = jnp.maximum(prompt, jnp.where(reach >= own, reach, reach - shift))
    return _Spans(group_L * (branches + 1) + branch_L, own, prompt, prompt_end, lowest)


def _visited(spans: _Spans, branch_L: Array, branches: int, block: int) -> Array:
    """Which blocks of keys hold one that some query of a block sees, bool [I, J]; J counts the copies too."""
    tiles = branch_L.shape[0] // block
    start_J = block * jnp.arange(tiles)

    def holds(lowest_L: Array, end_L: Array) -> Array:
        """Blocks of keys between the lowest and the highest that a block's queries see."""
        some_L = lowest_L < end_L
        low_I = jnp.min(jnp.where(some_L, lowest_L, LONGEST).reshape(tiles, block), axis=1)
        end_I = jnp.max(jnp.where(some_L, end_L, 0).reshape(tiles, block), axis=1)
        return (start_J[None] < end_I[:, None]) & (start_J[None] + block > low_I[:, None])

    index = jnp.arange(branch_L.shape[0])
    parts = [holds(jnp.maximum(spans.own, spans.lowest), index + 1)]
    for b in range(1, _copies(branches) + 1):
        parts.append(holds(spans.lowest, jnp.where(branch_L == b, spans.prompt_end, 0)))
    return jnp.concatenate(parts, axis=1)


def _copies(branches: int) -> int:
    return branches if branches > 1 else 0


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


def _pad(array: Array, length: int) -> Array:
    return jnp.pad(array, [(0, 0), (0, length - array.shape[1]), *[(0, 0)] * (array.ndim - 2)])
