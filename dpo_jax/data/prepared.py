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

The lengths of all examples lie beside the records, ``SPLIT.lengths``: int32 [n, 1 + answers], tokens of the prompt and
of each answer. ``prepared.json`` in the same folder says how many examples there are, which tokenizer encoded them and
how they were made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from dpo_jax.data import folders
from dpo_jax.data.example import Answer, Example

METADATA_FILE = "prepared.json"
FORMAT_VERSION = 1
MAX_SHARD_BYTES = 256 * 2**20

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
    """

    name: str
    tokenizer: str
    counts: dict[str, int]
    answers: dict[str, int]
    fingerprints: dict[str, str]
    sizes: dict[str, int]
    details: dict[str, Any] = field(default_factory=dict)


def _features() -> tfds.features.FeaturesDict:
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


# --- writing ---------------------------------------------------------------------------------------------------------


def write_examples(
    splits: Mapping[str, Iterable[Example]],
    folder: str | Path,
    *,
    name: str,
    tokenizer: str,
    to_text: Callable[[np.ndarray], str] | None = None,
    details: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Metadata:
    """Writes examples in the order given; memory does not grow with their number.

    TFDS's own builders gather a split in memory before they write it, so the records are streamed into files here, and
    TFDS's metadata are added. The folder appears when all is written: an interrupted preparation leaves none.

    Args:
      splits: name → examples, such as a generator; read once, one split after the other.
      folder: the place of the dataset; an older one there is replaced.
      name: name of the dataset: letters, digits and underscores.
      tokenizer: fingerprint of the tokenizer that encoded the examples.
      to_text: decodes tokens for the texts beside them; None leaves them empty.
      details: how the examples were made; any JSON. A function is called when all are written.
      max_shard_bytes: size past which a new file is begun, bytes.

    Returns:
      What was written.

    Raises:
      ValueError: no split, a split without examples, a malformed example or name, or examples of one split that differ
        in their number of answers.
      OSError: the folder cannot be written.
    """
    if not splits or not name.isidentifier() or not all(split.isidentifier() for split in splits):
        raise ValueError(
            f"Dataset {name!r} with the splits {list(splits)}; expected one split or more, named as in code."
        )
    if not callable(details):
        json.dumps(dict(details or {}))  # fails before the examples are made, not after
    with folders.replaced_folder(folder, f"the prepared examples {name}") as incomplete:
        template = tfds.core.ShardedFileTemplate(data_dir=incomplete, dataset_name=name, filetype_suffix="array_record")
        infos: list[tfds.core.SplitInfo] = []
        fingerprints: dict[str, str] = {}
        answers: dict[str, int] = {}
        for split, examples in splits.items():
            with (incomplete / _lengths_file(split)).open("wb") as lengths:
                content = _Content(split, to_text, lengths)
                infos.append(_write_records(content.records(examples), template.replace(split=split), max_shard_bytes))
            fingerprints[split], answers[split] = content.digest.hexdigest(), content.answers
        tfds.folder_dataset.write_metadata(
            data_dir=incomplete,
            features=_features(),
            split_infos=infos,
            filename_template=template,
            check_data=False,  # would read through TensorFlow
        )
        metadata = Metadata(
            name=name,
            tokenizer=tokenizer,
            counts={info.name: info.num_examples for info in infos},
            answers=answers,
            fingerprints=fingerprints,
            sizes={
                path.name: path.stat().st_size
                for pattern in ("*.array_record*", "*.lengths")
                for path in sorted(incomplete.glob(pattern))
            },
            details=dict(details() if callable(details) else details or {}),
        )
        text = json.dumps({"format": FORMAT_VERSION, **asdict(metadata)}, indent=2)
        (incomplete / METADATA_FILE).write_text(text + "\n", encoding="utf-8")
    return metadata


class _Content:
    """What is known of a split once all its records have gone by."""

    def __init__(self, split: str, to_text: Callable[[np.ndarray], str] | None, lengths: BinaryIO):
        self.digest = hashlib.sha256()
        self.answers = 0
        self._split, self._to_text, self._lengths = split, to_text, lengths

    def records(self, examples: Iterable[Example]) -> Iterator[bytes]:
        features = _features()
        for example in examples:
            record = _record_of(example, self._to_text)
            self._count(example)
            self._add(record)
            self._lengths.write(np.array([len(record["prompt"]), *record["answer_lengths"]], np.int32).tobytes())
            yield features.serialize_example(record)
        if not self.answers:
            raise ValueError(f"The split {self._split!r} holds no example; expected one or more.")

    def _count(self, example: Example) -> None:
        self.answers = self.answers or len(example.answers)
        if len(example.answers) != self.answers:
            raise ValueError(
                f"Example {example.uid} of the split {self._split!r} has {len(example.answers)} answers, those before "
                f"it have {self.answers}; expected the same number in a whole split. Write them as two datasets."
            )

    def _add(self, record: dict[str, Any]) -> None:
        # Not the serialized bytes: a protocol buffer writes its map in an order that differs between processes.
        for name, value in record.items():
            if isinstance(value, np.ndarray):
                self.digest.update(f"{name} {len(value)} ".encode())
                self.digest.update(value.tobytes())
            else:
                self.digest.update(json.dumps([name, value]).encode())


def _lengths_file(split: str) -> str:
    return f"{split}.lengths"


def _write_records(
    records: Iterable[bytes], template: tfds.core.ShardedFileTemplate, max_shard_bytes: int
) -> tfds.core.SplitInfo:
    shards = _Shards(Path(template.data_dir), template.split, max_shard_bytes)
    with contextlib.closing(shards):
        for record in records:
            shards.write(record)
    for index, path in enumerate(shards.paths):
        path.rename(template.sharded_filepath(shard_index=index, num_shards=len(shards.paths)))
    return tfds.core.SplitInfo(
        name=template.split,
        shard_lengths=shards.lengths,
        num_bytes=shards.total_bytes,
        filename_template=template,
    )


class _Shards:
    """Record files of a size; their number, which is part of TFDS's names, is known only at the end."""

    def __init__(self, folder: Path, split: str, max_bytes: int):
        self.paths: list[Path] = []
        self.lengths: list[int] = []
        self.total_bytes = 0
        self._folder, self._split, self._max_bytes = folder, split, max_bytes
        self._writer: array_record_module.ArrayRecordWriter | None = None
        self._bytes = 0

    def write(self, record: bytes) -> None:
        writer = self._writer
        if writer is None or self._bytes + len(record) > self._max_bytes:
            writer = self._open_next()
        writer.write(record)
        self._bytes += len(record)
        self.total_bytes += len(record)
        self.lengths[-1] += 1

    def _open_next(self) -> array_record_module.ArrayRecordWriter:
        self.close()
        self.paths.append(self._folder / f"{self._split}.{len(self.paths)}.unnamed")
        self.lengths.append(0)
        self._bytes = 0
        # One record a group: any record is read without its neighbours.
        self._writer = array_record_module.ArrayRecordWriter(str(self.paths[-1]), "group_size:1")
        return self._writer

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _record_of(example: Example, to_text: Callable[[np.ndarray], str] | None) -> dict[str, Any]:
    _check(example)
    answers = example.answers
    return {
        "uid": int(example.uid),
        "prompt": np.asarray(example.prompt, np.int32),
        "answer_tokens": np.concatenate([answer.tokens for answer in answers]).astype(np.int32),
        "answer_weights": np.concatenate([answer.weights for answer in answers]).astype(np.float32),
        "answer_lengths": np.array([len(answer.tokens) for answer in answers], np.int32),
        "roles": np.array([answer.role for answer in answers], np.int32),
        "scores": np.array([answer.score for answer in answers], np.float32),
        "prompt_text": to_text(example.prompt) if to_text else "",
        "answer_texts": [to_text(answer.tokens) if to_text else "" for answer in answers],
    }


def _check(example: Example) -> None:
    lengths = [(len(answer.tokens), len(answer.weights)) for answer in example.answers]
    if len(example.prompt) < 1 or not lengths or any(tokens < 1 or tokens != weights for tokens, weights in lengths):
        raise ValueError(
            f"Example {example.uid} has a prompt of {len(example.prompt)} tokens and answers of (tokens, weights) "
            f"{lengths}; expected a prompt and one or more answers of at least one token, with a weight for each token."
        )
    if not all(np.isfinite(answer.score) and np.all(np.isfinite(answer.weights)) for answer in example.answers):
        raise ValueError(f"Example {example.uid} has a score or a weight that is not finite.")


# --- reading ---------------------------------------------------------------------------------------------------------


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
        path = self._folder / _lengths_file(self._split)
        if path.name in self.metadata.sizes:
            return np.fromfile(path, np.int32).reshape(len(self), 1 + self.answers)
        # Written before lengths lay beside the records.
        rows = (self._row(i) for i in range(len(self)))
        return np.array([[len(row["prompt"]), *row["answer_lengths"]] for row in rows], np.int32)

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
