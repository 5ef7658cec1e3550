"""GPT-2 (Radford et al. 2019): pre-norm decoder with learned positions, GELU MLP, biases and a tied head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.models.layers import Cache, append, attend
from dpo_jax.types import Array


@dataclass(frozen=True)
class Gpt2Config:
    """Sizes of a GPT-2.

    Attributes:
      vocab_size: V.
      context_length: positions that the model has embeddings for, tokens.
      width: D.
      layers: N.
      heads: H; D must be a multiple.
      mlp_width: F.
      norm_epsilon: added to the variance in layer norms.
      dtype: of activations and matrix products; parameters are made in fp32.
      unroll: layers of the scan that are compiled side by side; a divisor of N.
    """

    vocab_size: int
    context_length: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    norm_epsilon: float = 1e-5
    dtype: Any = jnp.float32
    unroll: int = 1


class Gpt2(nn.Module):
    """Tokens to hidden states; the head is applied by whoever needs logits, only where needed."""

    config: Gpt2Config

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(0.02)
        self.token_embedding = self.param(
            "token_embedding", nn.with_logical_partitioning(init, ("vocab", "embed")), (c.vocab_size, c.width)
        )
        self.position_embedding = self.param(
            "position_embedding", nn.with_logical_partitioning(init, (None, "embed")), (c.context_length, c.width)
        )
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=c.layers,
            unroll=c.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        self.blocks = blocks(c)
        self.final_norm = LayerNorm(c)

    def __call__(
        self, tokens_RQ: Array, position_RQ: Array, mask_RQT: Array, cache: Cache | None = None, start: Array | int = 0
    ) -> tuple[Array, Cache | None]:
        """Hidden states of Q tokens a row.

        Args:
          tokens_RQ: int32.
          position_RQ: int32, each below ``context_length``.
          mask_RQT: bool, which of the T keys a token sees: those of its row (T = Q), or the slots of the cache.
          cache: keys and values of earlier tokens; None when the row is whole.
          start: cache slot of the first of these tokens.

        Returns:
          (hidden [R, Q, D] after the final norm, the cache with these tokens in it).
        """
        x_RQD = self.token_embedding[tokens_RQ] + self.position_embedding[position_RQ]
        x_RQD, cache = self.blocks(x_RQD.astype(self.config.dtype), cache, mask_RQT, start)
        return self.final_norm(x_RQD), cache

    def head(self) -> Array:
        """The output matrix [V, D]: logits = hidden · headᵀ. Tied to the token embedding."""
        return self.token_embedding

    def empty_cache(self, rows: int, slots: int) -> Cache:
        """A cache for ``slots`` tokens a row."""
        c = self.config
        shape = (c.layers, rows, slots, c.heads, c.width // c.heads)
        return Cache(jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype))


class Block(nn.Module):
    """Attention and MLP, each on the normed stream and added to it."""

    config: Gpt2Config

    @nn.compact
    def __call__(
        self, x_RQD: Array, cache: Cache | None, mask_RQT: Array, start: Array | int
    ) -> tuple[Array, Cache | None]:
        c = self.config
        h_RQD = LayerNorm(c, name="attention_norm")(x_RQD)
        qkv = Dense(c, 3 * c.width, ("embed", "heads"), name="qkv")(h_RQD)
        q, k, v = (a.reshape(*a.shape[:2], c.heads, -1) for a in jnp.split(qkv, 3, axis=-1))
        if cache is not None:
            k, v = append(cache.key, k, start), append(cache.value, v, start)
            cache = Cache(k, v)
        attended = attend(q, k, v, mask_RQT).reshape(x_RQD.shape)
        x_RQD += Dense(c, c.width, ("heads", "embed"), residual=True, name="attention_out")(attended)
        h_RQD = LayerNorm(c, name="mlp_norm")(x_RQD)
        h_RQF = jax.nn.gelu(Dense(c, c.mlp_width, ("embed", "mlp"), name="mlp_in")(h_RQD), approximate=True)
        return x_RQD + Dense(c, c.width, ("mlp", "embed"), residual=True, name="mlp_out")(h_RQF), cache


class Dense(nn.Module):
    """x W + b, with logical axis names on W; layers that write to the residual stream start 1/√(2N) smaller."""

    config: Gpt2Config
    features: int
    axes: tuple[str, str]
    residual: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        scale = 0.02 / (2 * c.layers) ** 0.5 if self.residual else 0.02
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(nn.initializers.normal(scale), self.axes),
            (x.shape[-1], self.features),
        )
        bias = self.param(
            "bias", nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[1:]), (self.features,)
        )
        return jax.lax.expand_dims(bias.astype(c.dtype), range(x.ndim - 1)) + x @ kernel.astype(c.dtype)


class LayerNorm(nn.Module):
    """Mean and variance over the width, in fp32."""

    config: Gpt2Config

    @nn.compact
    def __call__(self, x: Array) -> Array:
        norm = nn.LayerNorm(
            epsilon=self.config.norm_epsilon,
            dtype=jnp.float32,
            scale_init=nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",)),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), ("embed",)),
            name="norm",
        )
        return norm(x).astype(self.config.dtype)
