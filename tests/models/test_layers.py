"""What is summed in fp32 and rounded once: products, the gradients of matrices, and what lies between products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.models import make_model
from dpo_jax.models.decoder import GatedMlp
from dpo_jax.models.layers import add_rows_in_order, outer_sum, product, take_rows
from tests.tiny import VOCAB


def test_half_precision_outer_products_are_summed_in_fp32() -> None:
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(64, n)), jnp.bfloat16) for n in (24, 40))
    expected = np.einsum("td,tf->df", np.asarray(x, np.float64), np.asarray(y, np.float64))
    got = jax.jit(outer_sum)(x, y)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=2e-5)  # a bf16 result would be off by 0.1


def test_a_product_has_the_gradients_of_a_product() -> None:
    rng = np.random.default_rng(0)
    x, kernel, cotangent = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 3, 24), (24, 40), (2, 3, 40)))

    def pulled_back(fn):
        out, pull_back = jax.vjp(fn, x, kernel)
        return out, pull_back(jnp.asarray(cotangent))

    expected = jax.jit(lambda: pulled_back(jnp.matmul))()
    got = jax.jit(lambda: pulled_back(lambda x, kernel: product(x, kernel, jnp.float32)))()
    # Sums of up to 40 numbers of about 1, in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), got, expected)


def test_rows_are_taken_with_the_gradient_of_indexing() -> None:
    rng = np.random.default_rng(0)
    table, index = rng.normal(size=(7, 3)).astype(np.float32), rng.integers(0, 7, (2, 5))
    cotangent = jnp.asarray(rng.normal(size=(2, 5, 3)), jnp.float32)
    got, pull_back = jax.vjp(take_rows, table, index)
    expected, expected_pull_back = jax.vjp(lambda t: t[index], jnp.asarray(table))
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(pull_back(cotangent)[0], expected_pull_back(cotangent)[0])


def test_rows_are_added_in_chunks_to_what_they_add_up_to() -> None:
    rng = np.random.default_rng(0)
    # Rows that are met in several chunks, often in one, and never; the last chunk is filled up.
    values, index = rng.normal(size=(3, 7, 5)).astype(np.float32), rng.integers(0, 6, (3, 7))
    index[0] = 2
    expected = np.zeros((8, 5))
    np.add.at(expected, index, values.astype(np.float64))
    got = jax.jit(add_rows_in_order, static_argnums=(2, 3))(values, index, 8, 4)
    np.testing.assert_allclose(got, expected, atol=2e-6)  # sums of up to 10 numbers of about 1
    assert not np.any(got[6:])


def test_a_gate_is_rounded_once() -> None:
    sizes = dict(vocab_size=VOCAB, context_length=8, width=16, layers=1, heads=2, mlp_width=16, dtype=jnp.bfloat16)
    mlp = GatedMlp(make_model("llama", sizes).config, jax.nn.silu)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 16)), jnp.bfloat16)
    gate, up = (rng.normal(size=(16, 16)).astype(np.float32) for _ in range(2))
    params = {name: {"kernel": kernel} for name, kernel in (("gate", gate), ("up", up), ("down", np.eye(16)))}
    got = mlp.apply({"params": params}, x)
    wide = [product(x, jnp.asarray(kernel), jnp.bfloat16).astype(jnp.float32) for kernel in (gate, up)]
    expected = (jax.nn.silu(wide[0]) * wide[1]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(got, expected)  # rounded after each of silu's four operations, four of ten differ
