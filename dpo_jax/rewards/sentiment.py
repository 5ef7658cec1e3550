"""The probability that a text is positive: logistic regression on TF-IDF of words and pairs of words.

It learns from short runs of sentences, each with the label of its review, since it judges texts of some sixty tokens:
trained on whole reviews, it is less accurate on short ones. The classifier sees words and nothing of grammar or sense,
so a policy pushed far from its reference can raise it with gibberish; the reward counts only beside the KL it cost.
"""

from __future__ import annotations

import functools
import hashlib
import json
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_jax.data import folders, windows
from dpo_jax.data.imdb import Review

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

REWARD_FILE = "reward.json"
FORMAT_VERSION = 1

_ARRAYS_FILE = "weights.npz"
_WORD = r"(?u)\b\w[\w']*\b"  # don't is a word, and so is I
_REMEDY = "Remove that folder and train the reward again."


@dataclass(frozen=True)
class Settings:
    """How the classifier is trained.

    Attributes:
      words: longest term, words.
      min_runs: runs that a term must stand in to be counted.
      inverse_regularization: scikit-learn's C.
      run_characters: most characters of a run of sentences.
    """

    words: int = 2
    min_runs: int = 3
    inverse_regularization: float = 4.0
    run_characters: int = 130


class SentimentReward:
    """P(positive | text).

    Attributes:
      terms: the T terms that count, words apart by spaces.
      idf_T: float64, inverse document frequency of each term.
      weight_T: float64, weight of each term, nats.
      intercept: weight of every text, nats.
      words: longest term, words.
    """

    name = "sentiment"

    def __init__(self, terms: Sequence[str], idf_T: np.ndarray, weight_T: np.ndarray, intercept: float, words: int):
        self.terms, self.idf_T, self.weight_T = list(terms), idf_T, weight_T
        self.intercept, self.words = float(intercept), int(words)

    @functools.cached_property
    def _tfidf(self) -> TfidfVectorizer:
        vectorizer = _vectorizer(self.words, vocabulary={term: n for n, term in enumerate(self.terms)})
        vectorizer.idf_ = self.idf_T
        return vectorizer

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Judges texts.

        Args:
          texts: prompt and answer as one text each.

        Returns:
          float64 [n], probabilities between 0 and 1. A text without a known word has that of the intercept.
        """
        if not texts:
            return np.zeros(0)
        from scipy.special import expit

        return expit(self._tfidf.transform(texts) @ self.weight_T + self.intercept)

    @classmethod
    def train(cls, reviews: Iterable[Review], settings: Settings | None = None) -> SentimentReward:
        """Trains the classifier.

        Args:
          reviews: labelled reviews, of both labels.
          settings: None takes the defaults.

        Returns:
          The reward; the same for the same reviews in the same order.

        Raises:
          ValueError: the reviews have one label alone, or no term is frequent enough.
        """
        settings = settings or Settings()
        texts, labels = _runs(reviews, settings.run_characters)
        if set(labels) != {0, 1}:
            raise ValueError(
                f"The reward needs reviews of both labels, got {len(labels)} runs of sentences with the labels "
                f"{sorted(set(labels))}. Look at the part of the reviews that it is trained on."
            )
        from sklearn.linear_model import LogisticRegression

        vectorizer = _vectorizer(settings.words, min_df=settings.min_runs)
        try:
            tfidf = vectorizer.fit_transform(texts)
        except ValueError as error:  # scikit-learn: no terms remain, or min_df exceeds the number of texts
            raise ValueError(
                f"No term stands in {settings.min_runs} of {len(texts)} runs of sentences: {error} Take more reviews."
            ) from error
        model = LogisticRegression(C=settings.inverse_regularization, solver="liblinear").fit(tfidf, labels)
        terms = vectorizer.get_feature_names_out().tolist()
        return cls(terms, vectorizer.idf_, model.coef_[0], model.intercept_[0], settings.words)

    def fingerprint(self) -> str:
        """Identity by content.

        Returns:
          sha256 over terms and weights, hexadecimal.
        """
        digest = hashlib.sha256(json.dumps([self.terms, self.words, self.intercept]).encode())
        for array in (self.idf_T, self.weight_T):
            digest.update(np.ascontiguousarray(array, np.float64).tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Writes the terms as JSON and the weights as arrays; the folder appears when both are whole.

        Args:
          folder: the place; an older reward there is replaced.

        Raises:
          OSError: the folder cannot be written.
        """
        content = {
            "name": self.name,
            "format": FORMAT_VERSION,
            "fingerprint": self.fingerprint(),
            "words": self.words,
            "terms": self.terms,
        }
        with folders.replaced_folder(folder, "the reward") as incomplete:
            (incomplete / REWARD_FILE).write_text(json.dumps(content, indent=0) + "\n", encoding="utf-8")
            np.savez(incomplete / _ARRAYS_FILE, idf=self.idf_T, weight=self.weight_T, intercept=self.intercept)

    @classmethod
    def load(cls, folder: str | Path) -> SentimentReward:
        """Reads a reward.

        Args:
          folder: where ``save`` wrote.

        Returns:
          The reward; its values are the same to the last bit.

        Raises:
          OSError: it is missing, damaged, or of another version of this format.
        """
        folder = Path(folder)
        try:
            content = json.loads((folder / REWARD_FILE).read_text(encoding="utf-8"))
            version = content["format"]
            if version != FORMAT_VERSION:
                raise ValueError(f"the format is {version}, expected {FORMAT_VERSION}")
            with np.load(folder / _ARRAYS_FILE) as arrays:
                reward = cls(
                    content["terms"], arrays["idf"], arrays["weight"], float(arrays["intercept"]), content["words"]
                )
            if reward.fingerprint() != content["fingerprint"]:
                raise ValueError("terms and weights are not those that were written")
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise OSError(f"Cannot read the reward in {folder}: {error}. {_REMEDY}") from error
        return reward


def _vectorizer(words: int, **kwargs: Any) -> TfidfVectorizer:
    # scikit-learn takes seconds to import: few programs judge anything, and those can do other things before.
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(ngram_range=(1, words), sublinear_tf=True, token_pattern=_WORD, **kwargs)


def _runs(reviews: Iterable[Review], characters: int) -> tuple[list[str], list[int]]:
    texts, labels = [], []
    for review in reviews:
        runs = windows.sentence_runs(review.text, characters)
        texts += runs
        labels += [review.label] * len(runs)
    return texts, labels
