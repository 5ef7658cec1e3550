"""Model families. To add one, write ``models/<family>.py`` over decoder.py, and add its line here.

A family is a linen module ``(tokens, position, mask) → hidden`` with ``head()`` and ``logit_cap``, and for sampling
``empty_cache``, ``read``, ``prepare`` and ``follow``; parameters are a plain nested dict.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.models.gemma import Gemma2, Gemma2Config, Gemma3, Gemma3Config
from dpo_jax.models.gpt2 import Gpt2, Gpt2Config
from dpo_jax.models.llama import Llama, LlamaConfig
from dpo_jax.models.mistral import Mistral, MistralConfig
from dpo_jax.models.neox import NeoX, NeoXConfig
from dpo_jax.models.qwen import Qwen2, Qwen2Config, Qwen3, Qwen3Config
from dpo_jax.sharding import Names
from dpo_jax.trees import named_leaves
from dpo_jax.types import Params

FAMILIES: dict[str, tuple[Callable[..., nn.Module], Callable[..., Any]]] = {
    "gpt2": (Gpt2, Gpt2Config),
    "gpt_neox": (NeoX, NeoXConfig),
    "llama": (Llama, LlamaConfig),
    "mistral": (Mistral, MistralConfig),
    "qwen2": (Qwen2, Qwen2Config),
    "qwen3": (Qwen3, Qwen3Config),
    "gemma2": (Gemma2, Gemma2Config),
    "gemma3_text": (Gemma3, Gemma3Config),
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
    return module(config(**sizes))


def rolled(model: nn.Module) -> nn.Module:
    """The same model for programs without a backward pass, where a loop over layers is as fast and quick to compile."""
    return model.clone(config=dataclasses.replace(model.config, unroll=1))


def unrolled(model: nn.Module) -> nn.Module:
    """The same model for programs that read a cache, whose layers lie apart."""
    return model.clone(config=dataclasses.replace(model.config, unroll=model.config.layers))


def as_read(model: nn.Module, params: Params) -> Params:
    """Parameters that are never written: what a half-precision model rounds wherever it reads it, rounded.

    The model computes the same numbers from them, in half of the memory, and rounds nothing anew at every step. They
    lie as bits (uint16): to read one layer's half precision, or a token's, CPUs widen all of it.
    """
    dtype = jnp.dtype(model.config.dtype)
    if dtype.itemsize > 2:
        return params

    def narrow(path: Any, leaf: Any) -> Any:
        return leaf.astype(dtype).view(jnp.uint16) if path[-1].key in model.rounded else leaf

    return jax.tree_util.tree_map_with_path(narrow, params)


def init_params(model: nn.Module, key: jax.Array) -> Params:
    """Fresh parameters without the boxes that carry axis names."""
    return nn.unbox(_init(model, key))


@functools.lru_cache(maxsize=16)
def param_shapes(model: nn.Module) -> Params:
    """Shapes of the parameters, adapters beside their layers; nothing is computed."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def logical_axes(model: nn.Module) -> dict[str, Names]:
    """Logical names of the dimensions of each parameter, by path; nothing is computed.

    Returns:
      ``{'token_embedding': ('vocab', 'embed'), …}``; a parameter without a box has no entry.
    """
    specs = nn.get_partition_spec(jax.eval_shape(lambda: _init(model, jax.random.key(0))))
    return {name: tuple(spec) for name, spec in named_leaves(specs).items() if spec}


def _init(model: nn.Module, key: jax.Array) -> Params:
    tokens = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, tokens, tokens, jnp.ones((1, 1, 1), bool))["params"]
