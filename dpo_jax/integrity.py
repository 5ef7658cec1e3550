"""Content hashes of arrays and folders: storage may return other bytes than it was given, without a word."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.trees import describe, named_leaves

MANIFEST = "manifest.json"


class DamagedError(OSError):
    """Something on disk is not what was written."""


def hash_leaves(tree: Any) -> dict[str, str]:
    """sha256 of every array with its dtype and shape, by path.

    Args:
      tree: a pytree of numpy arrays.

    Returns:
      ``{'params/decoder/kernel': hexadecimal, …}``.
    """
    return {name: _hash_array(np.asarray(leaf)) for name, leaf in named_leaves(tree).items()}


def hash_tree(tree: Any) -> str:
    """One sha256 over all arrays of a pytree and their names, hexadecimal."""
    return combine(hash_leaves(tree))


def combine(hashes: dict[str, str]) -> str:
    """One sha256 over named hashes, whatever their order, hexadecimal."""
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def seal(folder: Path) -> None:
    """Writes the size and the sha256 of every file of a folder into its manifest, and waits until all is on the disk.

    Args:
      folder: complete but for the manifest.

    Raises:
      OSError: it cannot be written.
    """
    (folder / MANIFEST).write_text(_to_text(_describe_files(folder)), encoding="utf-8")
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def verify(folder: Path) -> None:
    """Compares a sealed folder with its manifest: every byte of every file, and that there is no file beside them.

    Args:
      folder: that was sealed.

    Raises:
      DamagedError: a file is missing, foreign or changed; the message names it.
    """
    if not folder.is_dir():
        raise DamagedError(f"{folder} is not a folder")
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    if links:
        raise DamagedError(f"{links[0]} is a link: a file that does not belong there")
    try:
        text = (folder / MANIFEST).read_bytes().decode()
        expected = json.loads(text)
        # A manifest with one byte changed says the same only when that byte has no meaning; it is refused all the same.
        whole = isinstance(expected, dict) and text == _to_text(expected)
    except (OSError, ValueError) as error:
        raise DamagedError(f"{folder / MANIFEST} is missing or damaged: {error}") from error
    if not whole:
        raise DamagedError(f"{folder / MANIFEST} is damaged")
    _compare(folder, expected)


def sync(path: Path) -> None:
    """Returns when a file, or the list of files of a folder, would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _compare(folder: Path, expected: dict[str, Any]) -> None:
    try:
        found = _describe_files(folder)
    except OSError as error:
        raise DamagedError(f"{folder} cannot be read: {error}") from error
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise DamagedError(f"{folder / name} is missing")
        if name not in expected:
            raise DamagedError(f"{folder / name} is a file that does not belong there")
        if found[name] != expected[name]:
            raise DamagedError(f"{folder / name} is damaged: it has {found[name]}, expected {expected[name]}")


def _describe_files(folder: Path) -> dict[str, Any]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST]
    return {path.relative_to(folder).as_posix(): _describe_file(path) for path in paths}


def _describe_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _to_text(files: dict[str, Any]) -> str:
    return json.dumps(files, sort_keys=True, indent=1) + "\n"


def _hash_array(array: np.ndarray) -> str:
    digest = hashlib.sha256(describe(array).encode())
    # Bytes: not every dtype (bfloat16) can hand out its buffer.
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
