"""Who attends to whom in rows that kernels look at whole: what ``training_mask`` says, in O(L)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from dpo_jax.types import Array

LONGEST = 2**15  # positions of a row


@struct.dataclass
class Sight:
    """Tokens of a group lie side by side, its prompt first, each answer's tokens side by side.

    Attributes:
      group_RL: as of TokenBatch.
      branch_RL: as of TokenBatch.
      branches: the largest branch; 1 where no group has several answers.
    """

    group_RL: Array
    branch_RL: Array
    branches: int = struct.field(pytree_node=False)


@struct.dataclass
class Spans:
    """The runs of tokens that each token sees: its own segment up to itself, and its prompt; int32 [R, L].

    A segment is a group's prompt, or one of its answers; where no group has several, the whole group. A token of
    padding is a segment of its own.

    Attributes:
      segment: a number for each; the next ``branches`` after a prompt's are its answers'.
      branch: 0 for a prompt; for all where no group has several answers.
      own: first token of the segment.
      prompt: first token of the group.
      prompt_end: past the last token of the prompt that an answer sees; ``prompt`` for tokens of a prompt.
      branches: most answers of a group; 1 where segments are groups.
    """

    segment: Array
    branch: Array
    own: Array
    prompt: Array
    prompt_end: Array
    branches: int = struct.field(pytree_node=False)

    def padded(self, length: int) -> Spans:
        """With padding after each row, up to ``length`` tokens."""
        rows, given = self.own.shape
        added = jnp.broadcast_to(jnp.arange(given, length, dtype=jnp.int32), (rows, length - given))
        new = Spans(jnp.zeros_like(added), jnp.zeros_like(added), added, added, added, self.branches)
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), self, new)

    def lowest(self, window: Array | int | None) -> Array:
        """First token of the row that the latest ``window`` positions of a token's sequence hold; None is all."""
        if window is None:
            return self.prompt
        index = jnp.broadcast_to(jnp.arange(self.own.shape[-1], dtype=jnp.int32), self.own.shape)
        # Distances count positions of a sequence: prompt, then this answer.
        shift = jnp.where(self.branch > 0, self.own - self.prompt_end, 0)
        reach = jnp.maximum(index - window + 1, -LONGEST)
        return jnp.maximum(self.prompt, jnp.where(reach >= self.own, reach, reach - shift))


def find_spans(sight: Sight) -> Spans:
    """What each token sees; the same for all layers, but for their windows."""
    group, branch = jnp.asarray(sight.group_RL), jnp.asarray(sight.branch_RL)
    branch = branch if sight.branches > 1 else jnp.zeros_like(branch)
    index = jnp.broadcast_to(jnp.arange(group.shape[1], dtype=jnp.int32), group.shape)

    def latest(starts: Array) -> Array:
        return jax.lax.cummax(jnp.where(starts, index, 0), axis=1)

    def changed(a: Array) -> Array:
        return (index == 0) | (a != jnp.roll(a, 1, axis=1))

    new_group = changed(group) | (group == 0)
    prompt, own = latest(new_group), latest(new_group | changed(branch))
    first_answer = (branch > 0) & (new_group | (jnp.roll(branch, 1, axis=1) == 0))
    prompt_end = jnp.where(branch > 0, latest(first_answer), prompt)
    return Spans(group * (sight.branches + 1) + branch, branch, own, prompt, prompt_end, sight.branches)


def blocks_between(low_L: Array, end_L: Array, queries: int, keys: int) -> Array:
    """Which blocks of keys hold one that lies in [low, end) of a query, or between two such: bool [I, J].

    Args:
      low_L: int32, for each query.
      end_L: int32.
      queries: of a block.
      keys: of a block.
    """
    first_I, end_I = block_ranges(low_L, end_L, queries, keys)
    block_J = jax.lax.expand_dims(jnp.arange(low_L.shape[-1] // keys), range(first_I.ndim))
    return (first_I[..., None] <= block_J) & (block_J < end_I[..., None])


def block_ranges(low_L: Array, end_L: Array, queries: int, keys: int) -> tuple[Array, Array]:
    """The blocks of keys from the first to past the last that the queries of a block see in [low, end), int32 [I].

    Where they see none, the range ends before it begins.
    """
    some_L = low_L < end_L
    blocked = (*low_L.shape[:-1], -1, queries)
    low_I = jnp.min(jnp.where(some_L, low_L, low_L.shape[-1]).reshape(blocked), axis=-1)
    end_I = jnp.max(jnp.where(some_L, end_L, 0).reshape(blocked), axis=-1)
    return low_I // keys, -(-end_I // keys)


def pad_positions(array: Array, length: int) -> Array:
    """Zeros after each row of [R, L, …], up to ``length`` positions."""
    return jnp.pad(array, [(0, 0), (0, length - array.shape[1]), *[(0, 0)] * (array.ndim - 2)])
