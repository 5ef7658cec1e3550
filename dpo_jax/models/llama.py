"""Llama 2 and 3 (arXiv 2302.13971, 2407.21783) and SmolLM2: RMS norms, rotary positions, grouped keys, a gated MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax

from dpo_jax.models.config import INPUT, DecoderConfig
from dpo_jax.models.decoder import Attention, Context, Decoder, GatedMlp, Layer
from dpo_jax.models.layers import Cache, RmsNorm, keepable
from dpo_jax.models.rope import Rope
from dpo_jax.types import Array


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """A Llama."""

    ropes: tuple[Rope, ...] = (Rope(),)


class Block(nn.Module):
    """Attention and MLP, each on the normed stream and added to it."""

    config: DecoderConfig
    head_norm: ClassVar[type[nn.Module] | None] = None

    @nn.compact
    def __call__(self, x_RQD: Array, cache: Cache | None, layer: Layer, context: Context) -> tuple[Array, Cache | None]:
        c = self.config
        x_RQD = keepable(x_RQD, INPUT)
        h_RQD = RmsNorm(c, name="attention_norm")(x_RQD)
        h_RQD, cache = Attention(c, self.head_norm, name="attention")(h_RQD, cache, layer, context)
        x_RQD += h_RQD
        return x_RQD + GatedMlp(c, jax.nn.silu, name="mlp")(RmsNorm(c, name="mlp_norm")(x_RQD)), cache


class Llama(Decoder):
    """The family."""

    block, norm = Block, RmsNorm
