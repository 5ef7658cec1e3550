"""Several sources as one: weighted for training, where a weight is how often an epoch passes over it, or held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dpo_jax.data.example import Example
from dpo_jax.data.prepared import PreparedExamples


class Mixture:
    """Random access to weighted sources, one after the other; the pipeline shuffles them together.

    A weight of 2 gives every example twice an epoch; 0.5 gives half of them, drawn by the seed. Of the examples a b c d
    and e f, the weights 0.5 and 2 may give ``b d e f e f``.

    Args:
      sources: prepared examples with the same number of answers.
      weights: passes over each, > 0.
      seed: of the examples that a fraction takes; the order of an epoch is the pipeline's.
      shuffled: whether the examples lie in an order drawn by the seed, so that the first of them are a sample of all.

    Attributes:
      answers: answers of each example.
      fingerprint: identity of the examples and their weights, hexadecimal.
      tokenizer_fingerprint: of the tokenizer that encoded them.

    Raises:
      ValueError: the sources differ in their number of answers, or a weight leaves no example of one.
    """

    def __init__(
        self,
        sources: Sequence[PreparedExamples],
        weights: Sequence[float],
        seed: int = 0,
        *,
        shuffled: bool = False,
    ) -> None:
        if len({source.answers for source in sources}) != 1:
            counts = [source.answers for source in sources]
            raise ValueError(f"the sources of the mixture have {counts} answers an example; mix sources of one kind")
        self._sources = list(sources)
        rows = [_drawn(len(s), weight, [seed, k]) for k, (s, weight) in enumerate(zip(sources, weights, strict=True))]
        if not all(len(r) for r in rows):
            raise ValueError(f"the weights {list(weights)} leave no example of a source; raise the smallest")
        self._source = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
        self._row = np.concatenate(rows)
        if shuffled:
            order = np.random.default_rng(seed).permutation(len(self._row))
            self._source, self._row = self._source[order], self._row[order]
        self._first_uids = np.concatenate([[0], np.cumsum([len(s) for s in sources])])
        self.answers = sources[0].answers
        self.tokenizer_fingerprint = sources[0].tokenizer_fingerprint
        parts = [f"{s.fingerprint} {weight!r}" for s, weight in zip(sources, weights, strict=True)]
        kind = ["shuffled"] if shuffled else []
        self.fingerprint = hashlib.sha256("\n".join([str(seed), *parts, *kind]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, index: int) -> Example:
        source, row = int(self._source[index]), int(self._row[index])
        example = self._sources[source][row]
        # Each source numbers its examples from 0.
        return replace(example, uid=int(self._first_uids[source]) + row)

    def copies(self) -> np.ndarray:
        """int [n], which of the different examples, numbered from 0, stands in each place."""
        uids = self._first_uids[self._source] + self._row
        return np.unique(uids, return_inverse=True)[1]

    def lengths(self) -> np.ndarray:
        """int32 [n, 1 + answers], tokens of the prompt and of each answer."""
        return self._rows_of([source.lengths() for source in self._sources])

    def contents(self) -> np.ndarray:
        """int64 [n, 1 + answers], hashes of the prompt and of each answer."""
        return self._rows_of([source.contents() for source in self._sources])

    def roles(self) -> np.ndarray:
        """int [n, answers], roles of all answers."""
        return self._rows_of([source.roles() for source in self._sources])

    def token_range(self) -> tuple[int, int]:
        """(least, greatest) token of the sources."""
        ranges = [source.token_range() for source in self._sources]
        return min(least for least, _ in ranges), max(greatest for _, greatest in ranges)

    def _rows_of(self, tables: Sequence[np.ndarray]) -> np.ndarray:
        first = np.cumsum([0, *(len(table) for table in tables[:-1])])
        return np.concatenate(tables)[first[self._source] + self._row]


def _drawn(count: int, weight: float, seed: Sequence[int]) -> np.ndarray:
    whole, part = int(weight), round((weight - int(weight)) * count)
    extra = np.sort(np.random.default_rng(seed).permutation(count)[:part])
    return np.concatenate([np.tile(np.arange(count), whole), extra]).astype(np.int64)
