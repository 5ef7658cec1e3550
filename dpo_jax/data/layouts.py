"""Layouts: how examples lie in the rows of a TokenBatch. One function each, the same contract.

Every layout gives each answer one slot (two when the loss also scores the prompt: the answer's, then its prompt's), in
the order of the examples, so that ``logps.reshape(X, A, C)`` is the same in all of them but for places that are UNUSED.
To add one, write a function ``(examples, shape) → TokenBatch`` and its line in LAYOUTS.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from dpo_jax.data.example import Answer, Example
from dpo_jax.types import PROMPT, UNUSED, TokenBatch


@dataclass(frozen=True)
class Shape:
    """What examples are promised to be, so that every batch has the same static shape.

    Attributes:
      answers: A, answers of an example.
      prompt_length: longest prompt, tokens, its BOS included.
      answer_length: longest answer, tokens, its EOS included.
      with_prompt: whether each answer's slot is followed by one for its prompt.
      with_reference: whether the answers carry stored log-probabilities of the reference.
      row_length: positions of a row of the packed layout; None where another layout is used.
      row_examples: most examples in a row of the packed layout.
    """

    answers: int
    prompt_length: int
    answer_length: int
    with_prompt: bool = False
    row_length: int | None = None
    row_examples: int = 8
    with_reference: bool = False

    @property
    def sequence_length(self) -> int:
        """Longest prompt + answer, tokens."""
        return self.prompt_length + self.answer_length


class _Targets(NamedTuple):
    """What a slot predicts; arrays of one length."""

    sources: np.ndarray
    tokens: np.ndarray
    weights: np.ndarray
    reference: np.ndarray | None
    slot: int


class _Row:
    """One row being filled: tokens, then the targets that they predict."""

    def __init__(self) -> None:
        self.inputs: list[tuple[np.ndarray, np.ndarray, int, int]] = []  # tokens, positions, group, branch
        self.targets: list[_Targets] = []
        self.slots: list[tuple[int, float]] = []  # role, score
        self.length = 0

    def add_input(self, tokens: np.ndarray, first_position: int, group: int, branch: int) -> int:
        """Appends tokens; returns the index in the row of the first."""
        start = self.length
        self.inputs.append((tokens, first_position + np.arange(len(tokens)), group, branch))
        self.length += len(tokens)
        return start

    def add_answer(self, prompt_start: int, prompt: np.ndarray, answer: Answer, group: int, branch: int) -> None:
        """Appends an answer after its prompt, with a target for each of its tokens.

        The last token is only ever predicted, so it is no input: it would predict what nobody asks for.
        """
        start = self.add_input(answer.tokens[:-1], len(prompt), group, branch)
        sources = np.concatenate([[prompt_start + len(prompt) - 1], start + np.arange(len(answer.tokens) - 1)])
        targets = _Targets(sources, answer.tokens, answer.weights, answer.reference, len(self.slots))
        self.add_slot(targets, answer.role, answer.score)

    def add_example(self, example: Example, with_prompt: bool, group: int) -> None:
        """Appends the prompt once, and its answers as branches."""
        start = self.add_input(example.prompt, 0, group, branch=0)
        for i, answer in enumerate(example.answers):
            self.add_answer(start, example.prompt, answer, group, branch=i + 1)
            if with_prompt:
                self.add_prompt_slot(start, example.prompt, used=i == 0)

    def add_prompt_slot(self, prompt_start: int, prompt: np.ndarray, used: bool) -> None:
        """A slot for the prompt's own targets; empty unless ``used``, so that a prompt counts once."""
        n = len(prompt) - 1 if used else 0
        # No loss reads the reference's log-probability of a prompt: 0 is stored for it.
        ones, zeros = np.ones(n, np.float32), np.zeros(n, np.float32)
        targets = _Targets(prompt_start + np.arange(n), prompt[1 : n + 1], ones, zeros, len(self.slots))
        self.add_slot(targets, PROMPT if used else UNUSED, 0.0)

    def add_slot(self, targets: _Targets, role: int, score: float) -> None:
        self.targets.append(targets)
        self.slots.append((role, score))


def concatenated(examples: Sequence[Example], shape: Shape) -> TokenBatch:
    """Each answer in a row of its own, after its own copy of the prompt.

    With prompt (7, 8) and answers (3, 2) and (4, 2), answer_length 3 (`.` is padding)::

        row 0   tokens 7 8 3 .   position 0 1 2 .   group 1 1 1 .   branch 0 0 1 .   source 1 2 .   target 3 2 .
        row 1   tokens 7 8 4 .   position 0 1 2 .   group 1 1 1 .   branch 0 0 1 .   source 1 2 .   target 4 2 .

    Args:
      examples: X examples.
      shape: what each of them is promised to be.

    Returns:
      TokenBatch with R = X·A rows, S = 1 (or 2) slots, L = prompt_length + answer_length − 1.

    Raises:
      ValueError: an example is not what ``shape`` promises.
    """
    rows = []
    for example in examples:
        _check(example, shape)
        for i, answer in enumerate(example.answers):
            row = _Row()
            start = row.add_input(example.prompt, 0, group=1, branch=0)
            row.add_answer(start, example.prompt, answer, group=1, branch=1)
            if shape.with_prompt:
                row.add_prompt_slot(start, example.prompt, used=i == 0)
            rows.append(row)
    return _stack(rows, _size(shape, answers=1))


def shared_prefix(examples: Sequence[Example], shape: Shape) -> TokenBatch:
    """The prompt once, then its answers as branches that do not see each other.

    With prompt (7, 8) and answers (3, 2) and (4, 2), answer_length 3 (`.` is padding)::

        tokens    7 8 3 4 . .
        position  0 1 2 2 . .
        group     1 1 1 1 . .
        branch    0 0 1 2 . .
        source    1 2 1 3 . .    the rejected answer's first target has the last prompt token as its source
        target    3 2 4 2 . .
        slot      0 0 1 1 . .

    Args:
      examples: X examples.
      shape: what each of them is promised to be.

    Returns:
      TokenBatch with R = X rows, S = A (or 2A) slots, L = prompt_length + A (answer_length − 1).

    Raises:
      ValueError: an example is not what ``shape`` promises.
    """
    rows = []
    for example in examples:
        _check(example, shape)
        row = _Row()
        row.add_example(example, shape.with_prompt, group=1)
        rows.append(row)
    return _stack(rows, _size(shape, shape.answers))


def packed(examples: Sequence[Example], shape: Shape) -> TokenBatch:
    """Several examples a row, each with its prompt once, in the order given; a row ends where the next does not fit.

    ``dpo_jax/data/packing.py`` finds an order that leaves little room. No example sees another: they are of different
    groups, and each begins with position 0. With (7, 8) → (3, 2), (4, 2) and (9) → (5, 2), (2), row_length 8,
    row_examples 2 (`.` is padding)::

        tokens    7 8 3 4 9 5 . .
        position  0 1 2 2 0 1 . .
        group     1 1 1 1 2 2 . .
        branch    0 0 1 2 0 1 . .
        source    1 2 1 3 4 5 4 . . .    the last answer, of its EOS alone, is predicted by the second prompt
        target    3 2 4 2 5 2 2 . . .
        slot      0 0 1 1 2 2 3 . . .

    Args:
      examples: X examples.
      shape: what each of them is promised to be, and the size of the rows.

    Returns:
      TokenBatch with as many rows as are needed, S = row_examples · A (or 2A) slots, L = row_length. The slots after
      the last example of a row are UNUSED.

    Raises:
      ValueError: an example is not what ``shape`` promises, or is longer than a row.
    """
    if shape.row_length is None:
        raise ValueError("data.row_length is not set; the packed layout needs the positions of a row")
    rows: list[_Row] = []
    taken = shape.row_examples
    for example in examples:
        _check(example, shape)
        positions = len(example.prompt) + sum(len(a.tokens) - 1 for a in example.answers)
        if positions > shape.row_length:
            raise ValueError(
                f"example {example.uid} takes {positions} positions, a row has {shape.row_length} (data.row_length); "
                "raise that key, or truncate the example when encoding it"
            )
        if taken == shape.row_examples or rows[-1].length + positions > shape.row_length:
            rows.append(_Row())
            taken = 0
        taken += 1
        rows[-1].add_example(example, shape.with_prompt, group=taken)
    return _stack(rows, _row_size(shape, shape.row_length))


LAYOUTS: dict[str, Callable[[Sequence[Example], Shape], TokenBatch]] = {
    "concatenated": concatenated,
    "shared_prefix": shared_prefix,
    "packed": packed,
}


def pad_rows(batch: TokenBatch, rows: int) -> TokenBatch:
    """Appends rows of padding until there are ``rows``; their slots are UNUSED and count nowhere."""
    missing = rows - batch.tokens_RL.shape[0]
    return jax.tree.map(lambda a: np.pad(a, ((0, missing), (0, 0))), batch)


def split_targets(
    values_RM: np.ndarray, batch: TokenBatch, examples: Sequence[Example]
) -> list[tuple[np.ndarray, ...]]:
    """Values of targets, back by example: what a layout does to the answers' tokens, undone.

    Args:
      values_RM: a value for each target.
      batch: what a layout made of the examples, without slots for prompts.
      examples: the examples, in the same order.

    Returns:
      For each example, [n] for each of its answers.
    """
    lengths = iter([len(answer.tokens) for example in examples for answer in example.answers])
    found = []
    for values_M, role_S in zip(values_RM, np.asarray(batch.role_RS), strict=True):
        borders = np.cumsum([next(lengths) for _ in np.flatnonzero(role_S != UNUSED)])
        found += np.split(values_M, borders)[:-1]
    answers = iter(found)
    return [tuple(itertools.islice(answers, len(example.answers))) for example in examples]


def _check(example: Example, shape: Shape) -> None:
    if len(example.answers) != shape.answers:
        raise ValueError(
            f"example {example.uid} has {len(example.answers)} answers where {shape.answers} are expected: paired "
            "losses take (chosen, rejected), sft and unpaired data have one"
        )
    lengths = [len(a.tokens) for a in example.answers]
    if not 1 <= len(example.prompt) <= shape.prompt_length or not all(1 <= n <= shape.answer_length for n in lengths):
        raise ValueError(
            f"example {example.uid} has {len(example.prompt)} prompt tokens and answers of {lengths} tokens; expected "
            f"1 to {shape.prompt_length} (data.prompt_length) and 1 to {shape.answer_length} (data.answer_length); "
            "raise these keys, or truncate the example when encoding it"
        )


@dataclass(frozen=True)
class _Size:
    """Static sizes of a row: positions, targets and slots."""

    length: int
    targets: int
    slots: int
    with_reference: bool


def _size(shape: Shape, answers: int) -> _Size:
    """A row of ``answers`` answers to one prompt."""
    return _Size(
        length=shape.prompt_length + answers * (shape.answer_length - 1),
        targets=answers * shape.answer_length + shape.with_prompt * (shape.prompt_length - 1),
        slots=answers * (1 + shape.with_prompt),
        with_reference=shape.with_reference,
    )


def _row_size(shape: Shape, row_length: int) -> _Size:
    """A row of several examples. One of n positions has at most n + A − 1 targets, its prompt's included."""
    return _Size(
        length=row_length,
        targets=row_length + shape.row_examples * (shape.answers - 1),
        slots=shape.row_examples * shape.answers * (1 + shape.with_prompt),
        with_reference=shape.with_reference,
    )


_FLOATS = ("weight_RM", "score_RS", "reference_RM")


def _stack(rows: Sequence[_Row], size: _Size) -> TokenBatch:
    """Copies filled rows into arrays of one static shape; what is not filled is padding."""
    shapes = {"RL": (len(rows), size.length), "RM": (len(rows), size.targets), "RS": (len(rows), size.slots)}
    out = {
        name: np.zeros(shapes[name[-2:]], np.float32 if name in _FLOATS else np.int32)
        for name in TokenBatch.__dataclass_fields__
        if name != "reference_RM" or size.with_reference
    }
    for r, row in enumerate(rows):
        at = 0
        for tokens, positions, group, branch in row.inputs:
            span = slice(at, at := at + len(tokens))
            out["tokens_RL"][r, span], out["position_RL"][r, span] = tokens, positions
            out["group_RL"][r, span], out["branch_RL"][r, span] = group, branch
        at = 0
        for targets in row.targets:
            span = slice(at, at := at + len(targets.tokens))
            out["source_RM"][r, span], out["target_RM"][r, span] = targets.sources, targets.tokens
            out["weight_RM"][r, span], out["slot_RM"][r, span] = targets.weights, targets.slot
            if size.with_reference:
                assert targets.reference is not None
                out["reference_RM"][r, span] = targets.reference
        for s, (role, score) in enumerate(row.slots):
            out["role_RS"][r, s], out["score_RS"][r, s] = role, score
    return TokenBatch(**out)
