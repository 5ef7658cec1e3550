"""Prompts with the answers of other examples, which KTO measures how far the policy has moved by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dpo_jax.data.example import Example
from dpo_jax.data.layouts import Shape


def mismatch(examples: Sequence[Example]) -> list[Example]:
    """Each prompt with the answers of another example: those of the next one with another prompt, in the order of uids.

    So which answers meet which prompt depends on the examples of the batch, not on their order in it. Where all prompts
    are the same, as in a batch of one, there is no mismatched answer, and the next example is taken as it is.

    With uids and prompts (5, "a"), (2, "b"), (9, "a"): the order is 2, 5, 9; 2 "b" gets the answers of 5, 5 "a" those
    of 2 (9 has its own prompt), and 9 "a" those of 2.
    """
    order = sorted(range(len(examples)), key=lambda i: examples[i].uid)
    prompts = [examples[i].prompt.tobytes() for i in order]
    donors = {}
    for place, i in enumerate(order):
        ring = [(place + shift) % len(order) for shift in range(1, len(order))]
        other = next((p for p in ring if prompts[p] != prompts[place]), (place + 1) % len(order))
        donors[i] = order[other]
    return [replace(e, answers=examples[donors[i]].answers, family=None) for i, e in enumerate(examples)]


def mismatched_shape(shape: Shape) -> Shape:
    """What the batch of mismatched examples is promised to be; its packed rows have an eighth more room.

    They add up to about what the batch's own take, but are not planned to fill as many rows: of batches of four full
    rows of HH-harmless (512, 768 and 2,048 positions), 2 to 8 % would fit into four, 93 to 100 % fit into such four.
    """

    def roomier(count: int) -> int:
        return count + -(-count // 8)

    shape = replace(shape, with_prompt=False)
    if shape.row_length is None:
        return shape
    return replace(shape, row_length=roomier(shape.row_length), row_examples=roomier(shape.row_examples))
