"""Products of a training step, counted from the model: a compiler's own count takes the body of a scan once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dpo_jax.models.config import DecoderConfig
from dpo_jax.trees import named_leaves
from dpo_jax.types import Params


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a step, over all chips.

    Attributes:
      useful: what the mathematics asks for: forward and backward pass of the policy, forward pass of the reference,
        causal attention.
      spent: what the program does: scores above the diagonal, and what is computed again in the backward pass.
    """

    useful: float
    spent: float


@dataclass(frozen=True)
class Forward:
    """Products of one forward pass over a row of L positions and M targets.

    A product of [L, D] with [D, F] is 2·L·D·F operations; scores and their sums over values are 2·L²·H·E each.

    Attributes:
      body: products with the layers' matrices.
      attention: scores and sums, all of L².
      head: logits of the targets.
    """

    body: float
    attention: float
    head: float


def forward(config: DecoderConfig, params: Params, length: int, targets: int) -> Forward:
    """Counts one row.

    Args:
      config: of the model.
      params: its parameters, or their shapes.
      length: L.
      targets: M.
    """
    matrices = [leaf for name, leaf in named_leaves(params).items() if name.endswith("kernel")]
    return Forward(
        body=2.0 * length * sum(math.prod(leaf.shape) for leaf in matrices),
        attention=4.0 * config.layers * length**2 * config.heads * config.size,
        head=2.0 * targets * config.vocab_size * config.width,
    )


def step_work(config: DecoderConfig, params: Params, batch: Any, *, reference: bool, scored_twice: bool) -> Work:
    """Counts a step over rows whose every position holds a token.

    Args:
      config: of the model.
      params: its parameters, or their shapes.
      batch: TokenBatch of the whole batch, or its shapes.
      reference: whether the reference is scored too.
      scored_twice: whether a coupled loss scores micro-batches once before it pulls them back.
    """
    rows, length = batch.tokens_RL.shape
    one = forward(config, params, length, batch.target_RM.shape[1])
    needed = one.body + one.attention / 2 + one.head
    full = one.body + one.attention + one.head
    again = one.head + (one.body + one.attention if config.remat == "full" else 0.0)
    passes = 3 + reference + scored_twice
    return Work(rows * needed * (3 + reference), rows * (full * passes + again))
