"""Every loss at a point that can be worked out by hand.

The pair: c = 3 and r = −2 nats (Δ = 5), |w| = 4 and |l| = 2 tokens, logp_w = −7, ref_w = −10, logp_l = −8, ref_l = −6.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.losses import LOSSES
from dpo_jax.losses.divergences import DIVERGENCES
from dpo_jax.losses.kto import weight_warning
from tests.losses.examples import evaluate, make_answers

C, R = 3.0, -2.0


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_odds(x: float) -> float:
    return x - math.log(1 - math.exp(x))


# name, hyper-parameters, value by hand
CASES = [
    ("dpo", {}, -log_sigmoid(0.5)),
    ("dpo", {"beta": 0.2, "label_smoothing": 0.25}, -0.75 * log_sigmoid(1.0) - 0.25 * log_sigmoid(-1.0)),
    ("ipo", {"beta": 0.25}, (5 - 2) ** 2),
    ("hinge", {}, 0.5),
    ("hinge", {"beta": 0.3}, 0.0),
    ("robust", {"label_smoothing": 0.2}, (-0.8 * log_sigmoid(0.5) + 0.2 * log_sigmoid(-0.5)) / 0.6),
    (
        "exo_pair",
        {"label_smoothing": 0.1},
        sigmoid(0.5) * (log_sigmoid(0.5) - math.log(0.9)) + sigmoid(-0.5) * (log_sigmoid(-0.5) - math.log(0.1)),
    ),
    ("nca_pair", {}, -log_sigmoid(0.3) - 0.5 * log_sigmoid(-0.3) - 0.5 * log_sigmoid(0.2)),
    # δ = (0.3 − 0.2) / 2 = 0.05
    ("bco_pair", {}, -log_sigmoid(0.25) - log_sigmoid(0.25)),
    ("sppo_hard", {"beta": 0.5}, (3 - 1) ** 2 + (-2 + 1) ** 2),
    ("aot", {}, -log_sigmoid(0.5)),
    ("aot_unpaired", {"label_smoothing": 0.25}, -0.75 * log_sigmoid(0.5) - 0.25 * log_sigmoid(-0.5)),
    ("apo_zero", {}, 1 - sigmoid(0.3) + sigmoid(-0.2)),
    ("apo_down", {}, sigmoid(0.3) + 1 - sigmoid(0.5)),
    ("discopop", {"temperature": 0.5}, -(1 - sigmoid(1.0)) * log_sigmoid(0.5) + sigmoid(1.0) * math.exp(-0.5)),
    ("sigmoid_norm", {"beta": 0.4}, -log_sigmoid(2.0)),  # the reduction is the objective's work
    ("r_dpo", {"length_penalty": 0.1}, -log_sigmoid(0.5 + 0.1 * 2)),
    ("odpo", {"offset_scale": 0.5}, -log_sigmoid(0.5 - 0.5 * math.log(3.0))),
    ("dpop", {}, -log_sigmoid(0.5)),  # the chosen answer has risen: no penalty
    ("beta_dpo", {}, -log_sigmoid(0.1 * (1 + 0.6 * (5 - 0.5)) * 5)),  # M_b = 5, M₀ = 0.9·0 + 0.1·5
    ("simpo", {"beta": 2.0, "gamma": 0.5}, -log_sigmoid(2 * (-7 + 8) - 0.5)),
    ("cpo", {"nll_weight": 0.5}, -log_sigmoid(0.1) + 0.5 * 7 / 4),
    ("orpo", {"beta": 0.2}, (7 + 5) / 7 - 0.2 * log_sigmoid(log_odds(-7) - log_odds(-8))),
    ("unlikelihood", {}, 7 - 8),
    ("unlikelihood", {"unlikelihood_weight": 0.25}, 7 - 2),
    ("sft", {}, 7 / 4),
]


@pytest.fixture
def pair():
    chosen = make_answers([-7.0], -10.0, count=4.0, score=5.0, prompt_sum=-5.0)
    return chosen, make_answers([-8.0], -6.0, count=2.0, score=2.0)


@pytest.mark.parametrize(("name", "hyper", "expected"), CASES, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(CASES)])
def test_pairwise_value(pair, name, hyper, expected):
    values_B = evaluate(name, *pair, **hyper)
    assert values_B.shape == (1,)
    np.testing.assert_allclose(values_B[0], expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "hyper", "desirable", "undesirable"),
    [
        ("kto", {"reference_point": 1.0}, 1 - sigmoid(0.2), 1 - sigmoid(0.3)),
        ("kto", {"desirable_weight": 1.5, "undesirable_weight": 2.0}, 1.5 * sigmoid(-0.3), 2 * sigmoid(-0.2)),
        ("kto", {"reference_point": -4.0}, 1 - sigmoid(0.3), 1 - sigmoid(0.2)),  # z is not negative
        ("apo_zero_unpaired", {}, 1 - sigmoid(0.3), sigmoid(-0.2)),
        ("apo_zero_unpaired", {"desirable_weight": 2.0}, 2 - 2 * sigmoid(0.3), sigmoid(-0.2)),
        ("bco_unpaired", {}, -log_sigmoid(0.25), -log_sigmoid(0.25)),  # δ = 0.05
    ],
)
def test_unpaired_value(pair, name, hyper, desirable, undesirable):
    np.testing.assert_allclose(evaluate(name, *pair, **hyper), [desirable, undesirable], rtol=2e-6)


def test_every_loss_has_a_value_by_hand():
    assert {name for name, *_ in CASES} | {"kto", "apo_zero_unpaired", "bco_unpaired"} == set(LOSSES)


def test_dpop_pays_for_a_chosen_answer_that_fell():
    chosen, rejected = make_answers([-12.0], -10.0), make_answers([-9.0], -6.0)
    value = evaluate("dpop", chosen, rejected, penalty=0.5)[0]
    np.testing.assert_allclose(value, -log_sigmoid(0.1 * (-2 + 3) - 0.5 * 2), rtol=1e-6)


@pytest.mark.parametrize("scores", [(2.0, 2.0), (0.0, 0.0), (1.0, 4.0)])
def test_odpo_without_an_order_of_scores_is_dpo(scores):
    chosen, rejected = make_answers([-7.0], -10.0, score=scores[0]), make_answers([-8.0], -6.0, score=scores[1])
    np.testing.assert_array_equal(evaluate("odpo", chosen, rejected), evaluate("dpo", chosen, rejected))


def test_aot_matches_ranks():
    policy, reference = [5.0, 1.0, 3.0], [2.0, 0.0, -4.0]
    chosen, rejected = make_answers(policy, reference), make_answers([0.0] * 3)
    # sorted: 1, 3, 5 against −4, 0, 2; the values stand where the policy's margins do
    expected = [-log_sigmoid(0.1 * d) for d in (3.0, 5.0, 3.0)]
    np.testing.assert_allclose(evaluate("aot", chosen, rejected), expected, rtol=1e-6)


def test_aot_unpaired_matches_ranks():
    chosen, rejected = make_answers([5.0, 1.0, 3.0]), make_answers([0.0, 2.0, -4.0])
    expected = [-log_sigmoid(0.1 * d) for d in (3.0, 5.0, 3.0)]
    np.testing.assert_allclose(evaluate("aot_unpaired", chosen, rejected), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("reverse_kl", (3.0, -2.0)),
        ("forward_kl", (1 - math.exp(-3), 1 - math.exp(2))),
        ("jensen_shannon", (math.log(2) + log_sigmoid(3), math.log(2) + log_sigmoid(-2))),
        ("alpha", ((math.exp(-0.7 * 3) - 1) / -0.7, (math.exp(0.7 * 2) - 1) / -0.7)),
    ],
)
def test_divergence_score(name, expected):
    np.testing.assert_allclose(DIVERGENCES[name](jnp.array([C, R]), 0.3), expected, rtol=1e-6)
    assert DIVERGENCES[name](jnp.zeros(1), 0.3)[0] == pytest.approx(0.0, abs=1e-7)


def test_alpha_divergence_has_its_limits():
    x = jnp.array([-3.0, 0.5, 2.0])
    np.testing.assert_array_equal(DIVERGENCES["alpha"](x, 1.0), x)
    np.testing.assert_allclose(DIVERGENCES["alpha"](x, 0.0), DIVERGENCES["forward_kl"](x, 0.0), rtol=1e-6)
    np.testing.assert_allclose(DIVERGENCES["alpha"](x, 1.001), x, rtol=2e-3)


@pytest.mark.parametrize(
    ("counts", "weights", "warns"),
    [
        ((100, 100), (1.0, 1.0), False),
        ((100, 100), (4 / 3, 1.0), False),
        ((100, 100), (1.4, 1.0), True),
        ((50, 100), (1.0, 1.0), True),
        ((50, 100), (2.0, 1.0), False),
        ((0, 100), (1.0, 1.0), True),
    ],
)
def test_kto_warns_of_unbalanced_weights(counts, weights, warns):
    text = weight_warning(*counts, desirable_weight=weights[0], undesirable_weight=weights[1])
    assert (text is not None) == warns


def test_the_warning_names_a_weight_that_would_do():
    text = weight_warning(50, 100)
    assert "between 2 and 2.67" in text
    assert weight_warning(50, 100, desirable_weight=2.5) is None
