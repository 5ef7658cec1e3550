"""Comparisons of methods against numbers worked out by hand, and intervals that cover as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from dpo_jax import comparison
from dpo_jax.results import HALVES, Result, Samples, half_of

PROMPTS = tuple(f"prompt {i}" for i in range(60))


def result(method: str, reward_TN, kl_TN=None, seed: str = "0", setting: str = "a") -> Result:
    reward_TN = np.asarray(reward_TN, float)
    kl_TN = np.zeros_like(reward_TN) if kl_TN is None else np.asarray(kl_TN, float)
    samples = {10 * t: Samples(PROMPTS, PROMPTS, reward_TN[t], kl_TN[t]) for t in range(len(reward_TN))}
    return Result(f"{method}{setting}{seed}", method, (), (setting,), seed, {}, [{"step": 10}], samples)


def flat(*means: float) -> np.ndarray:
    return np.repeat(np.array(means)[:, None], len(PROMPTS), 1)


def test_both_halves_are_there_and_belong_to_the_text() -> None:
    halves = half_of(PROMPTS)
    assert set(halves) == set(HALVES) and 15 < (halves == "test").sum() < 45
    assert (half_of(PROMPTS[::-1]) == halves[::-1]).all()


def test_reward_at_a_level_of_kl() -> None:
    kl, reward = np.array([0.0, 4.0, 8.0, 6.0, 9.0]), np.array([0.5, 0.7, 0.8, 0.9, 1.0])
    assert comparison.at_kl(kl, reward, 6.0) == pytest.approx(0.75)  # where it is first reached
    assert comparison.at_kl(kl, reward, 4.0) == pytest.approx(0.7)
    assert comparison.at_kl(kl, reward, 0.0) == 0.5
    assert np.isnan(comparison.at_kl(kl, reward, 9.5))


def test_the_best_point_is_chosen_on_one_half_and_reported_on_the_other() -> None:
    """Setting b is best on the validation half, a on the test half: b is chosen, and its lower number reported."""
    validation = half_of(PROMPTS) == "validation"
    a = result("dpo", np.stack([np.full(60, 0.5), np.where(validation, 0.6, 0.9)]), setting="a")
    b = result("dpo", np.stack([np.full(60, 0.5), np.where(validation, 0.8, 0.7)]), setting="b")
    choice = comparison.best_point([(a,), (b,)])
    assert choice is not None and choice.runs == (b,) and choice.step == 1 and choice.tried == 2
    assert choice.values("validation") == pytest.approx([0.8])
    assert choice.values("test") == pytest.approx([0.7])


def test_the_point_of_step_0_is_never_chosen() -> None:
    choice = comparison.best_point([(result("dpo", flat(0.9, 0.5, 0.6)),)])
    assert choice is not None and choice.step == 2


def test_a_level_that_a_seed_does_not_reach_is_not_compared() -> None:
    near, far = (result("dpo", flat(0.5, 0.7), flat(0.0, kl), seed=s) for kl, s in ((2.0, "0"), (8.0, "1")))
    assert comparison.best_at_kl([(near, far)], 4.0) is None
    choice = comparison.best_at_kl([(near, far)], 1.0)
    assert choice is not None
    assert choice.values("test") == pytest.approx([0.6, 0.525])


def test_levels_are_those_that_every_method_reaches() -> None:
    runs = [result("dpo", flat(0.5, 0.7), flat(0.0, 8.0)), result("ipo", flat(0.5, 0.7), flat(0.0, 4.0))]
    assert comparison.levels_of(runs) == [1.0, 2.0, 3.0]


def test_interval_of_a_mean() -> None:
    # sd of 1, 2, 3 is 1; t of 2 degrees of freedom is 4.302653, of 19 it is 2.093024.
    assert comparison.interval([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    twenty = np.arange(20.0)
    assert comparison.interval(twenty) == pytest.approx(2.093024 * twenty.std(ddof=1) / 20**0.5, rel=1e-6)
    assert np.isnan(comparison.interval([1.0]))


def test_a_constant_difference_has_no_width_however_much_prompts_vary() -> None:
    """Pairing: prompts differ by far more than methods do."""
    noise = np.random.default_rng(0).normal(0, 5, 60)
    base = [np.stack([noise, noise + s]) for s in (0.0, 1.0)]
    a = comparison.best_point([tuple(result("ipo", t + 0.1, seed=str(s)) for s, t in enumerate(base))])
    b = comparison.best_point([tuple(result("dpo", t, seed=str(s)) for s, t in enumerate(base))])
    assert a is not None and b is not None
    found = comparison.difference(a, b)
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert found.p < 1e-9


def test_prompts_that_differ_and_seeds_that_do_are_refused() -> None:
    a, b = (comparison.best_point([(result(m, flat(0.5, 0.6), seed=s),)]) for m, s in (("a", "0"), ("b", "1")))
    assert a is not None and b is not None
    with pytest.raises(ValueError, match="no seed in common"):
        comparison.difference(a, b)


def test_methods_that_are_one_do_not_differ() -> None:
    runs = [tuple(result(m, flat(0.5, 0.6), seed=str(s)) for s in range(3)) for m in ("a", "b")]
    a, b = (comparison.best_point([own]) for own in runs)
    assert a is not None and b is not None
    assert comparison.difference(a, b) == comparison.Difference(0.0, 0.0, 0.0, 1.0)


def _worlds(seeds: int, seed_sd: float, prompt_sd: float, level: float | None, count: int = 300):
    """Differences in worlds where there is none: seeds and prompts that vary, and both together."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        shared, runs = prompt_sd * rng.normal(size=60), []
        for _ in range(seeds):
            noise = seed_sd * rng.normal() + shared + 0.3 * rng.normal(size=60)
            runs.append([np.stack([np.zeros(60), x]) for x in (noise, np.zeros(60))])
        kl = flat(0.0, 4.0)
        a, b = (tuple(result("ab"[i], table[i], kl, seed=str(s)) for s, table in enumerate(runs)) for i in range(2))
        choices = [comparison.Choice(own, 1 if level is None else None, level, 1) for own in (a, b)]
        yield comparison.difference(*choices)


@pytest.mark.parametrize("level", [None, 2.0])
@pytest.mark.parametrize(
    ("seeds", "seed_sd", "prompt_sd"), [(1, 0.0, 0.2), (2, 0.3, 0.0), (3, 0.2, 0.0), (3, 0.1, 0.5), (5, 0.1, 0.2)]
)
def test_intervals_cover_the_truth_and_p_values_err_as_often_as_they_say(seeds, seed_sd, prompt_sd, level) -> None:
    found = list(_worlds(seeds, seed_sd, prompt_sd, level))
    covered = sum(d.low <= 0 <= d.high for d in found)
    assert covered >= 270  # of 300; 285 less 4 standard deviations of a binomial
    assert covered == sum(d.p >= 0.05 for d in found)
    assert covered < 300  # they are not just wide


def test_a_standard_error_by_hand() -> None:
    """Two seeds, two prompts: seeds 1 and 3, prompts the same, nothing else: 4 = 2·(1 + 1)."""
    error, freedom = comparison._standard_error(np.array([[1.0, 1.0], [3.0, 3.0]]))
    assert (error, freedom) == (1.0, 1.0)
    # Values 0, 1 and 2, 5: mean squares 9 of seeds, 4 of prompts, 1 of the rest.
    error, freedom = comparison._standard_error(np.array([[0.0, 1.0], [2.0, 5.0]]))
    assert error == pytest.approx(((9.0 + 4.0 - 1.0) / 4) ** 0.5)
    assert freedom == pytest.approx(12.0**2 / (81.0 + 16.0 + 1.0))


def test_holm() -> None:
    assert comparison.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert comparison.holm([0.9, 0.8]) == [1.0, 1.0]
    assert comparison.holm([]) == []
