"""Attention in pairs of blocks, against attention over whole rows written out."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.models.flash import flash
from dpo_jax.models.layers import training_mask
from dpo_jax.sharding import AXES

HEADS, GROUPS, SIZE = 4, 2, 4
SCALE = SIZE**-0.5


def _plain(q, k, v, mask, cap):
    k, v = (jnp.repeat(a, HEADS // GROUPS, axis=2) for a in (k, v))
    scores = jnp.einsum("rqhe,rkhe->rhqk", q, k) * SCALE
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1)
    return jnp.einsum("rhqk,rkhe->rqhe", weights, v)


def _tensors(rows: int, length: int, dtype=np.float32):
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(rows, length, n, SIZE)).astype(dtype) for n in (HEADS, GROUPS, GROUPS, HEADS))


def _pair_and_more(padding: int):
    """group and branch [2, L]: a prompt of 90 tokens with two answers, which lie across borders, and what is alone."""
    group = [np.repeat([1, 2, 0], [180, 100, padding]), np.repeat([1, 0], [270, 10 + padding])]
    branch = [np.repeat([0, 1, 2, 0], [90, 45, 45, 100 + padding]), np.repeat([0], [280 + padding])]
    return np.array(group, np.int32), np.array(branch, np.int32)


@pytest.mark.parametrize(
    ("padding", "cap"),
    [
        pytest.param(20, None, id="three blocks of 100"),
        pytest.param(21, 2.0, id="three blocks of 101 and two positions more, cap"),
    ],
)
def test_pairs_of_blocks_give_what_whole_rows_give(padding: int, cap: float | None) -> None:
    group, branch = _pair_and_more(padding)
    mask, real = training_mask(group, branch), (group != 0)[:, :, None, None]
    *tensors, cotangent = _tensors(*group.shape)

    def pulled_back(fn):
        out, pull_back = jax.vjp(fn, *tensors)
        return out * real, pull_back(jnp.asarray(cotangent * real))

    expected = jax.jit(lambda: pulled_back(functools.partial(_plain, mask=mask, cap=cap)))()
    got = jax.jit(lambda: pulled_back(functools.partial(flash, mask_RLL=mask, scale=SCALE, cap=cap)))()
    # Sums over up to 270 keys of numbers of about 1, in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)


def test_padding_passes_nothing_back() -> None:
    group, branch = _pair_and_more(20)
    *tensors, cotangent = _tensors(*group.shape)
    padding = (group == 0)[:, :, None, None]
    _, pull_back = jax.vjp(functools.partial(flash, mask_RLL=training_mask(group, branch), scale=SCALE), *tensors)
    assert all(not np.any(grad) for grad in jax.jit(pull_back)(jnp.asarray(cotangent * padding)))


def test_blocks_that_nobody_sees_are_not_visited() -> None:
    # Four pairs of a block each; what is not a number spoils all that it meets.
    group = np.repeat([1, 2, 3, 4], 128)[None].astype(np.int32)
    q, k, v, _ = _tensors(1, 512)
    spoiled = v.copy()
    spoiled[:, 128:256] = np.nan
    run = jax.jit(functools.partial(flash, mask_RLL=training_mask(group, np.zeros_like(group)), scale=SCALE))
    out = np.asarray(run(q, k, spoiled))
    assert np.isnan(out[:, 128:256]).all()
    np.testing.assert_array_equal(np.delete(out, np.s_[128:256], 1), np.delete(run(q, k, v), np.s_[128:256], 1))


def test_scores_of_one_pair_of_blocks_exist_at_a_time() -> None:
    rows = jax.ShapeDtypeStruct((1, 512, 2, 4), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, 512, 512), bool)
    total = lambda q, m: flash(q, q, q, m, scale=1.0).sum()  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(total))(rows, mask))
    assert "f32[1,2,1,128,128]" in text and "512,512]" not in text.replace("bool[1,512,512]", "")


def test_half_precision_is_summed_in_fp32() -> None:
    group, branch = _pair_and_more(20)
    mask, real = training_mask(group, branch), (group != 0)[:, :, None, None]
    q, k, v, _ = (jnp.asarray(a, jnp.bfloat16) for a in _tensors(*group.shape))
    expected = _plain(*(a.astype(jnp.float32) for a in (q, k, v)), mask, None)
    got = jax.jit(functools.partial(flash, mask_RLL=mask, scale=SCALE))(q, k, v)
    assert got.dtype == jnp.bfloat16
    # Weights and results are rounded to 8 bits; sums of 270 terms in bf16 would be off by 0.1.
    np.testing.assert_allclose(got.astype(jnp.float32) * real, expected * real, atol=0.02)


def test_heads_and_rows_are_attended_to_where_they_lie() -> None:
    mesh = jax.make_mesh((1, 2, 2), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=jax.devices()[:4])
    group, branch = _pair_and_more(20)
    mask = training_mask(group, branch)
    tensors = _tensors(*group.shape)[:3]
    run = functools.partial(flash, scale=SCALE)
    whole = jax.jit(run)(*tensors, mask)
    heads, rows = (jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, n)) for n in ("tensor", None))
    with jax.set_mesh(mesh):
        arguments = [*(jax.device_put(a, heads) for a in tensors), jax.device_put(mask, rows)]
        compiled = jax.jit(run).lower(*arguments).compile()
        parts = compiled(*arguments)
    real = (group != 0)[:, :, None, None]
    np.testing.assert_array_equal(parts * real, whole * real)
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-reduce", "all-to-all"))
