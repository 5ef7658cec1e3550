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
      prompt_answers: most different answers of a family in the packed layout; None where there are no families.
    """

    answers: int
    prompt_length: int
    answer_length: int
    with_prompt: bool = False
    row_length: int | None = None
    row_examples: int = 8
    with_reference: bool = False
    prompt_answers: int | None = None

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
        self.slots: list[tuple[int, float, int]] = []  # role, score, the slot whose targets count
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
        self.targets.append(_Targets(sources, answer.tokens, answer.weights, answer.reference, len(self.slots)))
        self.add_slot(answer.role, answer.score)

    def add_family(self, examples: Sequence[Example], with_prompt: bool, group: int) -> None:
        """Appends the prompt of all examples once, and each different answer once, as a branch."""
        prompt = examples[0].prompt
        start = self.add_input(prompt, 0, group, branch=0)
        first = len(self.slots)
        laid: dict[bytes | int, int] = {}
        for example in examples:
            for i, answer in enumerate(example.answers):
                slot = laid.setdefault(_identity(example, i), len(self.slots))
                if slot == len(self.slots):
                    self.add_answer(start, prompt, answer, group, branch=len(laid))
                else:
                    self.add_slot(answer.role, answer.score, slot)
                if with_prompt:
                    self.add_prompt_slot(start, prompt, used=i == 0, laid=first + 1)

    def add_prompt_slot(self, prompt_start: int, prompt: np.ndarray, used: bool, laid: int) -> None:
        """A slot for the prompt's own targets; UNUSED unless ``used``, so that a prompt counts once an example.

        The targets are laid in the slot ``laid``, a family's first.
        """
        slot = len(self.slots)
        if slot == laid:
            n = len(prompt) - 1
            # No loss reads the reference's log-probability of a prompt: 0 is stored for it.
            ones, zeros = np.ones(n, np.float32), np.zeros(n, np.float32)
            self.targets.append(_Targets(prompt_start + np.arange(n), prompt[1:], ones, zeros, slot))
        self.add_slot(PROMPT, 0.0, laid) if used else self.add_slot(UNUSED, 0.0)

    def add_slot(self, role: int, score: float, scored: int | None = None) -> None:
        self.slots.append((role, score, len(self.slots) if scored is None else scored))


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
            if shape.with_prompt and i == 0:
                row.add_prompt_slot(start, example.prompt, used=True, laid=1)
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
        row.add_family([example], shape.with_prompt, group=1)
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

    Examples of a family share a prompt and equal answers; (7, 8) → (3, 2), (4, 2) and (7, 8) → (5, 2), (3, 2)::

        tokens    7 8 3 4 5 . . .
        position  0 1 2 2 2 . . .
        group     1 1 1 1 1 . . .
        branch    0 0 1 2 3 . . .
        source    1 2 1 3 1 4 . . . . .
        target    3 2 4 2 5 2 . . . . .
        slot      0 0 1 1 2 2 . . . . .
        scored    0 1 2 0               the second rejected answer is the first chosen one: its targets count twice

    Args:
      examples: X examples.
      shape: what each of them is promised to be, and the size of the rows.

    Returns:
      TokenBatch with as many rows as are needed, S = row_examples · A (or 2A) slots, L = row_length. The slots after
      the last example of a row are UNUSED.

    Raises:
      ValueError: an example is not what ``shape`` promises, or is longer than a row.
    """
    most = shape.prompt_answers or shape.answers
    if shape.row_length is None:
        raise ValueError("data.row_length is not set; the packed layout needs the positions of a row")
    rows: list[_Row] = []
    taken = shape.row_examples
    for family in _families(examples):
        positions, answers = _measure(family, shape)
        if positions > shape.row_length:
            raise ValueError(
                f"example {family[0].uid} takes {positions} positions, a row has {shape.row_length} "
                "(data.row_length); raise that key, or truncate the example when encoding it"
            )
        assert len(family) <= shape.row_examples and answers <= most
        if taken + len(family) > shape.row_examples or rows[-1].length + positions > shape.row_length:
            rows.append(_Row())
            taken = 0
        rows[-1].add_family(family, shape.with_prompt, group=taken + 1)
        taken += len(family)
    return _stack(rows, _row_size(shape, shape.row_length, most))


def _families(examples: Sequence[Example]) -> list[list[Example]]:
    """Runs of examples of one family; those of none alone."""
    names = [(e.family, e.prompt.tobytes() if e.family is not None else i) for i, e in enumerate(examples)]
    runs = itertools.groupby(zip(names, examples, strict=True), key=lambda item: item[0])
    return [[example for _, example in run] for _, run in runs]


def _measure(family: Sequence[Example], shape: Shape) -> tuple[int, int]:
    """(positions that a family takes, its different answers)."""
    for example in family:
        _check(example, shape)
    answers = {_identity(e, i): len(answer.tokens) - 1 for e in family for i, answer in enumerate(e.answers)}
    return len(family[0].prompt) + sum(answers.values()), len(answers)


def _identity(example: Example, i: int) -> bytes | int:
    """What tells answer ``i`` from the others beside it: in a family its content, else its place."""
    return i if example.family is None else example.answers[i].content


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
    slot_RM, scored_RS, role_RS = (np.asarray(a) for a in (batch.slot_RM, batch.scored_RS, batch.role_RS))
    # The targets of a slot lie side by side, before padding, whose slot is 0.
    places = zip(*np.nonzero(role_RS != UNUSED), strict=True)
    first = ((r, int(np.argmax(slot_RM[r] == scored_RS[r, s]))) for r, s in places)
    answers = iter([values_RM[r, start : start + n] for (r, start), n in zip(first, lengths, strict=True)])
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
    branches: int
    with_reference: bool


def _size(shape: Shape, answers: int) -> _Size:
    """A row of ``answers`` answers to one prompt."""
    return _Size(
        length=shape.prompt_length + answers * (shape.answer_length - 1),
        targets=answers * shape.answer_length + shape.with_prompt * (shape.prompt_length - 1),
        slots=answers * (1 + shape.with_prompt),
        branches=answers,
        with_reference=shape.with_reference,
    )


def _row_size(shape: Shape, row_length: int, branches: int) -> _Size:
    """A row of several examples.

    K answers with their prompt, in n positions, have at most n + K − 1 targets, the prompt's included. All examples of
    a row may be of one family; those of none have each a prompt of their own.
    """
    prompts = 1 if shape.prompt_answers else shape.row_examples
    return _Size(
        length=row_length,
        targets=row_length + shape.row_examples * shape.answers - prompts,
        slots=shape.row_examples * shape.answers * (1 + shape.with_prompt),
        branches=branches,
        with_reference=shape.with_reference,
    )


_FLOATS = ("weight_RM", "score_RS", "reference_RM")


def _stack(rows: Sequence[_Row], size: _Size) -> TokenBatch:
    """Copies filled rows into arrays of one static shape; what is not filled is padding."""
    shapes = {"RL": (len(rows), size.length), "RM": (len(rows), size.targets), "RS": (len(rows), size.slots)}
    out = {
        name: np.zeros(shapes[name[-2:]], np.float32 if name in _FLOATS else np.int32)
        for name in TokenBatch.__dataclass_fields__
        if name != "branches" and (name != "reference_RM" or size.with_reference)
    }
    out["scored_RS"][:] = np.arange(size.slots)
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
        for s, (role, score, scored) in enumerate(row.slots):
            out["role_RS"][r, s], out["score_RS"][r, s], out["scored_RS"][r, s] = role, score, scored
    return TokenBatch(**out, branches=size.branches)
