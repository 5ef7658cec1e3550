"""One checkpoint: all damage is found, none of it restored; another structure is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dpo_jax.checkpoint import Checkpoints, open_newest
from dpo_jax.integrity import MANIFEST, DamagedError, seal, verify
from tests.tiny_state import State, assert_equal, files, make_state, restore, save


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


def test_what_is_restored_is_what_was_saved(workdir: Path) -> None:
    step, meta = restore(workdir)
    assert (step, meta["note"], meta["step"]) == (10, "of step 10", 10)
    assert_equal(open_newest(workdir).params(make_state(0).params), make_state(10).params)


# --- damage ----------------------------------------------------------------------------------------------------------


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


def test_damage_of_another_runs_parameters_is_named(workdir: Path) -> None:
    flip_bit(files(workdir, 10)[-1], np.random.default_rng(0))
    with pytest.raises(DamagedError, match="the checkpoint of step 10 in .* is damaged: .* remove the folder 10"):
        open_newest(workdir).params(make_state(0).params)


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
