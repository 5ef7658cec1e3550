"""Prompts that share rows are read as they are alone; equal ones are read once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import prefill as module
from dpo_jax.prefill import _next_fit, prefill
from tests.tiny import VOCAB, tiny_model, tiny_params, windowed_model

ROOM = 3


@pytest.fixture(params=["gpt2", "windows"])
def model(request):
    return tiny_model() if request.param == "gpt2" else windowed_model()


def _prompts(rows: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, longest + 1, rows).astype(np.int32)
    tokens = rng.integers(3, VOCAB, (rows, longest)).astype(np.int32)  # what stands after a prompt is not to be seen
    tokens[rows // 2], lengths[rows // 2] = tokens[0], lengths[0]
    return tokens, lengths


@pytest.mark.parametrize(("row_length", "lanes"), [(512, 1), (9, 1), (9, 4), (2, 3)])
def test_shared_rows_give_what_each_prompt_gives_alone(model, row_length: int, lanes: int, monkeypatch) -> None:
    monkeypatch.setattr(module, "ROW", row_length)
    params = {"params": tiny_params(model)}
    tokens, lengths = _prompts(rows=14, longest=6)
    last, cache = _read(model, params, tokens, lengths, lanes=lanes)
    apply, alone = jax.jit(model.apply), jax.jit(functools.partial(model.apply, method="read"))
    position, mask = np.arange(tokens.shape[1])[None], np.tril(np.ones((1, tokens.shape[1], tokens.shape[1]), bool))
    for r, n in enumerate(lengths):
        hidden, key, value = alone(params, tokens[r : r + 1], position, mask)
        _assert_rounded(hidden, apply(params, tokens[r : r + 1], position, mask))
        _assert_rounded(last[r], hidden[0, n - 1])
        for found, expected in ((_by_slot(cache.key), key), (np.stack(cache.value), value)):
            _assert_rounded(found[:, r, :, :n], expected[:, 0, :, :n])


def test_rows_that_are_not_new_are_left_alone(model) -> None:
    """Two rows have been read, though for a new one with the same prompt it is read again; one is nobody's."""
    params = {"params": tiny_params(model)}
    tokens, lengths = _prompts(rows=6, longest=6)
    tokens[4], lengths[4] = tokens[1], lengths[1]
    tokens[5], lengths[5] = tokens[2], lengths[2]
    first, later = np.arange(6) < 2, np.arange(6) > 2
    before = _read(model, params, tokens, lengths, new=first)
    after = _read(model, params, tokens, lengths, new=later, found=before)
    whole = _read(model, params, tokens, lengths)
    for found, old, expected in zip(*map(jax.tree.leaves, (after, before, whole)), strict=True):
        np.testing.assert_array_equal(found[:3], old[:3])
        _assert_rounded(found[later], expected[later])


def _read(model, params, tokens, lengths, *, new=None, found=None, lanes: int = 1):
    """What prefill gives: by default of rows that are all new."""
    rows, width = tokens.shape
    if found is None:
        empty = model.apply(params, rows, width + ROOM, method="empty_cache")
        found = np.zeros((rows, model.config.width), np.float32), empty
    new = np.ones(rows, bool) if new is None else new
    return jax.jit(functools.partial(prefill, model, lanes=lanes))(params, tokens, lengths, new, *found)


def _by_slot(keys) -> np.ndarray:
    """Of all layers, [N, R, K, T, E]."""
    layers, rows, heads, blocks, size, block = np.shape(keys)
    return np.moveaxis(np.stack(keys), 4, 5).reshape(layers, rows, heads, blocks * block, size)


def _assert_rounded(found, expected) -> None:
    # The same products in rows of another length, in another order on other processors: of the array's largest number,
    # some ten times fp32's rounding, 1.2e-7.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.max(np.abs(expected)))


def test_rows_are_filled_one_after_the_other() -> None:
    start, used = jax.jit(functools.partial(_next_fit, row_length=10))(jnp.array([4, 6, 0, 7, 4, 0, 10, 1]))
    np.testing.assert_array_equal(start, [0, 4, 10, 10, 20, 24, 30, 40])
    assert int(used) == 5


@pytest.mark.parametrize(("answers", "loops"), [(1, [4, 1, 1, 1, 1]), (8, [1, 8])])
def test_no_row_is_read_for_prompts_already_seen(answers: int, loops: list[int], monkeypatch) -> None:
    """Eight prompts of 5 tokens fill four rows of 10, each written once; the same prompt eight times is one row of
    them, written eight times."""
    monkeypatch.setattr(module, "ROW", 10)
    tokens = np.repeat(np.arange(3, 3 + 5 * 8 // answers, dtype=np.int32).reshape(-1, 5), answers, axis=0)
    model, count = tiny_model(), []
    params = {"params": tiny_params(model)}
    loop = jax.lax.fori_loop

    def counted(lower, upper, body, init):
        jax.debug.callback(lambda n: count.append(int(n)), upper, ordered=True)
        return loop(lower, upper, body, init)

    monkeypatch.setattr(jax.lax, "fori_loop", counted)
    jax.block_until_ready(_read(model, params, tokens, np.full(8, 5, np.int32)))
    jax.effects_barrier()
    assert count == loops
