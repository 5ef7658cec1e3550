"""Attention over whole rows on GPUs by kernels of our own: no [L, L] exists, and blocks that nobody sees cost nothing.

A token sees two runs of its row, its prompt and its own segment (``sight.py``), so a block of queries visits two ranges
of blocks of keys. The passes are those of FlashAttention-2 (arXiv 2307.08691): a running maximum and sum forward;
backward, scores again from each query's normalizer, once for the gradients of keys and values and once for those of
queries.

Written for the Triton backend of Pallas, which later versions of JAX will be without, and NVIDIA's compute capability
8.0 and above.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from dpo_jax.models.config import ATTENDED
from dpo_jax.models.layers import soft_cap
from dpo_jax.models.sight import Spans, block_ranges, blocks_between, pad_positions
from dpo_jax.sharding import by_device
from dpo_jax.types import Array


class Tiles(NamedTuple):
    """How a kernel cuts rows up: queries and keys of a block, warps that share one, stages of its loop's pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


class Kernels(NamedTuple):
    """Tiles of the three kernels."""

    forward: Tiles
    keys: Tiles
    queries: Tiles


# The fastest of a dozen on an H200, for packed rows of 2,048 positions and heads of 64.
TILES = Kernels(Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2))
SIZES = (16, 32, 64, 128)  # of a head
_UNSEEN = -0.7 * float(jnp.finfo(jnp.float32).max)
_LOG2E = math.log2(math.e)


class _Settings(NamedTuple):
    """What is compiled into a kernel."""

    cap: float | None
    tiles: Kernels
    interpret: bool


def triton(
    q_RLHE: Array,
    k_RLKE: Array,
    v_RLKE: Array,
    spans: Spans,
    *,
    window: Array | None = None,
    scale: float,
    cap: float | None = None,
    tiles: Kernels = TILES,
    interpret: bool = False,
) -> Array:
    """Softmax attention with grouped key/value heads; softmax and sums in fp32.

    Args:
      q_RLHE: queries, E one of SIZES.
      k_RLKE: keys, H a multiple of K.
      v_RLKE: values.
      spans: who sees whom.
      window: int32 scalar, how many of the latest positions are seen; None is all.
      scale: what multiplies q·k.
      cap: c of c·tanh(score / c) for the scores; None leaves them alone.
      tiles: of the kernels.
      interpret: runs on CPUs, slowly.

    Returns:
      [R, L, H, E] in the dtype of the queries; padding sees itself.
    """
    settings = _Settings(cap, tiles, interpret)

    def attend_rows(q: Array, k: Array, v: Array, spans: Spans, window: Array | None) -> Array:
        length = q.shape[1]
        padded = -(-length // _multiple(tiles)) * _multiple(tiles)
        spans = spans.padded(padded)
        lowest = spans.lowest(window)
        runs_R3L = jnp.stack([jnp.maximum(spans.own, lowest), lowest, spans.prompt_end], axis=1)
        return _attend(*(pad_positions(a, padded) for a in (q, k, v)), runs_R3L, settings)[:, :length]

    queries, keys = ("rows", None, "heads", None), ("rows", None, "kv_heads", None)
    local = by_device(attend_rows, (queries, keys, keys, ("rows", None), ()), queries)
    return local(q_RLHE * scale, k_RLKE, v_RLKE, spans, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_RLHE: Array, k_RLKE: Array, v_RLKE: Array, runs_R3L: Array, settings: _Settings) -> Array:
    return _forward(q_RLHE, k_RLKE, v_RLKE, runs_R3L, settings)[0]


def _forward(
    q_RLHE: Array, k_RLKE: Array, v_RLKE: Array, runs_R3L: Array, settings: _Settings
) -> tuple[Array, tuple[Array, ...]]:
    rows, length, heads, width = q_RLHE.shape
    tiles, group = settings.tiles.forward, heads // k_RLKE.shape[2]
    block = _Blocks(length, tiles.queries, group, width)
    out, normalizer = _call(
        _forward_kernel,
        settings,
        tiles,
        grid=(length // tiles.queries, heads, rows),
        inputs=[
            (_visited_keys(runs_R3L, tiles), block.ranges),
            (runs_R3L, block.runs),
            (q_RLHE, block.queries),
            (k_RLKE, block.all_keys),
            (v_RLKE, block.all_keys),
        ],
        outputs=[
            (q_RLHE, block.queries),
            (jax.ShapeDtypeStruct((rows, heads, length), jnp.float32), block.normalizer),
        ],
    )
    out, normalizer = (checkpoint_name(a, ATTENDED) for a in (out, normalizer))
    return out, (q_RLHE, k_RLKE, v_RLKE, runs_R3L, out, normalizer)


def _backward(settings: _Settings, saved: tuple[Array, ...], dout_RLHE: Array) -> tuple[Array | None, ...]:
    q_RLHE, k_RLKE, v_RLKE, runs_R3L, out, normalizer = saved
    (rows, length, heads, width), keys = q_RLHE.shape, k_RLKE.shape[2]
    mean_slope = jnp.einsum("rlhe,rlhe->rhl", out, dout_RLHE, preferred_element_type=jnp.float32)
    given = q_RLHE, k_RLKE, v_RLKE, dout_RLHE, normalizer, mean_slope

    tiles = settings.tiles.keys
    block = _Blocks(length, tiles.keys, heads // keys, width)
    specs = block.group_queries, block.keys, block.keys, block.group_queries, *[block.group_normalizer] * 2
    visited = [(_visiting_queries(runs_R3L, tiles), block.last), (runs_R3L, block.all_runs)]
    dk, dv = _call(
        _keys_kernel,
        settings,
        tiles,
        grid=(length // tiles.keys, keys, rows),
        inputs=[*visited, *zip(given, specs, strict=True)],
        outputs=[(k_RLKE, block.keys), (v_RLKE, block.keys)],
    )
    tiles = settings.tiles.queries
    block = _Blocks(length, tiles.queries, heads // keys, width)
    specs = block.queries, block.all_keys, block.all_keys, block.queries, *[block.normalizer] * 2
    visited = [(_visited_keys(runs_R3L, tiles), block.ranges), (runs_R3L, block.runs)]
    [dq] = _call(
        _queries_kernel,
        settings,
        tiles,
        grid=(length // tiles.queries, heads, rows),
        inputs=[*visited, *zip(given, specs, strict=True)],
        outputs=[(q_RLHE, block.queries)],
    )
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward)


class _Blocks:
    """What a program of the grid (block, head, row) reads and writes of each array.

    Args:
      length: of rows.
      size: queries or keys of a block.
      group: query heads of a key head.
      width: E.
    """

    def __init__(self, length: int, size: int, group: int, width: int) -> None:
        of_block, of_row = lambda i, h, r: (r, 0, i), lambda i, h, r: (r, 0, 0)
        self.ranges = pl.BlockSpec((None, 4, None), of_block)
        self.last = pl.BlockSpec((None, 1), lambda i, h, r: (r, i))
        self.runs, self.all_runs = pl.BlockSpec((None, 3, size), of_block), pl.BlockSpec((None, 3, length), of_row)
        self.queries = self.keys = pl.BlockSpec((None, size, None, width), lambda i, h, r: (r, i, h, 0))
        self.all_keys = pl.BlockSpec((None, length, None, width), lambda i, h, r: (r, 0, h // group, 0))
        self.group_queries = pl.BlockSpec((None, length, group, width), lambda i, h, r: (r, 0, h, 0))
        self.normalizer = pl.BlockSpec((None, None, size), lambda i, h, r: (r, h, i))
        self.group_normalizer = pl.BlockSpec((None, group, length), lambda i, h, r: (r, h, 0))


def _call(
    kernel: Callable[..., None],
    settings: _Settings,
    tiles: Tiles,
    *,
    grid: tuple[int, int, int],
    inputs: list[tuple[Array, pl.BlockSpec]],
    outputs: list[tuple[Any, pl.BlockSpec]],
) -> list[Array]:
    call = pl.pallas_call(
        functools.partial(kernel, tiles=tiles, cap=settings.cap),
        grid=grid,
        in_specs=[spec for _, spec in inputs],
        out_specs=[spec for _, spec in outputs],
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a, _ in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=settings.interpret,
        name=kernel.__name__.strip("_"),
    )
    return call(*(a for a, _ in inputs))


def _visited_keys(runs_R3L: Array, tiles: Tiles) -> Array:
    """For each block of queries, two ranges of blocks of keys that it visits one after the other, int32 [R, 4, I].

    They hold the queries' prompts and their own segments; where these are not apart, all is in the second.
    """
    own_RL, low_RL, end_RL = runs_R3L[:, 0], runs_R3L[:, 1], runs_R3L[:, 2]
    prompt_first, prompt_end = block_ranges(low_RL, end_RL, tiles.queries, tiles.keys)
    first, end = block_ranges(own_RL, _past(own_RL), tiles.queries, tiles.keys)
    apart = prompt_end <= first
    last_prompt = jnp.where(apart, prompt_end, prompt_first)
    return jnp.stack(
        [prompt_first, last_prompt, jnp.where(apart, first, jnp.minimum(prompt_first, first)), end], axis=1
    )


def _visiting_queries(runs_R3L: Array, tiles: Tiles) -> Array:
    """For each block of keys, past the last block of queries that sees one of them, int32 [R, J]."""
    own_RL, low_RL, end_RL = runs_R3L[:, 0], runs_R3L[:, 1], runs_R3L[:, 2]
    prompts_RIJ = blocks_between(low_RL, end_RL, tiles.queries, tiles.keys)
    visited_RIJ = prompts_RIJ | blocks_between(own_RL, _past(own_RL), tiles.queries, tiles.keys)
    past_I = jnp.arange(1, visited_RIJ.shape[1] + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(visited_RIJ, past_I[None, :, None], 0), axis=1)


def _past(own_RL: Array) -> Array:
    """Past each token, where its own run ends."""
    return jnp.broadcast_to(jnp.arange(1, own_RL.shape[1] + 1, dtype=jnp.int32), own_RL.shape)


def _forward_kernel(
    ranges: Any, runs: Any, q: Any, k: Any, v: Any, out: Any, normalizer: Any, *, tiles: Tiles, cap: float | None
) -> None:
    queries_QE, runs_3Q, at_Q = q[...], _three(runs, slice(None)), _positions(pl.program_id(0), tiles.queries)

    def visit(j: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top_Q, total_Q, sum_QE = carry
        block = pl.ds(j * tiles.keys, tiles.keys)
        scores_QT = _LOG2E * soft_cap(_dot(queries_QE, k[block, :].T), cap)
        scores_QT = jnp.where(_sees(runs_3Q, at_Q, _positions(j, tiles.keys)), scores_QT, _UNSEEN)
        higher_Q = jnp.maximum(top_Q, jnp.max(scores_QT, axis=1))
        weights_QT, fade_Q = jnp.exp2(scores_QT - higher_Q[:, None]), jnp.exp2(top_Q - higher_Q)
        values_TE = v[block, :]
        sum_QE = fade_Q[:, None] * sum_QE + _dot(weights_QT.astype(values_TE.dtype), values_TE)
        return higher_Q, fade_Q * total_Q + jnp.sum(weights_QT, axis=1), sum_QE

    nothing = jnp.full(tiles.queries, _UNSEEN), jnp.zeros(tiles.queries), jnp.zeros(queries_QE.shape, jnp.float32)
    top_Q, total_Q, sum_QE = _visit_keys(ranges, visit, nothing)
    out[...] = (sum_QE / total_Q[:, None]).astype(out.dtype)
    normalizer[...] = top_Q + jnp.log2(total_Q)


def _queries_kernel(
    ranges: Any,
    runs: Any,
    q: Any,
    k: Any,
    v: Any,
    dout: Any,
    normalizer: Any,
    mean_slope: Any,
    dq: Any,
    *,
    tiles: Tiles,
    cap: float | None,
) -> None:
    runs_3Q, at_Q = _three(runs, slice(None)), _positions(pl.program_id(0), tiles.queries)
    given = q[...], dout[...], normalizer[...], mean_slope[...]

    def visit(j: Any, dq_QE: Array) -> Array:
        block = pl.ds(j * tiles.keys, tiles.keys)
        keys_TE = k[block, :]
        seen_QT = _sees(runs_3Q, at_Q, _positions(j, tiles.keys))
        _, dscores_QT = _pulled_back(*given, keys_TE, v[block, :], seen_QT, cap)
        return dq_QE + _dot(dscores_QT.astype(keys_TE.dtype), keys_TE)

    dq[...] = _visit_keys(ranges, visit, jnp.zeros(dq.shape, jnp.float32)).astype(dq.dtype)


def _keys_kernel(
    last: Any,
    runs: Any,
    q: Any,
    k: Any,
    v: Any,
    dout: Any,
    normalizer: Any,
    mean_slope: Any,
    dk: Any,
    dv: Any,
    *,
    tiles: Tiles,
    cap: float | None,
) -> None:
    j = pl.program_id(0)
    keys_TE, values_TE, at_T = k[...], v[...], _positions(j, tiles.keys)

    def visit(head: int, i: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        dk_TE, dv_TE = carry
        block = pl.ds(i * tiles.queries, tiles.queries)
        queries_QE, dout_QE = q[block, head, :], dout[block, head, :]
        seen_QT = _sees(_three(runs, block), _positions(i, tiles.queries), at_T)
        given = queries_QE, dout_QE, normalizer[head, block], mean_slope[head, block]
        weights_QT, dscores_QT = _pulled_back(*given, keys_TE, values_TE, seen_QT, cap)
        dv_TE += _dot(weights_QT.astype(dout_QE.dtype).T, dout_QE)
        return dk_TE + _dot(dscores_QT.astype(queries_QE.dtype).T, queries_QE), dv_TE

    carry = (jnp.zeros(dk.shape, jnp.float32),) * 2
    first = j * tiles.keys // tiles.queries
    for head in range(q.shape[1]):
        carry = jax.lax.fori_loop(first, last[0], functools.partial(visit, head), carry)
    dk[...], dv[...] = (a.astype(dk.dtype) for a in carry)


def _pulled_back(
    queries_QE: Array,
    dout_QE: Array,
    normalizer_Q: Array,
    mean_slope_Q: Array,
    keys_TE: Array,
    values_TE: Array,
    seen_QT: Array,
    cap: float | None,
) -> tuple[Array, Array]:
    """(weights, gradient of the scores before their cap), [Q, T]."""
    scores_QT = soft_cap(_dot(queries_QE, keys_TE.T), cap)
    weights_QT = jnp.where(seen_QT, jnp.exp2(_LOG2E * scores_QT - normalizer_Q[:, None]), 0.0)
    slope = 1.0 if cap is None else 1.0 - jnp.square(scores_QT / cap)
    return weights_QT, weights_QT * (_dot(dout_QE, values_TE.T) - mean_slope_Q[:, None]) * slope


def _visit_keys(ranges: Any, visit: Callable[[Any, Any], Any], carry: Any) -> Any:
    """``visit(j, carry)`` for each block of keys in two ranges."""
    carry = jax.lax.fori_loop(ranges[0], ranges[1], visit, carry)
    return jax.lax.fori_loop(ranges[2], ranges[3], visit, carry)


def _sees(runs_3Q: tuple[Array, Array, Array], at_Q: Array, at_T: Array) -> Array:
    """Which keys a query sees: of its own segment up to itself, and of its prompt; bool [Q, T]."""
    own, low, end = (a[:, None] for a in runs_3Q)
    query, key = at_Q[:, None], at_T[None]
    return ((key >= own) & (key <= query)) | ((key >= low) & (key < end))


def _three(runs: Any, block: Any) -> tuple[Array, Array, Array]:
    return runs[0, block], runs[1, block], runs[2, block]


def _positions(i: Any, size: int) -> Array:
    return i * size + jnp.arange(size, dtype=jnp.int32)


def _dot(a: Array, b: Array) -> Array:
    """In fp32; operands of fp32 are not rounded to tf32."""
    return plgpu.dot(a, b, allow_tf32=False) if a.dtype == jnp.float32 else plgpu.dot(a, b)


def _multiple(tiles: Kernels) -> int:
    """Rows are padded to a multiple of every block."""
    return max(max(tile.queries, tile.keys) for tile in tiles)
