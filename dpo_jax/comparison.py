"""Fair comparisons of methods: tuned on the same budget, judged on prompts that tuned nothing, paired by prompt."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_jax.results import Result

DRAWS = 2000  # of the bootstrap

# Two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Choice:
    """The setting (and step) of a method that did best on the validation half.

    Attributes:
      runs: its runs, a seed each.
      step: index of the evaluation; None where the point is a level of KL.
      level: the level of KL, nats; None where the point is a step.
      tried: settings (and steps) that were compared.
    """

    runs: tuple[Result, ...]
    step: int | None
    level: float | None
    tried: int

    def values(self, half: str) -> np.ndarray:
        """Mean reward of every seed on a half of the prompts; nan where a run never reaches the level."""
        return np.array([self.reward(*run.path(half)) for run in self.runs])

    def reward(self, kl_TN: np.ndarray, reward_TN: np.ndarray) -> float:
        """Mean reward at the point, from what each of N prompts had at each of T evaluations."""
        if self.step is not None:
            return float(reward_TN[self.step].mean())
        return at_kl(kl_TN.mean(1), reward_TN.mean(1), self.level or 0.0)


def at_kl(kl_T: np.ndarray, reward_T: np.ndarray, level: float) -> float:
    """Reward where a path first reaches a level of KL, linear between evaluations; nan when it never does.

    >>> at_kl(np.array([0.0, 4.0, 8.0]), np.array([0.5, 0.7, 0.8]), 6.0)
    0.75
    """
    above = np.flatnonzero(kl_T >= level)
    if not len(above):
        return float("nan")
    t = int(above[0])
    if t == 0:
        return float(reward_T[0])
    part = (level - kl_T[t - 1]) / (kl_T[t] - kl_T[t - 1])
    return float(reward_T[t - 1] + part * (reward_T[t] - reward_T[t - 1]))


def by_setting(results: Sequence[Result], method: str, condition: tuple[str, ...]) -> list[tuple[Result, ...]]:
    """Runs of a method under a condition, a tuple of seeds for each setting."""
    own = [r for r in results if r.method == method and r.condition == condition]
    settings = dict.fromkeys(r.setting for r in own)
    return [tuple(r for r in own if r.setting == setting) for setting in settings]


def best_point(settings: Sequence[tuple[Result, ...]]) -> Choice | None:
    """The setting and the step with the best reward on the validation half, the mean over seeds."""
    candidates = [
        Choice(runs, step, None, 0) for runs in settings for step in range(1, min(len(r.steps) for r in runs))
    ]
    return _best(candidates)


def best_at_kl(settings: Sequence[tuple[Result, ...]], level: float) -> Choice | None:
    """The setting with the best reward at a level of KL on the validation half; all its seeds must reach the level."""
    return _best([Choice(runs, None, level, 0) for runs in settings])


def _best(candidates: Sequence[Choice]) -> Choice | None:
    scores = [candidate.values("validation").mean() for candidate in candidates]
    known = [i for i, score in enumerate(scores) if np.isfinite(score)]
    if not known:
        return None
    found = candidates[max(known, key=lambda i: scores[i])]
    return Choice(found.runs, found.step, found.level, len(candidates))


def levels_of(results: Sequence[Result]) -> list[float]:
    """Three levels of KL (nats) that every method reaches in half of its runs, a quarter apart."""
    reached = []
    for method in dict.fromkeys(r.method for r in results):
        own = [max(s.kl.mean() for s in r.samples.values()) for r in results if r.method == method]
        reached.append(float(np.median(own)))
    largest = min(reached)
    return [float(f"{largest * share:.2g}") for share in (0.25, 0.5, 0.75)] if largest > 0 else []


def interval(values: Sequence[float] | np.ndarray) -> float:
    """Half the width of the 95 % interval of a mean over seeds (Student's t); nan for fewer than two values."""
    values = np.asarray(values, float)
    n = len(values)
    if n < 2:
        return float("nan")
    t = _T95[n - 2] if n - 2 < len(_T95) else 1.96
    return float(t * values.std(ddof=1) / n**0.5)


@dataclass(frozen=True)
class Difference:
    """Reward of one method less that of another, on the test half.

    Attributes:
      mean: of seeds and prompts.
      low, high: 95 % interval of the bootstrap over seeds and, within each, prompts.
      p: two-sided, of the bootstrap; not smaller than 2 / DRAWS.
    """

    mean: float
    low: float
    high: float
    p: float


def difference(a: Choice, b: Choice, seed: int = 0) -> Difference:
    """a − b, paired: both answer the same prompts with the same random numbers, seed by seed.

    The bootstrap draws seeds, and prompts within a seed, the same ones for both methods; at a level of KL the whole
    path is interpolated anew for each draw.

    Args:
      a: a point of one method.
      b: of another.
      seed: of the bootstrap.

    Raises:
      ValueError: they have no seed in common, or their prompts differ.
    """
    pairs = [(x, y) for x, y in itertools.product(a.runs, b.runs) if x.seed == y.seed]
    if not pairs:
        raise ValueError("the methods have no seed in common, so that nothing can be paired")
    for x, y in pairs:
        if x.samples[x.steps[0]].prompts != y.samples[y.steps[0]].prompts:
            raise ValueError(f"{x.name} and {y.name} have answered other prompts; evaluate both on the same")
    rng = np.random.default_rng(seed)
    paths = [(x.path("test"), y.path("test")) for x, y in pairs]
    size = paths[0][0][0].shape[1]
    observed = float(np.mean([a.reward(*x) - b.reward(*y) for x, y in paths]))
    # One table of differences a seed: which prompts a draw holds is the same for both methods.
    tables = [_resampled(a, b, x, y, rng.integers(0, size, (DRAWS, size))) for x, y in paths]
    picked = rng.integers(0, len(paths), (DRAWS, len(paths)))
    draws = np.stack(tables)[picked, np.arange(DRAWS)[:, None]].mean(1)
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return Difference(observed, float("nan"), float("nan"), float("nan"))
    low, high = np.quantile(draws, [0.025, 0.975])
    p = 2 * min((draws <= 0).mean(), (draws >= 0).mean())
    return Difference(observed, float(low), float(high), float(min(1.0, max(p, 2 / DRAWS))))


Path = tuple[np.ndarray, np.ndarray]


def _resampled(a: Choice, b: Choice, x: Path, y: Path, index_BN: np.ndarray) -> np.ndarray:
    """Differences of one seed for every draw of prompts, [B]."""
    reward: Callable[[Choice, Path, np.ndarray], float] = lambda c, path, i: c.reward(path[0][:, i], path[1][:, i])  # noqa: E731
    return np.array([reward(a, x, index) - reward(b, y, index) for index in index_BN])


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979): the chance of any false finding stays below the level.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [float("nan")] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
