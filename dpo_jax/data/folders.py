"""Folders that are either complete or not there: written beside their place, then renamed onto it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path


def check_writable(folder: str | Path, purpose: str) -> Path:
    """Makes the folder if need be and writes a byte into it, so that a long job does not fail at its end.

    Args:
      folder: where files are to be written.
      purpose: what for, in words; stands in the message.

    Returns:
      The folder.

    Raises:
      OSError: the folder can be neither made nor written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
            probe.flush()
    except OSError as error:
        raise OSError(
            f"Cannot write {purpose} to {folder}: {error.strerror or error}. "
            "Choose another folder, or give this user the right to write there."
        ) from error
    return folder


@contextlib.contextmanager
def replaced_folder(folder: str | Path, purpose: str) -> Iterator[Path]:
    """Yields an empty folder that takes the place of ``folder`` when the block ends without an error.

    A reader finds the old folder, the whole new one, or (killed between two renames) none, but never a half. What a
    killed writer of this machine left behind is removed by the next one.

    Args:
      folder: the place of the result; an older folder there is replaced.
      purpose: what is written, in words; stands in the messages.

    Yields:
      The folder to write to.

    Raises:
      OSError: the place cannot be written to.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not folder.is_dir():
        raise OSError(f"Cannot write {purpose} to {folder}: a file lies there. Move it, or choose another folder.")
    check_writable(folder.parent, purpose)
    _remove_leftovers(folder)
    incomplete = folder.parent / f"{_prefix(folder)}{os.getpid()}"
    shutil.rmtree(incomplete, ignore_errors=True)
    incomplete.mkdir()
    try:
        yield incomplete
        _swap(incomplete, folder)
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)


def _swap(new: Path, place: Path) -> None:
    old = place.parent / f"{_prefix(place)}{os.getpid()}.old"
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def _prefix(folder: Path) -> str:
    return f".incomplete.{folder.name}.{socket.gethostname()}."


def _remove_leftovers(folder: Path) -> None:
    for path in folder.parent.glob(f"{_prefix(folder)}*"):
        pid = path.name.removeprefix(_prefix(folder)).removesuffix(".old")
        if pid.isdigit() and not _runs(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
