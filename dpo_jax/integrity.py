"""Sealed folders: storage may return other bytes than it was given, without a word."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


class DamagedError(OSError):
    """Something on disk is not what was written."""


def seal(folder: Path) -> None:
    """Writes the size and the sha256 of every file of a folder into its manifest, and waits until all is on the disk.

    Args:
      folder: complete but for the manifest.

    Raises:
      OSError: it cannot be written.
    """
    (folder / MANIFEST).write_text(
        _to_text({name: _describe_file(folder / name) for name in _files(folder)}), encoding="utf-8"
    )
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def verify(folder: Path, share: tuple[int, int] = (0, 1)) -> None:
    """Compares a sealed folder with its manifest: every byte of every file, and that there is no file beside them.

    Args:
      folder: that was sealed.
      share: (index, count) of this process among those that compare a part of the files' bytes each.

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
    _compare(folder, expected, share)


def sync(path: Path) -> None:
    """Returns when a file, or the list of files of a folder, would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _compare(folder: Path, expected: dict[str, Any], share: tuple[int, int]) -> None:
    names, (index, count) = _files(folder), share
    for name in sorted(expected.keys() | set(names)):
        if name not in names:
            raise DamagedError(f"{folder / name} is missing")
        if name not in expected:
            raise DamagedError(f"{folder / name} is a file that does not belong there")
    for name in names[index::count]:
        try:
            found = _describe_file(folder / name)
        except OSError as error:
            raise DamagedError(f"{folder} cannot be read: {error}") from error
        if found != expected[name]:
            raise DamagedError(f"{folder / name} is damaged: it has {found}, expected {expected[name]}")


def _files(folder: Path) -> list[str]:
    """Names of the files that a manifest lists, sorted."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _describe_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _to_text(files: dict[str, Any]) -> str:
    return json.dumps(files, sort_keys=True, indent=1) + "\n"
