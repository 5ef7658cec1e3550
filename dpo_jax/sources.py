"""Where examples come from: one function a source, (config.data) → Dataset. To add one, write it and add its line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_jax.config import DataConfig
from dpo_jax.data.imdb import load_reviews
from dpo_jax.data.pipeline import Source
from dpo_jax.data.prepared import PreparedExamples
from dpo_jax.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_fingerprint, train_tokenizer
from dpo_jax.data.windows import review_windows, window_example
from dpo_jax.rewards import Reward, held_out_accuracy, load_reward, train_reward


@dataclass(frozen=True)
class Dataset:
    """Examples for training and held-out ones.

    Attributes:
      train: random-access examples.
      held_out: the same, never trained on.
      answers: A, answers of an example.
      tokenizer: that made their tokens.
    """

    train: Source
    held_out: Source
    answers: int
    tokenizer: Any


def imdb_openings(data: DataConfig) -> Dataset:
    """Openings of IMDb reviews, for supervised fine-tuning: BOS is the prompt, the text the answer."""
    tokenizer = imdb_tokenizer(data)
    window = data.prompt_length + data.answer_length

    def examples(part: str, continuations: bool) -> Source:
        windows = review_windows(load_reviews(part, data.dir, data.reviews), tokenizer, window, continuations)
        return [window_example(uid, w) for uid, w in windows]

    return Dataset(examples("sft", data.continuations), examples("eval", False), 1, tokenizer)


def prepared(data: DataConfig) -> Dataset:
    """Examples that ``python -m dpo_jax.prefer`` (or anybody else) has written to ``config.data.path``."""
    if data.path is None:
        raise ValueError("config.data.source is 'prepared' but config.data.path is not set: give the folder of the examples")
    folder = tokenizer_folder(data)
    tokenizer, fingerprint = load_tokenizer(folder), tokenizer_fingerprint(folder)
    train, held_out = (PreparedExamples(data.path, split, fingerprint) for split in ("train", "eval"))
    return Dataset(train, held_out, train.answers, tokenizer)


def imdb_tokenizer(data: DataConfig) -> Any:
    """The tokenizer of the IMDb experiment, trained on the ``sft`` part when it is not there yet."""
    folder = tokenizer_folder(data)
    if not folder.is_dir():
        texts = (review.text for review in load_reviews("sft", data.dir, data.reviews))
        save_tokenizer(train_tokenizer(texts, data.vocab_size), folder)
    return load_tokenizer(folder)


def imdb_reward(data: DataConfig, name: str) -> Reward:
    """The ground truth of the IMDb experiment, trained on the ``reward`` part when it is not there yet."""
    folder = Path(data.dir) / f"reward-{name}"
    if not folder.is_dir():
        reward = train_reward(name, load_reviews("reward", data.dir, data.reviews))
        window = data.prompt_length + data.answer_length
        held_out_accuracy(reward, load_reviews("eval", data.dir, data.reviews), imdb_tokenizer(data), window)
        reward.save(folder)
    return load_reward(folder)


def tokenizer_folder(data: DataConfig) -> Path:
    """Where the tokenizer of a data folder lies."""
    return Path(data.dir) / f"tokenizer-{data.vocab_size}"


SOURCES: dict[str, Callable[[DataConfig], Dataset]] = {
    "imdb_openings": imdb_openings,
    "prepared": prepared,
}


def open_dataset(data: DataConfig) -> Dataset:
    """Opens the source that a config names.

    Raises:
      ValueError: an unknown name, or data that cannot be used.
    """
    if data.source not in SOURCES:
        raise ValueError(f"unknown data source {data.source!r}; known: {', '.join(SOURCES)}")
    return SOURCES[data.source](data)
