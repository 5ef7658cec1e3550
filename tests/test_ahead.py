"""Programs that are made beside other work are the ones that a call would make."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.ahead import Prepared
from dpo_jax.parallel import DataParallel, MeshParallel, Parallel


def _step(state: Any, batch: Any, hyper: Any) -> Any:
    return state + hyper * jnp.tanh(batch).mean(), {"batch": batch.sum()}


def _placed(kind: str, devices: int) -> Parallel:
    own = jax.devices()[:devices]
    return DataParallel(own) if kind == "pmap" else MeshParallel(own, {"data": devices, "fsdp": 1, "tensor": 1}, {})


@pytest.mark.parametrize(("kind", "devices"), [("pmap", 1), ("pmap", 2), ("mesh", 2)])
def test_a_prepared_step_is_traced_once_and_is_the_same(
    kind: str, devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for ahead in (True, False):
        parallel = _placed(kind, devices)
        step = parallel.train_step(_step)
        state, hyper = (parallel.replicate(np.arange(3, dtype=np.float32) + n) for n in (1, 7))
        if not ahead:
            monkeypatch.setattr(Prepared, "prepare", lambda *_: None)  # what jit or pmap does on its own
        for number in range(3):
            batch = parallel.shard(np.arange(4, dtype=np.float32) + number, 1)
            if ahead:
                step.prepare(state, batch, hyper)  # the first time; then there is a program
            state, metrics = step(state, batch, hyper)
        assert parallel.traces == {"train_step": 1}
        found.append(jax.tree.map(np.asarray, (state, metrics)))
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_what_goes_wrong_in_the_thread_is_raised_by_the_call() -> None:
    def broken(_: Any) -> Any:
        raise ValueError("no such layer")

    step = Prepared(jax.jit(broken))
    step.prepare(np.zeros(1))
    with pytest.raises(ValueError, match="no such layer"):
        step(np.zeros(1))
