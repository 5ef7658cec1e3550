"""Orbax checkpoints of a run: the whole state, and beside it what the state is a state of."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import args as ocp_args

from dpo_jax.trees import describe, named_leaves

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one run. A save that is interrupted is never read: the one before it is.

    Args:
      workdir: the run's folder.
      keep: how many of the newest are kept; None keeps all.
    """

    def __init__(self, workdir: Path, keep: int | None = None) -> None:
        self.folder = Path(workdir).absolute() / FOLDER
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Saves a state of host arrays.

        Args:
          step: updates done; also the position in the data, whose batches are a function of (seed, step).
          state: a pytree of numpy arrays.
          meta: what is needed to know what the state belongs to; JSON values.

        Raises:
          OSError: no room or no permission.
        """
        meta = {**meta, "step": step, "state": _description(state)}
        items = ocp_args.Composite(state=ocp_args.StandardSave(state), meta=ocp_args.JsonSave(meta))
        self._manager.save(step, args=items)

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint back.

        Args:
          step: which one.
          like: a pytree of arrays (or their shapes) of the structure that is expected.

        Returns:
          (state of numpy arrays, the meta that was saved).

        Raises:
          ValueError: the checkpoint holds another structure, other shapes or dtypes; both sides are listed.
        """
        meta = dict(self._manager.restore(step, args=ocp_args.Composite(meta=ocp_args.JsonRestore())).meta)
        _check(meta["state"], _description(like), self.folder / str(step))
        template = jax.tree.map(lambda a: np.empty(a.shape, a.dtype), like)
        state = self._manager.restore(step, args=ocp_args.Composite(state=ocp_args.StandardRestore(template))).state
        return state, meta

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_params(workdir: Path, like: Any) -> Any:
    """The policy's parameters of a run's newest checkpoint, without its optimizer.

    Args:
      workdir: the folder of another run.
      like: a pytree of shapes of the parameters that are expected.

    Raises:
      ValueError: there is no checkpoint, or it holds another model.
    """
    folder = Path(workdir).absolute() / FOLDER
    mend = "train that run first, or point init.run at the workdir of a finished one"
    if not folder.is_dir():
        raise ValueError(f"no checkpoints in {folder}: {mend}")
    with contextlib.redirect_stdout(io.StringIO()), Checkpoints(workdir) as checkpoints:
        manager = checkpoints._manager
        step = manager.latest_step()
        if step is None:
            raise ValueError(f"no complete checkpoint in {folder}: {mend}")
        meta = dict(manager.restore(step, args=ocp_args.Composite(meta=ocp_args.JsonRestore())).meta)
        saved = {k.removeprefix("params/"): v for k, v in meta["state"].items() if k.startswith("params/")}
        _check(saved, _description(like), folder / str(step))
        template = {"params": jax.tree.map(lambda a: ocp.RestoreArgs(restore_type=np.ndarray), like)}
        restored = ocp.PyTreeCheckpointer().restore(
            folder / str(step) / "state",
            args=ocp_args.PyTreeRestore({"params": like}, restore_args=template, partial_restore=True),
        )
    return restored["params"]


def _description(tree: Any) -> dict[str, str]:
    return {name: describe(leaf) for name, leaf in named_leaves(tree).items()}


def _check(got: Mapping[str, str], expected: Mapping[str, str], folder: Path) -> None:
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
            "\n".join([f"the checkpoint {folder} is of another model or optimizer:", *shown])
            + "\nuse the config that it was made with, or start in a new workdir"
        )
