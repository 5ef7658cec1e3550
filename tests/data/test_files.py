"""Files: every format and compression gives the same rows, and every kind of damage its reason, file and line."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dpo_jax.data import files
from dpo_jax.data.formats import parse_row
from dpo_jax.data.records import BadRow

ROWS = [{"prompt": f"p{i}", "chosen": "ja\nнет", "rejected": "x" * i or "-"} for i in range(5)]


def write(path: Path, rows=ROWS) -> Path:
    suffix = path.name.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    if suffix == "csv":
        plain = path.with_name("plain.csv.tmp")
        with plain.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        data = plain.read_bytes()
        plain.unlink()
    elif suffix == "json":
        data = json.dumps(rows, indent=1).encode()
    else:
        data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    path.write_bytes(compress(path, data))
    return path


def compress(path: Path, data: bytes) -> bytes:
    return {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)(data)


def read(path: Path, **options) -> list[files.Line]:
    return list(files.read_lines(path, **options))


NAMES = [f"a{suffix}{packed}" for suffix in (".jsonl", ".json", ".csv") for packed in ("", ".gz", ".zst")]


@pytest.mark.parametrize("name", [*NAMES, "a.parquet", "a.ndjson"])
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    lines = read(write(tmp_path / name))
    assert [dict(line.row) for line in lines] == ROWS
    assert all(line.error is None for line in lines)


def test_lines_are_numbered_as_an_editor_does(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n[3]\n')
    assert [(line.number, line.error and line.error.reason) for line in read(tmp_path / "a.jsonl")] == [
        (1, None),
        (3, None),
        (4, "wrong type"),
    ]
    (tmp_path / "a.json").write_text('[\n {"a": 1},\n {"a":\n  2},\n 3]')
    assert [line.number for line in read(tmp_path / "a.json")] == [2, 3, 5]
    (tmp_path / "a.csv").write_text('a,b\n1,"x\ny"\n2,z\n')
    assert [line.number for line in read(tmp_path / "a.csv")] == [2, 4]


DAMAGE = {
    "not JSON": ("a.jsonl", b'{"a": 1}\n{"a": \n{"a": 3}\n', 2, 3),
    "NaN": ("a.jsonl", b'{"a": NaN}\n', 1, 1),
    "NUL": ("a.jsonl", b'{"a": 1}\n{"a": "\0"}\n', 2, 2),
    "not UTF-8": ("a.jsonl", b'{"a": "\xff"}\n', 1, 1),
    "empty file": ("a.jsonl", b"", 1, 1),
    "blank file": ("a.jsonl", b" \n\n", 1, 1),
    "array cut short": ("a.json", b'[\n{"a": 1},\n{"a"', 3, 2),
    "array of something else": ("a.json", b'[{"a": 1} {"a": 2}]', 1, 2),
    "array with a bad byte": ("a.json", b'[{"a": 1},\n{"a": "\xff"}]', None, None),
    "empty array": ("a.json", b"[]", 1, 1),
    "a second array": ("a.json", b'[{"a": 1},\n{"a": 2}]\n[{"a": 3}]', 3, 3),
    "columns": ("a.csv", b"a,b\n1\n2,3\n", 2, 2),
    "quotes": ("a.csv", b'a,b\n1,"x\n', 2, 1),
    "gzip cut short": ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 20_000)[:40], None, None),
    "no gzip": ("a.jsonl.gz", b"plain", 1, 1),
    "zst cut short": ("a.jsonl.zst", zstandard.compress(bytes(range(256)).hex().encode() * 50)[:60], None, None),
    "no zst": ("a.jsonl.zst", b"plain text", 1, 1),
    "no parquet": ("a.parquet", b"plain text, and more of it", 1, 1),
    "deep": ("a.jsonl", b"[" * 100_000 + b"\n", 1, 1),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_a_line_with_a_reason(name: str, tmp_path: Path) -> None:
    file, data, number, count = DAMAGE[name]
    (tmp_path / file).write_bytes(data)
    lines = read(tmp_path / file)
    bad = [line for line in lines if line.error]
    assert len(bad) == 1
    assert bad[0].place.startswith(str(tmp_path / file))
    if number is not None:
        assert bad[0].number == number
        assert len(lines) == count


def test_a_truncated_compressed_file_is_not_taken_for_a_short_one(tmp_path: Path) -> None:
    rows = b"".join(json.dumps({"a": i}).encode() + b"\n" for i in range(8_000))
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        data = compress(tmp_path / name, rows)
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        lines = read(tmp_path / name)
        assert lines[-1].error is not None and lines[-1].error.reason == "damaged file"
        assert len(lines) < 8_000


def test_compressed_frames_may_follow_each_other(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        frame = compress(tmp_path / name, b'{"a": 1}\n')
        (tmp_path / name).write_bytes(frame * 3)
        assert len(read(tmp_path / name)) == 3


def test_a_line_of_fifty_megabytes_is_one_error_and_the_next_line_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"a": "')
        for _ in range(50):
            file.write(b"x" * 2**20)
        file.write(b'"}\n{"a": 2}\n')
    lines = read(path)
    assert [(line.number, line.error and line.error.reason) for line in lines] == [(1, "too long"), (2, None)]
    assert "52428810 bytes" in str(lines[0].error)


def test_an_array_is_read_in_a_window(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(files, "_CHUNK", 7)
    assert [dict(line.row) for line in read(write(tmp_path / "a.json"))] == ROWS
    assert read(write(tmp_path / "a.json"), max_bytes=20)[0].error.reason == "not JSON"


def test_an_empty_cell_is_a_field_without_a_value(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion,label\na,b,true\na,c,\n")
    good, unrated = read(tmp_path / "a.csv")
    assert (good.row["label"], unrated.row["label"]) == ("true", None)
    with pytest.raises(BadRow, match="label"):  # without the field it would be an answer to imitate
        parse_row(unrated.row)


def test_json_of_lines_is_read_as_lines(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl").rename(tmp_path / "a.json")
    assert [dict(line.row) for line in read(tmp_path / "a.json")] == ROWS


def test_paths_stand_for_files_folders_and_globs(tmp_path: Path) -> None:
    for folder in ("sub", ".ipynb_checkpoints"):
        (tmp_path / folder).mkdir()
    for name in ("b.jsonl", "a.json", "sub/c.csv.gz", ".hidden.jsonl", ".ipynb_checkpoints/b.jsonl", "README.md"):
        (tmp_path / name).write_text("x")
    assert [p.name for p in files.find_files(str(tmp_path))] == ["a.json", "b.jsonl", "c.csv.gz"]
    assert [p.name for p in files.find_files(f"{tmp_path}/*.json*")] == ["a.json", "b.jsonl"]
    for pattern, message in ((f"{tmp_path}/*.x", "no data files"), (f"{tmp_path}/README.md", "no known suffix")):
        with pytest.raises(ValueError, match=message):
            files.find_files(pattern)


@given(
    st.binary(max_size=200), st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
)
def test_any_bytes_are_rows_or_reasons(tmp_path_factory, data: bytes, name: str) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data)
    lines = read(path)
    assert lines
    assert all((line.row is None) != (line.error is None) for line in lines)
