"""One checkpoint: a folder of Orbax arrays and of what they are the state of, sealed with hashes.

What is read is compared with its hashes, file by file and array by array, since Orbax restores a flipped bit without a
word. The format is one for all modes: each process writes the parts of arrays that lie on its devices, the first one
those that lie on hosts; they are read back onto any devices, each process its parts, or as whole numpy arrays.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import args as ocp_args
from orbax.checkpoint import type_handlers

from dpo_jax import processes
from dpo_jax.hashing import hash_leaves, spans_processes
from dpo_jax.integrity import DamagedError, seal, verify
from dpo_jax.trees import describe, named_leaves

META_FILE, STATE_FOLDER = "meta.json", "state"

Admit = Callable[[Mapping[str, Any]], None]


def copy_to_host(state: Any) -> Any:
    """A copy on the host, which the steps that follow leave alone: what lies over devices stays split as it is."""
    return jax.tree.map(_copy_to_host, state)


def _copy_to_host(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array):
        # On CPUs a host array may be the very buffer that the next step reuses.
        return np.array(leaf)
    parts = [
        jax.device_put(part.data, part.data.sharding.with_memory_kind(_HOST_MEMORY)) for part in leaf.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding.with_memory_kind(_HOST_MEMORY), parts)


_HOST_MEMORY = "pinned_host"
_WRITTEN_AT_ONCE = 2**26  # bytes, or one part of an array where that is larger


def write(folder: Path, state: Any, meta: Mapping[str, Any], hashes: Mapping[str, str] | None = None) -> None:
    """Writes one sealed checkpoint.

    Args:
      folder: its place; must not exist, and its parent must.
      state: a pytree of arrays. Where they lie over several processes, all of them must call; else only one.
      meta: JSON values.
      hashes: of ``state``; None computes them, for which several processes would have to meet.
    """
    together, first = spans_processes(state), processes.first()
    described = {"state": description(state), "hashes": hashes or hash_leaves(state)}
    if first or not together:
        folder.mkdir()
    state = jax.tree.map(lambda a: a if isinstance(a, jax.Array) else np.asarray(a), state)
    active = set(range(jax.process_count())) if together else {jax.process_index()}
    with _checkpointer(active, _largest_part(state)) as checkpointer:
        checkpointer.save(folder / STATE_FOLDER, args=ocp_args.PyTreeSave(state))
    if first or not together:
        (folder / META_FILE).write_text(json.dumps({**meta, **described}, indent=1) + "\n", encoding="utf-8")
        seal(folder)


def read(folder: Path, like: Any, step: int, admit: Admit | None = None) -> tuple[Any, dict[str, Any]]:
    """Reads one checkpoint, and compares it with its hashes. All processes must call.

    Args:
      folder: where ``write`` wrote.
      like: a pytree of arrays or their shapes, of the structure that is expected. A shape with a sharding is read onto
        its devices, everything else as a numpy array.
      step: the step that it must be of.
      admit: looks at the meta, and raises ValueError when the checkpoint is another run's.

    Returns:
      (state, meta).

    Raises:
      DamagedError: it is not what was written, as one of the processes has found.
      ValueError: it holds another structure, other shapes or dtypes; both sides are listed.
    """
    meta = read_meta(folder, step)
    if admit is not None:
        admit(meta)
    _check_structure(meta["state"], description(like), folder)
    return _restore(folder, like, meta.get("hashes")), meta


def read_meta(folder: Path, step: int) -> dict[str, Any]:
    """The meta of a checkpoint whose files are what was written. All processes must call.

    Raises:
      DamagedError: they are not, or it is the checkpoint of another step.
    """
    with processes.failing_together(DamagedError):
        verify(folder, (jax.process_index(), jax.process_count()))
        with _damage(folder):
            meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
            found = int(meta["step"])
        if found != step:
            raise DamagedError(f"{folder} holds the checkpoint of step {found}")
    return meta


@dataclass(frozen=True)
class Saved:
    """A run's newest checkpoint, whose files are what was written.

    Attributes:
      folder: where it is.
      meta: what stands beside the state.
    """

    folder: Path
    meta: Mapping[str, Any]

    def params(self, like: Any) -> Any:
        """What was trained, without its optimizer. All processes must call.

        Args:
          like: a pytree of shapes of the parameters that are expected; those with a sharding are read onto its devices.

        Raises:
          ValueError: it holds another model.
          DamagedError: it is not what was written.
        """
        _check_structure(_of_params(self.meta["state"]), description({"params": like}), self.folder)
        hashes = self.meta.get("hashes")
        return _restore(self.folder, {"params": like}, hashes and _of_params(hashes))["params"]

    def names(self) -> list[str]:
        """Paths of what was trained."""
        return [name.removeprefix("params/") for name in _of_params(self.meta["state"])]


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, rising."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isascii() and path.name.isdigit())


def newest_saved(folder: Path) -> Saved:
    """The newest checkpoint of another run. All processes must call.

    Args:
      folder: of its checkpoints.

    Raises:
      ValueError: there is none.
      DamagedError: it is not what was written.
    """
    steps = steps_in(folder)
    if not steps:
        mend = "train that run first, or point init.run at the workdir of a finished one"
        raise ValueError(f"no complete checkpoint in {folder}: {mend}")
    newest = folder / str(steps[-1])
    return Saved(newest, _meta_of_init(newest, steps))


def description(tree: Any) -> dict[str, str]:
    """Dtype and shape of every array by path: ``{'params/kernel': 'float32[4,192]', …}``."""
    return {name: describe(leaf) for name, leaf in named_leaves(tree).items()}


def _of_params(by_name: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in by_name.items() if name.startswith("params/")}


def _restore(folder: Path, like: Any, hashes: Mapping[str, str] | None) -> Any:
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), like)
    places = jax.tree.map(_restore_args, like)
    arguments = ocp_args.PyTreeRestore(shapes, restore_args=places, partial_restore=True)
    with (
        processes.failing_together(DamagedError),
        _damage(folder),
        _checkpointer({jax.process_index()}) as checkpointer,
    ):
        state = checkpointer.restore(folder / STATE_FOLDER, args=arguments)
    if hashes is not None:  # checkpoints of older versions have those of their files alone
        _check_hashes(hash_leaves(state), hashes, folder)
    return state


def _restore_args(like: Any) -> ocp.RestoreArgs:
    if isinstance(like, jax.ShapeDtypeStruct) and like.sharding is not None:
        return ocp.ArrayRestoreArgs(sharding=like.sharding, global_shape=like.shape, dtype=like.dtype)
    return ocp.RestoreArgs(restore_type=np.ndarray)


def _largest_part(state: Any) -> int:
    """Bytes of the largest part of an array that a device holds."""
    arrays = (leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array))
    return max((array.addressable_shards[0].data.nbytes for array in arrays), default=0)


def _checkpointer(active: set[int], largest: int = 0) -> ocp.Checkpointer:
    """Orbax in these processes, whatever the others are doing: it would wait for them.

    Args:
      active: processes that save or restore together.
      largest: part of an array that is saved, bytes.
    """
    options = ocp.options.MultiprocessingOptions(
        primary_host=min(active), active_processes=active, barrier_sync_key_prefix=f"from_process_{min(active)}"
    )
    # Parts that several devices hold are written by one of them: to share them out would take programs of its own.
    registry = type_handlers.create_type_handler_registry(
        (np.ndarray, type_handlers.NumpyHandler()),
        (jax.Array, type_handlers.ArrayHandler(use_replica_parallel=False, enable_write_sharding_file=False)),
    )
    handler = ocp.PyTreeCheckpointHandler(
        # What is being written takes as much room again as the copy that it is written from.
        save_concurrent_gb=(max(largest, _WRITTEN_AT_ONCE) + 1) / 1e9,
        multiprocessing_options=options,
        type_handler_registry=registry,
    )
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _meta_of_init(newest: Path, steps: Sequence[int]) -> dict[str, Any]:
    try:
        return read_meta(newest, steps[-1])
    except DamagedError as error:
        raise DamagedError(
            f"the checkpoint of step {steps[-1]} in {newest.parent} is damaged: {error}. Train that run again, or "
            f"remove the folder {newest.name} to take an earlier one (there are {len(steps) - 1})"
        ) from error


def _check_hashes(got: Mapping[str, str], expected: Mapping[str, str], folder: Path) -> None:
    changed = sorted(name for name in expected.keys() | got.keys() if got.get(name) != expected.get(name))
    if changed:
        raise DamagedError(f"{folder}: {len(changed)} arrays are not what was saved, the first is {changed[0]}")


def _check_structure(got: Mapping[str, str], expected: Mapping[str, str], folder: Path) -> None:
    lines = [f"  only in the checkpoint: {n} {got[n]}" for n in got if n not in expected]
    lines += [f"  only in this run: {n} {expected[n]}" for n in expected if n not in got]
    lines += [
        f"  {n}: the checkpoint has {got[n]}, this run {expected[n]}"
        for n in got
        if n in expected and got[n] != expected[n]
    ]
    if lines:
        shown = lines[:20] + ([f"  … and {len(lines) - 20} more"] if len(lines) > 20 else [])
        raise ValueError(
            "\n".join([f"the checkpoint {folder} is of another model, loss or optimizer:", *shown])
            + "\nuse the config that it was made with, or start in a new workdir"
        )


@contextlib.contextmanager
def _damage(folder: Path) -> Any:
    """What libraries raise for broken files, in many types, is damage."""
    try:
        yield
    except Exception as error:
        raise DamagedError(f"{folder} cannot be read: {type(error).__name__}: {error}") from error
