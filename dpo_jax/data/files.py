"""Rows of local files: JSON lines, JSON arrays, CSV and Parquet, also compressed (.gz, .zst), in constant memory.

Nothing is left out in silence: what is no row comes as a line with the reason, the file and the number.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet
import zstandard
from absl import logging

from dpo_jax import buckets
from dpo_jax.data.records import BadRow

MAX_ROW_BYTES = 16 * 2**20  # a longer line is a damaged file, not an example
_CHUNK = 2**20
_COMPRESSIONS = (".gz", ".zst")


@dataclass(frozen=True)
class Line:
    """One row of a file, or why there is none.

    Attributes:
      file: the file's path.
      number: line (of Parquet: row) number, from 1.
      row: the fields; None where there is an error.
      error: what is wrong; None where there is a row.
    """

    file: str
    number: int
    row: Mapping[str, Any] | None
    error: BadRow | None = None

    @property
    def place(self) -> str:
        return f"{self.file}, line {self.number}"


def find_files(pattern: str) -> list[Path]:
    """The data files that a path stands for, in the order of their names.

    Args:
      pattern: a file, a folder (all data files in it and below) or a glob such as ``data/*.jsonl.gz``; buckets too.

    Returns:
      The files.

    Raises:
      ValueError: there is none, or a file has no known suffix.
    """
    path = buckets.fetched(pattern).expanduser()
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
        found = [p for p in inside if _format(p)]
        ignored = [p.name for p in inside if not _format(p)]
        if ignored:
            logging.info("%s: %d files are no data: %s", path, len(ignored), ", ".join(ignored[:5]))
    else:
        found = [path] if path.is_file() else sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        found = [p for p in found if p.is_file()]
        unknown = [str(p) for p in found if not _format(p)]
        if unknown:
            raise ValueError(f"{unknown[0]} has no known suffix; expected {', '.join(FORMATS)}, also with .gz or .zst")
    if not found:
        raise ValueError(f"no data files at {pattern}; expected a file, a folder or a glob: {', '.join(FORMATS)}")
    return found


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def read_lines(path: Path, max_bytes: int = MAX_ROW_BYTES) -> Iterator[Line]:
    """All rows of a file, in order, and all that should have been rows.

    Args:
      path: a file with a known suffix.
      max_bytes: a longer line is an error.

    Yields:
      A line for each row; blank lines of text files are none. A file without rows gives one line with an error.

    Raises:
      OSError: the file cannot be opened.
    """
    lines = 0
    try:
        for line in FORMATS[_format(path)](path, max_bytes):
            lines += 1
            yield line
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError, pyarrow.ArrowException) as error:
        lines += 1
        yield _bad(path, lines, "damaged file", f"the rest of the file cannot be read: {error}")
    if not lines:
        yield _bad(path, 1, "empty file", "the file holds no row")


def _json_lines(path: Path, max_bytes: int) -> Iterator[Line]:
    with _open(path) as file:
        yield from _parse_lines(path, file, max_bytes)


def _parse_lines(path: Path, file: BinaryIO, max_bytes: int) -> Iterator[Line]:
    number = 0
    while raw := file.readline(max_bytes + 1):
        number += 1
        if len(raw) > max_bytes:
            size = len(raw)
            while not raw.endswith(b"\n") and (raw := file.readline(_CHUNK)):
                size += len(raw)
            yield _bad(path, number, "too long", f"the line has {size} bytes; a row has at most {max_bytes}")
        elif raw.strip():
            yield _parse(path, number, raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw)


def _parse(path: Path, number: int, raw: bytes) -> Line:
    if b"\0" in raw:
        return _bad(path, number, "NUL", f"the line holds a NUL byte at position {raw.index(0)}")
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return _bad(path, number, "not UTF-8", f"byte {error.start} of the line is no UTF-8")
    except (ValueError, RecursionError) as error:
        return _bad(path, number, "not JSON", str(error))
    return _object(path, number, value)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _object(path: Path, number: int, value: Any) -> Line:
    if not isinstance(value, dict):
        return _bad(path, number, "wrong type", f"the row is a {type(value).__name__}; expected an object with fields")
    return Line(str(path), number, value)


def _json_array(path: Path, max_bytes: int) -> Iterator[Line]:
    """An array of objects, element by element; a file of lines is read as such."""
    with _open(path) as file:
        start = file.read(_CHUNK)
        if not start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            yield from _parse_lines(path, io.BufferedReader(_Rejoined(start, file)), max_bytes)
            return
        yield from _Elements(path, io.BufferedReader(_Rejoined(start, file)), max_bytes).lines()


class _Elements:
    """The elements of a JSON array, decoded one by one from a window over the text."""

    def __init__(self, path: Path, file: BinaryIO, max_bytes: int) -> None:
        self._path, self._max = path, max_bytes
        self._file = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        self._text, self._at, self._line = "", 0, 1
        self._decoder = json.JSONDecoder(parse_constant=_no_constant)

    def lines(self) -> Iterator[Line]:
        try:
            self._skip("[")
            while self._peek() not in ("]", ""):
                number = self._line
                value = self._element()
                yield _object(self._path, number, value)
                if self._peek() != "]":
                    self._skip(",")
            self._skip("]")
            if found := self._peek():
                raise ValueError(f"expected the end of the file after the array but found {found!r}")
        except UnicodeDecodeError:
            yield self._stop("not UTF-8", "the file is no UTF-8 from here on, or a little later")
        except (ValueError, RecursionError) as error:
            yield self._stop("not JSON", f"{error}; the rest of the file cannot be read")

    def _stop(self, reason: str, message: str) -> Line:
        return _bad(self._path, self._line, reason, message)

    def _element(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except ValueError:
                if len(self._text) - self._at > self._max:
                    raise ValueError(f"an element has more than {self._max} characters") from None
                # Perhaps only because the window ends inside of it: twice the text, so that the work stays linear.
                if not self._read(max(_CHUNK, len(self._text) - self._at)):
                    raise
            else:
                self._advance(end)
                return value

    def _peek(self) -> str:
        while True:
            stop = self._at
            while stop < len(self._text) and self._text[stop] in " \t\r\n":
                stop += 1
            self._advance(stop)
            if stop < len(self._text) or not self._read(_CHUNK):
                return self._text[stop : stop + 1]

    def _skip(self, character: str) -> None:
        found = self._peek()
        if found != character:
            raise ValueError(f"expected {character!r} but found {found!r}")
        self._advance(self._at + 1)

    def _advance(self, stop: int) -> None:
        self._line += self._text.count("\n", self._at, stop)
        self._at = stop

    def _read(self, size: int) -> bool:
        more = self._file.read(size)
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)


class _Rejoined(io.RawIOBase):
    """A stream whose beginning has been read already."""

    def __init__(self, start: bytes, rest: BinaryIO) -> None:
        self._start, self._rest = start, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._start[: len(buffer)] or self._rest.read(len(buffer))
        self._start = self._start[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)


def _csv_rows(path: Path, max_bytes: int) -> Iterator[Line]:
    with _open(path) as binary, _field_limit(max_bytes):
        text = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
        reader = csv.reader(text, strict=True)
        number = 1
        try:
            names = next(reader, None)
            number = reader.line_num + 1
            for values in reader:
                if names is not None and len(values) == len(names):
                    yield Line(str(path), number, {n: v or None for n, v in zip(names, values, strict=True)})
                elif values:
                    expected = f"expected the {len(names or ())} of the first line"
                    yield _bad(path, number, "wrong columns", f"{len(values)} columns; {expected}")
                number = reader.line_num + 1
        except csv.Error as error:
            yield _bad(path, number, "not CSV", f"{error}; the rest of the file cannot be read")
        except UnicodeDecodeError:
            yield _bad(path, number, "not UTF-8", "the file is no UTF-8 from here on, or a little later")


@contextlib.contextmanager
def _field_limit(size: int) -> Iterator[None]:
    # The limit is csv's own and of the whole process; its default is less than a long answer.
    before = csv.field_size_limit(size)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet_rows(path: Path, max_bytes: int) -> Iterator[Line]:
    del max_bytes  # columns have their lengths beside them: a damaged file is found before it is read
    if path.suffix != ".parquet":
        raise ValueError(f"{path} is compressed from outside; Parquet compresses its own pages, so unpack it")
    with pyarrow.parquet.ParquetFile(path) as file:
        number = 0
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield Line(str(path), number, row)


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        return io.BufferedReader(_Zstandard(path.open("rb")))
    return path.open("rb")


class _Zstandard(io.RawIOBase):
    """Decompresses; unlike the library's own reader it does not take a truncated file for a short one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._ready = file, b""
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._inside = False  # whether a frame has begun that has not ended

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            raw = self._file.read(_CHUNK)
            if not raw:
                if self._inside:
                    raise EOFError("the compressed file ends inside of a frame")
                return 0
            self._ready = self._decompress(raw)
        piece, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)

    def _decompress(self, raw: bytes) -> bytes:
        out = []
        while raw:
            out.append(self._frame.decompress(raw))
            self._inside = not self._frame.eof
            raw = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
        return b"".join(out)

    def close(self) -> None:
        self._file.close()
        super().close()


def _bad(path: Path, number: int, reason: str, message: str) -> Line:
    return Line(str(path), number, None, BadRow(reason, message))


def _format(path: Path) -> str:
    """The suffix that tells the format, empty where it is unknown."""
    suffix = Path(path.stem).suffix if path.suffix in _COMPRESSIONS else path.suffix
    return suffix if suffix in FORMATS else ""


FORMATS: dict[str, Callable[[Path, int], Iterator[Line]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_array,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
