"""Small states, saved into a workdir and read back, that tests of checkpoints share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import struct

from dpo_jax.checkpoint import Checkpoints


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


def restore(workdir: Path, **options: Any) -> tuple[int, dict[str, Any]]:
    with Checkpoints(workdir) as checkpoints:
        found = checkpoints.restore_newest(make_state(0), **options)
        assert found is not None
        state, meta = found
        assert_equal(state, make_state(int(state.step)))
        return int(state.step), meta


def files(workdir: Path, step: int) -> list[Path]:
    return sorted(p for p in (workdir / "checkpoints" / str(step)).rglob("*") if p.is_file() and p.stat().st_size)


def remove_a_file(workdir: Path, step: int) -> None:
    files(workdir, step)[0].unlink()
