"""Log-probabilities: hand-computed sums, chunks, weights, and that no full table of logits is ever made."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from dpo_jax.data.layouts import Shape, concatenated
from dpo_jax.logprobs import score, token_scores
from dpo_jax.models.layers import project
from tests.tiny import VOCAB, jit_score, random_examples, tiny_model, tiny_params


def test_token_scores_are_those_of_a_float64_softmax() -> None:
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(2, 5, 8)).astype(np.float32), rng.normal(size=(VOCAB, 8)).astype(np.float32)
    target = rng.integers(0, VOCAB, (2, 5)).astype(np.int32)
    logp = log_softmax(np.einsum("rmd,vd->rmv", hidden, head, dtype=np.float64), axis=-1)
    expected = (
        np.take_along_axis(logp, target[..., None], -1)[..., 0],
        -(np.exp(logp) * logp).sum(-1),
        np.log((np.exp(logp) ** 2).sum(-1)),
    )
    for chunk in (1, 3, 10, 64):
        got = jax.jit(token_scores, static_argnums=3)(hidden, head, target, chunk)
        # Logits of about 10 in fp32 carry errors of a few 1e-6.
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=5e-6, rtol=1e-6)


def test_answers_are_scored_as_the_sum_over_their_own_tokens() -> None:
    shape = Shape(answers=2, prompt_length=4, answer_length=6)
    (example,) = random_examples(1, shape, seed=3)
    model, params = tiny_model(), tiny_params(tiny_model())
    batch = concatenated([example], shape)
    got = jit_score(model, params, batch, (2, 1), 16)
    for a, answer in enumerate(example.answers):
        tokens = np.concatenate([example.prompt, answer.tokens])[None]
        length = tokens.shape[1]
        mask = np.tril(np.ones((1, length, length), bool))
        hidden = model.apply({"params": params}, tokens, np.arange(length)[None], mask)
        logits = np.asarray(hidden[0] @ params["token_embedding"].T, np.float64)
        logp = log_softmax(logits, axis=-1)
        start = len(example.prompt)
        expected = sum(logp[t - 1, tokens[0, t]] for t in range(start, length))
        np.testing.assert_allclose(got.sum[0, a, 0], expected, rtol=2e-6)
        assert got.count[0, a, 0] == len(answer.tokens)
    shortest = min(len(a.tokens) for a in example.answers)
    assert got.tail[0, int(np.argmin([len(a.tokens) for a in example.answers])), 0] == 0
    assert shortest < max(len(a.tokens) for a in example.answers), "the example must have a tail"
    assert (got.tail[0] < 0).any()


def test_weights_scale_the_targets_and_zero_removes_them() -> None:
    shape = Shape(answers=1, prompt_length=2, answer_length=5)
    batch = concatenated(random_examples(4, shape, seed=1), shape)
    model, params = tiny_model(), tiny_params(tiny_model())
    whole = jit_score(model, params, batch, (1, 1), 16)
    double = jit_score(model, params, batch.replace(weight_RM=2 * batch.weight_RM), (1, 1), 16)
    none = jit_score(model, params, batch.replace(weight_RM=0 * batch.weight_RM), (1, 1), 16)
    np.testing.assert_allclose(double.sum, 2 * whole.sum, rtol=1e-6)
    np.testing.assert_array_equal(none.sum, np.zeros((4, 1, 1)))


def test_targets_are_the_answers_tokens_and_no_prompt_token_is_one() -> None:
    shape = Shape(answers=1, prompt_length=3, answer_length=3)
    examples = random_examples(5, shape, seed=2)
    batch = concatenated(examples, shape)
    for row, example in enumerate(examples):
        counts = batch.weight_RM[row] > 0
        np.testing.assert_array_equal(batch.target_RM[row][counts], example.answers[0].tokens)
        np.testing.assert_array_equal(
            batch.source_RM[row][counts], len(example.prompt) - 1 + np.arange(len(example.answers[0].tokens))
        )


def _shapes(jaxpr) -> set[tuple[int, ...]]:
    found = set()
    for equation in jaxpr.eqns:
        found |= {tuple(v.aval.shape) for v in equation.outvars if hasattr(v.aval, "shape")}
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found |= _shapes(inner)
    return found


@pytest.mark.parametrize("gradient", [False, True])
def test_logits_exist_for_one_chunk_at_a_time(gradient: bool) -> None:
    shape = Shape(answers=2, prompt_length=6, answer_length=9)
    batch = concatenated(random_examples(8, shape), shape)
    model, params = tiny_model(), tiny_params(tiny_model())

    def loss(p):
        return score(model, p, batch, (2, 1), 16).sum.sum()

    shapes = _shapes(jax.make_jaxpr(jax.grad(loss) if gradient else loss)(params).jaxpr)
    with_vocab = [s for s in shapes if VOCAB in s]
    assert (16, 1, VOCAB) in with_vocab  # 16 rows, one target of each
    assert max(int(np.prod(s)) for s in with_vocab) <= VOCAB * max(16, model.config.width)


def test_bf16_models_are_scored_in_fp32() -> None:
    model = tiny_model(dtype=jnp.bfloat16)
    shape = Shape(answers=1, prompt_length=2, answer_length=9)
    batch = concatenated(random_examples(4, shape), shape)
    params = tiny_params(model)
    got = jit_score(model, params, batch, (1, 1), 16)
    assert got.sum.dtype == jnp.float32
    exact = jit_score(tiny_model(), params, batch, (1, 1), 16)
    # Hidden states carry 8 bits; their errors of up to 2^-8 reach logits of about 10.
    np.testing.assert_allclose(got.sum / got.count, exact.sum / exact.count, atol=0.2)


@pytest.mark.parametrize(("cap", "dtype"), [(None, jnp.float32), (3.0, jnp.float32), (None, jnp.bfloat16)])
def test_gradients_are_those_of_all_logits_at_once(cap: float | None, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    rows, targets, width = 3, 11, 8
    hidden, head = (
        jnp.asarray(rng.normal(size=(*n, width)), jnp.float32).astype(dtype) for n in ((rows, targets), (VOCAB,))
    )
    target = rng.integers(0, VOCAB, (rows, targets)).astype(np.int32)
    used = np.arange(targets) < 6  # chunks of 2 columns, the first 3 of 6
    weight = jnp.asarray(rng.normal(size=(rows, targets)) * used, jnp.float32)

    def plain(hidden, head):
        logp = jax.nn.log_softmax(project(hidden, head, cap))
        return jnp.sum(weight * jnp.take_along_axis(logp, target[..., None], -1)[..., 0])

    def chunked(hidden, head):
        scores = token_scores(hidden, head, target, 6, cap, used)
        # What carries no gradient must not add any.
        return jnp.sum(weight * scores.logp) + jnp.sum(scores.entropy) + jnp.sum(scores.log_collision)

    expected = jax.jit(jax.grad(plain, (0, 1)))(*(a.astype(jnp.float32) for a in (hidden, head)))
    got = jax.jit(jax.grad(chunked, (0, 1)))(hidden, head)
    # In half precision, the gradient of the logits is rounded once (2^-9 of entries up to 3), as are the results.
    tolerance = 2e-6 if dtype == jnp.float32 else 3e-2
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=tolerance)


def test_columns_without_a_target_are_not_computed() -> None:
    hidden, head = np.full((1, 8, 4), np.nan, np.float32), np.ones((VOCAB, 4), np.float32)
    hidden[:, :3] = 0.0
    scores = jax.jit(token_scores, static_argnums=(3, 4))(
        hidden, head, np.zeros((1, 8), np.int32), 2, None, np.arange(8) < 3
    )
    np.testing.assert_allclose(scores.logp[0], [-np.log(VOCAB)] * 3 + [np.nan] + [0.0] * 4, rtol=1e-6)


def test_the_head_is_read_as_it_lies() -> None:
    """In half precision CPUs copied it, [V, D], into transposed order before each loop over chunks."""
    hidden, head = jnp.ones((2, 12, 24), jnp.bfloat16), jnp.ones((VOCAB, 24), jnp.bfloat16)
    target, used = np.zeros((2, 12), np.int32), np.arange(12)

    def total(hidden, head, last):
        return token_scores(hidden, head, target, 4, None, used < last).logp.sum()

    text = jax.jit(jax.grad(total, (0, 1))).lower(hidden, head, 7).compile().as_text()
    assert f"bf16[{VOCAB},24]" in text and f"bf16[24,{VOCAB}]" not in text
