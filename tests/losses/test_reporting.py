"""Metrics by hand, and a glossary for each."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.losses import LOSSES
from dpo_jax.losses.objective import Scored, make_objective
from dpo_jax.losses.reporting import GLOSSARY
from dpo_jax.metrics import Correlation, Ratio, Sum, compute
from dpo_jax.types import CHOSEN, REJECTED, UNUSED, SequenceLogps
from tests.losses.examples import make_scored, prepare

REFERENCE_ONLY = {"log_ratio/mean", "displacement"}


def _scores(sums, counts, entropies=None) -> SequenceLogps:
    sums, counts = (jnp.asarray(a, jnp.float32)[..., None] for a in (sums, counts))
    entropy = counts * 0 if entropies is None else jnp.asarray(entropies, jnp.float32)[..., None]
    return SequenceLogps(sums, sums * 0, counts, entropy, sums * 0)


@pytest.fixture
def batch() -> Scored:
    """Three pairs and one unused row; log-ratios (chosen, rejected): (2, −2), (−1, 3), (1, 1)."""
    counts = [[4, 2], [1, 5], [3, 3], [0, 0]]
    policy = _scores([[-6, -8], [-5, -9], [-7, -4], [0, 0]], counts, [[4, 1], [2, 5], [3, 3], [0, 0]])
    reference = _scores([[-8, -6], [-4, -12], [-8, -5], [0, 0]], counts)
    role = jnp.asarray([[CHOSEN, REJECTED]] * 3 + [[UNUSED, UNUSED]], jnp.int32)[..., None]
    return Scored(policy, reference, role, jnp.zeros((4, 2, 1)))


def test_metrics_by_hand(batch):
    metrics = _metrics("dpo", batch, beta=0.5)
    expected = {
        "loss": np.mean(np.logaddexp(0, -0.5 * np.array([4.0, -4.0, 0.0]))),
        "rewards/chosen": 0.5 * (2 - 1 + 1) / 3,
        "rewards/rejected": 0.5 * (-2 + 3 + 1) / 3,
        "rewards/margins": 0.0,
        "rewards/accuracies": 1 / 3,  # the tie of the third pair is wrong
        "logps/chosen": -6.0,
        "logps/rejected": -7.0,
        "logps/chosen_per_token": -18 / 8,
        "logps/rejected_per_token": -21 / 10,
        "lengths/chosen": 8 / 3,
        "lengths/rejected": 10 / 3,
        "entropy": 18 / 18,
        "margin_length_correlation": np.corrcoef([4, -4, 0], [2, -4, 0])[0, 1],
        "log_ratio/mean": 4 / 6,
        "displacement": 1 / 3,
    }
    assert metrics == pytest.approx(expected, abs=1e-6)


def test_rewards_are_of_sums_whatever_the_reduction(batch):
    for name in ("sigmoid_norm", "ipo", "dpo"):
        reduction = "mean" if name == "ipo" else None
        metrics = _metrics(name, batch, reduction=reduction, beta=0.5)
        assert metrics["rewards/chosen"] == pytest.approx(0.5 * 2 / 3)


def test_rewards_without_a_reference_are_of_reduced_log_probabilities(batch):
    metrics = _metrics("simpo", batch, beta=2.0)
    assert metrics["rewards/chosen"] == pytest.approx(2 * (-6 / 4 - 5 / 1 - 7 / 3) / 3)
    assert not REFERENCE_ONLY & set(metrics)
    assert _metrics("cpo", batch, beta=2.0)["rewards/chosen"] == pytest.approx(2 * -6)


def test_rewards_of_a_sum_take_the_first_beta(batch):
    assert _metrics("sft + dpo", batch, beta=0.5)["rewards/chosen"] == pytest.approx(0.5 * 2 / 3)


def test_terms_are_reported_when_there_are_several(batch):
    metrics = _metrics("dpo + 0.5*sft", batch)
    assert metrics["loss"] == pytest.approx(metrics["loss/dpo"] + 0.5 * metrics["loss/sft"], rel=1e-6)
    assert metrics["loss/sft"] == pytest.approx(18 / 8)
    assert "loss/dpo" not in _metrics("dpo", batch)


def test_statistics_are_reported(batch):
    assert _metrics("kto", batch)["kto/reference_point"] == pytest.approx(0.3)
    assert _metrics("bco_pair", batch, beta=0.5)["bco_pair/shift"] == pytest.approx(0.5 * 4 / 6)
    assert _metrics("beta_dpo", batch)["beta_dpo/batch_beta"] == pytest.approx(0.1)  # the mean margin is 0
    assert not [name for name in _metrics("aot", batch) if name.startswith("aot/")]  # a permutation is no metric


def test_unpaired_data_has_no_pairwise_metrics(batch):
    """Six answers on their own: three desirable, three not."""
    flat = Scored(
        *(
            SequenceLogps(*(a.reshape(-1, 1, 1) for a in (s.sum, s.tail, s.count, s.entropy, s.overlap)))
            for s in (batch.policy, batch.reference)
        ),
        batch.role.reshape(-1, 1, 1),
        batch.score.reshape(-1, 1, 1),
    )
    paired, single = _metrics("kto", batch), _metrics("kto", flat)
    gone = {"rewards/margins", "rewards/accuracies", "margin_length_correlation"}
    assert set(paired) - set(single) == gone
    assert single == pytest.approx({k: v for k, v in paired.items() if k not in gone})


def test_an_empty_shard_reports_nothing(batch):
    empty = batch.replace(role=jnp.zeros_like(batch.role))
    objective, hyper = make_objective("dpo")
    totals, numbers = prepare(objective, hyper, batch)
    for metric in objective.metrics(hyper, empty, totals, numbers).values():
        for part in metric.means if isinstance(metric, Sum) else (metric,):
            assert isinstance(part, (Ratio, Correlation))
            assert float(part.denominator if isinstance(part, Ratio) else part.n) == 0


@pytest.mark.parametrize("name", [*LOSSES, "dpo + 0.5*sft"])
@pytest.mark.parametrize("answers", [1, 2])
def test_every_metric_is_in_the_glossary(name, answers):
    objective, hyper = make_objective(name)
    if objective.needs_pairs and answers == 1:
        answers = 2
    scored = make_scored(np.random.default_rng(1), 3, answers=answers)
    totals, numbers = prepare(objective, hyper, scored)
    patterns = [re.compile(re.sub("<[a-z]+>", "[a-z_]+", known)) for known in GLOSSARY]
    for metric in objective.metrics(hyper, scored, totals, numbers):
        assert any(pattern.fullmatch(metric) for pattern in patterns), metric


def _metrics(name, batch, *, reduction=None, **given):
    objective, hyper = make_objective(name, given, reduction=reduction)
    totals, numbers = prepare(objective, hyper, batch, mismatched=(0.3,))
    return compute(objective.metrics(hyper, batch, totals, numbers))
