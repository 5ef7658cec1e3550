"""Schedules and AdamW against numbers worked out by hand."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax.optim import SCHEDULES, _is_matrix, make_optimizer, schedule
from dpo_jax.parallel import DataParallel
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
    optimizer = make_optimizer(b1=b1, b2=b2, epsilon=eps, weight_decay=decay, clip_norm=None)
    w, m, v = 2.0, 0.0, 0.0
    params = {"kernel": jnp.float32(w)}
    state = optimizer.init(params)
    for t, g in enumerate((0.5, -1.5), 1):
        updates, state = optimizer.update({"kernel": jnp.float32(g)}, state, params)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        expected = -(m / (1 - b1**t) / (math.sqrt(v / (1 - b2**t)) + eps) + decay * w)
        assert float(updates["kernel"]) == pytest.approx(expected, rel=1e-5)  # fp32 powers of β
        params = optax.apply_updates(params, updates)
        w += expected


def test_gradients_are_clipped_by_their_global_norm() -> None:
    """(3, 4) has norm 5: with a limit of 1 it becomes (0.6, 0.8); Adam's first moment shows it."""
    for clip, scale in ((1.0, 0.2), (10.0, 1.0), (None, 1.0)):
        optimizer = make_optimizer(b1=0.0, b2=0.0, epsilon=1.0, weight_decay=0.0, clip_norm=clip)
        grads = {"a": jnp.float32(3), "b": jnp.float32(4)}
        updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
        expected = {name: -g * scale / (g * scale + 1) for name, g in (("a", 3), ("b", 4))}  # −g/(|g| + ε)
        assert {k: float(u) for k, u in updates.items()} == pytest.approx(expected, rel=1e-6)


def test_weight_decay_is_for_matrices_alone() -> None:
    params = tiny_params(tiny_model())
    optimizer = make_optimizer(b1=0.9, b2=0.95, epsilon=1e-8, weight_decay=0.1, clip_norm=1.0)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    moved = {jax.tree_util.keystr(path, simple=True, separator="/") for path, u in _leaves(updates) if bool(u.any())}
    still = {jax.tree_util.keystr(path, simple=True, separator="/") for path, u in _leaves(updates)} - moved
    assert {name.rpartition("/")[2] for name in moved} == {"kernel", "token_embedding", "position_embedding"}
    assert {name.rpartition("/")[2] for name in still} == {"scale", "bias"}
    assert _is_matrix({"head": 0.0, "lora_a": 0.0}) == {"head": True, "lora_a": True}


def _leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


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
