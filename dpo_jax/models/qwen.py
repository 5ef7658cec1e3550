"""Qwen 2, 2.5 (arXiv 2407.10671, 2412.15115) and 3 (2505.09388): Llama with biases, or with normed queries and keys.

Their later layers may see a window only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn

from dpo_jax.models import llama
from dpo_jax.models.layers import RmsNorm
from dpo_jax.models.llama import Llama, LlamaConfig
from dpo_jax.models.rope import Rope


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(LlamaConfig):
    """A Qwen 2 or 2.5."""

    norm_epsilon: float = 1e-6
    qkv_bias: bool = True
    ropes: tuple[Rope, ...] = (Rope(1e6),)


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(LlamaConfig):
    """A Qwen 3."""

    norm_epsilon: float = 1e-6
    ropes: tuple[Rope, ...] = (Rope(1e6),)


class Qwen2(Llama):
    """The family of Qwen 2 and 2.5: Llama's layers."""


class Block(llama.Block):
    """Llama's layer with a norm for each query and key head."""

    head_norm: ClassVar[type[nn.Module] | None] = RmsNorm


class Qwen3(Llama):
    """The family of Qwen 3."""

    block = Block
