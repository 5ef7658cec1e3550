"""Prepared examples on disk: encoded prompts and answers as a TFDS dataset of array_record files.

One record holds one example. Its answers lie one after the other, with their lengths beside them:

==============  ========  =======================================================
feature         dtype     example 7: BOS 11 12 → (21 22 EOS, 0.9), (31 EOS, 0.2)
==============  ========  =======================================================
uid             int64     7
prompt          int32     1 11 12
answer_tokens   int32     21 22 2 31 2
answer_weights  float32   1 1 1 1 1
answer_lengths  int32     3 2
roles           int32     1 2
scores          float32   0.9 0.2
prompt_text     text      for reading only
answer_texts    texts     for reading only
==============  ========  =======================================================

What is asked of all examples at once lies beside the records: ``SPLIT.lengths``, int32 [n, 1 + answers], tokens of the
prompt and of each answer; ``SPLIT.contents``, int64 of the same shape, hashes of them; and ``SPLIT.roles``, int8 [n,
answers]. ``prepared.json`` in the same folder says how many examples there are, which tokenizer encoded them and how
they were made. ``prepared_writer.py`` writes all of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dpo_jax.data import packing
from dpo_jax.data.example import Answer, Example

METADATA_FILE = "prepared.json"
FORMAT_VERSION = 1

_REMEDY = "Remove that folder, and the next run prepares it again."


@dataclass(frozen=True)
class Metadata:
    """What a folder of prepared examples holds.

    Attributes:
      name: name of the dataset.
      tokenizer: fingerprint of the tokenizer that encoded the examples.
      counts: examples of every split.
      answers: answers of each example, for every split.
      fingerprints: sha256 over the examples of every split, hexadecimal: identity of the data.
      sizes: bytes of every file of records.
      details: how the examples were made; any JSON.
      tokens: least and greatest token of every split; none in folders written before it was kept.
    """

    name: str
    tokenizer: str
    counts: dict[str, int]
    answers: dict[str, int]
    fingerprints: dict[str, str]
    sizes: dict[str, int]
    details: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)


def lengths_file(split: str) -> str:
    """Name of the file with the lengths of a split."""
    return f"{split}.lengths"


def contents_file(split: str) -> str:
    """Name of the file with the hashes of a split's prompts and answers."""
    return f"{split}.contents"


def roles_file(split: str) -> str:
    """Name of the file with the roles of a split."""
    return f"{split}.roles"


def features() -> tfds.features.FeaturesDict:
    """What TFDS knows of a record."""

    def array(dtype: type) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=(None,), dtype=dtype)

    return tfds.features.FeaturesDict(
        {
            "uid": np.int64,
            "prompt": array(np.int32),
            "answer_tokens": array(np.int32),
            "answer_weights": array(np.float32),
            "answer_lengths": array(np.int32),
            "roles": array(np.int32),
            "scores": array(np.float32),
            "prompt_text": tfds.features.Text(),
            "answer_texts": tfds.features.Sequence(tfds.features.Text()),
        }
    )


def is_prepared(folder: str | Path) -> bool:
    """Whether a folder holds prepared examples, complete.

    Args:
      folder: where ``write_examples`` writes.

    Returns:
      Whether they are there.
    """
    return (Path(folder) / METADATA_FILE).is_file()


def read_metadata(folder: str | Path) -> Metadata:
    """Reads what a folder of prepared examples says of itself, and looks whether its files are whole.

    Args:
      folder: where ``write_examples`` wrote.

    Returns:
      The metadata.

    Raises:
      OSError: the folder is missing, unreadable or damaged.
      ValueError: it was written by another version of this format.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"No prepared examples: {folder} does not exist. Prepare them, or correct the path.")
    try:
        content = json.loads((folder / METADATA_FILE).read_text(encoding="utf-8"))
        version = content.pop("format")
        metadata = Metadata(**content) if version == FORMAT_VERSION else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"Cannot read {folder / METADATA_FILE}: {error}. {_REMEDY}") from error
    if metadata is None:
        raise ValueError(f"{folder} has the format {version}, expected {FORMAT_VERSION}. {_REMEDY}")
    for name, expected in metadata.sizes.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != expected:
            got = "is missing" if found is None else f"has {found} bytes, expected {expected}"
            raise OSError(f"The prepared examples are damaged: {path} {got}. {_REMEDY}")
    return metadata


class PreparedExamples:
    """Random access to the prepared examples of a split, in the order of writing; a source for grain.

    Attributes:
      metadata: what the folder holds.
      answers: answers of each example.
      fingerprint: sha256 over the examples of the split: identity of the data, hexadecimal.
      tokenizer_fingerprint: of the tokenizer that encoded them.
    """

    def __init__(self, folder: str | Path, split: str, tokenizer: str | None = None):
        """Opens a split.

        Args:
          folder: where ``write_examples`` wrote.
          split: one of its splits.
          tokenizer: fingerprint of the tokenizer in use; None does not compare.

        Raises:
          OSError: the folder is missing, unreadable or damaged.
          ValueError: an unknown split, another tokenizer, or another version of the format.
        """
        self.metadata = read_metadata(folder)
        self._folder, self._split = Path(folder), split
        if split not in self.metadata.counts:
            splits = ", ".join(f"{name} ({count})" for name, count in self.metadata.counts.items())
            raise ValueError(f"{folder} has no split {split!r}; it has {splits}.")
        if tokenizer is not None and tokenizer != self.metadata.tokenizer:
            raise ValueError(
                f"The prepared examples in {folder} were encoded with the tokenizer {self.metadata.tokenizer}, but the "
                f"tokenizer in use is {tokenizer}: the same numbers would mean other words. Use the first tokenizer, "
                "or prepare the examples again with the second."
            )
        self.answers = self.metadata.answers[split]
        self.fingerprint = self.metadata.fingerprints[split]
        self.tokenizer_fingerprint = self.metadata.tokenizer
        try:
            self._rows = tfds.builder_from_directory(self._folder).as_data_source(split=split)
        except Exception as error:  # TFDS reports damaged metadata in several types
            raise OSError(f"Cannot open the prepared examples in {folder}: {error}. {_REMEDY}") from error

    def __len__(self) -> int:
        return self.metadata.counts[self._split]

    def __getitem__(self, index: int) -> Example:
        """Reads one example.

        Args:
          index: 0 ≤ index < length.

        Returns:
          The example.

        Raises:
          IndexError: there is no such example.
          OSError: the record is damaged.
        """
        row = self._row(index)
        borders = np.cumsum(row["answer_lengths"])[:-1]
        tokens = np.split(row["answer_tokens"], borders)
        weights = np.split(row["answer_weights"], borders)
        fields = zip(tokens, weights, row["roles"].tolist(), row["scores"].tolist(), strict=True)
        return Example(int(row["uid"]), row["prompt"], tuple(Answer(*values) for values in fields))

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def lengths(self) -> np.ndarray:
        """Lengths of all examples, without reading them.

        Returns:
          int32 [n, 1 + answers], tokens of the prompt and of each answer.
        """
        path = self._folder / lengths_file(self._split)
        if path.name in self.metadata.sizes:
            return np.fromfile(path, np.int32).reshape(len(self), 1 + self.answers)
        # Written before lengths lay beside the records.
        rows = (self._row(i) for i in range(len(self)))
        return np.array([[len(row["prompt"]), *row["answer_lengths"]] for row in rows], np.int32)

    def contents(self) -> np.ndarray:
        """Hashes of all prompts and answers, without reading the examples.

        Returns:
          int64 [n, 1 + answers], as of :func:`dpo_jax.data.packing.example_contents`.
        """
        path = self._folder / contents_file(self._split)
        if path.name in self.metadata.sizes:
            return np.fromfile(path, np.int64).reshape(len(self), 1 + self.answers)
        # Written before hashes lay beside the records.
        return np.array([packing.contents_of(example) for example in self], np.int64)

    def roles(self) -> np.ndarray:
        """Roles of all answers, without reading the examples.

        Returns:
          int [n, answers], of ``dpo_jax.types``.
        """
        path = self._folder / roles_file(self._split)
        if path.name in self.metadata.sizes:
            return np.fromfile(path, np.int8).reshape(len(self), self.answers)
        # Written before roles lay beside the records.
        return np.array([self._row(i)["roles"] for i in range(len(self))], np.int8)

    def token_range(self) -> tuple[int, int]:
        """(least, greatest) token of all prompts and answers, without reading the examples."""
        if self._split in self.metadata.tokens:
            least, greatest = self.metadata.tokens[self._split]
            return least, greatest
        # Written before it was kept.
        rows = (self._row(i) for i in range(len(self)))
        found = [np.concatenate([row["prompt"], row["answer_tokens"]]) for row in rows]
        return min(int(t.min()) for t in found), max(int(t.max()) for t in found)

    def texts(self, index: int) -> tuple[str, tuple[str, ...]]:
        """The texts that were written beside an example.

        Args:
          index: 0 ≤ index < length.

        Returns:
          (prompt, answers); empty where the writer had no decoder.

        Raises:
          IndexError: there is no such example.
          OSError: the record is damaged.
        """
        row = self._row(index)
        return row["prompt_text"].decode(), tuple(text.decode() for text in row["answer_texts"])

    def __repr__(self) -> str:
        return f"PreparedExamples({str(self._folder)!r}, {self._split!r}, {self.fingerprint[:12]})"

    def _row(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"Example {index} of {len(self)} in {self._folder}.")
        try:
            return self._rows[index]
        except Exception as error:  # array_record and TFDS report a damaged record in several types
            raise OSError(f"Cannot read example {index} in {self._folder}: {error}. {_REMEDY}") from error
