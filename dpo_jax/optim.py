"""AdamW with a schedule whose peak is a traced number, so that a sweep over learning rates does not recompile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from dpo_jax.types import Array, Params

SCHEDULES: dict[str, Callable[[Array, int, int], Array]] = {
    "constant": lambda step, warmup, steps: jnp.float32(1.0),
    "linear": lambda step, warmup, steps: 1.0 - _progress(step, warmup, steps),
    "cosine": lambda step, warmup, steps: 0.5 * (1.0 + jnp.cos(jnp.pi * _progress(step, warmup, steps))),
}


_VECTORS = ("bias", "scale")  # in every layer; all other parameters are matrices


def schedule(name: str, step: Array, *, warmup: int, steps: int) -> Array:
    """Share of the peak learning rate at a step: a linear rise over ``warmup`` steps, then the named decay to 0.

    Args:
      name: a key of SCHEDULES.
      step: int32, updates done so far.
      warmup: steps of the rise.
      steps: updates of the whole run.

    Returns:
      float32 in [0, 1].
    """
    rise = jnp.minimum((step + 1) / (warmup + 1), 1.0)
    return jnp.where(step < warmup, rise, SCHEDULES[name](step, warmup, steps)).astype(jnp.float32)


@struct.dataclass
class Moments:
    """What AdamW remembers.

    Attributes:
      count: int32 scalar, updates done.
      mean: running mean of gradients, like the parameters.
      square: running mean of squared gradients.
    """

    count: Array
    mean: Params
    square: Params


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101).

    It is ours and not optax's for one reason: first the moments are written, then the parameters from the new moments,
    in two branches of which each reads and writes an array in the same place. Where the compiler may mix the two, it
    keeps copies of the old moments until the parameters are written: up to half of the state again.

    Attributes:
      b1: decay of the mean of gradients.
      b2: decay of the mean of squared gradients.
      epsilon: added to the root of the latter.
      weight_decay: decoupled, on matrices only: embeddings, kernels, head and adapters, not norms and biases.
      clip_norm: largest global norm of the gradient; None leaves it alone.
    """

    b1: float
    b2: float
    epsilon: float
    weight_decay: float
    clip_norm: float | None

    def init(self, params: Params) -> Moments:
        """Moments before the first update."""
        # One number, seen in every place: takes no memory until it is on a device, however large the model.
        zeros = jax.tree.map(lambda p: np.broadcast_to(np.zeros((), p.dtype), p.shape), params)
        return Moments(np.zeros((), np.int32), zeros, zeros)

    def update(
        self, params: Params, moments: Moments, grads: Params, norm: Array, rate: Array, taken: Array | bool = True
    ) -> tuple[Params, Moments]:
        """One update.

        Args:
          params: before it.
          moments: before it.
          grads: like the parameters.
          norm: global norm of ``grads``.
          rate: learning rate.
          taken: bool scalar, whether it is done; else all stays as it was, whatever the gradient is.

        Returns:
          (parameters, moments).
        """
        moments = jax.lax.cond(taken, self._accumulated, lambda old, *_: old, moments, grads, norm)
        return jax.lax.cond(taken, self._moved, lambda old, *_: old, params, moments, rate), moments

    def _accumulated(self, moments: Moments, grads: Params, norm: Array) -> Moments:
        scale = 1.0 if self.clip_norm is None else jnp.minimum(1.0, self.clip_norm / norm)
        grads = jax.tree.map(lambda g: (scale * g).astype(g.dtype), grads)
        mean = optax.tree.update_moment(grads, moments.mean, self.b1, 1)
        return Moments(moments.count + 1, mean, optax.tree.update_moment(grads, moments.square, self.b2, 2))

    def _moved(self, params: Params, moments: Moments, rate: Array) -> Params:
        mean = optax.tree.bias_correction(moments.mean, self.b1, moments.count)
        square = optax.tree.bias_correction(moments.square, self.b2, moments.count)

        def moved(path: Any, p: Array, m: Array, v: Array) -> Array:
            decay = self.weight_decay if path[-1].key not in _VECTORS else 0.0
            return (p - rate * (m / (jnp.sqrt(v) + self.epsilon) + decay * p)).astype(p.dtype)

        return jax.tree_util.tree_map_with_path(moved, params, mean, square)


def _progress(step: Array, warmup: int, steps: int) -> Array:
    return jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
