"""Label noise on purpose: a share of the labels of a source, flipped."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np

from dpo_jax.data import packing
from dpo_jax.data.example import Answer, Example
from dpo_jax.types import CHOSEN, REJECTED

_OTHER = {CHOSEN: REJECTED, REJECTED: CHOSEN}


class Flipped:
    """A source some of whose labels are wrong: the chosen answer is called rejected, the rejected one chosen.

    round(share · n) of the n different examples are flipped, drawn by the seed, wherever a mixture has them; those of a
    smaller share are among those of a larger one. Scores go with the labels, as of an annotator who took one answer for
    the other::

        clean     good (chosen, score 5)   bad (rejected, score 2)
        flipped   bad (chosen, score 5)    good (rejected, score 2)

    Args:
      source: the clean examples, with one answer or two.
      share: of the examples, in [0, 1].
      seed: of the draw.
      fingerprint: identity of the clean examples.

    Attributes:
      count: examples that are flipped, each as often as the source has it.
      fingerprint: identity of the examples with their labels, hexadecimal.
    """

    def __init__(self, source: Any, share: float, seed: int, fingerprint: str) -> None:
        self._source = source
        copy_of = source.copies() if hasattr(source, "copies") else np.arange(len(source))
        different = int(copy_of.max(initial=-1)) + 1
        # A stream of its own: the order of batches is drawn from the same seed.
        order = np.random.default_rng([seed, 0xF11B]).permutation(different)
        flipped = np.zeros(different, bool)
        flipped[order[: round(share * different)]] = True
        self._flipped = flipped[copy_of]
        self.count = int(self._flipped.sum())
        digest = hashlib.sha256(f"{fingerprint} flipped ".encode() + np.packbits(self._flipped).tobytes())
        self.fingerprint = digest.hexdigest()
        tokenizer = getattr(source, "tokenizer_fingerprint", None)
        if tokenizer is not None:
            self.tokenizer_fingerprint = tokenizer

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        return flip(example) if self._flipped[index] else example

    def lengths(self) -> np.ndarray:
        """int32 [n, 1 + answers], tokens of the prompt and of each answer."""
        return self._swapped(packing.example_lengths(self._source))

    def contents(self) -> np.ndarray:
        """int64 [n, 1 + answers], hashes of the prompt and of each answer."""
        return self._swapped(packing.example_contents(self._source))

    def _swapped(self, table: np.ndarray) -> np.ndarray:
        """Columns of flipped answers the other way round; the first is the prompt's."""
        table = np.array(table)
        table[self._flipped, 1:] = table[self._flipped, :0:-1]
        return table


def flip(example: Example) -> Example:
    """The example with its label the other way round; the chosen answer of a pair comes first, as ever."""
    if len(example.answers) == 1:
        answer = example.answers[0]
        return dataclasses.replace(example, answers=(dataclasses.replace(answer, role=_OTHER[answer.role]),))
    chosen, rejected = example.answers

    def called(answer: Answer, label: Answer) -> Answer:
        return dataclasses.replace(answer, role=label.role, score=label.score)

    return dataclasses.replace(example, answers=(called(rejected, chosen), called(chosen, rejected)))
