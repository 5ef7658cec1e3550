"""Workdirs and data in a bucket that lives in this process's memory: a flat table of objects, as object stores are."""

from __future__ import annotations

import functools
import io
import posixpath
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from etils.epath import gpath

from dpo_jax import buckets, integrity, train
from dpo_jax.config import Config
from dpo_jax.data.files import find_files
from dpo_jax.shared import Shared
from dpo_jax.stopping import Stopped
from dpo_jax.writers import read_metrics
from tests import tiny_run

BUCKET, RUN = "gs://bucket", "gs://bucket/run"


class Store:
    """Objects by name. It knows no rename, no append and no folder without files: asking for one is an error.

    Attributes:
      objects: their content.
      log: all writes (name, content) and removals (name, None).
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.log: list[tuple[str, bytes | None]] = []

    def put(self, name: str, content: bytes | None) -> None:
        self.log.append((name, content))
        if content is None:
            del self.objects[name]
        else:
            self.objects[name] = content

    def put_folder(self, name: str, folder: Path) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def to_folder(self, name: str, folder: Path) -> Path:
        for path, content in self.objects.items():
            if path.startswith(f"{name}/"):
                place = folder / path.removeprefix(f"{name}/")
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)
        return folder

    # What epath asks of a backend.

    def open(self, path: str, mode: str) -> Any:
        if "w" in mode:
            return _Writer(self, path) if "b" in mode else io.TextIOWrapper(_Writer(self, path), write_through=True)
        assert "r" in mode
        if path not in self.objects:
            raise FileNotFoundError(path)
        content = io.BytesIO(self.objects[path])
        return content if "b" in mode else io.TextIOWrapper(content)

    def exists(self, path: str) -> bool:
        return path in self.objects or self.isdir(path)

    def isdir(self, path: str) -> bool:
        return any(name.startswith(f"{path}/") for name in self.objects)

    def listdir(self, path: str) -> list[str]:
        return list({n.removeprefix(f"{path}/").split("/")[0] for n in self.objects if n.startswith(f"{path}/")})

    def glob(self, path: str) -> list[str]:
        return [
            name
            for name in self.objects
            if posixpath.dirname(name) == posixpath.dirname(path) and Path(name).match(posixpath.basename(path))
        ]

    def remove(self, path: str) -> None:
        if path not in self.objects:
            raise FileNotFoundError(path)
        self.put(path, None)

    def stat(self, path: str) -> Any:
        writes = sum(name == path for name, _ in self.log)
        return SimpleNamespace(length=len(self.objects[path]), mtime=1_000_000 + writes)


class _Writer(io.BytesIO):
    """An object appears when its file is closed."""

    def __init__(self, store: Store, path: str) -> None:
        super().__init__()
        self._store, self._path = store, path

    def close(self) -> None:
        if not self.closed:
            self._store.put(self._path, self.getvalue())
        super().close()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", store)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return store


@pytest.fixture(scope="module")
def shared() -> Shared:
    """What the runs of these tests compile, once for all of them."""
    return Shared()


class Crash(Exception):
    """What no run expects."""


class Slow:
    """Has all who read an object of a store wait until they are told to go on.

    Attributes:
      reached: set when the object is read.
      free: to be set, to go on.
      opened: how often the object was opened.
    """

    def __init__(self, store: Store, name: str) -> None:
        self.reached, self.free, self.opened = threading.Event(), threading.Event(), 0
        self._name, self._store_open = name, store.open
        store.open = self._open  # type: ignore[method-assign]

    def _open(self, path: str, mode: str) -> Any:
        file = self._store_open(path, mode)
        if path == self._name:
            self.opened += 1
            file.read = functools.partial(self._read, file.read)
        return file

    def _read(self, read: Callable[[int], bytes], size: int) -> bytes:
        self.reached.set()
        assert self.free.wait(60)
        return read(size)


class Kill:
    """Ends a run after a step as a loss of power would: what it does later is not seen in the store."""

    def __init__(self, store: Store, step: int) -> None:
        self._store, self._left = store, step
        self.left: dict[str, bytes] = {}

    def agreed(self) -> bool:
        self._left -= 1
        if self._left == 0:
            self.left = dict(self._store.objects)
            raise Crash
        return False

    def __enter__(self) -> Kill:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def make_config(data: Path, **changes: Any) -> Config:
    changes = {"eval.prompts": 0, "eval.examples": 0, "checkpoint.every": 2, "checkpoint.keep": 2, **changes}
    return tiny_run.make_config(data, **changes)


def states(store: Store) -> Iterator[Store]:
    """The store after each of its writes and removals."""
    past = Store()
    for name, content in store.log:
        past.put(name, content)
        yield past


def test_a_run_in_a_bucket_is_killed_and_goes_on(store: Store, shared: Shared, tmp_path: Path, monkeypatch) -> None:
    tiny_run.write_data(tmp_path / "data")
    train.run(make_config(tmp_path / "data"), tmp_path / "whole", shared)

    store.put_folder(f"{BUCKET}/examples", tmp_path / "data" / "examples")
    config = make_config(tmp_path / "data", **{"data.path": f"{BUCKET}/examples"})
    kill = Kill(store, 7)
    monkeypatch.setattr(train, "StopRequest", lambda: kill)
    with pytest.raises(Crash):
        train.run(config, RUN, shared)
    monkeypatch.undo()
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", store)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "another machine"))
    store.objects = kill.left
    summary = train.run(config, RUN, shared)
    left = store.to_folder(RUN, tmp_path / "left")
    assert tiny_run.results(left) == tiny_run.results(tmp_path / "whole")
    assert sorted(p.name for p in (left / "checkpoints").iterdir()) == ["10", "8"]
    assert not list(left.rglob(".lock"))
    assert list((left / "tensorboard").iterdir())
    assert train.run(config, RUN, shared) == pytest.approx(summary, nan_ok=True, abs=0, rel=0)  # finished, and says so


def test_every_state_of_the_bucket_is_one_to_go_on_from(store: Store, shared: Shared, tmp_path: Path) -> None:
    tiny_run.write_data(tmp_path / "data")
    train.run(make_config(tmp_path / "data"), RUN, shared)
    newest = []
    for number, past in enumerate(states(store)):
        if not any(name.endswith("manifest.json") for name in past.objects):
            continue
        if store.log[number][0].endswith(("manifest.json", "metrics.jsonl", "summary.json")):  # others change little
            store.objects = past.objects
            mirror = buckets.Mirror(RUN)
            mirror.pull()
            steps = sorted(int(path.name) for path in (mirror.folder / "checkpoints").iterdir())
            for step in steps:
                integrity.verify(mirror.folder / "checkpoints" / str(step))
            lines = [row["step"] for row in read_metrics(mirror.folder / "metrics.jsonl")]
            assert [step for step in lines if step <= steps[-1]] == [s for s in (3, 6, 9, 10) if s <= steps[-1]]
            newest.append(steps[-1])
    assert newest == sorted(newest)
    assert set(newest) == {2, 4, 6, 8, 10}


def test_a_checkpoint_that_was_copied_in_part_does_not_count_and_is_copied_anew(store: Store) -> None:
    for name in ("1/manifest.json", "1/state/a", "2/state/b"):
        store.put(f"{RUN}/checkpoints/{name}", b"")
    mirror = buckets.Mirror(RUN)
    mirror.claim()
    mirror.pull()
    assert [path.name for path in (mirror.folder / "checkpoints").iterdir()] == ["1"]
    again = mirror.folder / "checkpoints" / "2"
    again.mkdir()
    (again / "c").write_bytes(b"c")
    (again / "manifest.json").write_bytes(b"")
    mirror.push()
    held = {name.removeprefix(f"{RUN}/checkpoints/") for name in store.objects}
    assert {name for name in held if name.startswith("2/")} == {"2/c", "2/manifest.json"}
    assert store.log[-1] == (f"{RUN}/checkpoints/2/manifest.json", b"")


def test_the_later_run_takes_the_workdir_over(store: Store) -> None:
    first, second = buckets.Mirror(RUN), buckets.Mirror(RUN)
    first.claim()
    (first.folder / "metrics.jsonl").write_text("first")
    first.push()
    second.claim()
    second.pull()
    assert (second.folder / "metrics.jsonl").read_text() == "first"
    (second.folder / "metrics.jsonl").write_text("second")
    second.push()
    with pytest.raises(OSError, match=r"process \d+ on .* has taken over the workdir gs://bucket/run: this run stops"):
        first.push()
    assert store.objects[f"{RUN}/metrics.jsonl"] == b"second"


def test_what_a_failed_run_leaves_is_kept(store: Store) -> None:
    def fail() -> None:
        with buckets.mirrored(RUN) as (folder, _):
            (folder / "not_finite").mkdir()
            for name in ("not_finite/case", ".lock", "summary.json.partial"):
                (folder / name).write_text("")
            raise Crash

    with pytest.raises(Crash):
        fail()
    assert store.objects.keys() == {f"{RUN}/.owner", f"{RUN}/not_finite/case"}


def test_a_run_that_stops_with_all_saved_leaves_nothing_on_this_machine(store: Store, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(Stopped), buckets.mirrored(RUN) as (folder, _):  # noqa: PT012 - what happens inside matters
            (folder / "metrics.jsonl").write_text("1")
            raise Stopped
    assert store.objects[f"{RUN}/metrics.jsonl"] == b"1"
    assert not [path for path in (tmp_path / "tmp").rglob("*") if path.is_file()]
    assert not folder.exists()


def test_a_run_that_stops_where_the_bucket_cannot_be_written_leaves_what_it_has(store: Store) -> None:
    with pytest.raises(Stopped), buckets.mirrored(RUN) as (folder, _):  # noqa: PT012 - what happens inside matters
        buckets.Mirror(RUN).claim()
        (folder / "metrics.jsonl").write_text("1")
        raise Stopped
    assert (folder / "metrics.jsonl").read_text() == "1"


KILLED = """
import os, signal, sys
from dpo_jax import buckets
for uri in sys.argv[1:]:
    mirror = buckets.Mirror(uri)
    (mirror.folder / "metrics.jsonl").write_text("1")
    print(mirror.folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_run_leaves_goes_with_its_next_start(store: Store, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    environment = {**tiny_run.environment(), "TMPDIR": str(tmp_path / "tmp")}
    command = [sys.executable, "-c", KILLED, RUN, f"{RUN}.2", f"{RUN}/part"]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    own, *others = map(Path, killed.stdout.split())
    assert own.is_dir() and len(others) == 2, killed.stderr
    mirrors = [buckets.Mirror(uri) for uri in (RUN, f"{RUN}/")]
    assert not own.exists()
    assert all(folder.is_dir() for folder in (*others, *(mirror.folder for mirror in mirrors)))


def test_a_bucket_may_be_fetched_whole_by_a_run_in_it(store: Store) -> None:
    store.put(f"{BUCKET}/a.jsonl", b"a")
    mirror = buckets.Mirror(RUN)
    (mirror.folder / "metrics.jsonl").write_text("1")
    assert (buckets.fetched(BUCKET) / "a.jsonl").read_text() == "a"
    assert (mirror.folder / "metrics.jsonl").read_text() == "1"


def test_files_folders_and_globs_are_fetched(store: Store, tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.txt", "deep/d.jsonl"):
        store.put(f"{BUCKET}/data/{name}", name.encode())
    assert buckets.fetched(f"{BUCKET}/data/a.jsonl").read_text() == "a.jsonl"
    assert [path.name for path in find_files(f"{BUCKET}/data/*.jsonl")] == ["a.jsonl", "b.jsonl"]
    assert [path.name for path in find_files(f"{BUCKET}/data")] == ["a.jsonl", "b.jsonl", "d.jsonl"]
    folder = buckets.fetched(f"{BUCKET}/data")
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.jsonl")}
    store.put(f"{BUCKET}/data/a.jsonl", b"A.jsonl")
    store.put(f"{BUCKET}/data/b.jsonl", None)
    assert buckets.fetched(f"{BUCKET}/data") == folder
    assert (folder / "a.jsonl").read_text() == "A.jsonl"
    assert not (folder / "b.jsonl").exists()
    assert (folder / "deep" / "d.jsonl").stat().st_mtime_ns == times[folder / "deep" / "d.jsonl"]
    with pytest.raises(OSError, match="cannot read gs://bucket/nothing: there is nothing of that name; look at"):
        buckets.fetched(f"{BUCKET}/nothing")
    assert [path.name for path in find_files(f"{BUCKET}/data/*.jsonl")] == ["a.jsonl"]
    store.put(f"{BUCKET}/data/b.jsonl", b"")
    find_files(f"{BUCKET}/data/*.jsonl")
    store.put(f"{BUCKET}/data/b.jsonl", None)
    assert [path.name for path in find_files(f"{BUCKET}/data/*.jsonl")] == ["a.jsonl"]
    assert buckets.fetched("~/here/x*.json") == Path("~/here/x*.json")


def test_two_who_fetch_the_same_folder_do_not_disturb_each_other(store: Store, tmp_path: Path) -> None:
    for name in ("config.json", "weights"):
        store.put(f"{BUCKET}/model/{name}", name.encode())
    slow = Slow(store, f"{BUCKET}/model/weights")
    with ThreadPoolExecutor() as pool:
        first = pool.submit(buckets.fetched, f"{BUCKET}/model")
        assert slow.reached.wait(60)
        second = pool.submit(buckets.fetched, f"{BUCKET}/model")
        with pytest.raises(TimeoutError):
            second.result(0.3)
        slow.free.set()
        folder = first.result(60)
        assert second.result(60) == folder
    assert sorted(path.read_text() for path in folder.iterdir()) == ["config.json", "weights"]
    assert slow.opened == 1


def test_what_a_killed_process_had_fetched_in_part_goes(store: Store) -> None:
    store.put(f"{BUCKET}/model/weights", b"weights")
    folder = buckets.fetched(f"{BUCKET}/model")
    (folder / "weights.partial").write_bytes(b"wei")
    assert list(buckets.fetched(f"{BUCKET}/model").iterdir()) == [folder / "weights"]


def test_the_policy_of_a_run_in_a_bucket_is_where_another_starts(store: Store, shared: Shared, tmp_path: Path) -> None:
    tiny_run.write_data(tmp_path / "data")
    train.run(make_config(tmp_path / "data"), RUN, shared)
    here = store.to_folder(RUN, tmp_path / "here")
    found = {
        place: train.run(make_config(tmp_path / "data", **{"init.run": place}), tmp_path / f"run{number}", shared)
        for number, place in enumerate((RUN, str(here)))
    }
    assert found[RUN] == found[str(here)]


def test_what_cannot_lie_in_a_bucket_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config.data.dir must be a local folder, got gs://bucket/data; mount"):
        make_config(tmp_path, **{"data.dir": "gs://bucket/data"})


def test_a_mesh_of_several_processes_needs_one_folder(store: Store, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(ValueError, match="the 2 processes of a mesh write each checkpoint together.*mount the bucket"):
        train.run(make_config(tmp_path, **{"parallel.mode": "mesh"}), RUN)
    assert not store.log


def test_a_missing_client_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing:
        def __getattr__(self, name: str) -> Any:
            raise ImportError("Please install gcsfs")

    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", Missing())
    with pytest.raises(OSError, match="cannot read gs://bucket/x: Please install gcsfs. .*requirements-tpu.txt"):
        buckets.fetched("gs://bucket/x")
