"""Which examples share a row: a plan made from lengths alone, so that any step's rows can be found again.

The plan of an epoch is a function of (lengths, seed, epoch). The examples are shuffled; a buffer of the next ones is
kept; each row takes those that have waited longest until the next one does not fit, and then, as long as one fits, the
longest of the buffer that does. Every example is in exactly one row. Rows of 10, the lengths 3 2 7 6 5 4 in shuffled
order, a buffer of 5::

    row 0   3 2 5   buffer 3 2 7 6 5: 3 and 2 have waited longest, 7 does not fit, 5 is the longest that does
    row 1   7       buffer 7 6 4: nothing fits into the last three
    row 2   6 4

So a row's examples are mostly neighbours in shuffled order: of all lengths, and of like number from row to row. Were
rows filled with the longest at once, some would hold a few long examples and others many short ones, and a step of few
rows would weigh an example by its length. The short ones that fill rows come before their turn, which leaves longer
ones to the rows made last; so an epoch takes its rows in shuffled order.

Examples of one prompt can be kept together, as a *family* that lies in a row as one: a prompt once, and each different
answer once. The six pairs of four answers take four answers' room, not twelve.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from dpo_jax.data.example import Example

LOOK_AHEAD = 1024  # examples


@dataclass(frozen=True)
class Rows:
    """Which examples lie in each row.

    Attributes:
      members: int64 [examples], indices of examples, row by row.
      starts: int64 [rows + 1], where each row begins in ``members``.
    """

    members: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Rows:
        """From the members of each row."""
        return cls(np.array(list(itertools.chain(*rows)), np.int64), np.cumsum([0, *map(len, rows)]))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.members[self.starts[row] : self.starts[row + 1]]

    def reordered(self, order: np.ndarray) -> Rows:
        """The same rows, in the order of these indices."""
        return Rows.of([self[row].tolist() for row in order.tolist()])


@runtime_checkable
class Measured(Protocol):
    """A source that knows the lengths and the contents of its examples without reading them."""

    def lengths(self) -> np.ndarray: ...

    def contents(self) -> np.ndarray: ...


class Sized(Protocol):
    """A random-access collection of examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def example_lengths(source: Sized) -> np.ndarray:
    """Lengths of all examples of a source.

    Args:
      source: the examples; read one by one unless it has ``lengths()``.

    Returns:
      int32 [n, 1 + A], tokens of the prompt and of each answer.
    """
    if isinstance(source, Measured):
        return source.lengths()
    examples = (source[i] for i in range(len(source)))
    return np.array([[len(e.prompt), *(len(a.tokens) for a in e.answers)] for e in examples], np.int32)


def example_contents(source: Sized) -> np.ndarray:
    """Which prompts and answers of a source are equal.

    Args:
      source: the examples; read one by one unless it has ``contents()``.

    Returns:
      int64 [n, 1 + A], a hash of the prompt and of each answer: equal numbers are equal contents.
    """
    if isinstance(source, Measured):
        return source.contents()
    return np.array([contents_of(source[i]) for i in range(len(source))], np.int64)


def contents_of(example: Example) -> list[int]:
    """Hashes of an example's prompt and of each of its answers."""
    parts = [np.asarray(example.prompt, np.int32).tobytes(), *(answer.content for answer in example.answers)]
    return [int.from_bytes(hashlib.blake2b(p, digest_size=8).digest(), "big", signed=True) for p in parts]


@dataclass(frozen=True)
class Families:
    """Examples that are placed as one.

    Attributes:
      members: indices of the examples of each family.
      positions: int64 [families], positions that each takes in a row.
    """

    members: list[list[int]]
    positions: np.ndarray

    @property
    def counts(self) -> list[int]:
        """Examples of each family."""
        return list(map(len, self.members))


def single(lengths: np.ndarray) -> Families:
    """Every example on its own."""
    return Families([[i] for i in range(len(lengths))], row_positions(lengths))


def families(
    lengths: np.ndarray, contents: np.ndarray, *, prompt_answers: int, row_length: int, row_examples: int
) -> Families:
    """Puts examples of equal prompts together; a family that outgrows a limit is followed by another of its prompt.

    With prompts a a b a and answers (1, 2) (1, 3) (4, 5) (2, 3), the families are {0, 1, 3}, of the answers 1 2 3, and
    {2}.

    Args:
      lengths: int [n, 1 + A], tokens of the prompt and of each answer.
      contents: int64 [n, 1 + A], as from :func:`example_contents`.
      prompt_answers: most different answers of a family.
      row_length: positions of a row.
      row_examples: most examples in a row.

    Returns:
      The families, in the order of their first examples.
    """
    found: list[list[int]] = []
    sizes: list[int] = []
    latest: dict[int, tuple[int, dict[int, int]]] = {}  # of each prompt: its latest family, and the answers there
    for i, (prompt, *answers) in enumerate(contents.tolist()):
        length, *rest = lengths[i].tolist()
        own = {answer: n - 1 for answer, n in zip(answers, rest, strict=True)}
        place, known = latest.get(prompt, (-1, {}))
        joined = {**known, **own}
        size = length + sum(joined.values())
        full = place < 0 or len(joined) > prompt_answers or size > row_length or len(found[place]) == row_examples
        if full:
            place, joined, size = len(found), own, length + sum(own.values())
            found.append([])
            sizes.append(0)
        found[place].append(i)
        sizes[place] = size
        latest[prompt] = place, joined
    return Families(found, np.array(sizes, np.int64))


def row_positions(lengths: np.ndarray) -> np.ndarray:
    """Positions that each example takes in a row: its prompt once, and all but the last token of each answer.

    Args:
      lengths: int [n, 1 + A], tokens of the prompt and of each answer.

    Returns:
      int64 [n].
    """
    return lengths.astype(np.int64).sum(axis=1) - (lengths.shape[1] - 1)


def shuffled(count: int, *key: int) -> np.ndarray:
    """A permutation of ``count`` indices, drawn by the key alone."""
    return np.random.default_rng(key).permutation(count)


def plan_rows(
    positions: np.ndarray,
    order: np.ndarray,
    *,
    row_length: int,
    row_examples: int,
    counts: Sequence[int] | None = None,
    look_ahead: int = LOOK_AHEAD,
) -> Rows:
    """Puts examples, or families of them, into rows; see the module's table.

    Args:
      positions: int [n], positions that each example takes.
      order: int [m], indices of the examples to place, in the order in which they come.
      row_length: positions of a row.
      row_examples: most examples in a row.
      counts: of the examples in each family, at most ``row_examples``; None is one.
      look_ahead: examples in the buffer.

    Returns:
      The rows; each index of ``order`` is in exactly one.

    Raises:
      ValueError: an example is longer than a row.
    """
    longest = int(positions[order].max(initial=0))
    if longest > row_length:
        worst = order[int(np.argmax(positions[order]))]
        raise ValueError(
            f"example number {worst} takes {longest} positions, a row has {row_length} (data.row_length), and "
            f"{int((positions[order] > row_length).sum())} of {len(order)} examples are longer than a row; raise that "
            "key, or lower data.prompt_length and data.answer_length so that examples are truncated"
        )
    waiting = _Buffer(positions.tolist(), counts or [1] * len(positions))
    rows: list[list[int]] = []
    for index in order.tolist():
        waiting.add(index)
        if len(waiting) >= look_ahead:
            rows.append(_take_row(waiting, row_length, row_examples))
    while len(waiting):
        rows.append(_take_row(waiting, row_length, row_examples))
    return Rows.of(rows)


def plan_examples(examples: Sized, *, row_length: int, row_examples: int) -> Rows:
    """Puts examples into rows as they come; see :func:`plan_rows`."""
    positions = row_positions(example_lengths(examples))
    return plan_rows(positions, np.arange(len(positions)), row_length=row_length, row_examples=row_examples)


def _take_row(waiting: _Buffer, room: int, most: int) -> list[int]:
    row: list[int] = []
    for take in (waiting.take_oldest, waiting.take_longest):
        while most and (index := take(room, most)) is not None:
            row.append(index)
            room, most = room - waiting.sizes[index], most - waiting.counts[index]
    return row


class _Buffer:
    """Examples, or families of them, that wait for a row, by age and by size."""

    def __init__(self, sizes: Sequence[int], counts: Sequence[int]) -> None:
        self.sizes, self.counts = sizes, counts
        self._by_size: list[tuple[int, int, int]] = []  # size, minus the arrival, index: the oldest of equals is last
        self._by_age: deque[tuple[int, int]] = deque()  # arrival, index
        self._gone: set[int] = set()  # arrivals that have left through _by_size
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._by_size)

    def add(self, index: int) -> None:
        bisect.insort(self._by_size, (self.sizes[index], -self._arrivals, index))
        self._by_age.append((self._arrivals, index))
        self._arrivals += 1

    def take_oldest(self, room: int, most: int) -> int | None:
        """The oldest one; None where it takes more than ``room`` positions or ``most`` examples, or there is none."""
        while self._by_age and self._by_age[0][0] in self._gone:
            self._gone.remove(self._by_age.popleft()[0])
        if not self._by_age:
            return None
        arrival, index = self._by_age[0]
        if self.sizes[index] > room or self.counts[index] > most:
            return None
        self._by_age.popleft()
        del self._by_size[bisect.bisect_left(self._by_size, (self.sizes[index], -arrival, index))]
        return index

    def take_longest(self, room: int, most: int) -> int | None:
        """The longest of at most ``room`` positions and ``most`` examples, the oldest of equals; None: none fits."""
        place = bisect.bisect_right(self._by_size, (room + 1,)) - 1
        while place >= 0 and self.counts[self._by_size[place][2]] > most:
            place -= 1
        if place < 0:
            return None
        _, minus_arrival, index = self._by_size.pop(place)
        self._gone.add(-minus_arrival)
        return index
