"""Ground-truth rewards: what an experiment takes for the truth about a text.

They rank the sampled answers, as a human annotator would, and judge the trained policy. No training step reads them:
DPO and its kin learn from the ranking alone, and no reward model is part of them.

To add one, write a class with the methods of ``Reward``, and its line in ``REWARDS``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from absl import logging
from transformers import PreTrainedTokenizerFast

from dpo_jax.data import tokenizer as tokenizers
from dpo_jax.data import windows
from dpo_jax.data.imdb import Review
from dpo_jax.rewards import sentiment


class Reward(Protocol):
    """A judge of whole texts, prompt and answer together."""

    name: str

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """float64 [n], the reward of each text; the greater the better."""
        ...

    def fingerprint(self) -> str:
        """Identity by content, hexadecimal."""
        ...

    @classmethod
    def train(cls, reviews: Iterable[Review]) -> Self:
        """Makes the reward from labelled reviews."""
        ...

    def save(self, folder: str | Path) -> None:
        """Writes a folder with ``reward.json``, which holds the reward's name under ``name``."""
        ...

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads what ``save`` wrote; the values are the same to the last bit."""
        ...


REWARDS: dict[str, type[Reward]] = {
    "sentiment": sentiment.SentimentReward,
}


def train_reward(name: str, reviews: Iterable[Review]) -> Reward:
    """Trains a reward.

    Args:
      name: a key of ``REWARDS``.
      reviews: labelled reviews that nothing else of the experiment sees.

    Returns:
      The reward.

    Raises:
      ValueError: an unknown name, or reviews that nothing can be learned from.
    """
    return _kind_of(name, "the configuration").train(reviews)


def load_reward(folder: str | Path) -> Reward:
    """Reads any saved reward.

    Args:
      folder: where a reward's ``save`` wrote.

    Returns:
      The reward.

    Raises:
      OSError: there is no reward, or it is damaged.
      ValueError: a reward of an unknown name.
    """
    path = Path(folder) / sentiment.REWARD_FILE
    if not path.is_file():
        raise FileNotFoundError(f"No reward: {path} does not exist. Train the reward first, or correct the path.")
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OSError(f"Cannot read {path}: {error}. Remove that folder and train the reward again.") from error
    return _kind_of(name, str(path)).load(folder)


def accuracy(reward: Reward, texts: Sequence[str], labels: Sequence[int]) -> float:
    """Share of the texts that the reward puts on the side of 0.5 that their label is on.

    Args:
      reward: a reward between 0 and 1.
      texts: what to judge, at least one.
      labels: 1 positive, 0 negative.

    Returns:
      The accuracy, 0 to 1.

    Raises:
      ValueError: no text.
    """
    if not texts:
        raise ValueError("The accuracy of a reward needs at least one text.")
    return float(np.mean((reward(texts) > 0.5) == np.asarray(labels, bool)))


def held_out_accuracy(
    reward: Reward, reviews: Sequence[Review], tokenizer: PreTrainedTokenizerFast, window: int
) -> dict[str, float]:
    """Accuracy on whole reviews and on their openings, which are as short as what the policy writes; logs both.

    Args:
      reward: a reward between 0 and 1.
      reviews: labelled reviews that the reward was not trained on.
      tokenizer: of the experiment.
      window: size of the openings, tokens.

    Returns:
      ``{"reviews": accuracy, "openings": accuracy}``.

    Raises:
      ValueError: no review.
    """
    labels = [review.label for review in reviews]
    openings = windows.review_windows(reviews, tokenizer, window)
    texts = {
        "reviews": [review.text for review in reviews],
        "openings": [tokenizers.decode(tokenizer, opening.tokens) for _, opening in openings],
    }
    found = {kind: accuracy(reward, texts[kind], labels) for kind in texts}
    logging.info(
        "Reward %s: held-out accuracy %.3f on whole reviews, %.3f on openings of at most %d tokens (%d reviews).",
        reward.name,
        found["reviews"],
        found["openings"],
        window,
        len(labels),
    )
    return found


def _kind_of(name: str, where: str) -> type[Reward]:
    if name not in REWARDS:
        raise ValueError(f"Unknown reward {name!r} in {where}; choose one of {', '.join(map(repr, REWARDS))}.")
    return REWARDS[name]
