"""AdamW with a schedule whose peak is a traced number, so that a sweep over learning rates does not recompile."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

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


def make_optimizer(
    *, b1: float, b2: float, epsilon: float, weight_decay: float, clip_norm: float | None
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) for a learning rate of 1: scale its updates by the real one.

    Args:
      b1: decay of the mean of gradients.
      b2: decay of the mean of squared gradients.
      epsilon: added to the root of the latter.
      weight_decay: decoupled, on matrices only: embeddings, kernels, head and adapters, not norms and biases.
      clip_norm: largest global norm of the gradient; None leaves it alone.
    """
    parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm is not None else []
    parts += [optax.scale_by_adam(b1=b1, b2=b2, eps=epsilon), optax.add_decayed_weights(weight_decay, _is_matrix)]
    return optax.chain(*parts, optax.scale(-1.0))


def _is_matrix(params: Params) -> Params:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in _VECTORS, params)


def _progress(step: Array, warmup: int, steps: int) -> Array:
    return jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
