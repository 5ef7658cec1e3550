"""Reference log-probabilities, computed once and kept: a number for each token of each answer.

A store belongs to one *identity*: the version of this code, the model, the hashes of its weights and of the tokenizer,
the template and the truncation that made the examples, the dtypes and the platform. Its folder is named by the hash of
all of them, so that a store of other weights is never found, let alone used. Examples are found by their content,
whatever the order, split or mixture: a store serves training and evaluation, all losses, reductions and layouts, which
only sum the tokens differently. With the answer ``21 22 EOS`` to the prompt ``BOS 11``::

    record   key of (BOS 11 | 21 22 EOS)   logps  −2.5 −0.125 −0.75
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from dpo_jax.data import folders
from dpo_jax.data.example import Answer, Example

_FORMAT = 2
_RECORDS, _KEYS, _META = "logps.array_record", "keys.npy", "store.json"
_KEY_BYTES = 16
_CHUNK = 4096  # records copied at a time
_REMEDY = "Remove that folder, and the next run computes it again."

IDENTITY = ("code", "model", "weights", "tokenizer", "template", "truncation", "dtype", "platform")


def identity_hash(identity: Mapping[str, str]) -> str:
    """sha256 of what log-probabilities depend on, hexadecimal.

    Args:
      identity: one value for each name in IDENTITY.

    Raises:
      ValueError: a name is missing or unknown: it would let two different references share a store.
    """
    if set(identity) != set(IDENTITY):
        raise ValueError(f"the identity of a reference has {sorted(identity)}; expected {sorted(IDENTITY)}")
    content = {"format": _FORMAT, **identity}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def answer_key(prompt: np.ndarray, tokens: np.ndarray) -> bytes:
    """Identity of an answer to a prompt, by content."""
    parts = [np.asarray(part, np.int32).tobytes() for part in (prompt, tokens)]
    digest = hashlib.blake2b(len(parts[0]).to_bytes(8, "big"), digest_size=_KEY_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()


def store_folder(root: str | Path, identity: Mapping[str, str]) -> Path:
    """Where the store of a reference lies."""
    return Path(root) / f"reference-{identity_hash(identity)[:32]}"


@contextlib.contextmanager
def locked(root: str | Path, identity: Mapping[str, str]) -> Iterator[None]:
    """Holds the store of a reference: of several runs that lack the same answers, one scores them, the others wait."""
    place = store_folder(root, identity)
    folders.check_writable(place.parent, "the reference log-probabilities")
    with place.with_name(f".{place.name}.lock").open("a+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, however the process ends
        yield


def write_store(
    root: str | Path,
    identity: Mapping[str, str],
    items: Iterable[tuple[Example, tuple[np.ndarray, ...]]],
    *,
    covers: Iterable[str] = (),
    extends: ReferenceStore | None = None,
) -> Path:
    """Writes a store; it appears when all is written.

    Args:
      root: folder of stores.
      identity: of the reference, one value for each name in IDENTITY.
      items: examples with the log-probabilities of their answers' tokens, nats, [n] each. An answer that comes again is
        written once.
      covers: fingerprints of data that the store holds in whole from now on.
      extends: the store that this one replaces; what it holds is taken over.

    Returns:
      The folder of the store.

    Raises:
      ValueError: log-probabilities that are not one finite number a token.
      OSError: the folder cannot be written.
    """
    place = store_folder(root, identity)
    keys: dict[bytes, None] = {}
    covered = {*covers, *(extends.covers if extends else ())}
    with folders.replaced_folder(place, "the reference log-probabilities") as incomplete:
        writer = array_record_module.ArrayRecordWriter(str(incomplete / _RECORDS), "group_size:1")
        try:
            for record in extends.records() if extends else ():
                keys[record[:_KEY_BYTES]] = None
                writer.write(record)
            for example, logps in items:
                for answer, values in zip(example.answers, logps, strict=True):
                    key = answer_key(example.prompt, answer.tokens)
                    if key not in keys:
                        keys[key] = None
                        writer.write(key + _checked(example, answer, values).tobytes())
        finally:
            writer.close()
        if not keys:
            raise ValueError("there is no example to keep reference log-probabilities of")
        np.save(incomplete / _KEYS, np.frombuffer(b"".join(keys), np.uint8).reshape(-1, _KEY_BYTES))
        meta = {
            "format": _FORMAT,
            "identity": dict(identity),
            "answers": len(keys),
            "covers": sorted(covered),
            "sha256": {name: _file_hash(incomplete / name) for name in (_RECORDS, _KEYS)},
        }
        (incomplete / _META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return place


def _checked(example: Example, answer: Answer, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float32)
    if values.shape != answer.tokens.shape or not np.isfinite(values).all():
        raise ValueError(
            f"example {example.uid} has an answer of {len(answer.tokens)} tokens and log-probabilities of shape "
            f"{values.shape}; expected one finite number for each token"
        )
    return values


class ReferenceStore:
    """Random access to the log-probabilities of a reference.

    Args:
      root: folder of stores.
      identity: of the reference in use.

    Attributes:
      covers: fingerprints of data of which it holds every answer.

    Raises:
      FileNotFoundError: there is no store of this reference.
      OSError: the store is damaged.
    """

    def __init__(self, root: str | Path, identity: Mapping[str, str]) -> None:
        self.folder = store_folder(root, identity)
        if not (self.folder / _META).is_file():
            raise FileNotFoundError(f"there are no log-probabilities of this reference in {root}: {dict(identity)}")
        try:
            meta = json.loads((self.folder / _META).read_text(encoding="utf-8"))
            whole = all(_file_hash(self.folder / name) == expected for name, expected in meta["sha256"].items())
            same = meta["identity"] == dict(identity) and meta["format"] == _FORMAT
            self.covers = frozenset(meta["covers"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OSError(
                f"cannot read the reference log-probabilities in {self.folder}: {error}. {_REMEDY}"
            ) from error
        if not whole or not same:
            raise OSError(f"the reference log-probabilities in {self.folder} are damaged. {_REMEDY}")
        keys = np.load(self.folder / _KEYS, allow_pickle=False)
        self._rows = {key.tobytes(): row for row, key in enumerate(keys)}
        self._reader = array_record_module.ArrayRecordReader(str(self.folder / _RECORDS))

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, example: Example) -> bool:
        return all(answer_key(example.prompt, answer.tokens) in self._rows for answer in example.answers)

    def records(self) -> Iterator[bytes]:
        """All records as they are written: the key of an answer, then its log-probabilities."""
        for start in range(0, len(self), _CHUNK):
            yield from self._reader.read(start, min(start + _CHUNK, len(self)))

    def attach(self, example: Example) -> Example:
        """The example with the stored log-probabilities of its answers; KeyError as of :meth:`logps`."""
        pairs = zip(example.answers, self.logps(example), strict=True)
        return replace(example, answers=tuple(replace(answer, reference=values) for answer, values in pairs))

    def logps(self, example: Example) -> tuple[np.ndarray, ...]:
        """Log-probabilities of all tokens of an example's answers.

        Args:
          example: prompt and answers, of any uid.

        Returns:
          float32 [n] for each answer, nats.

        Raises:
          KeyError: an answer is not in the store; it was written for other data.
        """
        found = []
        for answer in example.answers:
            key = answer_key(example.prompt, answer.tokens)
            if key not in self._rows:
                raise KeyError(
                    f"example {example.uid} has an answer that {self.folder} does not hold: it was written for other "
                    "data"
                )
            record = self._reader.read([self._rows[key]])[0]
            found.append(np.frombuffer(record[_KEY_BYTES:], np.float32))
        return tuple(found)


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
