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
    model: nn.Module,
    variables: Any,
    prompt_RP: Array,
    length_R: Array,
    new_R: Array,
    last_RD: Array,
    cache: Cache,
    *,
    lanes: int = 1,
) -> tuple[jax.Array, Cache]:
    """Reads the prompts of new rows, as many at a time as fit together.

    Args:
      model: a family's module.
      variables: its parameters, as ``apply`` takes them.
      prompt_RP: int32 tokens, padded on the right.
      length_R: int32, of each prompt, from 1 to P.
      new_R: bool, which prompts are to be read; what belongs to the other rows is left alone.
      last_RD: hidden states of each row's last token.
      cache: of R rows; slots 0 to P are the prompts'.
      lanes: packed rows that are read at a time.

    Returns:
      (hidden states with those of the new prompts' last tokens, the cache with the new prompts in it).
    """
    rows, width = prompt_RP.shape
    row_length, block = max(width, min(ROW, rows * width)), cache.key[0].shape[4]
    source_R = _first_alike(prompt_RP, length_R, new_R)
    alike_RC, most = _alike(source_R, new_R)
    own_R = jnp.where(new_R & (source_R == jnp.arange(rows)), length_R, 0)  # what is to be read
    start_R, used = _next_fit(own_R, row_length)
    slot_RP = jnp.broadcast_to(jnp.arange(width), prompt_RP.shape)
    group_RP = jnp.broadcast_to(1 + jnp.arange(rows)[:, None], prompt_RP.shape)
    capacity = -(-rows // lanes) * lanes
    place_RP = jnp.where(slot_RP < own_R[:, None], start_R[:, None] + slot_RP, capacity * row_length)
    packed = [
        jnp.zeros(capacity * row_length, jnp.int32).at[place_RP].set(values, mode="drop").reshape(capacity, row_length)
        for values in (prompt_RP, slot_RP, group_RP)
    ]

    def read(step: Any, found: tuple[Array, Cache]) -> tuple[Array, Cache]:
        tokens, position, group = (jax.lax.dynamic_slice_in_dim(a, step * lanes, lanes) for a in packed)
        mask = training_mask(group, jnp.zeros_like(group))
        hidden, key, value = model.apply(variables, tokens, position, mask, method="read")
        keys, values = ([layer.swapaxes(1, 2) for layer in part] for part in (key, value))

        def put(c: Any, found: Any) -> tuple[Array, Cache]:
            """Into the c-th row with each prompt; padding, and what has no such row, is dropped."""
            last, cache = found
            row = jnp.where(group > 0, alike_RC[group - 1, c], rows)
            slots = row, slice(None), position // block, slice(None), position % block
            cache = Cache(
                tuple(a.at[slots].set(b, mode="drop") for a, b in zip(cache.key, keys, strict=True)),
                tuple(a.at[row, :, position].set(b, mode="drop") for a, b in zip(cache.value, values, strict=True)),
                cache.position,
            )
            return last.at[jnp.where(position == length_R[group - 1] - 1, row, rows)].set(hidden, mode="drop"), cache

        return jax.lax.fori_loop(0, most, put, found)

    return jax.lax.fori_loop(0, -(-used // lanes), read, (last_RD, cache))


def _first_alike(prompt_RP: Array, length_R: Array, new_R: Array) -> Array:
    """The first new row with the same prompt as each new row."""
    inside_RP = jnp.arange(prompt_RP.shape[1])[None] < length_R[:, None]
    tokens_RP = jnp.where(inside_RP, prompt_RP, -1)
    return jnp.argmax(jnp.all(tokens_RP[:, None] == tokens_RP[None], axis=2) & new_R[None], axis=1)


def _alike(source_R: Array, new_R: Array) -> tuple[Array, Array]:
    """[R, R], the rows whose source is each row, in order, filled up with R; and how many the most are."""
    rows = len(source_R)
    same_RR = (source_R[:, None] == source_R[None]) & new_R[None]
    turn_R = jnp.sum(jnp.tril(same_RR, -1), axis=1)
    place = jnp.where(new_R, source_R, rows), turn_R
    alike_RC = jnp.full((rows, rows), rows).at[place].set(jnp.arange(rows), mode="drop")
    return alike_RC, 1 + jnp.max(jnp.where(new_R, turn_R, 0))


def _next_fit(length_R: Array, row_length: int) -> tuple[Array, Array]:
    """Where each prompt begins when rows are filled one after the other, and how many rows that takes."""

    def place(end: Any, length: Any) -> tuple[Array, Array]:
        fits = end % row_length + length <= row_length
        start = jnp.where(fits, end, -(-end // row_length) * row_length)
        return start + length, start

    end, start_R = jax.lax.scan(place, jnp.int32(0), length_R)
    return start_R, -(-end // row_length)
