"""Which rows hang together: a reader that has seen one of them knows the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import scipy.sparse
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import GroupKFold

from dpo_jax.data.checks.case import Case

Folds = list[tuple[np.ndarray, np.ndarray]]
_FOLDS = 5
_LEAST = 20  # groups that hold a label, for an estimate


def by_prompt(cases: Sequence[Case]) -> np.ndarray:
    """Group of each row: rows of one prompt are together."""
    return _tied(cases, lambda case: [case.prompt])


def by_text(cases: Sequence[Case]) -> np.ndarray:
    """Group of each row: rows with an equal prompt or an equal answer are together, also over others."""
    return _tied(cases, lambda case: [("prompt", case.prompt), *(("answer", answer) for answer in case.answers)])


def too_few(labels: Sequence[bool], groups: np.ndarray) -> str | None:
    """Why nothing can be estimated; None where something can.

    A label that few groups hold may be missing where a model is trained on the others.
    """
    held = [len(set(groups[np.array(labels, bool) == label])) for label in (False, True)]
    if min(held) >= _LEAST:
        return None
    return f"too few independent rows ({len(labels)} labelled ones in {len(set(groups))} groups with a text in common)"


def folds(target: np.ndarray, groups: np.ndarray) -> Folds:
    """(rows to train on, rows held out), no group of which is in both."""
    # Groups of one size are dealt out in turn: their numbers must say nothing of their labels.
    shuffled = np.random.default_rng(0).permutation(len(target))[groups]
    return list(GroupKFold(_FOLDS).split(target, target, shuffled))


def standard_error(right: np.ndarray, groups: np.ndarray) -> float:
    """Of the share of rows that are right, where rows of one group go right or wrong together.

    sqrt(Σ_groups (Σ_rows (right − mean))²) / rows.
    """
    sums = np.bincount(groups, right - right.mean())
    return float(np.sqrt((sums**2).sum()) / len(right))


def _tied(cases: Sequence[Case], keys: Callable[[Case], Iterable[Any]]) -> np.ndarray:
    """Components of the graph whose edges go from rows to their keys."""
    numbers: dict[Any, int] = {}
    edges = [(row, numbers.setdefault(key, len(numbers))) for row, case in enumerate(cases) for key in keys(case)]
    if not edges:
        return np.zeros(0, int)
    rows, columns = np.array(edges).T
    size = len(cases) + len(numbers)
    graph = scipy.sparse.coo_matrix((np.ones(len(edges)), (rows, columns + len(cases))), shape=(size, size))
    return connected_components(graph, directed=False)[1][: len(cases)]
