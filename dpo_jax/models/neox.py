"""GPT-NeoX (arXiv 2204.06745) and Pythia: attention and MLP side by side, rotary positions in a part of each head."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax

from dpo_jax.models.config import INPUT, DecoderConfig
from dpo_jax.models.decoder import Context, Decoder, Layer, Mlp, attend_and_keep
from dpo_jax.models.layers import Cache, Dense, LayerNorm, keepable
from dpo_jax.models.rope import Rope
from dpo_jax.types import Array


@dataclass(frozen=True, kw_only=True)
class NeoXConfig(DecoderConfig):
    """A GPT-NeoX.

    Attributes:
      parallel: whether the MLP reads the same stream as attention; otherwise what attention has added to it.
    """

    parallel: bool = True
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    ropes: tuple[Rope, ...] = (Rope(share=0.25),)


class Block(nn.Module):
    """Each part reads a norm of its own. Queries, keys and values of a head lie side by side in one matrix."""

    config: NeoXConfig

    @nn.compact
    def __call__(self, x_RQD: Array, cache: Cache | None, layer: Layer, context: Context) -> tuple[Array, Cache | None]:
        c = self.config
        x_RQD = keepable(x_RQD, INPUT)
        h_RQD = LayerNorm(c, name="attention_norm")(x_RQD)
        qkv = Dense(c, 3 * c.width, ("embed", "heads"), bias=c.qkv_bias, name="qkv")(h_RQD)
        qkv = qkv.reshape(*qkv.shape[:2], c.heads, 3, c.size)
        attended, cache = attend_and_keep(c, qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :], cache, layer, context)
        out = Dense(c, c.width, ("heads", "embed"), bias=c.out_bias, residual=True, name="attention_out")(attended)
        h_RQD = LayerNorm(c, name="mlp_norm")(x_RQD if c.parallel else x_RQD + out)
        return x_RQD + out + Mlp(c, partial(jax.nn.gelu, approximate=False), name="mlp")(h_RQD), cache


class NeoX(Decoder):
    """The family."""

    block, norm = Block, LayerNorm
