"""Where examples come from: one function a source, (config.data) → Dataset. To add one, write it and add its line."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import logging

from dpo_jax import buckets, hub
from dpo_jax.config import DataConfig
from dpo_jax.data.encode import Encoder, Encoding
from dpo_jax.data.imdb import load_reviews
from dpo_jax.data.mixture import Mixture
from dpo_jax.data.noise import Flipped
from dpo_jax.data.pipeline import Source, source_fingerprint
from dpo_jax.data.preparation import Part, Reader, Request, parse_mixture, prepare
from dpo_jax.data.prepared import PreparedExamples
from dpo_jax.data.tokenizer import (
    load_tokenizer,
    open_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)
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
        raise ValueError(
            "config.data.source is 'prepared' but config.data.path is not set: give the folder of the examples"
        )
    folder = tokenizer_folder(data)
    tokenizer, fingerprint = load_tokenizer(folder), tokenizer_fingerprint(folder)
    place = buckets.fetched(data.path)
    train, held_out = (PreparedExamples(place, split, fingerprint) for split in ("train", "eval"))
    return Dataset(train, held_out, train.answers, tokenizer)


def files(data: DataConfig) -> Dataset:
    """Local files and public sets, prepared once: what ``config.data.path`` names (see dpo_jax/data/preparation.py)."""
    if data.path is None:
        raise ValueError(
            "config.data.source is 'files' but config.data.path is not set: give a file, a folder or a glob"
        )
    parts = parse_mixture(data.path)
    held_out = _held_out(data.eval_path)
    folder = tokenizer_folder(data)
    if data.tokenizer is None and not folder.is_dir():
        save_tokenizer(train_tokenizer(_texts(data, parts), data.vocab_size), folder)
    tokenizer, fingerprint = open_tokenizer(folder), tokenizer_fingerprint(folder)
    encoder = Encoder(tokenizer, encoding_of(data))
    prepared_parts = []
    for part in parts:
        request = Request(part, held_out, data.eval_share, data.on_error, data.max_skips)
        prepared_parts.append(prepare(request, encoder, fingerprint, Path(data.dir)))
    train = [PreparedExamples(place, "train", fingerprint) for place in prepared_parts]
    tests = [PreparedExamples(place, "eval", fingerprint) for place in prepared_parts[: 1 if held_out else None]]
    mixed = Mixture(train, [part.weight for part in parts], data.mixture_seed)
    # Evaluation takes the first ones: of several files, or of sources, they must not be those of one alone.
    several = sum(len(test.metadata.details["files"]["eval"]) for test in tests) > 1
    return Dataset(mixed, Mixture(tests, [1.0] * len(tests), shuffled=several), mixed.answers, tokenizer)


def _held_out(path: str | None) -> tuple[Part, ...]:
    parts = () if path is None else tuple(parse_mixture(path))
    if any(part.weight != 1 for part in parts):
        raise ValueError(
            f"config.data.eval_path is {path!r}; held-out examples are all taken once, so leave the weights out"
        )
    return parts


def encoding_of(data: DataConfig) -> Encoding:
    """How records become tokens, as a config wants it."""
    return Encoding(data.prompt_length, data.answer_length, data.template, data.turns, data.truncate, data.pairs)


def _texts(data: DataConfig, parts: list[Part]) -> Iterator[str]:
    """Prompts and answers to train a tokenizer on."""
    for part in parts:
        reader = Reader(data.on_error, data.max_skips)
        found = part.records(reader, "train", Path(data.dir) / "downloads")
        for _, record in itertools.islice(found, _TOKENIZER_RECORDS):
            yield record.prompt_text()
            yield from (reply.text() for reply in record.replies)


_TOKENIZER_RECORDS = 50_000  # of each source; merges settle long before


def imdb_tokenizer(data: DataConfig) -> Any:
    """The tokenizer of the IMDb experiment, trained on the ``sft`` part when it is not there yet."""
    return load_tokenizer(_imdb_tokenizer_folder(data))


def _imdb_tokenizer_folder(data: DataConfig) -> Path:
    folder = tokenizer_folder(data)
    if not folder.is_dir():
        texts = (review.text for review in load_reviews("sft", data.dir, data.reviews))
        save_tokenizer(train_tokenizer(texts, data.vocab_size), folder)
    return folder


def imdb_reward(data: DataConfig, name: str) -> Reward:
    """The ground truth of the IMDb experiment, trained on the ``reward`` part when it is not there yet."""
    folder = Path(data.dir) / f"reward-{name}"
    if not folder.is_dir():
        reward = train_reward(name, load_reviews("reward", data.dir, data.reviews))
        tokenizer, window = open_tokenizer(_imdb_tokenizer_folder(data)), data.prompt_length + data.answer_length
        held_out_accuracy(reward, load_reviews("eval", data.dir, data.reviews), tokenizer, window)
        reward.save(folder)
    return load_reward(folder)


def tokenizer_folder(data: DataConfig) -> Path:
    """Where the tokenizer lies: the one that a config names, else the one of its data folder.

    Raises:
      OSError: the one that a config names is neither here nor in its bucket nor on the hub.
    """
    if data.tokenizer is not None:
        return hub.find(data.tokenizer, _TOKENIZER_KEY, hub.SETTINGS)
    return Path(data.dir) / f"tokenizer-{data.vocab_size}"


_TOKENIZER_KEY = "config.data.tokenizer (config.init.hf, where it is the model's own)"


def flipped(data: Dataset, share: float, seed: int) -> Dataset:
    """The data with a share of its training labels flipped (``config.data.flip``), its held-out ones as they are."""
    if not share:
        return data
    train = Flipped(data.train, share, seed, source_fingerprint(data.train))
    logging.info("flipped the labels of %d of %d training examples (config.data.flip)", train.count, len(train))
    return dataclasses.replace(data, train=train)


SOURCES: dict[str, Callable[[DataConfig], Dataset]] = {
    "imdb_openings": imdb_openings,
    "prepared": prepared,
    "files": files,
}


def open_dataset(data: DataConfig) -> Dataset:
    """Opens the source that a config names.

    Raises:
      ValueError: an unknown name, or data that cannot be used.
    """
    if data.source not in SOURCES:
        raise ValueError(f"unknown data source {data.source!r}; known: {', '.join(SOURCES)}")
    return SOURCES[data.source](data)
