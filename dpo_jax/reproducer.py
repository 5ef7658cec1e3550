"""A step that was not finite, kept so that it can be run again: the state before it and its batch."""

from __future__ import annotations

import dataclasses
import json
import shutil
import typing
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from absl import logging

from dpo_jax import build as builders
from dpo_jax.config import Config, from_dict, to_json
from dpo_jax.guards import Finding, first_not_finite, make_probe
from dpo_jax.parallel import DataParallel
from dpo_jax.snapshot import read, read_meta, write
from dpo_jax.state import TrainState
from dpo_jax.types import Array, PreferenceBatch, TokenBatch

FOLDER = "not_finite"


@dataclasses.dataclass(frozen=True)
class Case:
    """A step to be run again.

    Attributes:
      config: of the run.
      state: before the step, on the host.
      batch: that the step reads.
      vocab_size: V.
      answers: A.
      steps: updates of the whole run.
    """

    config: Config
    state: TrainState
    batch: PreferenceBatch
    vocab_size: int
    answers: int
    steps: int


def save(workdir: Path, case: Case) -> Path:
    """Writes a case.

    Args:
      workdir: the run's folder.
      case: what to write.

    Returns:
      Its folder, for ``python -m dpo_jax.train --replay``.

    Raises:
      OSError: it cannot be written.
    """
    number = int(case.state.step) + 1
    folder = workdir.absolute() / FOLDER / f"step_{number:06d}"
    folder.parent.mkdir(exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    branches = case.batch.answers.branches
    numbers = {"vocab_size": case.vocab_size, "answers": case.answers, "branches": branches, "steps": case.steps}
    meta = {"step": number, "config": json.loads(to_json(case.config)), **numbers}
    write(folder, {"state": case.state, "batch": case.batch}, meta)
    return folder


def replay(folder: Path) -> Finding | None:
    """Runs a saved step again, and says where it stops being finite.

    Args:
      folder: what ``save`` returned.

    Returns:
      What it found, None when all is finite.

    Raises:
      OSError: there is no such folder, or it is damaged.
    """
    case = load(folder)
    finding = examine(case)
    found = f"is not finite, first: {finding}" if finding else "is finite here"
    logging.info("Step %d %s.", int(case.state.step) + 1, found)
    return finding


def load(folder: Path) -> Case:
    """Reads what ``save`` wrote.

    Raises:
      OSError: there is no such folder, or it is damaged.
    """
    folder = Path(folder).absolute()
    number = folder.name.removeprefix("step_")
    if not folder.is_dir() or not number.isdigit():
        raise OSError(f"{folder} holds no step to be run again; expected a folder such as WORKDIR/{FOLDER}/step_000123")
    meta = read_meta(folder, int(number))
    config = from_dict(meta["config"])
    parts = builders.build(config, vocab_size=meta["vocab_size"], answers=meta["answers"])
    like = {"state": builders.state_shapes(parts), "batch": _batch_like(meta["state"], meta["branches"])}
    content, _ = read(folder, like, int(number))
    return Case(config, content["state"], content["batch"], meta["vocab_size"], meta["answers"], meta["steps"])


def examine(case: Case) -> Finding | None:
    """Finds the first tensor of a step that is not finite.

    Args:
      case: the step.

    Returns:
      What it found, None when all is finite.
    """
    config = case.config
    parts = builders.build(config, vocab_size=case.vocab_size, answers=case.answers)
    parallel = DataParallel(jax.local_devices()[:1])  # one device: rows are in their order
    state, hyper = (parallel.replicate(tree) for tree in (case.state, parts.hyper))
    batch = parallel.shard(case.batch, config.train.micro_batches)
    settings = builders.step_config(config, case.answers, case.steps)
    probe = parallel.eval_step(make_probe(builders.scorer(config, parts), settings, parallel.axis))
    tensors = jax.tree.map(np.asarray, probe(state, batch, hyper))
    finding = first_not_finite(tensors, case.batch.answers.role_RS.shape[1])
    if finding is not None:
        return finding
    step = parallel.eval_step(builders.guarded_step(config, parts, case.steps, parallel.axis))
    after, _ = step(parallel.replicate(builders.guarded(case.state, 0)), batch, hyper)
    overflows = bool(parallel.unreplicate(after).skipped)
    return Finding("the norm of the gradient, which overflows") if overflows else None


def _batch_like(described: Mapping[str, str], branches: int) -> PreferenceBatch:
    """The shapes of a saved batch, from what its checkpoint says: ``{'batch/answers/tokens_RL': 'int32[8,63]', …}``."""

    def rows(part: str) -> TokenBatch | None:
        names = {field.name: f"batch/{part}/{field.name}" for field in dataclasses.fields(TokenBatch)}
        if not described.keys() & set(names.values()):
            return None
        found = {name: _shape(described[path]) for name, path in names.items() if path in described}
        return TokenBatch(**typing.cast(dict[str, Array], found), branches=branches)

    answers = rows("answers")
    assert answers is not None
    return PreferenceBatch(answers, rows("mismatched"))


def _shape(text: str) -> jax.ShapeDtypeStruct:
    dtype, _, sizes = text.removesuffix("]").partition("[")
    return jax.ShapeDtypeStruct(tuple(int(size) for size in sizes.split(",") if size), np.dtype(dtype))
