"""One checkpoint: all damage is found, none of it restored; another structure is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax import snapshot
from dpo_jax.checkpoint import Checkpoints, open_newest
from dpo_jax.hashing import hash_leaves
from dpo_jax.integrity import MANIFEST, DamagedError, seal, verify
from dpo_jax.snapshot import copy_to_host
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


# --- over devices ----------------------------------------------------------------------------------------------------


def over(axes: tuple[int, int], spec: P, state: Any) -> Any:
    """Where the leaves of a state lie on a mesh: the kernel split, the rest whole on each device."""
    mesh = Mesh(np.array(jax.devices()[: axes[0] * axes[1]]).reshape(axes), ("data", "fsdp"))
    specs = jax.tree.map(lambda a: NamedSharding(mesh, spec if a.ndim == 2 else P()), state)
    return jax.tree.map(lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), state, specs)


def place(state: Any, targets: Any) -> Any:
    return jax.tree.map(lambda a, t: jax.device_put(a, t.sharding), state, targets)


EIGHT = ((2, 4), P("fsdp"))
TOPOLOGIES = [((1, 4), P(None, "data")), ((2, 2), P("fsdp", "data")), ((1, 1), P()), None]


def test_a_state_is_restored_onto_any_devices_from_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 → 4 → 4 others → 1 → host → 8, to the bit; and never is an array that is split put together on the host."""
    state = make_state(10)
    held, hashes = place(state, over(*EIGHT, state)), hash_leaves(state)
    array = type(held.params["kernel"])
    fetch = array.__array__

    def fetch_whole_ones(self: jax.Array, *args: Any, **kwargs: Any) -> np.ndarray:
        assert self.is_fully_replicated, f"{self.sharding} was fetched"
        return fetch(self, *args, **kwargs)

    with Checkpoints(tmp_path) as checkpoints, monkeypatch.context() as patched:
        patched.setattr(array, "__array__", fetch_whole_ones)
        patched.setattr(snapshot, "_WRITTEN_AT_ONCE", 0)  # one part at a time
        with pytest.raises(AssertionError, match="was fetched"):
            np.asarray(held.params["kernel"])
        for step, topology in enumerate([*TOPOLOGIES, EIGHT]):
            checkpoints.save(step, held, {})
            checkpoints.wait()
            like = state if topology is None else over(*topology, state)
            held, meta = checkpoints.restore(step, like)
            assert meta["hashes"] == hashes
            if topology is not None:
                jax.tree.map(lambda a, b: a.sharding == b.sharding or pytest.fail(str(a.sharding)), held, like)
    assert_equal(jax.tree.map(np.asarray, held), state)


def test_a_save_holds_one_copy_of_the_parts() -> None:
    """Of what is on the devices, and leaves them for the next step."""
    state = make_state(10)
    placed = place(state, over(*EIGHT, state))
    copy = copy_to_host(placed)
    for before, after in zip(jax.tree.leaves(placed), jax.tree.leaves(copy), strict=True):
        assert after.sharding == before.sharding.with_memory_kind("pinned_host")
        parts = [[part.data for part in a.addressable_shards] for a in (before, after)]
        assert [part.shape for part in parts[0]] == [part.shape for part in parts[1]]
        assert {p.unsafe_buffer_pointer() for p in parts[0]}.isdisjoint(p.unsafe_buffer_pointer() for p in parts[1])


def test_damage_of_a_part_is_found_on_any_devices(tmp_path: Path) -> None:
    """Another step's arrays, sealed anew: no device holds more than a quarter of the array that differs."""
    state = make_state(10)
    with Checkpoints(tmp_path) as checkpoints:
        for step in (5, 10):
            checkpoints.save(step, place(make_state(step), over(*EIGHT, state)), {})
    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder / "10" / "state")
    shutil.copytree(folder / "5" / "state", folder / "10" / "state")
    seal(folder / "10")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(DamagedError, match="arrays are not what was saved"):
        checkpoints.restore(10, over(*EIGHT, state))
