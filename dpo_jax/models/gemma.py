"""Gemma 2 (arXiv 2408.00118) and 3 (2503.19786), text only: norms before and after each part, windows in some layers.

Gemma 2 soft-caps attention scores and logits. Gemma 3 norms queries and keys instead, and gives layers with a window
rotary embeddings of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.models.config import INPUT, DecoderConfig
from dpo_jax.models.decoder import Attention, Context, Decoder, GatedMlp, Layer
from dpo_jax.models.layers import Cache, UnitRmsNorm, keepable
from dpo_jax.models.rope import Rope
from dpo_jax.types import Array


@dataclass(frozen=True, kw_only=True)
class Gemma2Config(DecoderConfig):
    """A Gemma 2."""

    norm_epsilon: float = 1e-6
    tied_head: bool = True
    attention_cap: float | None = 50.0
    logit_cap: float | None = 30.0
    ropes: tuple[Rope, ...] = (Rope(),)


@dataclass(frozen=True, kw_only=True)
class Gemma3Config(DecoderConfig):
    """A Gemma 3; ``ropes`` are those of layers with a window and of the others."""

    norm_epsilon: float = 1e-6
    tied_head: bool = True
    ropes: tuple[Rope, ...] = (Rope(),)


class Block(nn.Module):
    """Attention and MLP, each normed before and after."""

    config: DecoderConfig
    head_norm: ClassVar[type[nn.Module] | None] = None

    @nn.compact
    def __call__(self, x_RQD: Array, cache: Cache | None, layer: Layer, context: Context) -> tuple[Array, Cache | None]:
        c = self.config
        x_RQD = keepable(x_RQD, INPUT)
        h_RQD = UnitRmsNorm(c, name="attention_norm")(x_RQD)
        h_RQD, cache = Attention(c, self.head_norm, name="attention")(h_RQD, cache, layer, context)
        x_RQD += UnitRmsNorm(c, name="attention_out_norm")(h_RQD)
        h_RQD = UnitRmsNorm(c, name="mlp_norm")(x_RQD)
        h_RQD = GatedMlp(c, partial(jax.nn.gelu, approximate=True), name="mlp")(h_RQD)
        return x_RQD + UnitRmsNorm(c, name="mlp_out_norm")(h_RQD), cache


class HeadNormBlock(Block):
    """The same with a norm for each query and key head."""

    head_norm: ClassVar[type[nn.Module] | None] = UnitRmsNorm


class Gemma2(Decoder):
    """The family of Gemma 2; embeddings are scaled by √D."""

    block, norm = Block, UnitRmsNorm

    def embed(self, tokens_RQ: Array, position_RQ: Array) -> Array:
        # In the compute dtype, rounding of √D included: the models were trained with it.
        c = self.config
        return super().embed(tokens_RQ, position_RQ).astype(c.dtype) * jnp.asarray(c.width**0.5, c.dtype)


class Gemma3(Gemma2):
    """The family of Gemma 3."""

    block = HeadNormBlock
