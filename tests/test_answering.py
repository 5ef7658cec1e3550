"""Any number of prompts, on any devices, is answered like each of them alone."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dpo_jax.answering import Answerer
from dpo_jax.models import logical_axes
from dpo_jax.parallel import DataParallel, MeshParallel
from dpo_jax.sampling import make_sampler, row_draws
from dpo_jax.sharding import AXES
from dpo_jax.state import ALONE
from tests.tiny import VOCAB, tiny_model, tiny_params

LONGEST, ROOM = 5, 7


def _prompts(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, VOCAB, rng.integers(1, LONGEST + 1)).astype(np.int32) for _ in range(count)]


def _parallel(kind: str) -> DataParallel | MeshParallel:
    if kind == "mesh":
        return MeshParallel(jax.devices()[:4], dict(zip(AXES, (2, 2, 1), strict=True)), logical_axes(tiny_model()))
    return DataParallel(jax.devices()[: int(kind)])


def _answers(kind: str, count: int, rows: int):
    parallel, model = _parallel(kind), tiny_model()
    ends = range(0, VOCAB, 5)
    answer = Answerer(model, parallel, prompt_length=LONGEST, rows=rows, max_new_tokens=ROOM, eos=tuple(ends))
    params = parallel.replicate(tiny_params(model))
    return answer, answer(params, _prompts(count), row_draws(1, np.arange(count)), 1.0).result(), parallel


@pytest.mark.parametrize(("kind", "rows"), [("1", 1), ("1", 5), ("1", 37), ("2", 3), ("mesh", 4), ("mesh", 10)])
def test_answers_do_not_depend_on_devices_nor_on_how_many_are_given_at_a_time(kind: str, rows: int) -> None:
    """37 prompts: eight rounds of one or two rows are several calls, of which the last is filled up."""
    _, expected, _ = _answers("1", 37, 64)
    answer, found, parallel = _answers(kind, 37, rows)
    assert answer.rows % parallel.parts == 0 and answer.rows - rows < parallel.parts
    assert parallel.traces["sample"] == 1
    assert 0 < expected.ended_R.mean() < 1
    for name in ("tokens_RT", "length_R", "ended_R"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    # Sums over slots in another order: fp32 rounding of scores of up to ten nats.
    np.testing.assert_allclose(found.logp_RT, expected.logp_RT, atol=1e-5)


@pytest.mark.parametrize("length", [0, LONGEST + 1])
def test_prompts_that_are_empty_or_too_long_are_refused(length: int) -> None:
    parallel = DataParallel(jax.devices()[:1])
    answer = Answerer(tiny_model(), parallel, prompt_length=LONGEST, rows=2, max_new_tokens=ROOM, eos=2)
    with pytest.raises(ValueError, match=f"a prompt has {length} tokens; .*at most data.prompt_length, {LONGEST}"):
        answer({}, [np.zeros(length, np.int32)], row_draws(0, np.arange(1)), 1.0)


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_prompts_of_tokens_that_the_model_does_not_know_are_refused(token: int) -> None:
    parallel = DataParallel(jax.devices()[:1])
    answer = Answerer(tiny_model(), parallel, prompt_length=LONGEST, rows=2, max_new_tokens=ROOM, eos=2)
    with pytest.raises(ValueError, match=f"the model has rows for those below {VOCAB}"):
        answer({}, [np.array([3, token, 4], np.int32)], row_draws(0, np.arange(1)), 1.0)


def test_no_prompt_at_all_is_refused() -> None:
    parallel = DataParallel(jax.devices()[:1])
    answer = Answerer(tiny_model(), parallel, prompt_length=LONGEST, rows=2, max_new_tokens=ROOM, eos=2)
    with pytest.raises(ValueError, match="there is no prompt to answer"):
        answer({}, [], row_draws(0, np.arange(0)), 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "rows is 0 and max_new_tokens 7; expected at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens 0; expected at least 1"),
    ],
)
def test_limits_that_cannot_be_are_refused(changes, message: str) -> None:
    limits = {"rows": 2, "max_new_tokens": ROOM, **changes}
    with pytest.raises(ValueError, match=message):
        Answerer(tiny_model(), DataParallel(jax.devices()[:1]), prompt_length=LONGEST, eos=2, **limits)


def test_more_tokens_than_the_model_has_positions_are_refused() -> None:
    parallel = DataParallel(jax.devices()[:1])
    answer = Answerer(tiny_model(), parallel, prompt_length=LONGEST, rows=2, max_new_tokens=28, eos=2)
    with pytest.raises(ValueError, match="up to 5 tokens and max_new_tokens 28 do not fit into the model's 32 posi"):
        answer({}, _prompts(1), row_draws(0, np.arange(1)), 1.0)


@pytest.mark.parametrize("count", [3, 17, 31])
def test_prompts_are_dealt_out_to_the_devices(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, found, parallel = _answers("2", count, 4)
    given = []
    sample = answer._sample
    monkeypatch.setattr(answer, "_sample", lambda params, *rows: given.append(rows[1]) or sample(params, *rows))
    params = parallel.replicate(tiny_params(tiny_model()))
    again = answer(params, _prompts(count), row_draws(1, np.arange(count)), 1.0).result()
    for length_R in given:
        of_each = (length_R.reshape(2, -1) > 0).sum(axis=1)
        assert of_each.sum() > 0 and abs(of_each[0] - of_each[1]) <= 1
    np.testing.assert_array_equal(again.tokens_RT, found.tokens_RT)


def test_each_process_has_seats_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under pmap each of two processes answers all prompts, on the two devices of four that are its own."""
    made = {}
    monkeypatch.setattr("dpo_jax.answering.make_sampler", lambda model, **settings: made.update(settings))
    pod = SimpleNamespace(parts=4, row_parts=2, axis=ALONE, row_function=lambda fn, name: fn)
    answer = Answerer(tiny_model(), pod, prompt_length=LONGEST, rows=15, max_new_tokens=ROOM, eos=2)
    assert (answer.rows, made["seats"]) == (16, 8)


def test_the_cache_is_split_over_the_devices_of_a_mesh() -> None:
    model, parallel = tiny_model(), _parallel("mesh")
    sample = make_sampler(model, max_new_tokens=11, eos=2, seats=12, lanes=4)  # 16 slots
    rows = np.ones((24, LONGEST), np.int32), np.ones(24, np.int32), row_draws(0, np.arange(24)), np.ones(24, np.float32)
    with jax.set_mesh(parallel.mesh):
        text = jax.jit(sample).lower(parallel.replicate(tiny_params(model)), *rows).compile().as_text()
    assert "f32[3,2,8,16]" in text and "f32[12,2,8,16]" not in text
