"""Rotary embeddings: what turning passes back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.models.rope import Rope, rotate


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_gradient_is_the_derivative_and_is_turned_back(share: float) -> None:
    cos, sin = Rope(share=share).angles(jnp.arange(7, dtype=jnp.int32)[None], 8)
    x, cotangent = jax.random.normal(jax.random.key(0), (2, 1, 7, 3, 8))

    out, pull_back = jax.vjp(lambda x: rotate(x, cos, sin), x)
    (gradient,) = pull_back(cotangent)

    # A linear map R has ⟨R x, c⟩ = ⟨x, Rᵀ c⟩; and these keep lengths. Sums of 168 products in fp32.
    np.testing.assert_allclose(jnp.vdot(out, cotangent), jnp.vdot(x, gradient), rtol=1e-5)
    for basis in jnp.eye(8):
        turned = rotate(jnp.broadcast_to(basis, x.shape), cos, sin)
        np.testing.assert_allclose(jnp.sum(turned * cotangent, -1), gradient @ basis, atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(out, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-6)
