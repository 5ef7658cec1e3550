"""Writes prepared examples (dpo_jax/data/prepared.py), streaming: a million of them take no more memory than ten."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from dpo_jax.data import folders, packing
from dpo_jax.data.example import Example
from dpo_jax.data.prepared import (
    FORMAT_VERSION,
    METADATA_FILE,
    Metadata,
    contents_file,
    features,
    lengths_file,
    roles_file,
)

MAX_SHARD_BYTES = 256 * 2**20


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
        tokens: dict[str, list[int]] = {}
        for split, examples in splits.items():
            with contextlib.ExitStack() as files:
                tables = [
                    files.enter_context((incomplete / name_of(split)).open("wb"))
                    for name_of in (lengths_file, contents_file, roles_file)
                ]
                content = _Content(split, to_text, *tables)
                infos.append(_write_records(content.records(examples), template.replace(split=split), max_shard_bytes))
            fingerprints[split], answers[split] = content.digest.hexdigest(), content.answers
            tokens[split] = [content.least, content.greatest]
        tfds.folder_dataset.write_metadata(
            data_dir=incomplete,
            features=features(),
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
                for pattern in ("*.array_record*", "*.lengths", "*.contents", "*.roles")
                for path in sorted(incomplete.glob(pattern))
            },
            details=dict(details() if callable(details) else details or {}),
            tokens=tokens,
        )
        text = json.dumps({"format": FORMAT_VERSION, **asdict(metadata)}, indent=2)
        (incomplete / METADATA_FILE).write_text(text + "\n", encoding="utf-8")
    return metadata


class _Content:
    """What is known of a split once all its records have gone by."""

    def __init__(
        self,
        split: str,
        to_text: Callable[[np.ndarray], str] | None,
        lengths: BinaryIO,
        contents: BinaryIO,
        roles: BinaryIO,
    ) -> None:
        self.digest = hashlib.sha256()
        self.answers = 0
        self.least, self.greatest = np.iinfo(np.int32).max, np.iinfo(np.int32).min  # of the tokens
        self._split, self._to_text = split, to_text
        self._lengths, self._contents, self._roles = lengths, contents, roles

    def records(self, examples: Iterable[Example]) -> Iterator[bytes]:
        serialize = features().serialize_example
        for example in examples:
            record = _record_of(example, self._to_text)
            self._count(example)
            self._add(record)
            self._lengths.write(np.array([len(record["prompt"]), *record["answer_lengths"]], np.int32).tobytes())
            self._contents.write(np.array(packing.contents_of(example), np.int64).tobytes())
            self._roles.write(record["roles"].astype(np.int8).tobytes())
            for tokens in (record["prompt"], record["answer_tokens"]):
                self.least, self.greatest = min(self.least, int(tokens.min())), max(self.greatest, int(tokens.max()))
            yield serialize(record)
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
