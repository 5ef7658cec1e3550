"""Checkpoints in places that cannot be written: vanished, read-only, full."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dpo_jax.checkpoint import Checkpoints
from tests.tiny_run import ROOT
from tests.tiny_state import make_state, restore


def test_a_vanished_workdir_is_named(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    checkpoints.save(1, make_state(1), {})
    with pytest.raises(OSError, match="cannot save the checkpoint of step 1 in .*free some space there"):
        checkpoints.close()


def test_a_workdir_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(OSError, match="cannot write to .*checkpoints"):
        Checkpoints(tmp_path)


def test_a_failed_save_does_not_hide_the_error_that_ended_the_run(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Checkpoints(tmp_path) as checkpoints:  # noqa: PT012 - what happens inside matters
        shutil.rmtree(tmp_path / "checkpoints")
        checkpoints.save(1, make_state(1), {})
        raise KeyError


def test_writes_that_go_on_after_a_save_has_failed_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = [tmp_path / "checkpoints" / ".incomplete-10" / "state" / name for name in ("first", "second")]

    def fail(folder: Path, *_: Any) -> None:
        folder.mkdir()
        raise OSError("no space")

    def write_on(_: float) -> None:
        if late:
            late.pop().mkdir(parents=True)

    monkeypatch.setattr("dpo_jax.checkpoint.write", fail)
    monkeypatch.setattr("dpo_jax.checkpoint.time.sleep", write_on)
    with pytest.raises(OSError, match="no space"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, make_state(10), {})
    assert not late
    assert not list((tmp_path / "checkpoints").iterdir())


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from tests.tiny_state import make_state
from dpo_jax.checkpoint import Checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # files end there, as on a full disk
with Checkpoints(Path(sys.argv[1])) as checkpoints:
    checkpoints.save(5, make_state(5), {})
    checkpoints.wait()
    checkpoints.save(10, make_state(10, width=4000), {})
    try:
        checkpoints.wait()
    except OSError as error:
        print("named:", error)
"""


def test_a_full_disk_is_named_and_earlier_checkpoints_stay(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert "named: cannot save the checkpoint of step 10" in done.stdout, done.stdout + done.stderr
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"5"}
    assert restore(tmp_path)[0] == 5
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 200_000


SMALL_DISK = """
import subprocess, sys
from pathlib import Path
from tests import tiny_run
from tests.tiny_state import make_state
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.workdir import owned
place = Path(sys.argv[1])
mount = lambda *options: subprocess.run(["mount", *options, str(place)], check=True)
mount("-t", "tmpfs", "-o", "size=600k", "tmpfs")
with Checkpoints(place / "run") as checkpoints:
    checkpoints.save(5, make_state(5), {})
    checkpoints.wait()
    checkpoints.save(10, make_state(10, width=40_000), {})
    try:
        checkpoints.wait()
    except OSError as error:
        print("full:", error)
print("kept:", sorted(path.name for path in (place / "run" / "checkpoints").iterdir()))
with Checkpoints(place / "run") as checkpoints:
    print("restored:", int(checkpoints.restore_newest(make_state(0))[0].step))
mount("-o", "remount,ro")
try:
    with owned(place / "run", tiny_run.make_config(place)):
        pass
except OSError as error:
    print("read only:", error)
"""
MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]  # file systems that this process alone sees


def _may_mount() -> bool:
    try:
        return subprocess.run([*MOUNTS, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not _may_mount(), reason="this machine lets no user mount a file system of their own")
def test_a_small_file_system_fills_up_and_becomes_read_only(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [*MOUNTS, sys.executable, "-c", SMALL_DISK, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert said.keys() == {"full", "kept", "restored", "read only"}, done.stdout + done.stderr
    assert "cannot save the checkpoint of step 10" in said["full"] and "No space left on device" in said["full"]
    assert (said["kept"], said["restored"]) == ("['5']", "5")
    assert "cannot write to the workdir" in said["read only"] and "Read-only file system" in said["read only"]
