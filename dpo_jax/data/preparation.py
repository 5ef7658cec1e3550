"""Local files and public sets → prepared examples, once. Every row is used, or counted with the reason why not.

``data.path`` names one source or a mixture, in which a weight is how often an epoch passes over a source::

    hh_test.jsonl.gz                     a file, a folder or a glob
    ultrafeedback                        a public set, downloaded
    shp:downloads/*.json                 files of that set's shape
    2*mine.jsonl + 0.5*ultrafeedback     twice all of the one, and a half, drawn by the seed, of the other
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from absl import logging

from dpo_jax.data.encode import Encoded, Encoder
from dpo_jax.data.example import Example
from dpo_jax.data.files import Line, find_files, read_lines
from dpo_jax.data.formats import Parser, parse_row
from dpo_jax.data.prepared import is_prepared, read_metadata
from dpo_jax.data.prepared_writer import write_examples
from dpo_jax.data.public import PUBLIC_SETS, download
from dpo_jax.data.records import BadRow, Record

ON_ERROR = ("raise", "skip")
OTHER_SPLIT = "other split"
_VERSION = 2  # of rows → examples: change it when the same rows give other examples
_EXAMPLES_OF_ERRORS = 50
_BEFORE_SHARE = 1000  # rows before which a share says little


@dataclass(frozen=True)
class Part:
    """One source of a mixture.

    Attributes:
      name: of a public set; None for plain files.
      pattern: of its files; None where they are downloaded.
      weight: passes over it in an epoch.
    """

    name: str | None
    pattern: str | None
    weight: float = 1.0

    def files(self, split: str, downloads: Path) -> list[Path]:
        """Its files, downloaded where need be."""
        if self.pattern is not None:
            return find_files(self.pattern)
        assert self.name is not None
        return [download(url, downloads / self.name) for url in PUBLIC_SETS[self.name].urls[split]]

    def parser(self, split: str) -> Parser:
        """What reads its rows."""
        return parse_row if self.name is None else PUBLIC_SETS[self.name].parser(split)

    def records(self, reader: Reader, split: str, downloads: Path) -> Iterator[tuple[Line, Record]]:
        """All records of its files, as of :meth:`Reader.records`."""
        return reader.records(self.files(split, downloads), self.parser(split))


def parse_mixture(path: str) -> list[Part]:
    """Parses ``data.path``; see the module's table.

    Raises:
      ValueError: an empty part, or a weight that is no positive number.
    """
    parts = []
    for term in path.split(" + "):
        term, weight = term.strip(), 1.0
        head, star, rest = term.partition("*")
        if star and _is_number(head):
            term, weight = rest.strip(), float(head)
        name, colon, pattern = term.partition(":")
        if not term or not 0 < weight < float("inf") or (colon and name in PUBLIC_SETS and not pattern):
            raise ValueError(f"data.path is {path!r}; expected sources such as 'a.jsonl + 0.5*hh', weights above 0")
        if name in PUBLIC_SETS and (colon or not Path(term).exists()):
            parts.append(Part(name, pattern or None, weight))
        else:
            parts.append(Part(None, term, weight))
    return parts


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@dataclass
class Tally:
    """What became of all rows: rows = used + Σ malformed + Σ dropped + other split.

    Attributes:
      rows: rows read, and lines that should have been rows.
      used: rows that gave examples.
      examples: examples made; scored answers give several a row.
      other_split: rows that belong to another split.
      malformed: rows that are wrong, by reason.
      dropped: rows that are right but of no use, by reason.
      notes: what happened to rows that are used: truncated prompts, answers that lost their EOS.
      places: (file and line, reason, message) of the first malformed and dropped rows.
    """

    rows: int = 0
    used: int = 0
    examples: int = 0
    other_split: int = 0
    malformed: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    places: list[tuple[str, str, str]] = field(default_factory=list)

    def accounted(self) -> int:
        """Rows whose fate is known; equals ``rows`` at the end."""
        return self.used + self.other_split + self.malformed.total() + self.dropped.total()

    def place(self, line: Line, reason: str, message: str = "") -> None:
        if len(self.places) < _EXAMPLES_OF_ERRORS:
            self.places.append((line.place, reason, message))

    def to_json(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in ("rows", "used", "examples", "other_split")}
        counts = {name: dict(getattr(self, name)) for name in ("malformed", "dropped", "notes")}
        return {**numbers, **counts, "places": [list(place) for place in self.places]}


class Reader:
    """Reads records out of files, and counts what it cannot read.

    Args:
      on_error: ``raise`` stops at the first malformed row, ``skip`` counts it.
      max_skips: share of malformed rows past which skipping stops too.

    Attributes:
      tally: what became of the rows so far.
    """

    def __init__(self, on_error: str, max_skips: float) -> None:
        if on_error not in ON_ERROR:
            raise ValueError(f"data.on_error is {on_error!r}; known: {', '.join(ON_ERROR)}")
        self.tally = Tally()
        self._on_error, self._max_skips = on_error, max_skips

    def records(self, files: Sequence[Path], parse: Parser) -> Iterator[tuple[Line, Record]]:
        """All records of the files, in order.

        Raises:
          ValueError: a malformed row, or too many of them.
        """
        for path in files:
            for line in read_lines(path):
                self.tally.rows += 1
                try:
                    if line.row is None:
                        raise line.error or BadRow("no row", "")
                    record = parse(line.row)
                except BadRow as error:
                    self.refuse(line, error)
                    continue
                yield line, record

    def refuse(self, line: Line, error: BadRow) -> None:
        """Counts a malformed row, or stops at it.

        Raises:
          ValueError: rows must be right, or too many are wrong.
        """
        if error.reason == OTHER_SPLIT:
            self.tally.other_split += 1
            return
        self.tally.malformed[error.reason] += 1
        self.tally.place(line, error.reason, str(error))
        if self._on_error == "raise":
            raise ValueError(
                f"{line.place}: {error.reason}: {error}. Mend the row, or set data.on_error to 'skip' to leave out and "
                "count such rows; python -m dpo_jax.audit lists all of them"
            ) from error
        if self.tally.rows >= _BEFORE_SHARE:
            self.check_share()

    def check_share(self) -> None:
        """Raises ValueError when more than the allowed share of rows is malformed."""
        wrong, rows = self.tally.malformed.total(), self.tally.rows
        if wrong > self._max_skips * rows:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self.tally.malformed.most_common())
            first = self.tally.places[0]
            raise ValueError(
                f"{wrong} of {rows} rows are malformed ({reasons}), more than the share data.max_skips = "
                f"{self._max_skips} allows; the first is {first[0]}: {first[2]}. Mend the files, or raise that key"
            )


def encoded_examples(
    reader: Reader, records: Iterable[tuple[Line, Record]], encoder: Encoder, keep: Callable[[Record], bool]
) -> Iterator[Example]:
    """The examples of all records, numbered from 0.

    Args:
      reader: has read the records, and counts.
      records: what to encode.
      encoder: Record → examples.
      keep: which records belong to this split.

    Raises:
      ValueError: a malformed row, or too many of them.
    """
    tally = reader.tally
    waiting: deque[Line] = deque()  # lines whose records the encoder holds; it works in batches

    def kept() -> Iterator[Record]:
        for line, record in records:
            if keep(record):
                waiting.append(line)
                yield record
            else:
                tally.other_split += 1

    answers = 0
    for result in encoder.encode(kept()):
        line = waiting.popleft()
        if isinstance(result, Encoded) and result.examples:
            answers = answers or len(result.examples[0].answers)
            if len(result.examples[0].answers) != answers:
                result = BadRow("mixed answers", f"the rows before have {answers} answers, this one has another number")
        if isinstance(result, BadRow):
            reader.refuse(line, result)
            continue
        tally.notes += result.notes
        if result.dropped is not None:
            tally.dropped[result.dropped] += 1
            tally.place(line, result.dropped)
            continue
        tally.used += 1
        for example in result.examples:
            yield replace(example, uid=tally.examples)
            tally.examples += 1
    reader.check_share()


@dataclass(frozen=True)
class Request:
    """What to prepare, and how; equal requests give equal examples.

    Attributes:
      part: the source of training examples.
      held_out: the sources of held-out ones; none of them holds out prompts of ``part``.
      eval_share: share of the prompts that is held out where ``held_out`` is empty.
      on_error: ``raise`` or ``skip``.
      max_skips: share of malformed rows past which skipping stops.
    """

    part: Part
    held_out: tuple[Part, ...]
    eval_share: float
    on_error: str
    max_skips: float

    @property
    def own_held_out(self) -> tuple[Part, ...]:
        """Sources of held-out examples alone: those that are given, or the public set's own; none of plain files."""
        return self.held_out or ((self.part,) if self.part.pattern is None else ())


def prepare(request: Request, encoder: Encoder, tokenizer: str, folder: Path) -> Path:
    """Prepares one source where that has not been done yet.

    Args:
      request: what to prepare.
      encoder: how.
      tokenizer: fingerprint of its tokenizer.
      folder: of prepared data; downloads lie there, too.

    Returns:
      The folder of the prepared examples, splits ``train`` and ``eval``.

    Raises:
      ValueError: malformed rows, or no example is left.
      OSError: files cannot be read, fetched or written.
    """
    downloads, splits = folder / "downloads", _splits(request)
    files = {name: split.files(downloads) for name, split in splits.items()}
    settings = {
        "version": _VERSION,
        "encoding": encoder.identity(),
        "tokenizer": tokenizer,
        "eval_share": None if request.own_held_out else request.eval_share,
        "sets": {name: [part.name for part in split.parts] for name, split in splits.items()},
        "files": {name: [file_hash(path) for path in paths] for name, paths in files.items()},
    }
    identity = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    place = folder / f"examples-{identity[:16]}"
    if is_prepared(place):
        _report(read_metadata(place).details["rows"], place)
        return place
    rows: dict[str, Any] = {}
    write_examples(
        {
            name: _recorded(split.examples(encoder, downloads), name, split.reader, rows)
            for name, split in splits.items()
        },
        place,
        name="preferences",
        tokenizer=tokenizer,
        details=lambda: {
            "settings": settings,
            "files": {s: [str(p) for p in ps] for s, ps in files.items()},
            "rows": rows,
        },
    )
    _report(rows, place)
    return place


@dataclass(frozen=True)
class _Split:
    """Where the examples of a split come from.

    Attributes:
      parts: its sources.
      name: what these call it; held-out rows may be rows of their training files.
      keep: which of their records belong to it.
      reader: reads and counts them.
    """

    parts: tuple[Part, ...]
    name: str
    keep: Callable[[Record], bool]
    reader: Reader

    def files(self, downloads: Path) -> list[Path]:
        return [path for part in self.parts for path in part.files(self.name, downloads)]

    def examples(self, encoder: Encoder, downloads: Path) -> Iterator[Example]:
        found = (part.records(self.reader, self.name, downloads) for part in self.parts)
        return encoded_examples(self.reader, itertools.chain.from_iterable(found), encoder, self.keep)


def _splits(request: Request) -> dict[str, _Split]:
    part, own, reader = (request.part,), request.own_held_out, Reader(request.on_error, request.max_skips)
    if own:
        every: Callable[[Record], bool] = lambda record: True  # noqa: E731
        other = Reader(request.on_error, request.max_skips)
        return {"train": _Split(part, "train", every, reader), "eval": _Split(own, "eval", every, other)}
    held_out: Callable[[Record], bool] = lambda record: is_held_out(record, request.eval_share)  # noqa: E731
    # Rows that are wrong are counted, or stop it, when they are read for training.
    return {
        "train": _Split(part, "train", lambda record: not held_out(record), reader),
        "eval": _Split(part, "train", held_out, Reader("skip", 1.0)),
    }


def is_held_out(record: Record, share: float) -> bool:
    """Whether a record is held out: by a hash of its prompt, so that no prompt is on both sides."""
    digest = hashlib.sha256(b"split:" + record.prompt_text().encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _recorded(examples: Iterator[Example], split: str, reader: Reader, rows: dict[str, Any]) -> Iterator[Example]:
    yield from examples
    tally = reader.tally
    rows[split] = tally.to_json()
    if not tally.examples:
        lost = dict(tally.malformed + tally.dropped)
        raise ValueError(
            f"no example is left for {split!r}: of {tally.rows} rows {tally.other_split} belong to another split, and "
            f"these are of no use: {lost}. Look at the files, raise data.eval_share, or set data.eval_path"
        )


def _report(rows: dict[str, Any], place: Path) -> None:
    for split, tally in rows.items():
        lost = {**tally["malformed"], **tally["dropped"]}
        logging.info(
            "%s: %d rows, %d used for %d examples, %d of another split%s%s; they lie in %s",
            split,
            tally["rows"],
            tally["used"],
            tally["examples"],
            tally["other_split"],
            "".join(f", {count} {reason}" for reason, count in lost.items()),
            "".join(f"; {count} {note}" for note, count in tally["notes"].items()),
            place,
        )
