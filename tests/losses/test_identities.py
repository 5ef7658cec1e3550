"""What must hold whatever the numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax.losses import LOSSES
from dpo_jax.losses.divergences import DIVERGENCES
from tests.losses.examples import evaluate, make_answers

LOG2 = float(np.log(2.0))
TAU = 0.25

# Value per pair (per answer, for those that see answers of either kind) where policy and reference agree.
AT_REFERENCE = {
    "dpo": ({}, LOG2),
    "ipo": ({"beta": TAU}, 1 / (4 * TAU**2)),
    "hinge": ({}, 1.0),
    "robust": ({}, LOG2),
    "exo_pair": ({"label_smoothing": 0.1}, -LOG2 - 0.5 * np.log(0.9 * 0.1)),
    "nca_pair": ({}, 2 * LOG2),
    "bco_pair": ({}, 2 * LOG2),
    "sppo_hard": ({"beta": TAU}, 2 / (4 * TAU**2)),
    "aot": ({}, LOG2),
    "aot_unpaired": ({}, LOG2),
    "apo_zero": ({}, 1.0),
    "apo_down": ({}, 1.0),
    "discopop": ({}, 0.5 * LOG2 + 0.5),
    "sigmoid_norm": ({}, LOG2),
    "odpo": ({}, LOG2),
    "dpop": ({}, LOG2),
    "beta_dpo": ({}, LOG2),
    "kto": ({"desirable_weight": 1.3, "undesirable_weight": 1.3}, 0.65),
    "apo_zero_unpaired": ({}, 0.5),
    "bco_unpaired": ({}, LOG2),
}

# Log-ratios, log-probabilities and lengths at the ends of what can occur.
EXTREMES = [-1e4, -80.0, -1.0, -1e-6, 0.0]


@pytest.mark.parametrize("name", AT_REFERENCE)
def test_policy_equal_to_reference(name):
    hyper, expected = AT_REFERENCE[name]
    logps = [-31.5, -4.25, -170.0]
    chosen, rejected = make_answers(logps, logps), make_answers(logps[::-1], logps[::-1])
    np.testing.assert_allclose(evaluate(name, chosen, rejected, **hyper), expected, rtol=1e-6)


def test_every_loss_with_a_reference_has_a_value_there():
    # r_dpo's depends on the lengths
    assert set(AT_REFERENCE) | {"r_dpo"} == {n for n, loss in LOSSES.items() if loss.needs_reference}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("lengths", [(1.0, 1.0), (1.0, 4096.0), (4096.0, 1.0)])
def test_extreme_inputs_stay_finite(name, lengths):
    grid = np.array([(a, b, c, d) for a in EXTREMES for b in EXTREMES for c in (-1e4, 0.0) for d in (-1e4, 0.0)])

    def total(policy: jnp.ndarray) -> jnp.ndarray:
        chosen = make_answers(policy[:, 0], grid[:, 2], count=lengths[0])
        rejected = make_answers(policy[:, 1], grid[:, 3], count=lengths[1])
        values_B = evaluate(name, chosen, rejected)
        return jnp.sum(values_B), values_B

    (_, values_B), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(grid[:, :2], jnp.float32))
    assert np.isfinite(values_B).all()
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", LOSSES)
def test_identical_answers_stay_finite(name):
    def total(logp: jnp.ndarray) -> jnp.ndarray:
        answers = make_answers(logp, -2.0)
        return jnp.sum(evaluate(name, answers, answers))

    value, gradient = jax.value_and_grad(total)(jnp.full(4, -3.0))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("alpha", [-1.0, 0.5, 1.0, 1 + 1e-7, 3.0])
def test_divergences_stay_finite(name, alpha):
    x = jnp.array([-1e4, -80.0, 0.0, 80.0, 1e4])
    scores, gradient = DIVERGENCES[name](x, alpha), jax.vmap(jax.grad(lambda v: DIVERGENCES[name](v, alpha)))(x)
    assert np.isfinite(scores).all()
    assert np.isfinite(gradient).all()
    assert (np.diff(scores) >= 0).all()


@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge", "sigmoid_norm", "simpo", "dpop"])
def test_swapping_the_answers_flips_the_margin(name):
    """The gradient of a margin loss with respect to both answers is opposite, and a swap trades the two."""
    hyper = {"gamma": 0.0} if name == "simpo" else {"penalty": 0.0} if name == "dpop" else {}

    def value(w: jnp.ndarray, other: jnp.ndarray) -> jnp.ndarray:
        return evaluate(name, make_answers(w[None], -3.0), make_answers(other[None], -4.0), **hyper)[0]

    w, other = jnp.float32(-2.5), jnp.float32(-4.5)
    d_w, d_l = jax.grad(value, (0, 1))(w, other)
    np.testing.assert_allclose(d_w, -d_l, rtol=1e-6)
    assert d_w < 0 < d_l


def test_dpo_and_its_swap_differ_by_the_margin():
    chosen, rejected = make_answers([-2.0, -9.0], [-3.0, -4.0]), make_answers([-5.0, -1.0], [-4.5, -2.0])
    forward, swapped = evaluate("dpo", chosen, rejected), evaluate("dpo", rejected, chosen)
    margin_B = 0.1 * (chosen.ratio_B - rejected.ratio_B)
    np.testing.assert_allclose(swapped - forward, margin_B, rtol=1e-5)  # −log σ(−m) + log σ(m) = m


@pytest.mark.parametrize("epsilon", [0.05, 0.2, 0.4])
def test_label_smoothing_has_its_optimum_at_one_minus_epsilon(epsilon):
    beta = 0.3
    delta = _minimise(
        lambda d: evaluate("dpo", make_answers(d), make_answers([0.0]), beta=beta, label_smoothing=epsilon)
    )
    np.testing.assert_allclose(jax.nn.sigmoid(beta * delta), 1 - epsilon, atol=1e-4)


def test_nca_has_its_fixed_point_at_log_2():
    """With an answer chosen as often as it is rejected, −log σ(x) − ½ log σ(−x) alone holds βc, at σ(x) = 2/3."""
    beta = 0.5
    c = _minimise(lambda c: evaluate("nca_pair", make_answers(c), make_answers([0.0]), beta=beta))
    np.testing.assert_allclose(beta * c, LOG2, atol=1e-4)


def test_dpo_and_hinge_have_no_optimum_for_a_single_pair():
    assert _minimise(lambda d: evaluate("dpo", make_answers(d), make_answers([0.0]), beta=1.0), steps=4000) > 5


def _minimise(loss, steps: int = 3000) -> jnp.ndarray:
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps) if steps == 3000 else 0.05)

    def step(carry, _):
        x, state = carry
        updates, state = optimizer.update(jax.grad(lambda v: jnp.sum(loss(v)))(x), state)
        return (x + updates, state), None

    x = jnp.zeros(1)
    return jax.lax.scan(step, (x, optimizer.init(x)), None, steps)[0][0][0]


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.3, 0.45])
def test_robust_is_unbiased_over_flipped_labels(epsilon):
    chosen, rejected = make_answers([-2.0, -9.0, -5.0], -3.0), make_answers([-5.0, -1.0, -5.0], -4.0)
    right = evaluate("robust", chosen, rejected, label_smoothing=epsilon)
    flipped = evaluate("robust", rejected, chosen, label_smoothing=epsilon)
    expectation = (1 - epsilon) * right + epsilon * flipped
    np.testing.assert_allclose(expectation, evaluate("dpo", chosen, rejected), rtol=1e-5)


CANCELS = {"dpo": True, "hinge": True, "robust": True, "kto": False, "apo_zero": False, "nca_pair": False}


@pytest.mark.parametrize(("name", "cancels"), CANCELS.items())
def test_a_shared_prefix_cancels_where_only_the_margin_counts(name, cancels):
    """k tokens that both answers begin with move both log-ratios by the same amount."""
    w, other = jnp.array([-4.0]), jnp.array([-6.0])

    def value(prefix: jnp.ndarray) -> jnp.ndarray:
        return jnp.sum(evaluate(name, make_answers(w + prefix, -5.0), make_answers(other + prefix, -4.0)))

    changed = value(jnp.float32(1.5)) - value(jnp.float32(0.0))
    gradient = jax.grad(value)(jnp.float32(1.0))
    assert (abs(changed) < 1e-6) == cancels
    assert (abs(gradient) < 1e-6) == cancels


def test_a_shared_prefix_does_not_cancel_in_averaged_ipo():
    """Lengths 4 and 8 with a prefix of 2 tokens: the prefix weighs ¼ in one mean, ⅛ in the other."""

    def value(prefix: jnp.ndarray, divide: bool) -> jnp.ndarray:
        count_w, count_l = (4.0, 8.0) if divide else (1.0, 1.0)
        chosen = make_answers((jnp.array([-4.0]) + prefix) / count_w)
        return evaluate("ipo", chosen, make_answers((jnp.array([-6.0]) + prefix) / count_l))[0]

    slope = jax.grad(value)
    assert abs(slope(jnp.float32(0.5), False)) < 1e-5
    assert abs(slope(jnp.float32(0.5), True)) > 0.1


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_does_not_see_the_order_of_the_batch(name):
    rng = np.random.default_rng(3)
    policy, reference = rng.normal(size=(2, 7)) * 5, rng.normal(size=(2, 7)) * 5
    order = rng.permutation(7)

    def values(order_w: np.ndarray, order_l: np.ndarray) -> jnp.ndarray:
        chosen = make_answers(policy[0][order_w], reference[0][order_w])
        return evaluate(name, chosen, make_answers(policy[1][order_l], reference[1][order_l]))

    before, after = values(np.arange(7), np.arange(7)), values(order, order)
    np.testing.assert_allclose(after, before[order], rtol=1e-6)
    if name == "aot_unpaired":  # which answer is paired with which does not matter either
        np.testing.assert_allclose(jnp.sum(values(np.arange(7), order)), jnp.sum(before), rtol=1e-6)


def test_r_dpo_prefers_the_shorter_of_two_equally_liked_answers():
    """Equal numbers of both labels: the best margin is −α(|a| − |b|)/β, in favour of the shorter one."""
    beta, alpha, length_a, length_b = 0.5, 0.1, 8.0, 3.0

    def loss(delta: jnp.ndarray) -> jnp.ndarray:
        a, b = make_answers(delta, count=length_a), make_answers([0.0], count=length_b)
        return sum(evaluate("r_dpo", *pair, beta=beta, length_penalty=alpha) for pair in ((a, b), (b, a)))

    delta = _minimise(loss)
    np.testing.assert_allclose(delta, -alpha * (length_a - length_b) / beta, atol=1e-4)


def test_simpo_has_no_hidden_likelihood_term():
    """Moving both log-probabilities together changes nothing."""
    value = lambda s: evaluate("simpo", make_answers(jnp.array([-1.0]) + s), make_answers(jnp.array([-2.0]) + s))[0]  # noqa: E731
    assert jax.grad(value)(jnp.float32(0.3)) == pytest.approx(0.0, abs=1e-7)
