"""Schedules and AdamW against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax.optim import SCHEDULES, AdamW, schedule
from dpo_jax.parallel import DataParallel
from dpo_jax.trees import named_leaves
from tests.tiny import random_examples, setup, tiny_model, tiny_params

# warmup 4, steps 12: a rise in fifths, then 8 steps of decay.
RISE = [0.2, 0.4, 0.6, 0.8]


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("constant", {4: 1.0, 8: 1.0, 12: 1.0, 99: 1.0}),
        ("linear", {4: 1.0, 6: 0.75, 8: 0.5, 11: 0.125, 12: 0.0, 99: 0.0}),
        ("cosine", {4: 1.0, 6: 0.5 + math.sqrt(2) / 4, 8: 0.5, 12: 0.0, 99: 0.0}),
    ],
)
def test_schedules_by_hand(name: str, after: dict[int, float]) -> None:
    expected = dict(enumerate(RISE)) | after
    got = {step: float(schedule(name, jnp.int32(step), warmup=4, steps=12)) for step in expected}
    assert got == pytest.approx(expected, abs=1e-7)  # fp32


def test_every_schedule_has_a_hand_value_and_none_needs_a_warmup() -> None:
    for name in SCHEDULES:
        assert float(schedule(name, jnp.int32(0), warmup=0, steps=10)) == 1.0


def test_two_steps_of_adamw_by_hand() -> None:
    """m = (1−β₁)g + β₁m, v likewise with g²; update −(m̂/(√v̂ + ε) + λw), for a learning rate of 1."""
    b1, b2, eps, decay = 0.9, 0.95, 1e-3, 0.1
    optimizer = AdamW(b1=b1, b2=b2, epsilon=eps, weight_decay=decay, clip_norm=None)
    w, m, v = 2.0, 0.0, 0.0
    params = {"kernel": jnp.float32(w)}
    moments = optimizer.init(params)
    for t, (g, rate) in enumerate(((0.5, 1.0), (-1.5, 0.5)), 1):
        params, moments = _step(optimizer, params, moments, {"kernel": jnp.float32(g)}, rate)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w -= rate * (m / (1 - b1**t) / (math.sqrt(v / (1 - b2**t)) + eps) + decay * w)
        assert float(params["kernel"]) == pytest.approx(w, rel=1e-5)  # fp32 powers of β
    assert int(moments.count) == 2


def test_updates_are_those_of_optax() -> None:
    params = {"kernel": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "bias": jnp.ones(3)}
    optimizer = AdamW(b1=0.9, b2=0.95, epsilon=1e-6, weight_decay=0.0, clip_norm=1.0)
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01, 0.9, 0.95, 1e-6))
    moments, state, expected = optimizer.init(params), theirs.init(params), params
    for seed in range(3):
        grads = {"kernel": jnp.full((2, 3), 0.5 - seed), "bias": jnp.arange(3.0) * 0.1}
        params, moments = _step(optimizer, params, moments, grads, 0.01)
        updates, state = theirs.update(grads, state, expected)
        expected = optax.apply_updates(expected, updates)
    # fp32: they divide by the norm and multiply by its limit, ours is one factor.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-7), params, expected)


def test_an_update_that_is_not_taken_leaves_all_as_it_was() -> None:
    params = {"kernel": jnp.float32(2)}
    optimizer = AdamW(b1=0.9, b2=0.95, epsilon=1e-6, weight_decay=0.1, clip_norm=1.0)
    moments = optimizer.init(params)
    nan = {"kernel": jnp.float32(math.nan)}
    got = optimizer.update(params, moments, nan, jnp.float32(math.nan), jnp.float32(1), jnp.bool_(False))
    assert got == (params, moments)


def test_an_update_keeps_no_copy_of_what_it_writes() -> None:
    """With the buffers donated, an update needs no room that grows with the parameters."""
    optimizer = AdamW(b1=0.9, b2=0.95, epsilon=1e-6, weight_decay=0.1, clip_norm=1.0)
    params = {"kernel": jax.ShapeDtypeStruct((256, 1024), np.float32)}
    moments = jax.eval_shape(optimizer.init, params)
    number, flag = jax.ShapeDtypeStruct((), np.float32), jax.ShapeDtypeStruct((), bool)
    update = jax.jit(optimizer.update, donate_argnums=(0, 1))
    memory = update.lower(params, moments, params, number, number, flag).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 3 * 256 * 1024 * 4
    assert memory.temp_size_in_bytes < 4096


def test_gradients_are_clipped_by_their_global_norm() -> None:
    """(3, 4) has norm 5: with a limit of 1 it becomes (0.6, 0.8); Adam's first moment shows it."""
    for clip, scale in ((1.0, 0.2), (10.0, 1.0), (None, 1.0)):
        optimizer = AdamW(b1=0.0, b2=0.0, epsilon=1.0, weight_decay=0.0, clip_norm=clip)
        grads = {"a": jnp.float32(3), "b": jnp.float32(4)}
        _, moments = _step(optimizer, grads, optimizer.init(grads), grads, 1.0)
        expected = {"a": 3 * scale, "b": 4 * scale}
        assert {k: float(u) for k, u in moments.mean.items()} == pytest.approx(expected, rel=1e-6)


def test_weight_decay_is_for_matrices_alone() -> None:
    params = {**tiny_params(tiny_model()), "head": jnp.ones(2), "lora_a": jnp.ones(2)}
    params = jax.tree.map(lambda p: p + 1.0, params)
    optimizer = AdamW(b1=0.9, b2=0.95, epsilon=1e-8, weight_decay=0.1, clip_norm=1.0)
    zero = jax.tree.map(jnp.zeros_like, params)
    after, _ = _step(optimizer, params, optimizer.init(params), zero, 1.0)
    before, after = named_leaves(params), named_leaves(after)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    matrices = {"kernel", "token_embedding", "position_embedding", "head", "lora_a"}
    assert {name.rpartition("/")[2] for name in moved} == matrices
    assert {name.rpartition("/")[2] for name in before.keys() - moved} == {"scale", "bias"}


def _step(optimizer: AdamW, params: Any, moments: Any, grads: Any, rate: float) -> Any:
    norm = optax.global_norm(grads)
    return jax.jit(optimizer.update)(params, moments, grads, norm, jnp.float32(rate), jnp.bool_(True))


def test_a_hundred_steps_with_weight_decay_leave_the_reference_alone() -> None:
    from dpo_jax.data.layouts import Shape
    from dpo_jax.data.pipeline import Pipeline

    shape = Shape(answers=2, prompt_length=3, answer_length=4)
    s = setup("dpo")
    before = s.parallel.unreplicate(s.state)
    batches = Pipeline(random_examples(32, shape), shape, layout="concatenated", batch_size=8, seed=0)
    after, _ = s.run([batches.batch(step) for step in range(100)])
    jax.tree.map(np.testing.assert_array_equal, after.reference, before.reference)
    moved = [
        not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (after.params, before.params)), strict=True)
    ]
    assert all(moved)
    assert isinstance(s.parallel, DataParallel)
