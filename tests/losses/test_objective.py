"""Sums of losses, what they need, how their words are checked, and that shards add up to the whole."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.losses import LOSSES
from dpo_jax.losses.hyper import RANGES, parameters_of, range_of
from dpo_jax.losses.objective import check_data, make_objective
from dpo_jax.metrics import compute, merge
from dpo_jax.types import CHOSEN, REJECTED, UNUSED
from tests.losses.examples import make_scored, prepare

APART = [n for n, loss in LOSSES.items() if not loss.couples_batch]
SUMS = ["dpo + 0.2*bco_pair + 1e-3*sft", "kto + sft", "orpo", "cpo"]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_a_sum_is_the_sum(rng):
    scored = make_scored(rng, 6)
    parts = {"dpo": 0.8, "bco_pair": 0.25, "sft": 1e-3}
    whole = _loss("0.8*dpo + 0.25*bco_pair + 1e-3*sft", scored)
    alone = sum(weight * _loss(name, scored) for name, weight in parts.items())
    np.testing.assert_allclose(whole, alone, rtol=1e-6)


@pytest.mark.parametrize(
    ("words", "weights"),
    [
        ("dpo", {"dpo": 1.0}),
        ("  dpo ", {"dpo": 1.0}),
        ("dpo+sft", {"dpo": 1.0, "sft": 1.0}),
        ("dpo + 0.5 * sft", {"dpo": 1.0, "sft": 0.5}),
        ("1e-3*sft+ 2.*dpo", {"sft": 1e-3, "dpo": 2.0}),
        ("1e+2*dpo +.5*sft", {"dpo": 100.0, "sft": 0.5}),
        ("2E1 *dpo", {"dpo": 20.0}),
    ],
)
def test_sums_are_read(words, weights):
    objective, numbers = make_objective(words)
    assert [t.name for t in objective.terms] == list(weights)
    assert {t.name: numbers[f"{t.name}.weight"] for t in objective.terms} == weights


@pytest.mark.parametrize(
    "words", ["", "dpo +", "+ dpo", "dpo sft", "dpo - sft", "-1*dpo", "0.5 dpo", "dpo*0.5", "a*dpo"]
)
def test_unreadable_sums_are_refused(words):
    with pytest.raises(ValueError, match="cannot read loss|unknown loss"):
        make_objective(words)


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        ("dpoo", {}, r"unknown loss 'dpoo' \(did you mean 'dpo'\?\); known: dpo, ipo"),
        ("dpo + simp", {}, "did you mean 'simpo'"),
        ("dpo + dpo", {}, "stands twice"),
        ("dpo", {"hyper": {"gamma": 0.5}}, "does not take gamma; it takes beta, label_smoothing"),
        ("dpo", {"hyper": {"bet": 0.5}}, r"does not take bet \(did you mean beta\?\)"),
        ("dpo", {"hyper": {"simpo.beta": 0.5}}, "does not take simpo.beta"),
        ("sft", {"hyper": {"beta": 0.5}}, "takes no hyper-parameters"),
        ("dpo", {"hyper": {"label_smoothing": 0.5}}, r"dpo.label_smoothing = 0.5 is out of range; .* \[0, 0.5\)"),
        ("dpo", {"hyper": {"label_smoothing": -0.1}}, "out of range"),
        ("dpo", {"hyper": {"beta": 0.0}}, r"\(0, inf\)"),
        ("ipo", {"hyper": {"beta": -0.1}}, "out of range"),
        ("dpo", {"hyper": {"beta": float("nan")}}, "out of range"),
        ("dpo", {"hyper": {"beta": float("inf")}}, "out of range"),
        ("dpo", {"hyper": {"beta": "0.1"}}, "must be a number"),
        ("dpo", {"hyper": {"beta": True}}, "must be a number"),
        ("exo_pair", {"hyper": {"label_smoothing": 0.0}}, r"exo_pair.label_smoothing = 0.0 .* \(0, 0.5\)"),
        ("robust", {"hyper": {"label_smoothing": 0.7}}, "out of range"),
        ("kto", {"hyper": {"desirable_weight": 0.0}}, "out of range"),
        ("discopop", {"hyper": {"temperature": 0.0}}, "out of range"),
        ("dpo", {"divergence": "reverse"}, "did you mean 'reverse_kl'"),
        ("dpo", {"reduction": "average"}, "known: sum, mean, desensitized"),
        ("dpo", {"hyper": {"divergence_alpha": 0.5}}, "divergence='alpha'"),
        ("dpo", {"hyper": {"length_alpha": 0.5}}, "reduction='desensitized'"),
        ("dpo", {"reduction": "desensitized", "hyper": {"length_alpha": 1.5}}, "out of range"),
        ("kto", {"divergence": "forward_kl"}, "reverse KL alone"),
        ("dpo + aot", {"divergence": "forward_kl"}, "'aot' is defined for the reverse KL alone"),
        ("simpo", {"divergence": "forward_kl"}, "reverse KL alone"),
        ("sft", {"reduction": "mean"}, "does not read reduction"),
        ("sft", {"wpo": True}, "does not read wpo"),
    ],
)
def test_bad_words_are_refused(words, options, message):
    with pytest.raises(ValueError, match=message):
        make_objective(words, **options)


def test_a_hyper_parameter_of_none_is_not_given():
    assert make_objective("dpo", {"beta": None, "gamma": None})[1] == make_objective("dpo")[1]


def test_each_loss_of_a_sum_keeps_its_own_beta():
    numbers = make_objective("dpo + simpo")[1]
    assert (numbers["dpo.beta"], numbers["simpo.beta"]) == (0.1, 2.0)
    numbers = make_objective("dpo + simpo", {"beta": 0.7})[1]
    assert (numbers["dpo.beta"], numbers["simpo.beta"]) == (0.7, 0.7)
    numbers = make_objective("dpo + simpo", {"beta": 0.7, "simpo.beta": 3.0})[1]
    assert (numbers["dpo.beta"], numbers["simpo.beta"]) == (0.7, 3.0)


def test_numbers_reach_the_loss(rng):
    scored = make_scored(rng, 5)
    separate = _loss("dpo", scored, beta=0.3) + _loss("hinge", scored, beta=0.05)
    np.testing.assert_allclose(
        _loss("dpo + hinge", scored, **{"dpo.beta": 0.3, "hinge.beta": 0.05}), separate, rtol=1e-6
    )


def test_every_hyper_parameter_has_a_range():
    for name, loss in LOSSES.items():
        for parameter, default in parameters_of(loss).items():
            assert default in RANGES[parameter], (name, parameter)


def test_a_hyper_parameter_without_a_range_is_told_where_it_goes():
    with pytest.raises(ValueError, match=r"loss 'new' takes sharpness, .* RANGES .*hyper.py, .* configs/base.py"):
        range_of("new", "sharpness")


@pytest.mark.parametrize("name", LOSSES)
def test_paired_losses_refuse_unpaired_data(name):
    objective, _ = make_objective(name)
    check_data(objective, 2)
    if LOSSES[name].sees == "pairs":
        with pytest.raises(ValueError, match="compares a chosen with a rejected answer"):
            check_data(objective, 1)
    else:
        check_data(objective, 1)


@pytest.mark.parametrize("name", [*LOSSES, *SUMS])
def test_changing_a_number_does_not_trace_again(name, rng):
    objective, hyper = make_objective(name)
    scored = make_scored(rng, 4)
    traces = []

    @jax.jit
    def loss(hyper, scored):
        traces.append(1)
        totals, numbers = prepare(objective, hyper, scored)
        return jax.grad(lambda p: objective.loss(hyper, scored.replace(policy=p), totals, numbers))(scored.policy).sum

    first = loss({k: np.float32(v) for k, v in hyper.items()}, scored)
    changed = {k: np.float32(v * 1.07 + 0.003) for k, v in hyper.items()}
    second = loss(changed, scored)
    assert len(traces) == 1
    # the numbers are read, not baked in
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("name", [*APART, "kto + sft"])
def test_a_shard_adds_its_part(name, rng):
    """Loss, gradient and metrics of two shards add up to those of the whole; padding adds nothing."""
    objective, hyper = make_objective(name, wpo=name != "sft")
    whole = make_scored(rng, 8, unused=2)
    totals, numbers = prepare(objective, hyper, whole)
    halves = [jax.tree.map(lambda a, h=h: a[h], whole) for h in (slice(0, 3), slice(3, 8))]

    def part(scored):
        loss, gradient = jax.value_and_grad(lambda p: objective.loss(hyper, scored.replace(policy=p), totals, numbers))(
            scored.policy
        )
        return loss, gradient, objective.metrics(hyper, scored, totals, numbers)

    loss, gradient, metrics = part(whole)
    pieces = [part(h) for h in halves]
    np.testing.assert_allclose(sum(p[0] for p in pieces), loss, rtol=1e-5)
    joined = jax.tree.map(lambda *a: jnp.concatenate(a), *(p[1] for p in pieces))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), joined, gradient)
    assert all(np.all(leaf[6:] == 0) for leaf in jax.tree.leaves(gradient))
    merged = pieces[0][2]
    for piece in pieces[1:]:
        merged = merge(merged, piece[2])
    assert compute(merged) == pytest.approx(compute(metrics), rel=1e-4, abs=1e-5)
    assert compute(merged)["loss"] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("wpo", [False, True])
@pytest.mark.parametrize("name", [*APART, "kto + sft", "dpo + 0.5*sft + 2*orpo"])
def test_the_loss_of_many_batches_is_that_of_all_in_one(name, wpo, rng):
    """Of held-out data: batches of one to five examples, each with totals of its own, add up to the loss of all."""
    objective, hyper = make_objective(name, wpo=wpo and name != "sft")
    whole = make_scored(rng, 8)
    cuts = [slice(0, 1), slice(1, 3), slice(3, 8)]

    def metrics(scored):
        return objective.metrics(hyper, scored, *prepare(objective, hyper, scored))

    parts = [metrics(jax.tree.map(lambda a, cut=cut: a[cut], whole)) for cut in cuts]
    expected = compute(metrics(whole))
    found = compute(functools.reduce(merge, parts))
    losses = [key for key in expected if key == "loss" or key.startswith("loss/")]
    assert {key: found[key] for key in losses} == pytest.approx({key: expected[key] for key in losses}, rel=1e-5)
    assert expected["loss"] == pytest.approx(_loss(name, whole, wpo=objective.wpo), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_changes_nothing(name, rng):
    scored = make_scored(rng, 7, unused=3)
    used = jax.tree.map(lambda a: a[:4], scored)
    np.testing.assert_allclose(_loss(name, scored), _loss(name, used), rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_padded_examples_of_any_content_stay_out(name, rng):
    """Whatever stands in unused places, even what would overflow, the gradient is finite and theirs is 0."""
    objective, hyper = make_objective(name)
    scored = make_scored(rng, 4, unused=1)
    poisoned = scored.policy.replace(sum=scored.policy.sum.at[3].set(0.0), count=scored.policy.count.at[3].set(0.0))
    scored = scored.replace(policy=poisoned)
    totals, numbers = prepare(objective, hyper, scored)
    gradient = jax.grad(lambda p: objective.loss(hyper, scored.replace(policy=p), totals, numbers))(scored.policy)
    assert all(np.isfinite(leaf).all() and np.all(leaf[3] == 0) for leaf in jax.tree.leaves(gradient))


def test_what_is_needed_is_declared(rng):
    """A loss that declares no reference does not read it, one that does, does."""
    scored = make_scored(rng, 5)
    moved = scored.replace(reference=jax.tree.map(lambda a: a * 1.5 - 1.0, scored.reference))
    for name, loss in LOSSES.items():
        same = np.allclose(_loss(name, scored), _loss(name, moved), rtol=1e-6)
        assert same == (not loss.needs_reference), name


@pytest.mark.parametrize("name", LOSSES)
def test_one_value_depends_on_others_only_where_declared(name, rng):
    """couples_batch: whether values of the first examples move with the log-probabilities of the last."""
    objective, hyper = make_objective(name)
    scored = make_scored(rng, 5)
    other = scored.replace(policy=scored.policy.replace(sum=scored.policy.sum.at[4, 0].add(-30.0)))
    first = []
    for batch in (scored, other):
        totals, numbers = prepare(objective, hyper, batch)
        first.append(objective.values(hyper, batch, totals, numbers)[name][0][:4])
    assert np.allclose(*first, rtol=1e-6) == (not objective.couples_batch)


def test_reductions(rng):
    scored = make_scored(rng, 4)
    policy, reference = scored.policy, scored.reference
    ratio = (policy.sum - reference.sum)[..., 0]
    tail = (policy.tail - reference.tail)[..., 0]
    mean = ratio / policy.count[..., 0]
    for reduction, ratios in (("sum", ratio), (None, ratio), ("mean", mean), ("desensitized", ratio - 0.7 * tail)):
        hyper = {"length_alpha": 0.3} if reduction == "desensitized" else {}
        expected = np.mean(np.logaddexp(0, -0.1 * (ratios[:, 0] - ratios[:, 1])))
        np.testing.assert_allclose(_loss("dpo", scored, reduction=reduction, **hyper), expected, rtol=1e-6)
    assert np.any(np.asarray(tail) != 0)


def test_desensitized_without_discount_is_the_sum(rng):
    scored = make_scored(rng, 4)
    full = _loss("dpo", scored, reduction="desensitized", length_alpha=1.0)
    np.testing.assert_allclose(full, _loss("dpo", scored), rtol=1e-6)


def test_sigmoid_norm_is_dpo_of_means(rng):
    scored = make_scored(rng, 4)
    np.testing.assert_allclose(
        _loss("sigmoid_norm", scored), _loss("dpo", scored, reduction="mean", beta=5.0), rtol=1e-6
    )


def test_wpo_weighs_pairs_by_both_answers(rng):
    scored = make_scored(rng, 4)
    plain, weighted = (_values("dpo", scored, wpo=wpo)["dpo"][0] for wpo in (False, True))
    overlap = scored.policy.overlap[..., 0] / scored.policy.count[..., 0]
    np.testing.assert_allclose(weighted, plain * np.exp(overlap.sum(1)), rtol=1e-5)


def test_wpo_weighs_answers_by_themselves_and_likelihood_not_at_all(rng):
    scored = make_scored(rng, 4)
    plain, weighted = (_values("kto + sft", scored, wpo=wpo) for wpo in (False, True))
    overlap = (scored.policy.overlap[..., 0] / scored.policy.count[..., 0]).reshape(-1)
    np.testing.assert_allclose(weighted["kto"][0], plain["kto"][0] * np.exp(overlap), rtol=1e-5)
    np.testing.assert_array_equal(weighted["sft"][0], plain["sft"][0])


def test_wpo_weights_carry_no_gradient(rng):
    objective, hyper = make_objective("dpo", wpo=True)
    scored = make_scored(rng, 4)
    totals, numbers = prepare(objective, hyper, scored)
    gradient = jax.grad(lambda p: objective.loss(hyper, scored.replace(policy=p), totals, numbers))(scored.policy)
    assert np.all(gradient.overlap == 0)


def test_likelihood_is_a_mean_over_tokens(rng):
    scored = make_scored(rng, 5)
    chosen = jax.tree.map(lambda a: a[:, 0, 0], scored.policy)
    np.testing.assert_allclose(_loss("sft", scored), -chosen.sum.sum() / chosen.count.sum(), rtol=1e-6)


def test_orpo_counts_the_prompt_in_its_likelihood(rng):
    scored = make_scored(rng, 5)
    both = jax.tree.map(lambda a: a[:, 0].sum(), scored.policy)
    value = _loss("orpo", scored, beta=1e-9)
    np.testing.assert_allclose(value, -both.sum / both.count, rtol=1e-5)


def test_unpaired_data(rng):
    """Answers one an example: the mean over all of them, by their kind."""
    scored = make_scored(rng, 5, answers=1, roles=[CHOSEN, REJECTED, CHOSEN, REJECTED, UNUSED])
    ratio = np.asarray(scored.policy.sum - scored.reference.sum)[:4, 0, 0]
    sign = np.array([1, -1, 1, -1])
    expected = np.mean(1 / (1 + np.exp(0.1 * sign * (ratio - 0.3))))
    np.testing.assert_allclose(_loss("kto", scored), expected, rtol=1e-5)


def test_kto_point_is_a_mean_over_real_mismatched_answers():
    objective, hyper = make_objective("kto")
    ratio_B, mask_B = jnp.array([0.5, 100.0, 0.9]), jnp.array([True, False, True])
    numbers, _ = objective.statistics(hyper, {}, None, None, ratio_B, mask_B)
    assert numbers["kto"]["reference_point"] == pytest.approx(0.7)
    numbers, _ = objective.statistics(hyper, {}, None, None, -ratio_B, mask_B)
    assert numbers["kto"]["reference_point"] == 0.0


@pytest.mark.parametrize(("reduction", "divided"), [(None, False), ("sum", False), ("mean", True)])
def test_mismatched_answers_are_reduced_as_the_others(rng, reduction, divided):
    objective, _ = make_objective("kto", reduction=reduction)
    scored = make_scored(rng, 3)
    ratio = objective.mismatched_ratio(scored.policy, scored.reference)
    expected = scored.policy.sum - scored.reference.sum
    np.testing.assert_allclose(ratio, expected / scored.policy.count if divided else expected, rtol=1e-6)


def test_bco_shift_is_the_mean_over_all_rewards_seen(rng):
    """Two batches of 3 and 5 pairs leave the mean over 16 answers; evaluation uses it and leaves it alone."""
    objective, hyper = make_objective("bco_pair")
    batches = [make_scored(rng, 4, unused=1), make_scored(rng, 5)]
    state, rewards = objective.initial_state(), []
    for scored in batches:
        totals = objective.totals(scored.role, scored.policy.count)
        numbers, state = objective.statistics(hyper, state, scored, totals, None, None)
        ratio = np.asarray(scored.policy.sum - scored.reference.sum)[..., 0]
        rewards.append(0.1 * ratio[: int(totals.pairs)].reshape(-1))
        np.testing.assert_allclose(numbers["bco_pair"]["shift"], np.concatenate(rewards).mean(), rtol=1e-5)
    assert float(state["bco_pair"]["count"]) == 16
    numbers, after = objective.statistics(hyper, state, batches[0], totals, None, None, update=False)
    np.testing.assert_array_equal(numbers["bco_pair"]["shift"], state["bco_pair"]["mean"])
    assert after == state


def test_dynamic_beta_follows_the_margin(rng):
    objective, hyper = make_objective("beta_dpo", {"adaptation": 0.6, "momentum": 0.9})
    first, second = make_scored(rng, 6, spread=1.0), make_scored(rng, 6, spread=4.0)
    state, threshold = objective.initial_state(), 0.0
    for scored in (first, second):
        ratio = np.asarray(scored.policy.sum - scored.reference.sum)[..., 0]
        margin = np.mean(ratio[:, 0] - ratio[:, 1])
        threshold = 0.9 * threshold + 0.1 * margin
        totals = objective.totals(scored.role, scored.policy.count)
        numbers, state = objective.statistics(hyper, state, scored, totals, None, None)
        expected = max(0.1 * (1 + 0.6 * (margin - threshold)), 1e-3)
        np.testing.assert_allclose(numbers["beta_dpo"]["batch_beta"], expected, rtol=1e-5)
    assert float(numbers["beta_dpo"]["batch_beta"]) != pytest.approx(0.1)
    _, after = objective.statistics(hyper, state, first, totals, None, None, update=False)
    assert after == state


def _loss(name, scored, *, reduction=None, wpo=False, **given):
    objective, hyper = make_objective(name, given, reduction=reduction, wpo=wpo)
    totals, numbers = prepare(objective, hyper, scored, mismatched=(0.3,))
    return float(objective.loss(hyper, scored, totals, numbers))


def _values(name, scored, *, wpo=False):
    objective, hyper = make_objective(name, wpo=wpo)
    totals, numbers = prepare(objective, hyper, scored)
    return objective.values(hyper, scored, totals, numbers)


def test_advice_comes_from_the_losses_own_numbers() -> None:
    objective, numbers = make_objective("kto")
    assert objective.advice(100, 100, numbers) == []
    assert "desirable_weight" in objective.advice(50, 100, numbers)[0]
    objective, numbers = make_objective("kto", {"desirable_weight": 2.5})
    assert objective.advice(50, 100, numbers) == []
    objective, numbers = make_objective("dpo")
    assert objective.advice(50, 100, numbers) == []
