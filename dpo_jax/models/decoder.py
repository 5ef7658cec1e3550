"""The body of every family: embeddings, a scan over layers of one shape, a final norm and the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dpo_jax.models.config import REMAT, DecoderConfig
from dpo_jax.models.flash import flash
from dpo_jax.models.layers import Cache, Dense, attend, empty_cache, extend, from_bits, take_rows
from dpo_jax.models.rope import rotate
from dpo_jax.models.sight import Sight, Spans, find_spans
from dpo_jax.models.splash import splash
from dpo_jax.models.triton import triton
from dpo_jax.sharding import PARAMETERS, constrain
from dpo_jax.types import Array


@struct.dataclass
class Layer:
    """What differs between layers beside their parameters.

    Attributes:
      window: int32, how many of the latest positions are seen; None when no layer has a window.
      rope: int32, which rotary embedding; None when all have the same.
    """

    window: Array | None
    rope: Array | None


@struct.dataclass
class Context:
    """What all layers share.

    Attributes:
      sight: which keys a token sees: bool [R, Q, T], those of its row, or of the cache; or its Spans.
      distance_RQT: int32, how many positions the key is back; None when no layer has a window.
      cos: float32 [ropes, R, Q, E'/2]; None without rotary embeddings.
      sin: the same.
      slot: of the cache, the token's; None where rows are whole.
    """

    sight: Array | Spans
    distance_RQT: Array | None
    cos: Array | None
    sin: Array | None
    slot: Array | int | None

    def seen(self, layer: Layer) -> Array:
        """bool [R, Q, T], which keys a token sees in a layer; of a context without Spans."""
        assert not isinstance(self.sight, Spans)
        if self.distance_RQT is None or layer.window is None:
            return self.sight
        return self.sight & (self.distance_RQT < layer.window)

    def turn(self, x_RQHE: Array, layer: Layer) -> Array:
        """Queries or keys with the layer's rotary embedding."""
        if self.cos is None or self.sin is None:
            return x_RQHE
        index = 0 if layer.rope is None else layer.rope
        return rotate(x_RQHE, self.cos[index], self.sin[index])


class Decoder(nn.Module):
    """Tokens to hidden states; the head is applied by whoever needs logits, only where needed.

    A family names its layer (``block``) and final norm (``norm``), and may change ``embed``.
    """

    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        self.token_embedding = self.table("token_embedding", ("vocab", "embed"), c.vocab_size)
        if not c.tied_head:
            self.head_matrix = self.table("head", ("vocab", "embed"), c.vocab_size)
        block = self.block
        kept = REMAT[c.remat]
        if kept is not None:
            block = nn.remat(block, policy=jax.checkpoint_policies.save_only_these_names(*kept), prevent_cse=False)
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, 0, nn.broadcast),
            length=c.layers,
            unroll=c.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
            # Tracing the layer once more would find no broken invariant, but initial parameters are drawn so.
            check_constancy_invariants=self.is_initializing(),
        )
        self.blocks = blocks(c)
        self.final_norm = self.norm(c)

    def table(self, name: str, axes: tuple[str | None, str], rows: int) -> Array:
        """A parameter of ``rows`` vectors of the model's width."""
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)
        values = self.param(name, init, (rows, self.config.width), self.config.param_dtype)
        return constrain(values, *axes, rules=PARAMETERS)

    def __call__(self, tokens_RL: Array, position_RL: Array, mask_RLL: Array | Sight) -> Array:
        """Hidden states [R, L, D] of whole rows, after the final norm.

        Args:
          tokens_RL: int32.
          position_RL: int32, each below ``context_length``.
          mask_RLL: bool, which tokens of its row a token sees; or a Sight, which a kernel reads in its place.
        """
        return self._read(tokens_RL, position_RL, mask_RLL, None)[0]

    def read(self, tokens_RL: Array, position_RL: Array, mask_RLL: Array) -> tuple[Array, Array, Array]:
        """Of whole rows, (hidden [R, L, D], keys [N, R, K, L, E], values of the same shape)."""
        none = jnp.zeros((self.config.layers, 0))  # a layer that is given a cache gives its keys and values
        hidden, cache = self._read(tokens_RL, position_RL, mask_RLL, Cache(none, none))
        return hidden, cache.key, cache.value

    def prepare(self, position_R1: Array, mask_R1T: Array, cache: Cache, slot: Array | int) -> tuple[Cache, Context]:
        """What ``follow`` needs to read the next token of each row, which need not be known yet.

        In a loop over tokens this belongs to the turn before: else XLA computes it in each layer anew, cosines and all.

        Args:
          position_R1: int32, each below ``context_length``.
          mask_R1T: bool, which slots of the cache the token sees, its own among them.
          cache: keys and values of earlier tokens.
          slot: of the cache, the one for this token.

        Returns:
          (the cache with the token's position in it, what all layers share).
        """
        position_RT = jax.lax.dynamic_update_slice_in_dim(jnp.asarray(cache.position), position_R1, slot, 1)
        context = self._context(position_R1, position_RT, mask_R1T, self._layers(None), slot)
        return Cache(cache.key, cache.value, position_RT), context

    def follow(self, tokens_R1: Array, position_R1: Array, cache: Cache, context: Context) -> tuple[Array, Cache]:
        """(hidden states [R, 1, D] of the next tokens, the cache with them in it), of what ``prepare`` has given."""
        layers, x_R1D = self._layers(None), self._embedded(tokens_R1, position_R1)
        x_R1D, stacked = self.blocks(x_R1D, _stacked(cache), layers, context)
        return self._normed(x_R1D), Cache(tuple(stacked.key), tuple(stacked.value), cache.position)

    def _read(self, tokens_RL: Array, position_RL: Array, sight: Array | Sight, cache: Cache | None) -> tuple:
        layers = self._layers(tokens_RL.shape[1])
        context = self._context(position_RL, position_RL, sight, layers)
        x_RLD, cache = self.blocks(self._embedded(tokens_RL, position_RL), cache, layers, context)
        return self._normed(x_RLD), cache

    def _embedded(self, tokens_RQ: Array, position_RQ: Array) -> Array:
        return constrain(self.embed(tokens_RQ, position_RQ).astype(self.config.dtype), "rows", None, "embed")

    def _normed(self, x_RQD: Array) -> Array:
        return self.final_norm(x_RQD).astype(self.config.output_dtype or self.config.dtype)

    def embed(self, tokens_RQ: Array, position_RQ: Array) -> Array:
        """What the first layer reads, [R, Q, D]."""
        return from_bits(look_up(self.token_embedding, tokens_RQ), self.config.dtype)

    def head(self) -> Array:
        """The output matrix [V, D]: logits = hidden · headᵀ, soft-capped where ``logit_cap`` is not None."""
        return from_bits(self.token_embedding if self.config.tied_head else self.head_matrix, self.config.dtype)

    @property
    def rounded(self) -> set[str]:
        """Last names of the parameters that are read in the compute dtype alone."""
        c, names = self.config, {"kernel", "token_embedding", "head"}
        wide = jnp.dtype(c.output_dtype or c.dtype) != jnp.dtype(c.dtype)  # as the head is then
        return names - {"token_embedding" if c.tied_head else "head"} if wide else names

    @property
    def logit_cap(self) -> float | None:
        return self.config.logit_cap

    def empty_cache(self, rows: int, slots: int) -> Cache:
        """A cache for at least ``slots`` tokens a row."""
        c = self.config
        return empty_cache(c.layers, rows, slots, c.key_heads, c.size, c.dtype)

    def _context(
        self,
        position_RQ: Array,
        key_position_RT: Array,
        sight: Array | Sight,
        layers: Layer,
        slot: Array | int | None = None,
    ) -> Context:
        c = self.config
        distances = layers.window is not None and not isinstance(sight, Sight)
        distance = position_RQ[:, :, None] - key_position_RT[:, None, :] if distances else None
        angles = [rope.angles(position_RQ, c.size) for rope in c.ropes]
        cos, sin = (jnp.stack(part) for part in zip(*angles, strict=True)) if angles else (None, None)
        return Context(find_spans(sight) if isinstance(sight, Sight) else sight, distance, cos, sin, slot)

    def _layers(self, length: int | None) -> Layer:
        """[N] entries, for sequences of at most ``length`` tokens."""
        c = self.config
        everything = np.iinfo(np.int32).max if length is None else length
        all_windows = [w or everything for w in c.windows or ()]
        windows = all_windows if any(w < everything for w in all_windows) else None
        ropes = list(c.rope_of_layer) if len(c.ropes) > 1 else None
        return Layer(*(None if entries is None else jnp.asarray(entries, jnp.int32) for entries in (windows, ropes)))


def _stacked(cache: Cache) -> Cache:
    """Keys and values with a dimension of layers, for a scan over them: no copy where the scan is unrolled."""
    return Cache(jnp.stack(cache.key), jnp.stack(cache.value))


def look_up(table: Array, index_RQ: Array, axis: str | None = "vocab") -> Array:
    """Rows of a table, [R, Q, D]. A table that is split by width is gathered first; ``axis`` names its rows."""
    return take_rows(constrain(table, axis, "embed"), index_RQ)


class Attention(nn.Module):
    """Grouped-query self-attention with separate query, key and value matrices, a cache, and what a family asks for.

    Args:
      config: sizes.
      head_norm: makes the norm of each query and key head; None for families without.
    """

    config: DecoderConfig
    head_norm: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(self, x_RQD: Array, cache: Cache | None, layer: Layer, context: Context) -> tuple[Array, Cache | None]:
        c = self.config

        def heads(name: str, axis: str, count: int) -> Array:
            y = Dense(c, count * c.size, ("embed", axis), bias=c.qkv_bias, name=name)(x_RQD)
            return y.reshape(*y.shape[:2], count, c.size)

        q, k = heads("query", "heads", c.heads), heads("key", "kv_heads", c.key_heads)
        v = heads("value", "kv_heads", c.key_heads)
        if self.head_norm is not None:
            q = self.head_norm(c, axis=None, name="query_norm")(q)
            k = self.head_norm(c, axis=None, name="key_norm")(k)
        attended, cache = attend_and_keep(c, q, k, v, cache, layer, context)
        return Dense(c, c.width, ("heads", "embed"), bias=c.out_bias, residual=True, name="out")(attended), cache


def attend_and_keep(
    config: DecoderConfig, q: Array, k: Array, v: Array, cache: Cache | None, layer: Layer, context: Context
) -> tuple[Array, Cache | None]:
    """Rotates queries and keys, attends, and keeps keys and values where there is a cache.

    Returns:
      (what the heads saw side by side [R, Q, H·E], the cache with this token in it; of whole rows, theirs alone, both
      [R, K, L, E]).
    """
    q, k = context.turn(q, layer), context.turn(k, layer)
    if cache is None or context.slot is None:
        out = _attend_row(config, q, k, v, layer, context)
        cache = None if cache is None else Cache(k.swapaxes(1, 2), v.swapaxes(1, 2))
    else:
        cache = extend(cache, k, v, context.slot)
        out = attend(q, context.seen(layer), cache, scale=config.score_scale, cap=config.attention_cap)
    return out.reshape(*out.shape[:2], -1), cache


def _attend_row(config: DecoderConfig, q: Array, k: Array, v: Array, layer: Layer, context: Context) -> Array:
    scale, cap, sight = config.score_scale, config.attention_cap, context.sight
    if not isinstance(sight, Spans):
        return flash(q, k, v, context.seen(layer), scale=scale, cap=cap)
    if config.attention == "cudnn":  # of rows that hold one sequence: padding comes after it, and sees what it likes
        return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")
    if config.attention == "triton":
        return triton(q, k, v, sight, window=layer.window, scale=scale, cap=cap)
    interpret = config.attention == "interpreted"
    return splash(q, k, v, sight, window=layer.window, scale=scale, cap=cap, interpret=interpret)


class Mlp(nn.Module):
    """activation(x W_in) W_out; all between the products in fp32, rounded once."""

    config: DecoderConfig
    activation: Callable[[Any], Any]

    @nn.compact
    def __call__(self, x_RQD: Array) -> Array:
        c = self.config
        h_RQF = Dense(c, c.mlp_width, ("embed", "mlp"), bias=c.mlp_bias, name="in")(x_RQD)
        h_RQF = self.activation(h_RQF.astype(jnp.float32))
        return Dense(c, c.width, ("mlp", "embed"), bias=c.mlp_bias, residual=True, name="out")(h_RQF)


class GatedMlp(nn.Module):
    """(activation(x W_gate) · x W_up) W_down (arXiv 2002.05202); all between the products in fp32, rounded once."""

    config: DecoderConfig
    activation: Callable[[Any], Any]

    @nn.compact
    def __call__(self, x_RQD: Array) -> Array:
        c = self.config
        gate = Dense(c, c.mlp_width, ("embed", "mlp"), bias=c.mlp_bias, name="gate")(x_RQD)
        up = Dense(c, c.mlp_width, ("embed", "mlp"), bias=c.mlp_bias, name="up")(x_RQD)
        down = Dense(c, c.width, ("mlp", "embed"), bias=c.mlp_bias, residual=True, name="down")
        return down(self.activation(gate.astype(jnp.float32)) * up)
