"""Checkpoints: all damage is found, none of it restored; a save is there whole or not at all."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import struct

from dpo_jax import checkpoint
from dpo_jax.checkpoint import Checkpoints, Retention, open_newest
from dpo_jax.integrity import MANIFEST, DamagedError, hash_leaves, hash_tree, seal, verify
from tests.tiny_run import ROOT


@struct.dataclass
class State:
    step: Any
    params: Any
    reference: Any
    loss_state: Any


def make_state(step: int, seed: int = 0, width: int = 40) -> State:
    rng = np.random.default_rng(seed + step)
    params = {"kernel": rng.normal(size=(width, 30)).astype(np.float32), "norm": {"scale": np.ones(5, np.float32)}}
    return State(np.int32(step), params, None, {})


def save(workdir: Path, *steps: int) -> None:
    with Checkpoints(workdir) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"note": f"of step {step}"})


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with checkpoints of steps 5 and 10; to be copied."""
    folder = tmp_path_factory.mktemp("saved")
    save(folder, 5, 10)
    return folder


@pytest.fixture
def workdir(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved / "checkpoints", tmp_path / "checkpoints")
    return tmp_path


def restore(workdir: Path, **options: Any) -> tuple[int, dict[str, Any]]:
    with Checkpoints(workdir) as checkpoints:
        found = checkpoints.restore_newest(make_state(0), **options)
        assert found is not None
        state, meta = found
        assert_equal(state, make_state(int(state.step)))
        return int(state.step), meta


def test_what_is_restored_is_what_was_saved(workdir: Path) -> None:
    step, meta = restore(workdir)
    assert (step, meta["note"], meta["step"]) == (10, "of step 10", 10)
    assert_equal(open_newest(workdir).params(make_state(0).params), make_state(10).params)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_newest(make_state(0)) is None
        assert checkpoints.latest_step() is None


def test_the_state_may_change_while_it_is_saved(tmp_path: Path) -> None:
    state = make_state(1, width=2000)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        state.params["kernel"][:] = 0
        checkpoints.wait()
        restored, _ = checkpoints.restore(1, state)
    assert_equal(restored, make_state(1, width=2000))
    assert checkpoints.blocked > 0


# --- damage ----------------------------------------------------------------------------------------------------------


def files(workdir: Path, step: int) -> list[Path]:
    return sorted(p for p in (workdir / "checkpoints" / str(step)).rglob("*") if p.is_file() and p.stat().st_size)


def flip_bit(path: Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


def zero_block(path: Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    start = int(rng.integers(len(content)))
    size = min(4096, len(content) - start)
    if not any(content[start : start + size]):
        content[start] = 1  # the block was zero: any other byte will do
    else:
        content[start : start + size] = bytes(size)
    path.write_bytes(content)


def truncate(path: Path, rng: np.random.Generator) -> None:
    os.truncate(path, int(rng.integers(path.stat().st_size)))


def remove(path: Path, rng: np.random.Generator) -> None:
    path.unlink()


def add_foreign(path: Path, rng: np.random.Generator) -> None:
    path.with_name(f"{path.name}.{rng.integers(10**6)}").write_bytes(path.read_bytes())


def swap_for_another_steps(path: Path, rng: np.random.Generator) -> None:
    """A whole file of the same name in the checkpoint of another step, or of another file."""
    other = Path(str(path).replace("/checkpoints/10/", "/checkpoints/5/"))
    content = other.read_bytes() if other.is_file() else b"of another file"
    path.write_bytes(content if content != path.read_bytes() else content + b" ")


def link(path: Path, rng: np.random.Generator) -> None:
    """The same bytes, but elsewhere."""
    outside = path.parent.parent.parent.parent / f"{path.name}.{rng.integers(10**6)}"
    outside.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(outside)


DAMAGES = [flip_bit, zero_block, truncate, remove, add_foreign, swap_for_another_steps, link]


@pytest.mark.parametrize("damage", DAMAGES)
def test_all_damage_is_found_and_the_run_falls_back(damage, saved: Path, tmp_path: Path) -> None:
    """At 40 random places of random files; the checkpoint before the damaged one is restored each time."""
    rng = np.random.default_rng(DAMAGES.index(damage))
    original = saved / "checkpoints"
    for trial in range(40):
        workdir = tmp_path / str(trial)
        shutil.copytree(original, workdir / "checkpoints")
        paths = files(workdir, 10)
        damage(paths[rng.integers(len(paths))], rng)
        with pytest.raises(DamagedError):
            verify(workdir / "checkpoints" / "10")
        if trial < 3:  # the whole way; it is the same one each time
            assert restore(workdir)[0] == 5
            assert (workdir / "checkpoints" / "damaged-10").is_dir()
            assert restore(workdir)[0] == 5  # not looked at again


def test_bits_all_over_the_small_files_are_guarded(workdir: Path) -> None:
    """One flip after the other, in the manifest too."""
    folder = workdir / "checkpoints" / "10"
    small = [folder / MANIFEST, min(files(workdir, 10), key=lambda p: p.stat().st_size)]
    for path in small:
        content = path.read_bytes()
        for bit in range(0, 8 * len(content), 97 if path.name == MANIFEST else 5):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            with pytest.raises(DamagedError):
                verify(folder)
        path.write_bytes(content)
    verify(folder)


def test_arrays_are_compared_with_their_own_hashes(workdir: Path) -> None:
    """Even where the files agree with their manifest: another checkpoint's arrays, sealed anew."""
    folder = workdir / "checkpoints" / "10"
    shutil.rmtree(folder / "state")
    shutil.copytree(workdir / "checkpoints" / "5" / "state", folder / "state")
    seal(folder)
    with Checkpoints(workdir) as checkpoints, pytest.raises(DamagedError, match="arrays are not what was saved"):
        checkpoints.restore(10, make_state(0))
    with pytest.raises(DamagedError, match="params/kernel"):
        open_newest(workdir).params(make_state(0).params)


def test_a_checkpoint_of_another_step_is_foreign(workdir: Path) -> None:
    (workdir / "checkpoints" / "5").rename(workdir / "checkpoints" / "20")
    with Checkpoints(workdir) as checkpoints, pytest.raises(DamagedError, match="holds the checkpoint of step 5"):
        checkpoints.restore(20, make_state(0))
    assert restore(workdir)[0] == 10


def test_a_run_may_be_told_to_stop_at_damage(workdir: Path) -> None:
    remove(files(workdir, 10)[0], np.random.default_rng(0))
    with pytest.raises(DamagedError, match=r"the checkpoint of step 10 is damaged: .* is missing.*on_damage=fall_back"):
        restore(workdir, stop_at_damage=True)
    assert (workdir / "checkpoints" / "10").is_dir()


def test_with_all_damaged_nothing_is_begun_anew(workdir: Path) -> None:
    for step in (5, 10):
        remove(files(workdir, step)[0], np.random.default_rng(0))
    with pytest.raises(DamagedError, match=r"no checkpoint in .* is whole: steps \[5, 10\] are damaged"):
        restore(workdir)


def test_damage_of_another_runs_parameters_is_named(workdir: Path) -> None:
    flip_bit(files(workdir, 10)[-1], np.random.default_rng(0))
    with pytest.raises(DamagedError, match="the checkpoint of step 10 in .* is damaged: .* remove the folder 10"):
        open_newest(workdir).params(make_state(0).params)


def test_two_damaged_checkpoints_of_a_step_are_both_kept(workdir: Path) -> None:
    for _ in range(2):
        remove(files(workdir, 10)[0], np.random.default_rng(0))
        assert restore(workdir)[0] == 5
        save(workdir, 10)
    assert restore(workdir)[0] == 10
    names = {p.name for p in (workdir / "checkpoints").iterdir()}
    assert names == {"5", "10", "damaged-10", "damaged-10-1"}


# --- another structure -----------------------------------------------------------------------------------------------


def test_another_structure_is_refused_with_both_sides(workdir: Path) -> None:
    other = State(
        np.int32(0), {"kernel": np.zeros((40, 31), np.float32), "bias": np.zeros(2)}, None, {"mean": np.float32(0)}
    )
    with Checkpoints(workdir) as checkpoints, pytest.raises(ValueError, match="of another model, loss or opt") as error:
        checkpoints.restore_newest(other)
    for line in (
        "only in the checkpoint: params/norm/scale float32[5]",
        "only in this run: params/bias float64[2]",
        "only in this run: loss_state/mean float32[]",
        "params/kernel: the checkpoint has float32[40,30], this run float32[40,31]",
    ):
        assert line in str(error.value)
    assert restore(workdir)[0] == 10  # nothing was set aside


def test_another_dtype_is_refused(workdir: Path) -> None:
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, np.float16), make_state(0).params)
    with pytest.raises(ValueError, match=r"params/kernel: the checkpoint has float32\[40,30\], this run float16"):
        open_newest(workdir).params(like)


def test_whoever_restores_may_refuse(workdir: Path) -> None:
    def admit(meta: Any) -> None:
        raise ValueError(f"not {meta['note']}")

    with Checkpoints(workdir) as checkpoints, pytest.raises(ValueError, match="not of step 10"):
        checkpoints.restore_newest(make_state(0), admit)


def test_parameters_of_no_run_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no complete checkpoint in .*train that run first"):
        open_newest(tmp_path).params(make_state(0).params)


# --- interrupted, full, read-only ------------------------------------------------------------------------------------


def test_an_interrupted_save_is_never_read(workdir: Path) -> None:
    for name in (".incomplete-15", ".removed-3"):
        shutil.copytree(workdir / "checkpoints" / "10", workdir / "checkpoints" / name)
    assert restore(workdir)[0] == 10
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"5", "10"}


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


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from tests.test_checkpoint import make_state
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
from tests.test_checkpoint import make_state
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


# --- retention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retention", "expected"),
    [
        (Retention(), {1, 2, 3, 4, 5, 6}),
        (Retention(newest=2), {5, 6}),
        (Retention(newest=1, every=2), {2, 4, 6}),
        (Retention(newest=1, best="min"), {3, 6}),
        (Retention(newest=1, best="max"), {2, 6}),
        (Retention(newest=2, every=4, best="min"), {3, 4, 5, 6}),
    ],
)
def test_retention(retention: Retention, expected: set[int]) -> None:
    scores = {1: 0.5, 2: 0.9, 3: 0.1, 4: None, 5: float("nan"), 6: 0.3}
    assert retention.kept(scores) == expected


def test_old_checkpoints_go_and_scores_are_remembered(tmp_path: Path) -> None:
    retention = Retention(newest=1, best="min")
    for steps in ({1: 0.2, 2: 0.1, 3: 0.7}, {4: 0.5}):
        with Checkpoints(tmp_path, retention) as checkpoints:
            for step, score in steps.items():
                checkpoints.save(step, make_state(step), {}, score)
    assert checkpoint.steps_in(tmp_path / "checkpoints") == [2, 4]


# --- hashes ----------------------------------------------------------------------------------------------------------


def test_hashes_know_bits_shapes_dtypes_and_names() -> None:
    array = np.arange(6, dtype=np.float32)
    changed = array.copy()
    changed.view(np.uint32)[3] ^= 1
    trees = [
        {"a": array},
        {"b": array},
        {"a": changed},
        {"a": array.reshape(2, 3)},
        {"a": array.view(np.int32)},
        {"a": np.float32(0)},
        {"a": array.astype("bfloat16")},
    ]
    assert len({hash_tree(tree) for tree in trees}) == len(trees)
    assert hash_tree({"a": array, "b": changed}) == hash_tree({"b": changed.copy(), "a": array[::1]})
    assert list(hash_leaves({"a": {"b": array}})) == ["a/b"]
