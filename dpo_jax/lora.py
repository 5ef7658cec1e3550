"""Low-rank adapters (LoRA, arXiv 2106.09685): which layers have one, and trees of base and adapters.

A layer x W with an adapter is x W + (α/r)·(x A) B: A [in, r] starts random and B [r, out] at zero, so that training
starts at the base itself. A and B stand beside W in the tree of parameters, as ``lora_a`` and ``lora_b``::

    joined    {'blocks': {'qkv': {'kernel': W, 'bias': b, 'lora_a': A, 'lora_b': B}, …}, …}
    base      {'blocks': {'qkv': {'kernel': W, 'bias': b}, …}, …}
    adapters  {'blocks': {'qkv': {'lora_a': A, 'lora_b': B}}}

Trees are joined without a copy: the base in front of the adapters is the reference itself.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dpo_jax.trees import named_leaves
from dpo_jax.types import Array, Params

A, B = "lora_a", "lora_b"


@dataclass(frozen=True)
class Adapter:
    """What is adapted, and how.

    Attributes:
      layers: regular expression, searched for in the names of linear layers, such as ``blocks/attention/query``.
      rank: r.
      alpha: α; what an adapter adds is scaled by α/r.
      dropout: share of an adapter's inputs that a training step leaves out.
    """

    layers: str
    rank: int
    alpha: float
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def matches(self, name: str) -> bool:
        """Whether the layer of that name has an adapter."""
        return re.search(self.layers, name) is not None


def init_a(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """A at the start: uniform in ±1/√in, as PEFT draws it."""
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0) / shape[-2] ** 0.5


def adapter_of(model: nn.Module) -> Adapter | None:
    """The adapter that a module is built with."""
    return getattr(getattr(model, "config", None), "adapter", None)


def with_adapter(model: nn.Module, adapter: Adapter | None) -> nn.Module:
    """The same module with an adapter, or without."""
    if adapter == adapter_of(model):
        return model
    return model.clone(config=dataclasses.replace(model.config, adapter=adapter))


def check_layers(adapter: Adapter, params: Params) -> None:
    """Raises ValueError unless the adapter is for at least one layer of a model; lists those that it has."""
    names = [name.removesuffix("/kernel") for name in named_leaves(params) if name.endswith("/kernel")]
    if not any(map(adapter.matches, names)):
        raise ValueError(
            f"config.lora.layers {adapter.layers!r} is found in no linear layer's name: {', '.join(names)}"
        )


def is_adapter(name: str) -> bool:
    """Whether a leaf of that path belongs to an adapter."""
    return name.rpartition("/")[2] in (A, B)


def split(params: Params) -> tuple[Params, Params]:
    """A joined tree → (base, adapters)."""
    leaves = named_leaves(params)
    adapters = {name: leaf for name, leaf in leaves.items() if is_adapter(name)}
    return _rebuilt({name: leaf for name, leaf in leaves.items() if name not in adapters}), _rebuilt(adapters)


def join(base: Params, adapters: Params) -> Params:
    """(base, adapters) → the tree that a module with adapters reads; arrays are shared."""
    return _rebuilt({**named_leaves(base), **named_leaves(adapters)})


def fresh(shapes: Params, seed: int) -> Params:
    """Adapters at the start of training, as numpy arrays: A random, B zero.

    Args:
      shapes: of the adapters.
      seed: a layer's A depends on (seed, name of the layer) alone.
    """

    def draw(name: str, leaf: Any) -> np.ndarray:
        if name.endswith(B):
            return np.zeros(leaf.shape, leaf.dtype)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        return np.array(init_a(key, leaf.shape, leaf.dtype))

    return _rebuilt({name: draw(name, leaf) for name, leaf in named_leaves(shapes).items()})


def merge(base: Params, adapters: Params, scale: float) -> Params:
    """W + scale·A·B for every adapted layer, rounded once, to W's dtype; other arrays are shared with the base.

    Args:
      base: numpy arrays; leading axes (layers) are the adapters' own.
      adapters: numpy arrays.
      scale: α/r.
    """
    merged, low = dict(named_leaves(base)), named_leaves(adapters)
    for name in _adapted(low):
        kernel, a, b = merged[f"{name}/kernel"], low[f"{name}/{A}"], low[f"{name}/{B}"]
        out = np.empty(kernel.shape, kernel.dtype)
        for n in np.ndindex(kernel.shape[:-2]):  # a layer at a time: float64 takes room
            out[n] = np.asarray(kernel[n], np.float64) + scale * (np.asarray(a[n], np.float64) @ np.asarray(b[n]))
        merged[f"{name}/kernel"] = out
    return _rebuilt(merged)


def _adapted(names: Iterable[str]) -> list[str]:
    return [name.removesuffix(f"/{A}") for name in names if name.endswith(f"/{A}")]


def _rebuilt(flat: dict[str, Any]) -> Params:
    return traverse_util.unflatten_dict(flat, sep="/")
