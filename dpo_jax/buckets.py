"""Files and workdirs in buckets (``gs://``, ``s3://``): copies on this machine, and what a run writes brought back.

An object store cannot append to a file, rename a folder or lock one, which logs and checkpoints rest on. So a run works
in a local folder, and what it has written is copied into the bucket after every checkpoint, in an order that makes each
state of the bucket in between one to go on from: logs, then the arrays of a checkpoint, then its manifest, without
which it does not count; old checkpoints lose their manifest first.

A second run cannot be kept out of a workdir in a bucket as it is out of a folder. It takes the workdir over: it leaves
its name there, and the first run stops when it would write the next time.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from absl import logging
from etils import epath

Item = TypeVar("Item")

_OWNER, _MANIFEST, _SUMMARY, _CHECKPOINTS = ".owner", "manifest.json", "summary.json", "checkpoints"
_MIRRORS = "workdirs"
_NEVER = (-1, 0)
_CHUNK = 2**24  # bytes copied at a time
_COPIES = 8  # files copied at a time


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path names something in a bucket."""
    return "://" in str(path)


def fetched(path: str | os.PathLike[str]) -> Path:
    """Where a file, a folder or what a glob names lies on this machine; what is in a bucket is copied first.

    Args:
      path: ``gs://bucket/pairs.jsonl``, ``gs://bucket/folder``, ``gs://bucket/*.jsonl``; a local path stays as it is.

    Returns:
      The local path, or the local glob. Copies are kept, and copied anew when size or time in the bucket differ.
      Where another process of this machine is fetching, it is waited for.

    Raises:
      OSError: there is no such thing in the bucket, or it cannot be read.
    """
    if not is_bucket(path):
        return Path(path)
    remote, place = epath.Path(path), _place(str(path))
    with _explained(f"cannot read {path}"), _alone_in(_root()):
        pattern = any(c in remote.name for c in "*?[")
        found = sorted(remote.parent.glob(remote.name)) if pattern else [remote]
        if not any(top.exists() for top in found):
            raise FileNotFoundError("there is nothing of that name")
        for top in found:
            _fetch(top, place.parent / top.name)
        for stale in set(place.parent.glob(place.name)) - {place.parent / top.name for top in found}:
            if stale.is_file():
                stale.unlink()
    return place


def local(path: str | os.PathLike[str], what: str) -> Path:
    """A path that cannot be in a bucket.

    Raises:
      ValueError: it is.
    """
    if is_bucket(path):
        raise ValueError(f"{what} must be a local folder, got {path}; mount the bucket and give its path")
    return Path(path)


class Mirror:
    """A workdir in a bucket and the local folder in which its run works.

    What killed and failed runs of the workdir have left on this machine is removed.

    Args:
      uri: the workdir, such as ``gs://bucket/run``.

    Attributes:
      folder: the local folder.
    """

    def __init__(self, uri: str) -> None:
        uri = uri.rstrip("/")
        own = f"{uri.rpartition('/')[2]}.{hashlib.sha256(uri.encode()).hexdigest()[:16]}."
        place = _root() / _MIRRORS
        with _alone_in(place):
            _remove_unlocked(place.glob(f"{glob.escape(own)}*"))
            self.folder = Path(tempfile.mkdtemp(prefix=own, dir=place))
            self._lock = _locked(self.folder)  # until it is removed or this process ends
        self._remote = epath.Path(uri)
        self._name = f"process {os.getpid()} on {socket.gethostname()} ({uuid.uuid4().hex})"
        self._stamps: dict[str, tuple[int, int]] = {}  # of files when they were copied into the bucket

    def claim(self) -> None:
        """Takes the workdir over.

        Raises:
          OSError: the bucket cannot be written.
        """
        with _explained(f"cannot write to {self._remote}"):
            (self._remote / _OWNER).write_text(self._name)

    def pull(self) -> None:
        """Copies what the bucket holds; checkpoints that are there in part are left out.

        Raises:
          OSError: the bucket cannot be read, or the folder not be written.
        """
        with _explained(f"cannot read {self._remote}"):
            names = [name for name in _files(self._remote) if name != _OWNER]
            taken = _whole(names)
            _each(taken, lambda name: _copy(self._remote / name, self.folder / name))
        # What was left out is not here, so that the first push removes it.
        self._stamps = {name: _stamp(self.folder / name) if name in taken else _NEVER for name in names}
        logging.info("copied %d files of %s to %s", len(taken), self._remote, self.folder)

    def push(self) -> None:
        """Makes the bucket what the local folder holds.

        Raises:
          OSError: the bucket cannot be written, or another process has taken the workdir over.
        """
        with _explained(f"cannot write to {self._remote}"):
            owner = (self._remote / _OWNER).read_text()
        if owner != self._name:
            raise OSError(f"{owner} has taken over the workdir {self._remote}: this run stops, and leaves it alone")
        with _explained(f"cannot write to {self._remote}"):
            stamps = {name: _stamp(self.folder / name) for name in _files(self.folder) if _is_kept(name)}
            changed = [name for name in stamps if stamps[name] != self._stamps.get(name)]
            for folder in {_checkpoint(name) for name in changed} - {None}:
                self._remove(f"{folder}/{name}" for name in _files(self._remote / str(folder)))
            for rank in (_LOGS, _ARRAYS, _SEALS, _END):
                _each([n for n in changed if _rank(n) == rank], lambda n: _copy(self.folder / n, self._remote / n))
            self._remove(self._stamps.keys() - stamps.keys())
            self._stamps = stamps

    def remove(self) -> None:
        """Removes the local folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    def _remove(self, names: Iterable[str]) -> None:
        for name in sorted(names, key=_rank, reverse=True):
            (self._remote / name).unlink(missing_ok=True)


@contextlib.contextmanager
def mirrored(workdir: str | os.PathLike[str], index: int = 0) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A workdir to work in, and what brings it back to where it belongs.

    Args:
      workdir: a local folder, which stays as it is, or one in a bucket.
      index: of this process among those of the run; the first one writes.

    Yields:
      (local folder, function to be called when something in it is to be kept; it does nothing for a local folder).
    """
    if not is_bucket(workdir):
        yield Path(workdir), lambda: None
        return
    mirror = Mirror(str(workdir))
    if index == 0:
        mirror.claim()
    mirror.pull()
    push = mirror.push if index == 0 else lambda: None
    try:
        yield mirror.folder, push
    except BaseException as error:
        with contextlib.suppress(OSError):  # what a failed run leaves to be looked at; its error is the one that counts
            push()
            if isinstance(error, SystemExit):  # stopped with all saved
                mirror.remove()
        raise
    push()
    mirror.remove()


_LOGS, _ARRAYS, _SEALS, _END = range(4)


def _rank(name: str) -> int:
    """Files of a higher rank stand for those of a lower one: they come last and go first."""
    if _checkpoint(name) is None:
        return _END if name == _SUMMARY else _LOGS
    return _SEALS if name == f"{_checkpoint(name)}/{_MANIFEST}" else _ARRAYS


def _checkpoint(name: str) -> str | None:
    """The folder of the checkpoint that a file belongs to."""
    parts = name.split("/")
    return "/".join(parts[:2]) if parts[0] == _CHECKPOINTS and len(parts) > 2 and parts[1].isdigit() else None


def _whole(names: Sequence[str]) -> list[str]:
    """Names without those of checkpoints that were copied in part."""
    sealed = {_checkpoint(name) for name in names if _rank(name) == _SEALS}
    return [name for name in names if _checkpoint(name) in {None, *sealed}]


def _is_kept(name: str) -> bool:
    """Whether a file belongs into the bucket: not locks, and not what is being written."""
    own = name.removeprefix(f"{_CHECKPOINTS}/")
    return not own.startswith(".") and not own.endswith(".partial")


def _files(folder: Path | epath.Path, prefix: str = "") -> Iterator[str]:
    """Names of the files of a folder and below; of a file the empty name, of nothing none."""
    if not folder.is_dir():
        if folder.exists():
            yield prefix
        return
    for path in sorted(folder.iterdir()):
        yield from _files(path, f"{prefix}/{path.name}" if prefix else path.name)


def _each(items: Iterable[Item], work: Callable[[Item], None]) -> None:
    with ThreadPoolExecutor(_COPIES, "bucket") as pool:
        for _ in pool.map(work, items):
            pass


def _copy(source: Path | epath.Path, target: Path | epath.Path) -> None:
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as file, target.open("wb") as copy:
        shutil.copyfileobj(file, copy, _CHUNK)


def _fetch(source: epath.Path, target: Path) -> None:
    """Makes a file or folder what it is in the bucket."""
    names = _whole(list(_files(source)))
    for name in set(_files(target)) - set(names):
        (target / name).unlink()
    _each(names, lambda name: _refresh(source / name, target / name))


def _refresh(source: epath.Path, target: Path) -> None:
    """Copies a file unless the copy is of the same size and time."""
    stat = source.stat()
    seen = (stat.length, stat.mtime)
    if target.exists() and (target.stat().st_size, int(target.stat().st_mtime)) == seen:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    _copy(source, partial)
    os.utime(partial, (stat.mtime, stat.mtime))
    partial.replace(target)


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _place(uri: str) -> Path:
    """Where copies of something in a bucket lie."""
    return _root().joinpath(*uri.rstrip("/").replace("://", "/").split("/"))


def _root() -> Path:
    return Path(tempfile.gettempdir(), "dpo_jax")


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keeps other processes of this machine waiting, until the block or this process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = _locked(folder)
    try:
        yield
    finally:
        os.close(lock)


def _locked(folder: Path, wait: int = 0) -> int:
    """Locks a folder until what is returned is closed, or this process ends.

    Raises:
      BlockingIOError: another one has locked it, and ``wait`` is ``fcntl.LOCK_NB``.
    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | wait)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _remove_unlocked(folders: Iterable[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # a run is at work there, or it is gone already
            lock = _locked(folder, fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """What clients of object stores raise, in many types, is an OSError."""
    try:
        yield
    except ImportError as error:
        raise OSError(f"{what}: {error}. Install what opens buckets: pip install -r requirements-tpu.txt") from error
    except Exception as error:
        mend = "look at the name, the network and the rights of this account (gcloud auth application-default login)"
        raise OSError(f"{what}: {error or type(error).__name__}; {mend}") from error
