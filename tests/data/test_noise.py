"""Labels flipped on purpose: as many as asked for, the same for a seed, and nothing else of the examples."""

from __future__ import annotations

import numpy as np
import pytest

from dpo_jax.data import packing
from dpo_jax.data.example import Answer, Example
from dpo_jax.data.noise import Flipped, flip
from dpo_jax.types import CHOSEN, REJECTED
from tests.tiny_run import make_examples


def answer(tokens: list[int], role: int, score: float) -> Answer:
    return Answer(np.array(tokens, np.int32), np.ones(len(tokens), np.float32), role, score)


def first_tokens(source) -> list[int]:
    return [int(source[i].answers[0].tokens[0]) for i in range(len(source))]


def test_a_flipped_pair_is_the_table_of_the_docstring() -> None:
    good, bad = answer([7, 8], CHOSEN, 5.0), answer([9], REJECTED, 2.0)
    pair = flip(Example(3, np.array([1], np.int32), (good, bad)))
    assert [(a.tokens.tolist(), a.role, a.score) for a in pair.answers] == [([9], CHOSEN, 5.0), ([7, 8], REJECTED, 2.0)]
    assert pair.uid == 3
    single = flip(Example(0, np.array([1], np.int32), (good,)))
    assert [(a.tokens.tolist(), a.role, a.score) for a in single.answers] == [([7, 8], REJECTED, 5.0)]


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.1, 3), (0.4, 10), (1.0, 26)])
def test_as_many_labels_are_flipped_as_asked_for(share: float, count: int) -> None:
    clean = make_examples(26, 2, 0)
    noisy = Flipped(clean, share, 0, "x")
    changed = sum(a != b for a, b in zip(first_tokens(clean), first_tokens(noisy), strict=True))
    assert changed == noisy.count == count


def test_larger_shares_hold_smaller_ones_and_seeds_differ() -> None:
    clean = make_examples(40, 2, 0)

    def which(share: float, seed: int) -> set[int]:
        noisy = first_tokens(Flipped(clean, share, seed, "x"))
        return {i for i, (a, b) in enumerate(zip(first_tokens(clean), noisy, strict=True)) if a != b}

    assert which(0.1, 0) < which(0.4, 0)
    assert which(0.4, 0) == which(0.4, 0) != which(0.4, 1)
    prints = {Flipped(clean, share, seed, "x").fingerprint for share in (0.1, 0.4) for seed in (0, 1)}
    assert len(prints) == 4


def test_lengths_and_contents_are_those_of_the_flipped_examples() -> None:
    noisy = Flipped(make_examples(20, 2, 0), 0.5, 0, "x")
    read_one_by_one = packing.example_lengths([noisy[i] for i in range(20)])
    np.testing.assert_array_equal(packing.example_lengths(noisy), read_one_by_one)
    assert (read_one_by_one != packing.example_lengths(make_examples(20, 2, 0))).any()
    contents = [packing.contents_of(noisy[i]) for i in range(20)]
    np.testing.assert_array_equal(packing.example_contents(noisy), contents)
