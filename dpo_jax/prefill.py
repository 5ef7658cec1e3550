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
    known_R: Array,
    new_R: Array,
    last_RD: Array,
    cache: Cache,
    *,
    lanes: int = 1,
) -> tuple[jax.Array, Cache]:
    """Reads the prompts of new rows, as many at a time as fit together; copies those that other rows have.

    Args:
      model: a family's module.
      variables: its parameters, as ``apply`` takes them.
      prompt_RP: int32 tokens, padded on the right.
      length_R: int32, of each prompt, from 1 to P.
      known_R: bool, rows whose prompts have been read; their part of the cache is left alone.
      new_R: bool, rows whose prompts are to be read; none of them is known. All others are of no matter.
      last_RD: hidden states of the known prompts' last tokens.
      cache: of R rows; slots 0 to P are the prompts'.
      lanes: packed rows that are read at a time.

    Returns:
      (hidden states of the known and the new prompts' last tokens, the cache with the new prompts in it).
    """
    rows, width = prompt_RP.shape
    row_length = max(width, min(ROW, rows * width))
    source_R = _sources(prompt_RP, length_R, known_R, new_R)
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
        last, cache = found
        tokens, position, group = (jax.lax.dynamic_slice_in_dim(a, step * lanes, lanes) for a in packed)
        mask = training_mask(group, jnp.zeros_like(group))
        hidden, key, value = model.apply(variables, tokens, position, mask, method="read")
        owner = jnp.where(group > 0, group - 1, rows)  # padding is owned by a row that is not there, and is dropped
        ends = jnp.where(position == length_R[owner] - 1, owner, rows)
        keys, values = ([layer.swapaxes(1, 2) for layer in part] for part in (key, value))
        cache = Cache(
            tuple(a.at[owner, :, :, position].set(b, mode="drop") for a, b in zip(cache.key, keys, strict=True)),
            tuple(a.at[owner, :, position].set(b, mode="drop") for a, b in zip(cache.value, values, strict=True)),
            cache.position,
        )
        return jnp.asarray(last).at[ends].set(hidden, mode="drop"), cache

    found = jax.lax.fori_loop(0, -(-used // lanes), read, (last_RD, cache))
    return _copied(found, source_R, new_R & (source_R != jnp.arange(rows)), width)


def _sources(prompt_RP: Array, length_R: Array, known_R: Array, new_R: Array) -> Array:
    """Which row each prompt is taken from: a known one with the same, else the first new one, which may be itself."""
    inside_RP = jnp.arange(prompt_RP.shape[1])[None] < length_R[:, None]
    tokens_RP = jnp.where(inside_RP, prompt_RP, -1)
    same_RR = jnp.all(tokens_RP[:, None] == tokens_RP[None], axis=2)
    known_RR, new_RR = same_RR & known_R[None], same_RR & new_R[None]
    return jnp.where(jnp.any(known_RR, axis=1), jnp.argmax(known_RR, axis=1), jnp.argmax(new_RR, axis=1))


def _copied(found: tuple[Array, Cache], source_R: Array, copied_R: Array, width: int) -> tuple[jax.Array, Cache]:
    """Some rows' last hidden states and first ``width`` slots, each from its source; no work where there are none."""

    def anew(part_R: Array) -> jax.Array:
        return jnp.where(copied_R.reshape(-1, *[1] * (part_R.ndim - 1)), part_R[source_R], part_R)

    def copy(_: Any, found: tuple[Array, Cache]) -> tuple[Array, Cache]:
        last, cache = found
        key = tuple(a.at[:, :, :, :width].set(anew(a[:, :, :, :width])) for a in cache.key)
        value = tuple(a.at[:, :, :width].set(anew(a[:, :, :width])) for a in cache.value)
        return anew(last), Cache(key, value, cache.position)

    return jax.lax.fori_loop(0, jnp.any(copied_R).astype(jnp.int32), copy, found)


def _next_fit(length_R: Array, row_length: int) -> tuple[Array, Array]:
    """Where each prompt begins when rows are filled one after the other, and how many rows that takes."""

    def place(end: Any, length: Any) -> tuple[Array, Array]:
        fits = end % row_length + length <= row_length
        start = jnp.where(fits, end, -(-end // row_length) * row_length)
        return start + length, start

    end, start_R = jax.lax.scan(place, jnp.int32(0), length_R)
    return start_R, -(-end // row_length)
