"""Model families. To add one, write ``models/<family>.py`` with the methods of Gpt2, and add its line here.

A family is a linen module ``(tokens, position, mask, cache, start) → (hidden, cache)`` with ``head()`` and
``empty_cache(rows, slots)``; parameters are a plain nested dict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.models.gpt2 import Gpt2, Gpt2Config
from dpo_jax.types import Params

FAMILIES: dict[str, tuple[Callable[..., nn.Module], type]] = {
    "gpt2": (Gpt2, Gpt2Config),
}


def make_model(family: str, sizes: Mapping[str, Any]) -> nn.Module:
    """Builds a model.

    Args:
      family: a name in FAMILIES.
      sizes: fields of the family's config.

    Raises:
      ValueError: an unknown family, or sizes that do not divide.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown model family {family!r}; known: {', '.join(FAMILIES)}")
    module, config = FAMILIES[family]
    if sizes["width"] % sizes["heads"]:
        raise ValueError(f"model.width {sizes['width']} is not a multiple of model.heads {sizes['heads']}")
    return module(config(**sizes))


def init_params(model: nn.Module, key: jax.Array) -> Params:
    """Fresh parameters, fp32, without the boxes that carry axis names."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return nn.unbox(model.init(key, tokens, tokens, jnp.ones((1, 1, 1), bool))["params"])
