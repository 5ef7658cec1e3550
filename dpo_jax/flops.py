"""Products of a training step, counted from the model: a compiler's own count takes the body of a scan once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_jax.models.config import DecoderConfig
from dpo_jax.trees import named_leaves
from dpo_jax.types import Params, PreferenceBatch, TokenBatch


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


def useful_flops(
    config: DecoderConfig, params: Params, batch: PreferenceBatch, *, reference: bool, full: bool = True
) -> float:
    """Counts what the mathematics of a step asks for on the tokens of a batch, not on its padding.

    Args:
      config: of the model.
      params: its parameters without adapters, or their shapes.
      batch: on the host.
      reference: whether the reference is scored too.
      full: whether all parameters are trained; the backward pass of adapters has no products with activations for the
        base.
    """
    trained = _useful_forward(config, params, batch.answers) * ((3 if full else 2) + reference)
    # Mismatched answers are scored, and not trained on.
    only_scored = 0.0 if batch.mismatched is None else _useful_forward(config, params, batch.mismatched)
    return trained + only_scored * (1 + reference)


def _useful_forward(config: DecoderConfig, params: Params, rows: TokenBatch) -> float:
    real = np.asarray(rows.group_RL) != 0
    one = forward(config, params, 1, 1)
    # A token attends to all of its own sequence up to itself: to position + 1 keys, of which ``one`` has counted one.
    keys = np.sum(np.asarray(rows.position_RL) + 1, where=real, dtype=np.float64)
    return one.body * np.count_nonzero(real) + one.attention * keys + one.head * np.count_nonzero(rows.weight_RM)


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
