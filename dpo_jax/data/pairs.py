"""Preference pairs from scored answers to one prompt."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_jax import types
from dpo_jax.data.example import Answer, Example


@dataclass(frozen=True)
class Pairs:
    """The pairs of one prompt, and what was left out.

    Attributes:
      examples: (chosen, rejected) each; the better score is chosen.
      duplicates: answers left out because an earlier one has the same tokens.
      ties: pairs left out because both answers have the same score.
    """

    examples: tuple[Example, ...]
    duplicates: int
    ties: int


def pairs_of(prompt: np.ndarray, answers: Sequence[tuple[np.ndarray, float]], uid: int) -> Pairs:
    """All pairs of a prompt's scored answers: four different answers give six.

    With the answers a (0.9), b (0.2), a (0.9), c (0.2) the pairs are (a, b) and (a, c): one duplicate, one tie.

    Args:
      prompt: int32 [p], with its BOS.
      answers: (int32 [n], score) of each answer; scores compare in float32, as they are stored.
      uid: of the first pair; the n-th pair has uid + n. Give prompts uids that lie far enough apart.

    Returns:
      The pairs, in the order of the answers.

    Raises:
      ValueError: a score is not a finite number.
    """
    unique: dict[bytes, tuple[np.ndarray, float]] = {}
    for tokens, score in answers:
        if not np.isfinite(score):
            raise ValueError(f"An answer to prompt {uid} has the score {score}; expected a finite number.")
        tokens = np.asarray(tokens, np.int32)
        unique.setdefault(tokens.tobytes(), (tokens, float(np.float32(score))))
    examples: list[Example] = []
    ties = 0
    for first, second in itertools.combinations(unique.values(), 2):
        if first[1] == second[1]:
            ties += 1
            continue
        chosen, rejected = (first, second) if first[1] > second[1] else (second, first)
        sides = (_side(*chosen, types.CHOSEN), _side(*rejected, types.REJECTED))
        examples.append(Example(uid + len(examples), np.asarray(prompt, np.int32), sides))
    return Pairs(tuple(examples), duplicates=len(answers) - len(unique), ties=ties)


def _side(tokens: np.ndarray, score: float, role: int) -> Answer:
    return Answer(tokens, np.ones(len(tokens), np.float32), role, score)
