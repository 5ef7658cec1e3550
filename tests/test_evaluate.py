"""Evaluators: averages do not depend on the batch size, samples are scored and written as they are."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from dpo_jax.data.layouts import Shape
from dpo_jax.data.pipeline import Pipeline
from dpo_jax.evaluate import Completer, HeldOutLoss, SampledAnswers, repetition, standard_error
from dpo_jax.gradients import make_eval_step
from dpo_jax.losses.objective import make_objective
from dpo_jax.parallel import DataParallel
from tests.tiny import Bigram, random_examples, setup, tiny_model, tiny_params

SHAPE = Shape(answers=2, prompt_length=3, answer_length=5)


def held_out(batch_size: int, devices: int) -> dict[str, float]:
    s = setup("dpo", devices=devices)
    step = make_eval_step(Bigram(), make_objective("dpo")[0], 2, 16, s.parallel.axis)
    pipeline = Pipeline(random_examples(10, SHAPE), SHAPE, layout="concatenated", batch_size=batch_size, seed=0)
    evaluator = HeldOutLoss(pipeline, s.parallel.eval_step(step), s.parallel)
    found = evaluator(s.state, s.hyper, 0).result()
    assert s.parallel.traces == {"eval_step": 1}
    return found


def test_averages_do_not_depend_on_batches_or_devices() -> None:
    """10 examples in batches of 10, 4 (the last one padded) and 16 (padded) on one and two devices."""
    expected = held_out(10, 1)
    assert expected["lengths/chosen"] == np.mean([len(e.answers[0].tokens) for e in random_examples(10, SHAPE)])
    for batch_size, devices in ((4, 1), (16, 2)):
        got = held_out(batch_size, devices)
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)  # fp32 sums in another order


class Words:
    """A tokenizer whose tokens are their numbers."""

    eos_token_id = 2

    def decode(self, tokens, skip_special_tokens):
        return " ".join(map(str, tokens))


def completer(rows: int = 4) -> tuple[Completer, DataParallel]:
    parallel = DataParallel(jax.devices()[:1])
    return (
        Completer(tiny_model(), Words(), parallel, prompt_length=3, answer_length=6, rows=rows, head_chunk=16),
        parallel,
    )


PROMPTS = [np.array(p, np.int32) for p in ([5], [6, 7], [8, 9, 10], [11], [12, 13])]


def test_samples_are_reported_as_they_are(tmp_path) -> None:
    answerer, parallel = completer()
    policy, reference = (parallel.replicate(tiny_params(tiny_model(), seed)) for seed in (0, 1))
    judge = lambda texts: np.array([len(text) for text in texts], float)  # noqa: E731
    sides = lambda state: (state.params, reference)  # noqa: E731
    evaluator = SampledAnswers(answerer, PROMPTS, sides, judge, tmp_path / "samples", seed=3, temperature=1.0)
    state = type("State", (), {"params": policy})
    numbers = evaluator(state, None, 7).result()
    rows = [json.loads(line) for line in (tmp_path / "samples" / "step_000007.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [answerer.text(p) for p in PROMPTS]
    assert numbers["length"] == np.mean([row["tokens"] for row in rows])
    assert numbers["kl"] == pytest.approx(np.mean([row["log_ratio"] for row in rows]), abs=1e-4)  # rows are rounded
    assert numbers["reward"] == pytest.approx(np.mean([row["reward"] for row in rows]))
    ended = [row["answer"].split()[-1] == "2" for row in rows]
    assert numbers["eos_share"] == np.mean(ended)
    assert evaluator(state, None, 8).result() == numbers, "every evaluation draws with the same random numbers"


def test_a_policy_that_is_its_reference_has_no_kl(tmp_path) -> None:
    answerer, parallel = completer()
    params = parallel.replicate(tiny_params(tiny_model()))
    evaluator = SampledAnswers(answerer, PROMPTS, lambda _: (params, params), None, tmp_path, seed=0, temperature=1.0)
    numbers = evaluator(None, None, 0).result()
    # The sampler's sums against the scorer's: fp32 rounding of sums of up to six terms of up to 10 nats.
    assert abs(numbers["kl"]) < 1e-5 and numbers["kl_se"] < 1e-5
    assert "reward" not in numbers


def test_the_draws_do_not_depend_on_how_many_are_drawn_at_a_time() -> None:
    drawn = []
    for rows in (5, 2):
        answerer, parallel = completer(rows)
        params = parallel.replicate(tiny_params(tiny_model()))
        answers, _ = answerer.sample(params, PROMPTS, seed=1, temperature=1.0).result()
        drawn.append([a.tokens.tolist() for a in answers])
    assert drawn[0] == drawn[1]


def test_small_statistics() -> None:
    assert repetition(np.array([5, 6, 7, 5, 6, 7])) == 0.25
    assert repetition(np.array([5, 6])) == 0.0
    assert standard_error(np.array([1.0, 3.0])) == pytest.approx(1.0)  # s = √2, n = 2
    assert np.isnan(standard_error(np.array([1.0])))
