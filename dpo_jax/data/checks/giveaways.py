"""What gives the label away without being its reason, and how much of the labels a simple reader disputes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dpo_jax.data.checks import groups
from dpo_jax.data.checks.case import Case, Finding, labelled_sides

_GIVEN_AWAY = 0.65  # accuracy of surface features past which they are a shortcut
READABLE = 0.7  # accuracy under which a reader's doubts mean nothing
_CONFIDENT = 0.9

_SURFACE = {
    "words": lambda t: len(t.split()),
    "characters": len,
    "lines": lambda t: t.count("\n"),
    "list items": lambda t: len(re.findall(r"^\s*(?:[-*•]|\d+[.)])\s", t, re.MULTILINE)),
    "headings": lambda t: len(re.findall(r"^#+ ", t, re.MULTILINE)),
    "bold": lambda t: t.count("**"),
    "code": lambda t: t.count("`"),
    "digits": lambda t: sum(map(str.isdigit, t)),
    "questions": lambda t: t.count("?"),
    "exclamations": lambda t: t.count("!"),
    "capitals": lambda t: sum(map(str.isupper, t)),
    "not ASCII": lambda t: sum(not c.isascii() for c in t),
    "first person": lambda t: len(re.findall(r"\bI\b", t)),
    "apologies": lambda t: len(re.findall(r"\b(?:sorry|apologi[sz]e|cannot|can't|unable)\b", t, re.IGNORECASE)),
    "ends a sentence": lambda t: t.rstrip()[-1:] in set(".!?\"')"),
    "begins with a blank": lambda t: t[:1].isspace(),
    "ends with a blank": lambda t: t[-1:].isspace(),
}


def giveaways(cases: Sequence[Case]) -> list[Finding]:
    """How well length alone, and surface features alone, predict the label; and which words do.

    Rows of one prompt are predicted together. An answer that is worse under many prompts is a give-away itself.
    """
    kept, first, second, labels = labelled_sides(cases)
    prompts = groups.by_prompt(kept)
    if few := groups.too_few(labels, prompts):
        return [Finding("give-aways", 0, f"{few} to look for give-aways")]
    features = _surface(first) - (_surface([t or "" for t in second]) if second[0] is not None else 0)
    target = np.array(labels, bool)
    folds = groups.folds(target, prompts)
    right = {"length": _right(features[:, :1], target, folds), "surface": _right(features, target, folds)}
    accuracies = {name: float(rows.mean()) for name, rows in right.items()}
    errors = {name: groups.standard_error(rows, prompts) for name, rows in right.items()}
    words = _telling_words(kept, first, second, labels)
    base = max(target.mean(), 1 - target.mean())
    alone, surface = (f"{100 * accuracies[name]:.1f} ± {100 * errors[name]:.1f} %" for name in right)
    summary = (
        f"the label is predicted from length alone in {alone}, from surface features in {surface} of the rows "
        f"(guessing: {100 * base:.1f} %; ± is one standard error over prompts)"
    )
    weights = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(features, target)
    strongest = sorted(zip(_SURFACE, map(float, weights[-1].coef_[0]), strict=True), key=lambda item: -abs(item[1]))
    numbers = {**accuracies, "errors": errors, "guess": float(base), "features": strongest, "words": words}
    found = [Finding("give-aways", len(target), summary, accuracies["surface"] > _GIVEN_AWAY, numbers=numbers)]
    if words:
        text = ", ".join(f"{word!r} {better}:{worse}" for word, _, better, worse in words[:5])
        found.append(
            Finding("telling words", len(words), f"in better : worse answers: {text}", numbers={"words": words})
        )
    return found


def label_noise(cases: Sequence[Case]) -> list[Finding]:
    """Rows whose label a reader of words, trained on rows with other prompts and answers, disputes.

    The share of wrong labels is estimated as in confident learning (Northcutt et al. 2021, arXiv 1911.00068): rows
    whose other label is as likely as a label of its kind is on average.
    """
    kept, first, second, labels = labelled_sides(cases)
    texts = groups.by_text(kept)
    if few := groups.too_few(labels, texts):
        return [Finding("label noise", 0, f"no estimate: {few}")]
    target = np.array(labels, bool)
    reader = LogisticRegression(C=1.0, max_iter=300)
    predicted = _predict(_bag(first, second), target, reader, groups.folds(target, texts))
    own = np.where(target, predicted, 1 - predicted)
    accuracy = float(np.mean(own > 0.5))
    usual = {label: float(own[target == label].mean()) for label in (False, True)}
    flipped = (1 - own) >= np.array([usual[not label] for label in labels])
    disputed = [i for i in np.argsort(own, kind="stable") if own[i] < 1 - _CONFIDENT]
    rows = [(kept[i].place, f"the given label has probability {own[i]:.3f}") for i in disputed]
    if accuracy < READABLE:
        summary = f"no estimate: a reader of words is right in only {100 * accuracy:.1f} % of held-out rows"
    else:
        summary = (
            f"about {100 * flipped.mean():.1f} % of the labels may be wrong; a reader of words, right in "
            f"{100 * accuracy:.1f} % of held-out rows, disputes {len(rows)} labels with {100 * _CONFIDENT:.0f} % "
            "certainty"
        )
    numbers = {"accuracy": accuracy, "noise": float(flipped.mean()), "own": np.round(own, 4).tolist()}
    return [Finding("label noise", len(rows), summary, False, rows, numbers)]


def _surface(texts: Sequence[str]) -> np.ndarray:
    table = np.array([[float(feature(text)) for feature in _SURFACE.values()] for text in texts])
    return np.sign(table) * np.log1p(np.abs(table))


def _right(features: np.ndarray, target: np.ndarray, folds: groups.Folds) -> np.ndarray:
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    return (_predict(features, target, model, folds) > 0.5) == target


def _predict(features: Any, target: np.ndarray, model: Any, folds: groups.Folds) -> np.ndarray:
    """Probability that the first side is the better one, each from a model that has not seen the row's group."""
    return cross_val_predict(model, features, target, cv=folds, method="predict_proba")[:, 1]


def _bag(first: Sequence[str], second: Sequence[str | None]) -> Any:
    vectors = HashingVectorizer(n_features=2**17, ngram_range=(1, 2), alternate_sign=False, norm="l2")
    one = vectors.transform(first)
    if second[0] is None:
        return one
    return scipy.sparse.csr_matrix(one - vectors.transform([text or "" for text in second]))


def _telling_words(
    kept: Sequence[Case], first: Sequence[str], second: Sequence[str | None], labels: Sequence[bool], most: int = 20
) -> list[tuple[str, float, int, int]]:
    """(word, z, better answers that hold it, worse ones) by a binomial test over answers that hold the word.

    However many pairs of a prompt an answer is in, it is one better answer, one worse answer, or one of each.
    """
    sides = {
        (case.prompt, text, good)
        for case, one, other, label in zip(kept, first, second, labels, strict=True)
        for text, good in ((one, label), (other, not label))
        if text is not None
    }
    counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for _, text, good in sides:
        counts[good].update(set(re.findall(r"[^\W\d_]{2,}", text.lower())))
    # There may be more answers of one kind than of the other.
    prior = sum(good for _, _, good in sides) / len(sides)
    found = []
    for word in counts[True].keys() | counts[False].keys():
        a, b = counts[True][word], counts[False][word]
        if a + b >= 10:
            z = (a - prior * (a + b)) / (prior * (1 - prior) * (a + b)) ** 0.5
            if abs(z) > 4:
                found.append((word, round(z, 2), a, b))
    return sorted(found, key=lambda item: (-abs(item[1]), item[0]))[:most]
