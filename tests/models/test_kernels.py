"""The kernels, interpreted, against dense attention: values and gradients of every layout."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.models.flash import flash
from dpo_jax.models.layers import training_mask
from dpo_jax.models.sight import Sight, find_spans
from dpo_jax.models.splash import splash, visited_pairs
from dpo_jax.models.triton import Kernels, Tiles, triton
from dpo_jax.sharding import AXES

LENGTH = 300  # three blocks of 128, the last in part
# Group, branch and tokens of each run of a row: pairs with shared prompts, a prompt alone, padding; borders of blocks
# lie inside of prompts and of answers.
PACKED = [(1, 0, 90), (1, 1, 45), (1, 2, 45), (2, 0, 20), (2, 1, 30), (2, 2, 10), (3, 0, 50), (0, 0, 10)]
SHARED = [(1, 0, 150), (1, 1, 20), (1, 2, 30), (0, 0, 100)]
SINGLE = [(1, 0, 140), (1, 1, 110), (0, 0, 50)]

KERNELS = {
    "splash": functools.partial(splash, block=128, interpret=True),
    # Blocks of keys larger than those of queries, smaller, and as large; with 300 tokens all end in padding.
    "triton": functools.partial(
        triton, tiles=Kernels(Tiles(16, 64, 4, 1), Tiles(64, 32, 4, 1), Tiles(32, 32, 4, 1)), interpret=True
    ),
}


def _rows(*rows):
    """group, branch, position [R, L]."""
    tables = []
    for runs in rows:
        prompts = {group: count for group, branch, count in runs if branch == 0}
        first = [prompts.get(group, 0) if branch else 0 for group, branch, _ in runs]
        tables.append(
            [
                [group for group, _, count in runs for _ in range(count)],
                [branch for _, branch, count in runs for _ in range(count)],
                [start + i for start, (_, _, count) in zip(first, runs, strict=True) for i in range(count)],
            ]
        )
    return np.array(tables, np.int32).swapaxes(0, 1)


@functools.partial(jax.jit, static_argnames=("name", "branches", "windowed", "cap"))
def _both(tensors, cotangent, rows, window, *, name, branches, windowed, cap):
    group, branch, position = rows
    mask = training_mask(group, branch)
    if windowed:
        mask &= position[:, :, None] - position[:, None, :] < window
    spans = find_spans(Sight(group, branch, branches))
    scale = tensors[0].shape[-1] ** -0.5
    kernel = functools.partial(KERNELS[name], spans=spans, window=window if windowed else None, scale=scale, cap=cap)
    dense = functools.partial(flash, mask_RLL=mask, scale=scale, cap=cap)
    real = (group != 0)[:, :, None, None]

    def pulled_back(fn):
        out, pull_back = jax.vjp(fn, *tensors)
        return out * real, pull_back(cotangent * real)

    return pulled_back(kernel), pulled_back(dense)


@pytest.mark.parametrize(
    ("rows", "branches", "window", "cap"),
    [
        pytest.param((PACKED, SHARED), 2, None, None, id="packed and shared"),
        pytest.param((PACKED, SHARED), 2, 25, 3.0, id="packed and shared, window, cap"),
        pytest.param((SINGLE,), 1, None, 3.0, id="concatenated, cap"),
        pytest.param((SINGLE,), 1, 25, None, id="concatenated, window"),
    ],
)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_sees_what_the_mask_shows(name, rows, branches, window, cap) -> None:
    rng, tables = np.random.default_rng(0), _rows(*rows)
    q, k, v, cotangent = (rng.normal(size=(len(rows), LENGTH, n, 16)).astype(np.float32) for n in (4, 2, 2, 4))
    windowed = window is not None
    settings = dict(name=name, branches=branches, windowed=windowed, cap=cap)
    got, expected = _both((q, k, v), cotangent, tables, window or 0, **settings)
    # Sums over up to 250 keys of numbers of about 1, in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)


def test_blocks_that_nobody_sees_are_not_visited() -> None:
    # Two pairs of 256 tokens: a prompt and two answers of a block of 64 each, and padding for the rest of a block.
    pair = [(0, 128), (1, 64), (2, 64)]
    group, branch, _ = _rows([(g, b, n) for g in (1, 2) for b, n in pair])
    sight = Sight(group, branch, 2)
    # Of 4 × 4 blocks of the row and 4 × 4 of each answer's copy: a prompt sees itself; the block of its answers sees
    # itself, and each of them its copy of the prompt.
    assert visited_pairs(sight, None, block=128) == 2 * (1 + 1 + 2) * 128**2
    # A window of 32 still reaches into the prompt from the first tokens of the answers; one of 1 does not.
    assert visited_pairs(sight, 32, block=128) == 2 * (1 + 1 + 2) * 128**2
    assert visited_pairs(sight, 1, block=128) == 2 * (1 + 1) * 128**2


@pytest.mark.parametrize("kernel", [functools.partial(splash, block=256), triton])
def test_no_array_has_two_axes_of_positions(kernel) -> None:
    shape = lambda heads: jax.ShapeDtypeStruct((1, 1024, heads, 8), jnp.float32)  # noqa: E731
    table = jax.ShapeDtypeStruct((1, 1024), jnp.int32)

    def total(q, k, v, group, branch):
        return kernel(q, k, v, find_spans(Sight(group, branch, 2)), scale=1.0).sum()

    text = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2)))(shape(4), shape(2), shape(2), table, table))
    assert "pallas_call" in text and "1024,1024]" not in text and "1024,3072]" not in text


@pytest.mark.parametrize("name", KERNELS)
def test_heads_and_rows_are_attended_to_where_they_lie(name) -> None:
    mesh = jax.make_mesh((1, 2, 2), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=jax.devices()[:4])
    group, branch, _ = _rows(*[[(1, 0, 50), (1, 1, 40), (1, 2, 38)]] * 2)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 128, n, 8)).astype(np.float32) for n in (4, 2, 2))
    spans = find_spans(Sight(group, branch, 2))
    attend_rows = lambda q, k, v: KERNELS[name](q, k, v, spans, scale=1.0)  # noqa: E731
    whole = jax.jit(attend_rows)(q, k, v)
    split = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor"))
    with jax.set_mesh(mesh):
        compiled = jax.jit(attend_rows).lower(*(jax.device_put(a, split) for a in (q, k, v))).compile()
        parts = compiled(*(jax.device_put(a, split) for a in (q, k, v)))
    np.testing.assert_array_equal(parts, whole)
    assert parts.sharding.shard_shape(parts.shape) == (1, 128, 2, 8)
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-reduce", "all-to-all"))


def test_rows_that_are_too_long_are_refused() -> None:
    long = jnp.zeros((1, 40000, 1, 8))
    table = jnp.ones((1, 40000), jnp.int32)
    with pytest.raises(ValueError, match="40000 positions, the kernel takes 32768"):
        splash(long, long, long, find_spans(Sight(table, table, 2)), scale=1.0)
