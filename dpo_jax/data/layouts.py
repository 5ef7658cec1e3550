"""Layouts: how examples lie in the rows of a TokenBatch. One function each, the same contract.

Every layout gives each answer one slot (two when the loss also scores the prompt: the answer's, then its prompt's), in the
order of the examples, so that ``logps.reshape(X, A, C)`` is the same in all of them. To add one, write a function
``(examples, shape) → TokenBatch`` and its line in LAYOUTS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_jax.data.example import Answer, Example
from dpo_jax.types import PROMPT, TokenBatch


@dataclass(frozen=True)
class Shape:
    """What examples are promised to be, so that every batch has the same static shape.

    Attributes:
      answers: A, answers of an example.
      prompt_length: longest prompt, tokens, its BOS included.
      answer_length: longest answer, tokens, its EOS included.
      with_prompt: whether each answer's slot is followed by one for its prompt.
    """

    answers: int
    prompt_length: int
    answer_length: int
    with_prompt: bool = False

    @property
    def sequence_length(self) -> int:
        """Longest prompt + answer, tokens."""
        return self.prompt_length + self.answer_length


class _Row:
    """One row being filled: tokens, then the targets that they predict."""

    def __init__(self) -> None:
        self.inputs: list[tuple[np.ndarray, np.ndarray, int, int]] = []  # tokens, positions, group, branch
        self.targets: list[tuple[np.ndarray, np.ndarray, np.ndarray, int]] = []  # sources, tokens, weights, slot
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
        self.add_targets(sources, answer.tokens, answer.weights, answer.role, answer.score)

    def add_prompt_slot(self, prompt_start: int, prompt: np.ndarray, used: bool) -> None:
        """A slot for the prompt's own targets; empty unless ``used``, so that a prompt counts once."""
        n = len(prompt) - 1 if used else 0
        self.add_targets(
            prompt_start + np.arange(n), prompt[1 : n + 1], np.ones(n, np.float32), PROMPT if used else 0, 0.0
        )

    def add_targets(self, sources: np.ndarray, tokens: np.ndarray, weights: np.ndarray, role: int, score: float) -> None:
        self.targets.append((sources, tokens, weights, len(self.slots)))
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
    return _stack(rows, shape, answers=1)


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
        start = row.add_input(example.prompt, 0, group=1, branch=0)
        for i, answer in enumerate(example.answers):
            row.add_answer(start, example.prompt, answer, group=1, branch=i + 1)
            if shape.with_prompt:
                row.add_prompt_slot(start, example.prompt, used=i == 0)
        rows.append(row)
    return _stack(rows, shape, answers=shape.answers)


LAYOUTS: dict[str, Callable[[Sequence[Example], Shape], TokenBatch]] = {
    "concatenated": concatenated,
    "shared_prefix": shared_prefix,
}


def pad_rows(batch: TokenBatch, rows: int) -> TokenBatch:
    """Appends rows of padding until there are ``rows``; their slots are UNUSED and count nowhere."""
    missing = rows - batch.tokens_RL.shape[0]
    return TokenBatch(**{name: np.pad(a, ((0, missing), (0, 0))) for name, a in vars(batch).items()})


def _check(example: Example, shape: Shape) -> None:
    if len(example.answers) != shape.answers:
        raise ValueError(
            f"example {example.uid} has {len(example.answers)} answers where {shape.answers} are expected: paired losses "
            "take (chosen, rejected), sft and unpaired data have one"
        )
    lengths = [len(a.tokens) for a in example.answers]
    if not 1 <= len(example.prompt) <= shape.prompt_length or not all(1 <= n <= shape.answer_length for n in lengths):
        raise ValueError(
            f"example {example.uid} has {len(example.prompt)} prompt tokens and answers of {lengths} tokens; expected 1 to "
            f"{shape.prompt_length} (data.prompt_length) and 1 to {shape.answer_length} (data.answer_length); raise these "
            "keys, or truncate the example when encoding it"
        )


def _stack(rows: Sequence[_Row], shape: Shape, answers: int) -> TokenBatch:
    """Copies filled rows of ``answers`` answers into arrays of one static shape; what is not filled is padding."""
    length = shape.prompt_length + answers * (shape.answer_length - 1)
    targets = answers * shape.answer_length + shape.with_prompt * (shape.prompt_length - 1)
    slots = answers * (1 + shape.with_prompt)
    shapes = {"RL": (len(rows), length), "RM": (len(rows), targets), "RS": (len(rows), slots)}
    out = {
        name: np.zeros(shapes[name[-2:]], np.float32 if name in ("weight_RM", "score_RS") else np.int32)
        for name in TokenBatch.__dataclass_fields__
    }
    for r, row in enumerate(rows):
        at = 0
        for tokens, positions, group, branch in row.inputs:
            span = slice(at, at := at + len(tokens))
            out["tokens_RL"][r, span], out["position_RL"][r, span] = tokens, positions
            out["group_RL"][r, span], out["branch_RL"][r, span] = group, branch
        at = 0
        for sources, tokens, weights, slot in row.targets:
            span = slice(at, at := at + len(tokens))
            out["source_RM"][r, span], out["target_RM"][r, span] = sources, tokens
            out["weight_RM"][r, span], out["slot_RM"][r, span] = weights, slot
        for s, (role, score) in enumerate(row.slots):
            out["role_RS"][r, s], out["score_RS"][r, s] = role, score
    return TokenBatch(**out)
