"""GPT-2 (Radford et al. 2019): pre-norm decoder with learned positions, GELU MLP, biases and a tied head."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.models.config import INPUT, DecoderConfig
from dpo_jax.models.decoder import Context, Decoder, Layer, attend_and_keep, look_up
from dpo_jax.models.layers import Cache, Dense, LayerNorm, keepable
from dpo_jax.types import Array


@dataclass(frozen=True, kw_only=True)
class Gpt2Config(DecoderConfig):
    """A GPT-2; ``context_length`` is how many positions have embeddings."""

    tied_head: bool = True
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True


class Block(nn.Module):
    """Attention and MLP, each on the normed stream and added to it."""

    config: Gpt2Config

    @nn.compact
    def __call__(self, x_RQD: Array, cache: Cache | None, layer: Layer, context: Context) -> tuple[Array, Cache | None]:
        c = self.config
        x_RQD = keepable(x_RQD, INPUT)
        h_RQD = LayerNorm(c, name="attention_norm")(x_RQD)
        qkv = Dense(c, 3 * c.width, ("embed", "heads"), name="qkv")(h_RQD)
        q, k, v = (a.reshape(*a.shape[:2], c.heads, -1) for a in jnp.split(qkv, 3, axis=-1))
        attended, cache = attend_and_keep(c, q, k, v, cache, layer, context)
        x_RQD += Dense(c, c.width, ("heads", "embed"), residual=True, name="attention_out")(attended)
        h_RQD = LayerNorm(c, name="mlp_norm")(x_RQD)
        h_RQF = Dense(c, c.mlp_width, ("embed", "mlp"), name="mlp_in")(h_RQD).astype(jnp.float32)
        h_RQF = jax.nn.gelu(h_RQF, approximate=True)  # in fp32, rounded once
        return x_RQD + Dense(c, c.width, ("mlp", "embed"), residual=True, name="mlp_out")(h_RQF), cache


class Gpt2(Decoder):
    """The family; its learned positions are added to the token embeddings."""

    block, norm = Block, LayerNorm

    def setup(self) -> None:
        super().setup()
        self.position_embedding = self.table("position_embedding", (None, "embed"), self.config.context_length)

    def embed(self, tokens_RQ: Array, position_RQ: Array) -> Array:
        position_RQD = look_up(self.position_embedding, position_RQ, None)
        return look_up(self.token_embedding, tokens_RQ) + position_RQD

    @property
    def rounded(self) -> set[str]:
        return super().rounded - {"token_embedding"}  # whose sum with a position's is rounded
