"""Devices: rows are split in order and come back in order, programs are compiled once.

A step gives the same whether one device runs it or eight, by pmap or over a mesh, however its devices are ordered.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from dpo_jax import steps
from dpo_jax.data.layouts import Shape
from dpo_jax.losses.objective import make_objective
from dpo_jax.models import logical_axes, make_model
from dpo_jax.optim import AdamW
from dpo_jax.parallel import DataParallel, MeshParallel, check_divides
from dpo_jax.sharding import AXES
from dpo_jax.state import Hyper, StepConfig
from dpo_jax.trees import named_leaves
from tests.tiny import Bigram, lay_out, random_examples, tiny_params

SHAPE, ROWS, STEPS = Shape(2, 3, 4), 16, 20
COLLECTIVES = r"\s(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("


def test_batches_are_sharded_in_order() -> None:
    parallel = DataParallel(jax.devices()[:2])
    sharded = parallel.shard({"a": np.arange(24).reshape(12, 2)}, 3)["a"]
    assert sharded.shape == (2, 3, 2, 2)
    np.testing.assert_array_equal(sharded.reshape(12, 2), np.arange(24).reshape(12, 2))


@pytest.mark.parametrize("devices", [1, 4])
def test_rows_come_back_in_order(devices: int) -> None:
    parallel = DataParallel(jax.devices()[:devices])
    double = parallel.row_function(lambda params, rows: {"out": rows * params}, "double")
    params = parallel.replicate(np.float32(2))
    for _ in range(2):
        got = double(params, np.arange(8, dtype=np.float32)).result()["out"]
        np.testing.assert_array_equal(got, 2 * np.arange(8))
    assert parallel.traces == {"double": 1}


def test_what_lies_on_a_device_is_its_own() -> None:
    """Memory of numpy's is not written to: a step would have to copy it, at the worst of times."""
    raw = np.zeros(1024 + 16, np.float32)
    aligned = raw[-raw.ctypes.data % 64 // 4 :][:1024]  # as JAX takes it without a copy
    assert jax.device_put(aligned).unsafe_buffer_pointer() == aligned.ctypes.data
    placed = DataParallel(jax.devices()[:1]).replicate(aligned)
    assert placed.addressable_data(0).unsafe_buffer_pointer() != aligned.ctypes.data


def test_numbers_on_devices_are_their_own() -> None:
    """One of four that numpy makes an array of is aligned."""
    placed = DataParallel(jax.devices()[:2]).replicate([np.int32(i) for i in range(100)])
    assert len({part.data.unsafe_buffer_pointer() for a in placed for part in a.addressable_shards}) == 200


def test_one_number_in_every_place_is_filled_in() -> None:
    """As often as it stands in the tree, each in memory of its own."""
    parallel, zeros = DataParallel(jax.devices()[:2]), np.broadcast_to(np.float32(3), (4, 5))
    placed = parallel.replicate({"mean": zeros, "variance": zeros, "step": np.int32(7)})
    places = {part.data.unsafe_buffer_pointer() for a in placed.values() for part in a.addressable_shards}
    assert len(places) == 6
    whole = parallel.replicate(np.array(zeros))
    assert placed["mean"].sharding == whole.sharding and placed["mean"].dtype == whole.dtype
    for name in ("mean", "variance"):
        np.testing.assert_array_equal(placed[name], whole)


def test_a_tree_survives_the_devices() -> None:
    parallel = DataParallel(jax.devices()[:4])
    tree = {"a": np.arange(3), "b": None, "c": np.float32(1.5)}
    back = parallel.unreplicate(parallel.replicate(tree))
    np.testing.assert_array_equal(back["a"], tree["a"])
    assert back["b"] is None and back["c"] == np.float32(1.5)


@pytest.mark.parametrize(("batch", "micro", "devices"), [(8, 1, 1), (8, 2, 4), (24, 3, 8)])
def test_batches_that_divide(batch: int, micro: int, devices: int) -> None:
    check_divides(batch, micro, devices)


@pytest.mark.parametrize(
    ("batch", "micro", "devices", "nearest"), [(10, 2, 4, "8 or 16"), (3, 1, 4, "4"), (7, 2, 1, "6 or 8")]
)
def test_batches_that_do_not_divide_are_told_what_would(batch: int, micro: int, devices: int, nearest: str) -> None:
    with pytest.raises(
        ValueError, match=f"does not divide over {devices} devices × {micro} micro-batches.* {nearest}$"
    ):
        check_divides(batch, micro, devices)


def _model(remat: str = "none") -> Any:
    sizes = dict(vocab_size=40, context_length=8, width=16, layers=2, heads=4, kv_heads=2, mlp_width=16)
    return make_model("llama", {**sizes, "remat": remat})


def _mesh(*shape: int, reverse: bool = False) -> MeshParallel:
    devices = jax.devices()[: int(np.prod(shape))]
    return MeshParallel(devices[:: -1 if reverse else 1], dict(zip(AXES, shape, strict=True)), logical_axes(_model()))


def _compile(parallel: DataParallel | MeshParallel, *, micro: int = 1, remat: str = "none", model=None, loss="dpo"):
    """(compiled step, state, batches, hyper); the optimizer's epsilon is that of tests.tiny, for its reason."""
    model, (objective, numbers) = model or _model(remat), make_objective(loss)
    optimizer = AdamW(b1=0.9, b2=0.95, epsilon=1e-3, weight_decay=0.01, clip_norm=1.0)
    config = StepConfig(2, "cosine", 1, STEPS, 8)
    state = steps.init_state(objective, optimizer, tiny_params(model, 0, 1.0), tiny_params(model, 1, 1.0))
    state = parallel.replicate(state)
    hyper = parallel.replicate(Hyper({k: np.float32(v) for k, v in numbers.items()}, np.float32(1e-2)))
    examples = random_examples(3 * ROWS, SHAPE)
    batches = [lay_out(examples[i * ROWS : (i + 1) * ROWS], SHAPE) for i in range(3)]
    batches = [parallel.shard(batch, micro) for batch in batches]
    step = parallel.train_step(steps.make_train_step(model, objective, optimizer, config, parallel.axis))
    return step.lower(state, batches[0], hyper).compile(), state, batches, hyper


def _run(parallel: DataParallel | MeshParallel, **options: Any) -> tuple[list[float], Any, Any]:
    """(loss of each step, parameters on the host, the compiled step)."""
    step, state, batches, hyper = _compile(parallel, **options)
    losses = []
    for i in range(STEPS):
        old = state
        state, metrics = step(state, batches[i % 3], hyper)
        losses.append(float(parallel.unreplicate(metrics["loss"]).compute()))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params))  # its buffers are the new state's
    return losses, parallel.unreplicate(state.params), step


@pytest.fixture(scope="module")
def one_device() -> Any:
    return _run(DataParallel(jax.devices()[:1]))


LAYOUTS = {
    "pmap on 8": (lambda: DataParallel(jax.devices()), {}),
    "a mesh of 1": (lambda: _mesh(1, 1, 1), {}),
    "data 4, accumulation": (lambda: _mesh(4, 1, 1), {"micro": 2}),
    "tensor 2": (lambda: _mesh(1, 1, 2), {}),
    "fsdp 2×4": (lambda: _mesh(2, 4, 1), {}),
    "2×2×2 reversed, accumulation, remat": (lambda: _mesh(2, 2, 2, reverse=True), {"micro": 2, "remat": "full"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_to_the_same_parameters(name: str, one_device: Any) -> None:
    make, options = LAYOUTS[name]
    losses, params, step = _run(make(), **options)
    np.testing.assert_allclose(losses, one_device[0], atol=1e-5)
    for path, leaf in named_leaves(params).items():
        np.testing.assert_allclose(leaf, named_leaves(one_device[1])[path], atol=1e-5, err_msg=path)
    found = Counter(re.findall(COLLECTIVES, step.as_text()))
    if name == "data 4, accumulation":
        assert found.keys() == {"all-reduce"} and found["all-reduce"] <= 8, found
    if name == "fsdp 2×4":
        assert found.keys() <= {"all-gather", "all-reduce", "reduce-scatter"} and found["all-gather"] >= 7, found
        # Every matrix is held in quarters: nothing but norms, numbers and a batch of tokens is whole on a device.
        inputs = step.memory_analysis().argument_size_in_bytes
        total = 4 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        assert inputs < total / 4 + 4096


def test_a_loss_that_sees_the_whole_batch_gathers_numbers_only() -> None:
    step, *_ = _compile(_mesh(8, 1, 1), micro=2, model=Bigram(), loss="aot")
    sizes = re.findall(r"f32\[([\d,]*)\]\S* all-gather(?:-start)?\(", step.as_text())
    assert set(re.findall(COLLECTIVES, step.as_text())) == {"all-reduce", "all-gather"}
    assert sizes and all(np.prod([int(n) for n in size.split(",")]) <= 2 * ROWS for size in sizes), sizes


def test_a_mesh_reads_what_all_devices_hold_without_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program would run after the next step, whose numbers nobody has asked for yet."""
    parallel = _mesh(2, 2, 1)
    number = parallel.replicate(np.float32(7))
    monkeypatch.delattr(multihost_utils, "process_allgather")
    assert parallel.unreplicate({"loss": number}) == {"loss": np.float32(7)}


def test_a_mesh_hands_rows_out_in_order_and_back() -> None:
    parallel = _mesh(2, 2, 1)
    sharded = parallel.shard({"a": np.arange(24).reshape(12, 2)}, 3)["a"]
    assert sharded.shape == (3, 4, 2)
    np.testing.assert_array_equal(np.asarray(sharded).reshape(12, 2), np.arange(24).reshape(12, 2))
    double = parallel.row_function(lambda params, rows: {"out": rows * params}, "double")
    params = parallel.replicate(np.float32(2))
    np.testing.assert_array_equal(double(params, np.arange(8, dtype=np.float32)).result()["out"], 2 * np.arange(8))
    assert parallel.traces == {"double": 1}
    tree = {"a": np.arange(3), "b": None, "c": np.float32(1.5)}
    back = parallel.unreplicate(parallel.replicate(tree))
    np.testing.assert_array_equal(back["a"], tree["a"])
    assert back["b"] is None and back["c"] == np.float32(1.5)
