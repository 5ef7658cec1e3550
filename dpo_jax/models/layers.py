"""Pieces that the model families share: who sees whom, attention, products and norms."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from dpo_jax import lora
from dpo_jax.models.config import DecoderConfig
from dpo_jax.sharding import PARAMETERS, constrain
from dpo_jax.types import Array

_BLOCK = 64  # slots of a cache's keys that lie together: the stride between a key's numbers slows CPUs down 2.5 times
_ALIGNED = 16  # slots come in as many: products read rows of fp32 from where lines of 64 bytes begin


@struct.dataclass
class Cache:
    """Keys and values of the tokens seen so far, in the model's compute dtype.

    They lie as products read them: scores run over a key's slots, of which as many lie side by side as a processor adds
    up at once, and sums over a value's size. Each layer's lie in an array of its own: on CPUs a part of an array is a
    copy, made anew for every token.

    Attributes:
      key: for each layer [R, K, B, E, T/B], T slots in B blocks; of one layer, this array alone.
      value: for each layer [R, K, T, E].
      position: int32 [R, T], the position of each slot's token; None in a single layer's part.
    """

    key: Any
    value: Any
    position: Array | None = None


def training_mask(group_RL: Array, branch_RL: Array) -> Array:
    """Who attends to whom in a row, bool [R, L, L]: [r, query, key].

    A query sees a key iff both belong to the same group (≠ 0), the key is not later, and the key is of the prompt
    (branch 0) or of the query's own branch.
    """
    length = group_RL.shape[1]
    causal_LL = jnp.tril(jnp.ones((length, length), bool))
    same_group = group_RL[:, :, None] == group_RL[:, None, :]
    visible = (branch_RL[:, None, :] == 0) | (branch_RL[:, :, None] == branch_RL[:, None, :])
    real = (group_RL != 0)[:, None, :]
    return causal_LL[None] & same_group & visible & real


def soft_cap(x: Array, cap: float | None) -> Array:
    """cap · tanh(x / cap); None leaves x alone."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def empty_cache(layers: int, rows: int, slots: int, heads: int, size: int, dtype: Any) -> Cache:
    """A cache of zeros for at least ``slots`` tokens a row: blocks are whole, and begin where lines of memory do."""
    block = min(_BLOCK, -(-slots // _ALIGNED) * _ALIGNED)
    blocks = -(-slots // block)
    key = jnp.zeros((rows, heads, blocks, size, block), dtype)
    value = jnp.zeros((rows, heads, blocks * block, size), dtype)
    return Cache((key,) * layers, (value,) * layers, jnp.zeros((rows, blocks * block), jnp.int32))


def extend(cache: Cache, k_R1KE: Array, v_R1KE: Array, slot: Array | int) -> Cache:
    """Writes the key and value of one layer's new token into a slot."""
    block = cache.key.shape[4]
    key = jax.lax.dynamic_update_slice(
        cache.key, k_R1KE.swapaxes(1, 2)[..., None], (0, 0, slot // block, 0, slot % block)
    )
    return Cache(key, jax.lax.dynamic_update_slice_in_dim(cache.value, v_R1KE.swapaxes(1, 2), slot, 2))


def attend(q_RQHE: Array, mask_RQT: Array, cache: Cache, *, scale: float, cap: float | None = None) -> Array:
    """Softmax attention to a cache; grouped key/value heads, softmax in fp32 whatever the operands.

    A query that sees nothing (padding) gets the mean of the values, which nobody reads.

    Args:
      q_RQHE: queries, H a multiple of the cache's K.
      mask_RQT: bool, which of the cache's slots a query sees.
      cache: one layer's keys and values.
      scale: what multiplies q·k.
      cap: of ``soft_cap`` for the scores.

    Returns:
      [R, Q, H, E] in the dtype of the queries.
    """
    rows, queries, heads, size = q_RQHE.shape
    groups, slots = cache.value.shape[1:3]
    q_RQKGE = (q_RQHE * scale).reshape(rows, queries, groups, heads // groups, size)
    wide = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    q_RKGQE = q_RQKGE.transpose(0, 2, 3, 1, 4)
    q_RKBGQE = jnp.broadcast_to(q_RKGQE[:, :, None], (*cache.key.shape[:3], *q_RKGQE.shape[2:]))
    scores_RKGQBT = wide("rkbgqe,rkbet->rkbgqt", q_RKBGQE, cache.key).transpose(0, 1, 3, 4, 2, 5)
    scores = soft_cap(scores_RKGQBT.reshape(*q_RKGQE.shape[:4], slots), cap)
    masked = jnp.where(mask_RQT[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(masked, axis=-1).astype(q_RQHE.dtype)
    out_RKGQE = wide("rkgqt,rkte->rkgqe", weights, cache.value).astype(q_RQHE.dtype)
    return out_RKGQE.transpose(0, 3, 1, 2, 4).reshape(rows, queries, heads, size)


def project(hidden: Array, head_VD: Array, cap: float | None) -> Array:
    """fp32 logits [..., V] of hidden states [..., D]."""
    # Of more than two dimensions, they would make CPUs copy the head into transposed order before a loop over chunks.
    hidden_TD = hidden.reshape(-1, hidden.shape[-1])
    logits_TV = _contract(hidden_TD, head_VD.astype(hidden.dtype), 1, 1)
    return soft_cap(logits_TV.reshape(*hidden.shape[:-1], -1), cap)


def from_bits(parameter: Array, dtype: Any) -> Array:
    """A parameter ``as_read``, which lies as bits of half precision; others as they are."""
    return jax.lax.bitcast_convert_type(parameter, dtype) if parameter.dtype == jnp.uint16 else parameter


def product(x: Array, kernel: Array, dtype: Any) -> Array:
    """x @ kernel with operands of ``dtype``, summed in fp32, forward and backward."""
    return _product(x.astype(dtype), kernel)


@jax.custom_vjp
def _product(x: Array, kernel: Array) -> Array:
    return _rounded_contract(x, kernel.astype(x.dtype), -1, 0)


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel), (x, kernel)


def _product_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    # Left to itself, the backward pass multiplies an fp32 cotangent by a half-precision matrix in fp32; and on CPUs
    # copies cotangents into transposed order, which takes longer than the products save by it.
    x, kernel = saved
    cotangent = cotangent.astype(x.dtype)
    dx = _rounded_contract(cotangent, kernel.astype(x.dtype), -1, 1)
    rows, columns = x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
    return dx, outer_sum(rows, columns).astype(kernel.dtype)


def outer_sum(rows_TD: Array, columns_TF: Array) -> Array:
    """Σ_t rows_t ⊗ columns_t in fp32, [D, F]: what a gradient of a matrix is."""

    def transposed_first(rows_TD: Array, columns_TF: Array) -> Array:
        return _contract(with_layout_constraint(rows_TD.T, Layout((0, 1))), columns_TF, 1, 0)

    def plain(rows_TD: Array, columns_TF: Array) -> Array:
        return _contract(rows_TD, columns_TF, 0, 0)

    if jnp.dtype(rows_TD.dtype).itemsize > 2:
        return plain(rows_TD, columns_TF)
    # CPUs multiply half-precision matrices half as fast when one is to be read in transposed order.
    return jax.lax.platform_dependent(rows_TD, columns_TF, cpu=transposed_first, default=plain)


def _rounded_contract(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """Summed in fp32 and rounded once, to the operands' dtype."""

    def by_library(a: Array, b: Array) -> Array:
        return _contract(a, b, axis_a, axis_b, a.dtype)

    def by_compiler(a: Array, b: Array) -> Array:
        return _contract(a, b, axis_a, axis_b).astype(a.dtype)

    # GPUs' libraries sum half-precision products in fp32 whatever they return; asked for fp32, they write it to memory.
    return jax.lax.platform_dependent(a, b, cuda=by_library, default=by_compiler)


def _contract(a: Array, b: Array, axis_a: int, axis_b: int, dtype: Any = jnp.float32) -> Array:
    axes = (((axis_a % a.ndim,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=dtype)


_product.defvjp(_product_forward, _product_backward)


def named(x: Array, name: str) -> Array:
    """x, which layers may keep for the backward pass under this name; where no derivative is taken through it.

    Half precision is kept as bits: CPUs widen such numbers, all layers' of them, to write one layer's among them.
    """
    if jnp.dtype(x.dtype).itemsize > 2:
        return checkpoint_name(x, name)
    return jax.lax.bitcast_convert_type(checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.uint16), name), x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def keepable(x: Array, name: str) -> Array:
    """x, which layers may keep for the backward pass under this name."""
    return named(x, name)


keepable.defvjp(lambda x, name: (named(x, name), None), lambda name, _, cotangent: (cotangent,))


def take_rows(table_ND: Array, index: Array) -> Array:
    """``table[index]``, whose gradient is summed in the same order every time: GPUs' scatters add as threads come.

    Args:
      table_ND: rows.
      index: int32, any shape.
    """
    return _take_rows(table_ND, jnp.asarray(index), table_ND.shape[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _take_rows(table_ND: Array, index: Array, count: int) -> Array:
    return jnp.asarray(table_ND)[index]


def _take_rows_forward(table_ND: Array, index: Array, count: int) -> tuple[Array, Array]:
    return _take_rows(table_ND, index, count), index


def _take_rows_backward(count: int, index: Array, cotangent: Array) -> tuple[Array, None]:
    add = functools.partial(add_rows_in_order, count=count)
    return jax.lax.platform_dependent(
        cotangent, index, cuda=add, default=functools.partial(_add_rows, count=count)
    ), None


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)


def _add_rows(values: Array, index: Array, count: int) -> Array:
    return jnp.zeros((count, values.shape[-1]), values.dtype).at[index].add(values)


def add_rows_in_order(values: Array, index: Array, count: int, chunk: int = 512) -> Array:
    """Σ of the values of each index, [count, D], in a fixed order: chunk after chunk, and in each by a product.

    Args:
      values: [..., D].
      index: int32 [...], which row a value is added to.
      count: of rows.
      chunk: values that are added at a time.
    """
    width, total = values.shape[-1], index.size
    chunks = -(-total // chunk)
    missing = chunks * chunk - total
    values_TCD = jnp.pad(values.reshape(total, width), ((0, missing), (0, 0))).reshape(chunks, chunk, width)
    index_TC = jnp.pad(index.reshape(total), (0, missing), constant_values=count).reshape(chunks, chunk)
    place_C = jnp.arange(chunk, dtype=jnp.int32)

    def add(sums_ND: Any, part: Any) -> tuple[Any, None]:
        values_CD, index_C = part
        same_CC = index_C[:, None] == index_C[None]
        totals_CD = jnp.dot(
            same_CC.astype(values.dtype), values_CD, precision="highest", preferred_element_type=jnp.float32
        )
        # Only the first of equal ones is added, so that no two write to one row; the others lie outside.
        first_C = (jnp.argmax(same_CC, axis=1) == place_C) & (index_C < count)
        row_C = jnp.where(first_C, index_C, count + place_C)
        sums_ND = sums_ND.at[row_C].add(totals_CD.astype(values.dtype), mode="drop", unique_indices=True)
        return sums_ND, None

    return jax.lax.scan(add, jnp.zeros((count, width), values.dtype), (values_TCD, index_TC))[0]


class Dense(nn.Module):
    """x W + b, with logical axis names on W; layers that write to the residual stream start 1/√(2N) smaller.

    With an adapter in the config whose layers are this one's, x W + b + (α/r)·(x A) B. A's input passes through dropout
    wherever there is a random stream of that name.
    """

    config: DecoderConfig
    features: int
    axes: tuple[str, str]
    bias: bool = True
    residual: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        init = nn.initializers.normal(0.02 / (2 * c.layers) ** 0.5 if self.residual else 0.02)
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.with_logical_partitioning(init, self.axes), shape, c.param_dtype)
        kernel = constrain(from_bits(kernel, c.dtype), *self.axes, rules=PARAMETERS)
        y = product(x, kernel, c.dtype)
        if c.adapter is not None and c.adapter.matches("/".join(self.path)):
            y += self._low_rank(x, c.adapter)
        y = keepable(constrain(y, "rows", *[None] * (x.ndim - 2), self.axes[1]), "/".join(self.path[1:]))
        if not self.bias:
            return y
        zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[1:])
        bias = constrain(self.param("bias", zeros, (self.features,), c.param_dtype), self.axes[1])
        return y + jax.lax.expand_dims(bias.astype(c.dtype), range(x.ndim - 1))

    def _low_rank(self, x: Array, adapter: lora.Adapter) -> Array:
        dtype = self.config.dtype
        init_a = nn.with_logical_partitioning(lora.init_a, (self.axes[0], None))
        init_b = nn.with_logical_partitioning(nn.initializers.zeros_init(), (None, self.axes[1]))
        # fp32 whatever the base's dtype: they are small, and small updates must not round away.
        a = self.param(lora.A, init_a, (x.shape[-1], adapter.rank), jnp.float32)
        b = self.param(lora.B, init_b, (adapter.rank, self.features), jnp.float32)
        if adapter.dropout and self.has_rng("dropout"):
            x = nn.Dropout(adapter.dropout, deterministic=False)(x)
        return adapter.scale * product(product(x, a, dtype), b, dtype)


class LayerNorm(nn.Module):
    """Mean and variance over the width, in fp32."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        norm = nn.LayerNorm(
            epsilon=self.config.norm_epsilon,
            dtype=jnp.float32,
            param_dtype=self.config.param_dtype,
            scale_init=nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",)),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), ("norm",)),
            name="norm",
        )
        return norm(x).astype(self.config.dtype)


class RmsNorm(nn.Module):
    """x / √(mean(x²) + ε) · scale over the last axis of [R, Q, …, D], in fp32 (arXiv 1910.07467)."""

    config: DecoderConfig
    axis: str | None = "norm"
    offset = 0.0  # added to the stored scale

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        init = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", nn.with_logical_partitioning(init, (self.axis,)), x.shape[-1:], c.param_dtype)
        # Where there is one row, CPUs take 20 times as long for the gradient's sums over [1, Q, D] as over [Q, D].
        wide = x.reshape(-1, *x.shape[2:]).astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + c.norm_epsilon)
        weight = self.offset + scale.astype(jnp.float32)
        return (normed * jax.lax.expand_dims(weight, range(wide.ndim - 1))).astype(c.dtype).reshape(x.shape)


class UnitRmsNorm(RmsNorm):
    """Gemma's: the scale is stored as its distance from 1."""

    offset = 1.0
