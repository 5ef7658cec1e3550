"""RLHF as a baseline: the estimator is exact, the reward model is Bradley and Terry's, and a run continues."""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import grid
from dpo_jax.config import from_config_dict
from dpo_jax.data.example import Answer
from dpo_jax.opened import OpenedRun
from dpo_jax.shared import Shared
from dpo_jax.types import CHOSEN
from experiments.betas import results
from experiments.betas import run as betas
from experiments.rlhf import judges, reward_model, rloo
from tests import tiny_run

CHANGES = {"train.steps": 4, "eval.every": 2, "checkpoint.every": 2, "train.micro_batches": 1, "eval.prompts": 6}


def test_advantages_by_hand():
    # 1 − (2 + 6)/2, 2 − (1 + 6)/2, 6 − (1 + 2)/2
    np.testing.assert_allclose(rloo.advantages(jnp.array([[1.0, 2.0, 6.0]])), [[-3.0, -1.5, 4.5]])


def test_the_expected_gradient_is_that_of_the_objective():
    """Over all 3² draws of two answers, weighted by their probability: −∇(E r − β·KL), whatever the baseline."""
    logits, reference = jnp.array([0.3, -0.8, 1.1]), jnp.array([0.2, -0.5, 0.1])
    reward, beta = jnp.array([1.0, -2.0, 0.5]), 0.7

    def objective(logits: jax.Array) -> jax.Array:
        p, ratio = jax.nn.softmax(logits), jax.nn.log_softmax(logits) - jax.nn.log_softmax(reference)
        return jnp.sum(p * (reward - beta * ratio))

    def estimate(logits: jax.Array, draw: jax.Array) -> jax.Array:
        logp, ref = jax.nn.log_softmax(logits)[draw][None], jax.nn.log_softmax(reference)[draw][None]
        return rloo.loss(logp, ref, reward[draw][None], beta)

    draws = jnp.array(list(itertools.product(range(3), repeat=2)))
    weight = jnp.prod(jax.nn.softmax(logits)[draws], axis=1)
    gradients = jax.vmap(jax.grad(estimate), (None, 0))(logits, draws)
    np.testing.assert_allclose(weight @ gradients, -jax.grad(objective)(logits), atol=1e-6)  # rounding of fp32


def test_bradley_terry_by_hand():
    loss, right = reward_model.bradley_terry(jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0]))
    assert float(loss) == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(2))) / 2, rel=1e-6)
    assert float(right) == 0.5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rlhf")
    tiny_run.write_data(folder)
    return folder


@pytest.fixture(scope="module")
def shared() -> Shared:
    return Shared()


def test_the_reward_model_learns_the_pairs_and_sees_no_padding(data: Path, shared: Shared, tmp_path: Path):
    config = tiny_run.make_config(data, **CHANGES | {"optim.learning_rate": 3e-2})
    run = OpenedRun(config, tmp_path, shared)
    params, numbers = reward_model.fit(run, tmp_path)
    # High tokens are chosen, low ones rejected: held-out pairs are easily told apart.
    assert numbers["eval/accuracy"] > 0.8 and numbers["steps"] == tiny_run.EXAMPLES // tiny_run.BATCH
    assert reward_model.fit(run, tmp_path)[1] == numbers  # read again, not fitted again
    example = run.data.held_out[0]
    rows = reward_model.rows_of([(example.prompt, example.answers[0])], 11)
    wider = reward_model.Rows(np.pad(rows.tokens_RL, ((0, 0), (0, 1)), constant_values=9), rows.length_R)
    one, other = (reward_model.rewards(run.parts.model, params, r) for r in (rows, wider))
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_a_run_goes_on_where_it_was_stopped(data: Path, shared: Shared, tmp_path: Path):
    config = from_config_dict(tiny_run.config_dict(data, **CHANGES))
    settings = rloo.Settings("truth", 0.1, 4, 2)

    def train(folder: Path, last: int | None) -> None:
        calls = itertools.count(1)

        def judge(prompts: list[np.ndarray], answers: list[Answer]) -> np.ndarray:
            if next(calls) == last:
                raise KeyboardInterrupt
            return np.array([a.tokens.mean() / 100 for a in answers])

        rloo.Rloo(config, folder, settings, judge, shared).train()

    train(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", 4)  # after the third step; the second is saved
    train(tmp_path / "parts", None)
    names = ("metrics.jsonl", "samples/step_000004.jsonl")
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    other = rloo.Settings("truth", 0.2, 4, 2)
    with pytest.raises(ValueError, match="beta"):
        rloo.Rloo(config, tmp_path / "parts", other, lambda p, a: np.zeros(len(a)), shared).train()


def test_rlhf_and_preference_losses_end_in_one_report(data: Path, shared: Shared, tmp_path: Path):
    base = tiny_run.config_dict(data, **CHANGES)
    axes = {"method": {"dpo-0.1": {"loss.beta": 0.1}}, "seed": [0]}
    rlhf_axes = {"method": {name: {} for name in ("rloo-learned", "rloo-truth")}, "seed": [0]}
    page = betas.run(base, axes, rlhf_axes, tmp_path, most=4, shared=shared)
    assert all(method in page.read_text(encoding="utf-8") for method in ("dpo-0.1", "rloo-learned", "rloo-truth"))
    summary = json.loads((tmp_path / "runs" / "method=rloo-truth" / "summary.json").read_text())
    assert summary["cost/steps"] == 4 and summary["cost/sampled_tokens"] > 0
    (best,) = json.loads((tmp_path / betas.BEST_FILE).read_text())
    truth = [row["truth"] for row in best["rows"]]
    assert [row["n"] for row in best["rows"]] == [1, 2, 4] and truth == sorted(truth)
    assert best["rows"][0]["truth"] == best["rows"][0]["learned"]  # one answer: nothing is chosen
    _, points = grid.read(tmp_path)
    assert len(points) == 3
    results.write(tmp_path, tmp_path / "results")
    costs = {row["method"]: row for row in csv.DictReader((tmp_path / "results" / "cost.csv").open(encoding="utf-8"))}
    assert costs["dpo-0.1"]["sampled_tokens"] == "0" and int(costs["rloo-truth"]["sampled_tokens"]) > 0
    assert float(costs["rloo-truth"]["teraflop"]) >= 0 and (tmp_path / "results" / "frontier.png").is_file()


def test_the_truth_is_scaled_on_training_answers(data: Path, shared: Shared, tmp_path: Path):
    run = OpenedRun(tiny_run.make_config(data, **CHANGES), tmp_path, shared)
    examples = [run.data.train[i] for i in range(tiny_run.EXAMPLES)]
    pairs = [(e.prompt, answer) for e in examples for answer in e.answers]
    found = judges.truth(run)(*zip(*pairs, strict=True))
    np.testing.assert_allclose([found.mean(), found.std()], [0, 1], atol=1e-6)
    assert {answer.role for _, answer in pairs} > {CHOSEN}
