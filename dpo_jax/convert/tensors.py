"""Reading and writing safetensors files, one tensor at a time.

A file is the length of its header (8 bytes, little endian), the header (JSON: name → dtype, shape, offsets), the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_BLOCK = 2**24  # bytes of a tensor that are compared at a time
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
      path: the file.
      name: the tensor's name.
      dtype: the file's name of its dtype, such as BF16.
      shape: its shape.
      start: of its data in the file, bytes.
      size: of its data, bytes.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The tensor, or some rows of it; the file is not kept in memory.

        Args:
          start: first index along the first axis.
          stop: the index after the last; None is the end.

        Raises:
          OSError: the file cannot be read, or has changed since its header was.
          ValueError: a dtype that weights do not have.
        """
        if self.dtype not in _DTYPES:
            raise ValueError(f"{self.path}: tensor {self.name} is {self.dtype}; expected one of {', '.join(_DTYPES)}")
        dtype = np.dtype(_DTYPES[self.dtype])
        rows = range(*slice(start, stop).indices(self.shape[0])) if self.shape else range(1)
        shape = (len(rows), *self.shape[1:]) if self.shape else ()
        row = math.prod(self.shape[1:]) * dtype.itemsize
        flat = np.fromfile(self.path, dtype, math.prod(shape), offset=self.start + rows.start * row)
        if flat.size != math.prod(shape):
            raise OSError(f"{self.path}: tensor {self.name} ends after {flat.nbytes} of {len(rows) * row} bytes")
        return flat.reshape(shape)


def same_numbers(one: Entry, other: Entry) -> bool:
    """Whether two tensors are equal; some rows of each are read at a time. Raises as ``Entry.read``."""
    if one.shape != other.shape:
        return False
    count = one.shape[0] if one.shape else 1
    rows = max(1, _BLOCK * count // max(one.size, other.size, 1))
    parts = (slice(start, start + rows) for start in range(0, count, rows))
    return all(np.array_equal(one.read(p.start, p.stop), other.read(p.start, p.stop), equal_nan=True) for p in parts)


def read_entries(folder: Path) -> dict[str, Entry]:
    """All tensors of a folder's single file or of its shards, by name; no data is read.

    Raises:
      OSError: no weights, a missing shard, a file that is cut short or is no safetensors file.
      ValueError: tensors that the index puts elsewhere than they are.
    """
    if (folder / INDEX).is_file():
        return _read_sharded(folder)
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    also = f"; {', '.join(pickled)} may run code when read, so it is not" if pickled else ""
    raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}{also}; save the model as safetensors")


def _read_sharded(folder: Path) -> dict[str, Entry]:
    path = folder / INDEX
    try:
        where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{path} is damaged: {error!r}; fetch it again") from error
    entries: dict[str, Entry] = {}
    for shard in sorted(set(where.values())):
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{folder / shard} is missing, though {path.name} names it; fetch it again")
        entries |= read_header(folder / shard)
    misplaced = sorted(name for name, shard in where.items() if name not in entries or entries[name].path.name != shard)
    unlisted = sorted(set(entries) - set(where))
    if misplaced or unlisted:
        raise ValueError(f"{path} is not the index of its files: misplaced {misplaced}, unlisted {unlisted}")
    return entries


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one file, by name.

    Raises:
      OSError: the file is damaged or cut short; the tensor that suffers is named.
    """
    total = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if total < 8 or not 2 <= length <= min(total - 8, _LONGEST_HEADER):
            raise OSError(f"{path} is no safetensors file, or is cut short ({total} bytes); fetch it again")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {name: _entry(path, name, item, 8 + length) for name, item in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"{path} has a damaged header: {error}; fetch it again") from error
    for entry in entries.values():
        if entry.start + entry.size > total:
            missing = entry.start + entry.size - total
            raise OSError(f"{path} is cut short: tensor {entry.name} lacks {missing} bytes; fetch it again")
    return entries


def _entry(path: Path, name: str, item: Mapping[str, Any], base: int) -> Entry:
    start, stop = (int(offset) for offset in item["data_offsets"])
    shape = tuple(int(n) for n in item["shape"])
    entry = Entry(path, name, str(item["dtype"]), shape, base + start, stop - start)
    if start < 0 or (
        entry.dtype in _DTYPES and entry.size != int(np.prod(shape)) * np.dtype(_DTYPES[entry.dtype]).itemsize
    ):
        raise ValueError(f"tensor {name} of shape {list(shape)} does not fill its {stop - start} bytes")
    return entry


def write_tensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: Any,
    make: Callable[[str], np.ndarray],
    shard_bytes: int,
) -> None:
    """Writes tensors into one file, or into shards with an index when one would grow too large.

    Args:
      folder: where to.
      shapes: of every tensor, by name, in the order of writing.
      dtype: of all of them.
      make: gives a tensor by name; only one exists at a time.
      shard_bytes: largest shard, bytes; a tensor that is larger has a shard of its own.
    """
    dtype = np.dtype(dtype)
    sizes = {name: int(np.prod(shape)) * dtype.itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    count = len(shards)
    files = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file, names in zip(files, shards, strict=True):
        write_file(folder / file, {name: shapes[name] for name in names}, dtype, make)
    if count > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, make: Callable[[str], np.ndarray]
) -> None:
    """Writes tensors into one file; arguments as of :func:`write_tensors`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        stop = offset + int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = np.ascontiguousarray(make(name), dtype)
            assert tensor.shape == shape, (name, tensor.shape, shape)
            file.write(tensor.tobytes())
