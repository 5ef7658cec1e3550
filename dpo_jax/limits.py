"""What the values of a config may be, each by itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from dpo_jax.data.layouts import LAYOUTS
from dpo_jax.models import FAMILIES
from dpo_jax.models.config import REMAT
from dpo_jax.optim import SCHEDULES
from dpo_jax.rewards import REWARDS

_KNOWN = {
    "model.family": FAMILIES,
    "model.dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.output_dtype": (None, "float32", "bfloat16"),
    "model.attention": ("auto", "dense", "splash", "triton", "cudnn"),
    "model.remat": REMAT,
    "data.layout": LAYOUTS,
    "optim.schedule": SCHEDULES,
    "checkpoint.best": ("min", "max"),
    "checkpoint.on_damage": ("fall_back", "stop"),
    "parallel.mode": ("pmap", "mesh"),
    "eval.reward": REWARDS,
    "prefer.reward": REWARDS,
}

# Numbers that may be 0; all others are above it.
_MAY_BE_ZERO = {
    "seed",
    "data.mixture_seed",
    "data.flip",
    "optim.warmup_steps",
    "optim.weight_decay",
    "optim.b1",
    "optim.b2",
    "eval.examples",
    "eval.prompts",
    "prefer.eval_prompts",
    "train.max_skipped",
    "lora.dropout",
}
# Shares: (the largest value, whether it is allowed).
_AT_MOST = {
    "optim.b1": (1.0, False),
    "optim.b2": (1.0, False),
    "reference.sync_rate": (1.0, True),
    "lora.dropout": (1.0, False),
    "data.flip": (1.0, True),
}


def check_values(config: Mapping[str, Any]) -> None:
    """Checks every name, and every number but the losses' own, which know their ranges.

    Args:
      config: nested, as ``dataclasses.asdict`` makes it.

    Raises:
      ValueError: an unknown name, or a number out of range.
    """
    for path, value in _leaves(config):
        if path in _KNOWN and value not in _KNOWN[path]:
            raise ValueError(f"config.{path} is {value!r}; known: {', '.join(map(str, _KNOWN[path]))}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            _check_range(path, value)


def _check_range(path: str, value: float) -> None:
    most, closed = _AT_MOST.get(path, (math.inf, False))
    low = value >= 0 if path in _MAY_BE_ZERO else value > 0
    high = value <= most if closed else value < most
    if not (low and high):
        least = "0 or more" if path in _MAY_BE_ZERO else "more than 0"
        bound = "" if most == math.inf else f" and {'at most' if closed else 'below'} {most:g}"
        raise ValueError(f"config.{path} is {value}; expected {least}{bound}")


def _leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{path}.{key}" if path else key
        if not isinstance(value, Mapping):
            yield name, value
        elif name != "loss":
            yield from _leaves(value, name)
