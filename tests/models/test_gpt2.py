"""GPT-2: who sees whom, by gradients; sizes; the same function with and without a cache."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.models import init_params, make_model
from dpo_jax.models.flash import flash
from dpo_jax.models.layers import training_mask
from dpo_jax.trees import parameter_count
from tests.tiny import VOCAB, tiny_model, tiny_params

GROUP = np.array([[1, 1, 1, 1, 1, 2, 2, 0]], np.int32)
BRANCH = np.array([[0, 0, 1, 1, 2, 0, 1, 0]], np.int32)
POSITION = np.array([[0, 1, 2, 3, 2, 0, 1, 0]], np.int32)
SEES = {0: {0}, 1: {0, 1}, 2: {0, 1, 2}, 3: {0, 1, 2, 3}, 4: {0, 1, 4}, 5: {5}, 6: {5, 6}}


def test_the_mask_is_the_rule() -> None:
    mask = np.asarray(training_mask(GROUP, BRANCH))[0]
    for query, keys in SEES.items():
        assert set(np.flatnonzero(mask[query])) == keys
    assert not mask[7].any() and not mask[:, 7].any()


def test_gradients_flow_only_along_the_mask() -> None:
    """The hard form: the Jacobian of every hidden state with respect to every input embedding."""
    model = tiny_model(vocab_size=8)  # one token a position, so that a row of the embedding is a position
    params = tiny_params(model)
    tokens = np.arange(8, dtype=np.int32)[None]
    mask = training_mask(GROUP, BRANCH)

    def hidden(embedding):
        return model.apply({"params": {**params, "token_embedding": embedding}}, tokens, POSITION, mask)[0].sum(-1)

    # Summing over the width would hide that the final norm makes sums constant: weigh the norm unevenly.
    params["final_norm"]["norm"]["scale"] = jnp.linspace(0.5, 1.5, model.config.width)
    jacobian = np.abs(jax.jit(jax.jacrev(hidden))(params["token_embedding"])).sum(-1)
    for query, keys in SEES.items():
        assert set(np.flatnonzero(jacobian[query] > 1e-7)) == keys, query


def test_attention_is_the_textbook_formula() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 5, h, 4)).astype(np.float32) for h in (6, 2, 2))
    mask = np.tril(np.ones((2, 5, 5), bool))
    expected = np.zeros((2, 5, 6, 4))
    for r in range(2):
        for h in range(6):
            for i in range(5):
                scores = np.array([q[r, i, h] @ k[r, j, h // 3] / 2 for j in range(i + 1)], np.float64)
                weights = np.exp(scores - scores.max())
                expected[r, i, h] = (weights / weights.sum()) @ v[r, : i + 1, h // 3]
    np.testing.assert_allclose(jax.jit(functools.partial(flash, scale=0.5))(q, k, v, mask), expected, atol=2e-6)


@pytest.mark.parametrize("length", [9, 16, 70])
def test_a_cache_gives_the_same_hidden_states(length: int) -> None:
    """In slots that are as many as tokens, or more, and of more than one block."""
    model = tiny_model(context_length=70)
    params = {"params": tiny_params(model, scale=4.0)}
    tokens = np.random.default_rng(1).integers(0, VOCAB, (3, length)).astype(np.int32)
    position = np.broadcast_to(np.arange(length), tokens.shape)
    mask = np.tril(np.ones((length, length), bool))[None].repeat(3, 0)
    whole = jax.jit(model.apply)(params, tokens, position, mask)
    cache = model.apply(params, 3, length, method="empty_cache")
    seen = np.pad(mask, ((0, 0), (0, 0), (0, cache.position.shape[1] - length)))
    prepare, follow = (jax.jit(functools.partial(model.apply, method=name)) for name in ("prepare", "follow"))
    for t in range(length):
        cache, context = prepare(params, position[:, t : t + 1], seen[:, t : t + 1], cache, t)
        hidden, cache = follow(params, tokens[:, t : t + 1], position[:, t : t + 1], cache, context)
        # The same products in matrices of other shapes: fp32 rounding of states of size 1.
        np.testing.assert_allclose(hidden[:, 0], whole[:, t], atol=4e-6)


@pytest.mark.parametrize("unroll", [1, 2])
def test_unrolling_layers_changes_nothing(unroll: int) -> None:
    model = tiny_model(unroll=unroll)
    params = tiny_params(model)
    tokens = np.arange(6, dtype=np.int32)[None]
    mask = np.tril(np.ones((1, 6, 6), bool))
    got = jax.jit(model.apply)({"params": params}, tokens, tokens, mask)
    layers = [jax.tree.map(lambda p, i=i: p[i], params["blocks"]) for i in range(2)]
    swapped = {**params, "blocks": jax.tree.map(lambda *p: jnp.stack(p), *reversed(layers))}
    other = jax.jit(model.apply)({"params": swapped}, tokens, tokens, mask)
    assert np.abs(got - other).max() > 1e-3, "the layers must differ for this test to mean something"
    reference = jax.jit(tiny_model(unroll=1).apply)({"params": params}, tokens, tokens, mask)
    np.testing.assert_allclose(got, reference, atol=1e-6)


def test_the_parameter_count_is_the_formula() -> None:
    d, f, n, context = 16, 32, 2, 32
    block = 3 * d * d + 3 * d + d * d + d + 2 * d * f + f + d + 4 * d
    params = init_params(tiny_model(), jax.random.key(0))
    assert parameter_count(params) == VOCAB * d + context * d + n * block + 2 * d


def test_bad_sizes_and_families_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown model family 'gpt3'; known: gpt2"):
        make_model("gpt3", {})
    with pytest.raises(ValueError, match="width 15 is not a multiple of model.heads 2"):
        tiny_model(width=15)
