"""Attention in blocks of queries, and the products that gradients of matrices are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.models.layers import attend, outer_sum, training_mask


def test_blocks_of_queries_see_what_the_whole_row_sees() -> None:
    rng = np.random.default_rng(0)
    rows, length, heads, groups, size = 1, 300, 4, 2, 4  # three blocks of 100
    q, k, v, cotangent = (
        rng.normal(size=(rows, length, n, size)).astype(np.float32) for n in (heads, groups, groups, heads)
    )
    # Two examples and padding; the first has a prompt of 90 tokens and two answers, which lie across borders.
    group = np.repeat([1, 2, 0], [180, 100, 20])[None].astype(np.int32)
    branch = np.repeat([0, 1, 2, 0], [90, 45, 45, 120])[None].astype(np.int32)
    mask = training_mask(group, branch)

    def plain(q, k, v):
        k, v = (jnp.repeat(a, heads // groups, axis=2) for a in (k, v))
        scores = jnp.einsum("rqhe,rkhe->rhqk", q, k) / size**0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1)
        return jnp.einsum("rhqk,rkhe->rqhe", weights, v)

    def pulled_back(fn):
        out, pull_back = jax.vjp(fn, q, k, v)
        real = (group != 0)[:, :, None, None]
        return out * real, pull_back(jnp.asarray(cotangent * real))

    expected = jax.jit(lambda: pulled_back(plain))()
    got = jax.jit(lambda: pulled_back(lambda q, k, v: attend(q, k, v, mask)[0]))()
    # Sums over up to 180 keys of numbers of about 1, in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), got, expected)


def test_a_block_does_not_look_at_later_keys() -> None:
    rows = jax.ShapeDtypeStruct((1, 256, 2, 4), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, 256, 256), bool)
    text = str(jax.make_jaxpr(lambda q, m: attend(q, q, q, m)[0])(rows, mask))
    assert "f32[1,2,1,128,128]" in text and "f32[1,2,1,128,256]" in text
    assert "256,256]" not in text.replace("bool[1,256,256]", "")


def test_half_precision_outer_products_are_summed_in_fp32() -> None:
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(64, n)), jnp.bfloat16) for n in (24, 40))
    expected = np.einsum("td,tf->df", np.asarray(x, np.float64), np.asarray(y, np.float64))
    got = jax.jit(outer_sum)(x, y)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=2e-5)  # a bf16 result would be off by 0.1
