"""The sampler draws from the policy: the same function that scores, in distribution and token by token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpo_jax import sampling
from dpo_jax.data.example import Example
from dpo_jax.data.layouts import Shape, concatenated
from dpo_jax.drawing import draw_token, keep_likeliest, likeliest_token
from dpo_jax.models import make_model
from dpo_jax.sampling import make_sampler, row_draws
from tests.tiny import VOCAB, jit_score, make_answer, tiny_model, tiny_params, windowed_model

EOS = 2
ENDS = tuple(range(0, VOCAB, 5))  # a fifth of the vocabulary: most answers end before there is no more room
ROOM = 7


@pytest.fixture(scope="module")
def sampler():
    model = tiny_model()
    return model, tiny_params(model), jax.jit(make_sampler(model, max_new_tokens=ROOM, eos=EOS))


def _prompts(rows: int, seed: int = 0, longest: int = 5):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, rows).astype(np.int32)
    tokens = np.where(np.arange(longest)[None] < lengths[:, None], rng.integers(3, VOCAB, (rows, longest)), 0)
    return tokens.astype(np.int32), lengths


def _draw(sampler, rows: int, seed: int = 0, temperature: float = 1.0, prompts=None):
    model, params, sample = sampler
    tokens, lengths = prompts or _prompts(rows)
    heat = np.full(rows, temperature, np.float32)
    return tokens, lengths, sample(params, tokens, lengths, row_draws(seed, np.arange(rows)), heat)


def test_its_own_log_probabilities_are_the_scorers(sampler) -> None:
    model, params, _ = sampler
    tokens, lengths, out = _draw(sampler, 64)
    n = np.asarray(out.length_R)
    examples = [
        Example(i, tokens[i, : lengths[i]], (make_answer(np.asarray(out.tokens_RT[i, : n[i]])),)) for i in range(64)
    ]
    batch = concatenated(examples, Shape(1, 5, ROOM))
    scores = jit_score(model, params, batch, (1, 1), 16).sum[:, 0, 0]
    # Two programs over the same weights: fp32 rounding of sums of up to seven terms of up to 10 nats.
    np.testing.assert_allclose(np.asarray(out.logp_RT).sum(1), scores, atol=1e-4)
    assert (np.abs(scores) > 1).all(), "the scores must be far from 0 for the comparison to mean something"


def test_it_ends_at_the_eos_and_only_there(sampler) -> None:
    _, _, out = _draw(sampler, 256)
    tokens, lengths, ended = np.asarray(out.tokens_RT), np.asarray(out.length_R), np.asarray(out.ended_R)
    assert 0 < ended.mean() < 1, "both kinds must occur"
    for row, n, done in zip(tokens, lengths, ended, strict=True):
        assert (row[n - 1] == EOS) == done
        assert EOS not in row[: n - 1]
        assert (row[n:] == 0).all()
        assert done or n == ROOM


def test_mean_sampled_log_probability_is_the_teacher_forced_expectation(sampler) -> None:
    """E[log p(token)] under sampling equals Σ_v p log p at every step: the bf16-cache kind of error would show here."""
    model, params, _ = sampler
    rows = 4096
    prompts = tuple(np.repeat(a[:1], rows, axis=0) for a in _prompts(4, seed=5))
    tokens, lengths, out = _draw(sampler, rows, seed=11, prompts=prompts)
    n = np.asarray(out.length_R)
    examples = [
        Example(i, tokens[i, : lengths[i]], (make_answer(np.asarray(out.tokens_RT[i, : n[i]])),)) for i in range(rows)
    ]
    scores = jit_score(model, params, concatenated(examples, Shape(1, 5, ROOM)), (1, 1), 4096)
    # Σ_t log p(y_t) + H(p_t) is a martingale difference sum with mean 0.
    difference = np.asarray(out.logp_RT).sum(1) + np.asarray(scores.entropy[:, 0, 0])
    z = difference.mean() / (difference.std(ddof=1) / rows**0.5)
    assert abs(z) < 4, z
    assert difference.std() > 0.5, "the draws must vary"


def test_first_tokens_follow_the_models_distribution(sampler) -> None:
    model, params, _ = sampler
    rows = 8192
    prompts = tuple(np.repeat(a[:1], rows, axis=0) for a in _prompts(1, seed=3))
    tokens, lengths, out = _draw(sampler, rows, seed=7, prompts=prompts)
    length = lengths[0]
    mask = np.tril(np.ones((1, length, length), bool))
    hidden = model.apply({"params": params}, tokens[:1, :length], np.arange(length)[None], mask)
    logits = np.asarray(hidden[0, -1] @ params["token_embedding"].T, np.float64)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    counts = np.bincount(np.asarray(out.tokens_RT[:, 0]), minlength=VOCAB)
    common = p * rows >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(p[common], p[~common].sum()) * rows
    kept = expected > 0
    assert stats.chisquare(observed[kept], expected[kept]).pvalue > 1e-4


def test_a_row_does_not_depend_on_the_rows_beside_it(sampler) -> None:
    tokens, lengths, out = _draw(sampler, 64)
    part = tuple(a[:64][::-1] for a in (tokens, lengths))
    model, params, sample = sampler
    again = sample(params, *part, row_draws(0, np.arange(64)[::-1]), np.ones(64, np.float32))
    np.testing.assert_array_equal(np.asarray(again.tokens_RT)[::-1], out.tokens_RT)


def test_temperature_sharpens_and_log_probabilities_stay_the_models(sampler) -> None:
    _, _, cold = _draw(sampler, 256, temperature=1e-3)
    _, _, warm = _draw(sampler, 256)
    assert np.asarray(cold.logp_RT)[:, 0].mean() > np.asarray(warm.logp_RT)[:, 0].mean() + 0.5
    again = _draw(sampler, 256, seed=99, temperature=1e-3)[2]
    np.testing.assert_array_equal(cold.tokens_RT[:, 0], again.tokens_RT[:, 0])  # all but greedy: the seed is no matter


@pytest.mark.parametrize("vocab", [2, 36, 37, 4096])
def test_draws_follow_any_distribution_and_never_take_the_impossible(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = np.where(rng.random(vocab) < 0.3, -np.inf, rng.normal(size=vocab) * 3).astype(np.float32)
    logits[rng.integers(vocab)] = 0.0
    logits[-1] = -np.inf
    n = 20_000
    # A grid of points hits each token in proportion to its share, to within one point for each border.
    uniform = ((np.arange(n) + 0.5) / n).astype(np.float32)
    tokens = np.asarray(jax.jit(draw_token)(np.broadcast_to(logits, (n, vocab)), uniform))
    p = np.exp(logits.astype(np.float64) - logits.max())
    p /= p.sum()
    counts = np.bincount(tokens, minlength=vocab)
    assert counts[p == 0].sum() == 0
    # Running sums in fp32 shift a border by up to 1e-6 of the whole: less than one point of the grid.
    np.testing.assert_allclose(counts, p * n, atol=2.5)


def test_the_largest_uniform_number_stays_in_the_vocabulary() -> None:
    logits = np.full((1, 5), -1e30, np.float32)
    logits[0, 3] = 0.0
    for u in (0.0, np.nextafter(np.float32(1), np.float32(0))):
        assert int(jax.jit(draw_token)(logits, np.array([u], np.float32))[0]) == 3


def test_a_temperature_of_0_takes_the_likeliest_token(sampler) -> None:
    model, params, _ = sampler
    tokens, lengths, greedy = _draw(sampler, 32, temperature=0.0)
    again = _draw(sampler, 32, seed=5, temperature=0.0)[2]
    np.testing.assert_array_equal(greedy.tokens_RT, again.tokens_RT)
    length = lengths[0]
    mask = np.tril(np.ones((1, length, length), bool))
    hidden = model.apply({"params": params}, tokens[:1, :length], np.arange(length)[None], mask)
    assert int(greedy.tokens_RT[0, 0]) == int(np.argmax(hidden[0, -1] @ params["token_embedding"].T))


@pytest.mark.parametrize("vocab", [2, 128, 300, 4096])
def test_the_likeliest_token_is_the_first_of_those_alike(vocab: int) -> None:
    few = np.random.default_rng(vocab).integers(-5, 5, (50, vocab)).astype(np.float32)
    few[0] = -np.inf
    np.testing.assert_array_equal(jax.jit(likeliest_token)(few), jnp.argmax(few, axis=1))


def test_only_the_likeliest_are_kept() -> None:
    p = np.array([[0.4, 0.3, 0.15, 0.1, 0.05], [0.05, 0.1, 0.15, 0.3, 0.4]])
    keep = jax.jit(keep_likeliest, static_argnums=(1, 2))
    kept = lambda *limits: np.isfinite(np.asarray(keep(np.log(p).astype(np.float32), *limits)))[0].tolist()  # noqa: E731
    assert kept(None, None) == [True] * 5
    assert kept(2, None) == [True, True, False, False, False]
    assert kept(99, 1.0) == [True] * 5
    assert kept(None, 0.39) == [True, False, False, False, False]
    assert kept(None, 0.5) == [True, True, False, False, False], "the token that crosses the mass stays"
    assert kept(None, 0.8) == [True, True, True, False, False]
    # Of the two likeliest, 4/7 and 3/7 remain, so that half of the mass is the first alone.
    assert kept(2, 0.5) == [True, False, False, False, False]
    both = np.isfinite(np.asarray(keep(np.log(p).astype(np.float32), 2, None)))
    np.testing.assert_array_equal(both[0], both[1][::-1])


def test_limits_and_several_ends_hold_while_sampling(sampler) -> None:
    model, params, _ = sampler
    ends = (EOS, 5, 9)
    sample = jax.jit(make_sampler(model, max_new_tokens=ROOM, eos=ends, top_k=3, top_p=0.9))
    tokens, lengths, out = _draw((model, params, sample), 128)
    assert len(np.unique(out.tokens_RT[:64, 0])) > 3, "prompts differ"
    same = tuple(np.repeat(a[:1], 256, axis=0) for a in (tokens, lengths))
    first = np.asarray(_draw((model, params, sample), 256, prompts=same)[2].tokens_RT)[:, 0]
    assert 2 <= len(np.unique(first)) <= 3
    for row, n, done in zip(*(np.asarray(a) for a in (out.tokens_RT, out.length_R, out.ended_R)), strict=True):
        assert (row[n - 1] in ends) == done
        assert not np.isin(row[: n - 1], ends).any()


@pytest.mark.parametrize("limits", [dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5)])
def test_impossible_limits_are_refused(limits) -> None:
    with pytest.raises(ValueError, match="expected at least 1, and more than 0 up to 1"):
        make_sampler(tiny_model(), max_new_tokens=1, eos=EOS, **limits)


@pytest.mark.parametrize("family", ["gpt2", "windows"])
@pytest.mark.parametrize("seats", [1, 3, 8])
def test_prompts_that_wait_for_a_seat_are_answered_as_they_are_alone(family: str, seats: int) -> None:
    """The room of an answer is short, so that what all seats write to is written anew many times."""
    model = tiny_model() if family == "gpt2" else windowed_model()
    params, (tokens, lengths) = tiny_params(model), _prompts(24)
    tokens[7], lengths[7] = tokens[5], lengths[5]
    samplers = (jax.jit(make_sampler(model, max_new_tokens=ROOM, eos=ENDS, seats=n)) for n in (None, seats))
    alone, some = (_draw((model, params, s), 24, 3, prompts=(tokens, lengths))[2] for s in samplers)
    assert len(np.unique(alone.length_R)) > 3 and 0 < np.mean(alone.ended_R) < 1, "answers must end at all times"
    for name in ("tokens_RT", "length_R", "ended_R"):
        np.testing.assert_array_equal(getattr(some, name), getattr(alone, name))
    # Sums over slots in another order: fp32 rounding of scores of up to ten nats.
    np.testing.assert_allclose(some.logp_RT, alone.logp_RT, atol=1e-5)
    answers = [make_answer(np.asarray(row[:n])) for row, n in zip(some.tokens_RT, some.length_R, strict=True)]
    examples = [Example(i, tokens[i, : lengths[i]], (answer,)) for i, answer in enumerate(answers)]
    scores = jit_score(model, params, concatenated(examples, Shape(1, 5, ROOM)), (1, 1), 16).sum[:, 0, 0]
    # Two programs over the same weights: fp32 rounding of sums of up to seven terms of up to 10 nats.
    np.testing.assert_allclose(np.asarray(some.logp_RT).sum(1), scores, atol=1e-4)


def test_a_prompt_without_tokens_is_not_answered() -> None:
    model = tiny_model()
    tokens, lengths = _prompts(12)
    absent = np.arange(12) % 3 == 0
    sample = jax.jit(make_sampler(model, max_new_tokens=ROOM, eos=ENDS, seats=4))
    whole, out = (
        _draw((model, tiny_params(model), sample), 12, prompts=(tokens, n))[2]
        for n in (lengths, np.where(absent, 0, lengths).astype(np.int32))
    )
    for found, expected in zip(*map(jax.tree.leaves, (out, whole)), strict=True):
        assert not np.any(found[absent])
        np.testing.assert_allclose(found[~absent], expected[~absent], atol=1e-5)


def test_seats_are_hardly_ever_empty(monkeypatch) -> None:
    """64 prompts in 8 seats: as many steps as there are tokens for every seat, but for those that wait to be a quarter
    of the seats, and for the last answers, the last two of which have two seats. One batch after the other takes as
    many as the longest of each."""
    reads, read = [], sampling._Sampling._read

    def counted(self, token, seats, context):
        jax.debug.callback(lambda token: reads.append(len(token)), token)
        return read(self, token, seats, context)

    monkeypatch.setattr(sampling._Sampling, "_read", counted)
    model, room, seats = tiny_model(), 24, 8
    sample = jax.jit(make_sampler(model, max_new_tokens=room, eos=ENDS, seats=seats))
    out = _draw((model, tiny_params(model), sample), 64)[2]
    lengths = np.asarray(out.length_R)
    jax.effects_barrier()
    in_batches = lengths.reshape(-1, seats).max(axis=1).sum()
    assert lengths.sum() / seats <= len(reads) <= lengths.sum() / seats / 0.75 + room < in_batches
    assert set(reads) == {seats, seats // 4} and lengths.sum() <= sum(reads)


def test_angles_are_computed_once_for_all_layers() -> None:
    """Left to itself, XLA puts their cosines into the product of each layer's scores, once for each block of keys."""

    def cosines(layers: int) -> int:
        sizes = {"width": 16, "layers": layers, "heads": 2, "mlp_width": 24, "context_length": 32, "vocab_size": VOCAB}
        model, (tokens, lengths) = make_model("llama", sizes), _prompts(8)
        arguments = tokens, lengths, row_draws(0, np.arange(8)), np.ones(8, np.float32)
        sample = make_sampler(model, max_new_tokens=ROOM, eos=EOS, seats=4)
        return jax.jit(sample).lower(tiny_params(model), *arguments).compile().as_text().count(" cosine(")

    assert cosines(layers=4) == cosines(layers=2) > 0
