"""Prompts into a cache: several share a row, each different one is read once, and hardly any padding is."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.models.layers import Cache, training_mask
from dpo_jax.types import Array

ROW = 512  # positions that prompts share; where one may be longer, rows are as long as it


def prefill(
    model: nn.Module, variables: Any, prompt_RP: Array, length_R: Array, *, room: int, lanes: int = 1
) -> tuple[Array, Cache]:
    """Reads prompts, as many at a time as fit into a row.

    Args:
      model: a family's module.
      variables: its parameters, as ``apply`` takes them.
      prompt_RP: int32 tokens, padded on the right.
      length_R: int32, of each prompt, from 1 to P.
      room: slots of the cache after the P of the prompts.
      lanes: rows that are read at a time.

    Returns:
      (hidden states of the prompts' last tokens [R, D], a cache of P + ``room`` slots a row).
    """
    c = model.config
    rows, width = prompt_RP.shape
    row_length = max(width, min(ROW, rows * width))
    alike_R = _first_alike(prompt_RP, length_R)
    own_R = jnp.where(alike_R == jnp.arange(rows), length_R, 0)  # what is to be read
    start_R, used = _next_fit(own_R, row_length)
    slot_RP = jnp.broadcast_to(jnp.arange(width), prompt_RP.shape)
    group_RP = jnp.broadcast_to(1 + jnp.arange(rows)[:, None], prompt_RP.shape)
    capacity = -(-rows // lanes) * lanes
    place_RP = jnp.where(slot_RP < own_R[:, None], start_R[:, None] + slot_RP, capacity * row_length)
    packed = [
        jnp.zeros(capacity * row_length, jnp.int32).at[place_RP].set(values, mode="drop").reshape(capacity, row_length)
        for values in (prompt_RP, slot_RP, group_RP)
    ]

    def read(step: Any, found: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        tokens, position, group = (jax.lax.dynamic_slice_in_dim(a, step * lanes, lanes) for a in packed)
        mask = training_mask(group, jnp.zeros_like(group))
        hidden, *new = model.apply(variables, tokens, position, mask, method="read")
        owner = jnp.where(group > 0, group - 1, rows)  # padding is owned by a row that is not there, and is dropped
        ends = jnp.where(position == length_R[owner] - 1, owner, rows)
        kept = (  # all layers of a token at once
            old.at[:, owner, :, position].set(part.transpose(1, 3, 0, 2, 4), mode="drop")
            for old, part in zip(found[1:], new, strict=True)
        )
        return found[0].at[ends].set(hidden, mode="drop"), *kept

    nothing = jnp.zeros((c.layers, rows, c.key_heads, width, c.size), c.dtype)
    last_RD = jnp.zeros((rows, c.width), c.output_dtype or c.dtype)
    last_RD, key, value = jax.lax.fori_loop(0, -(-used // lanes), read, (last_RD, nothing, nothing))

    def spread(layers: Array) -> list[Array]:
        """Into all rows with the same prompt, with room after it."""
        return [jnp.pad(a[alike_R], ((0, 0), (0, 0), (0, room), (0, 0))) for a in layers]

    keys = tuple(a.swapaxes(2, 3) for a in spread(key))
    return last_RD[alike_R], Cache(keys, tuple(spread(value)), jnp.pad(slot_RP, ((0, 0), (0, room))))


def _first_alike(prompt_RP: Array, length_R: Array) -> Array:
    """The first row with the same prompt as each row."""
    inside_RP = jnp.arange(prompt_RP.shape[1])[None] < length_R[:, None]
    tokens_RP = jnp.where(inside_RP, prompt_RP, -1)
    return jnp.argmax(jnp.all(tokens_RP[:, None] == tokens_RP[None], axis=2), axis=1)


def _next_fit(length_R: Array, row_length: int) -> tuple[Array, Array]:
    """Where each prompt begins when rows are filled one after the other, and how many rows that takes."""

    def place(end: Any, length: Any) -> tuple[Array, Array]:
        fits = end % row_length + length <= row_length
        start = jnp.where(fits, end, -(-end // row_length) * row_length)
        return start + length, start

    end, start_R = jax.lax.scan(place, jnp.int32(0), length_R)
    return start_R, -(-end // row_length)
