"""Fair comparisons of methods: tuned on the same budget, judged on prompts that tuned nothing, paired by prompt."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from dpo_jax.results import Result


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
    return float(student.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5)


@dataclass(frozen=True)
class Difference:
    """Reward of one method less that of another, on the test half.

    Attributes:
      mean: of seeds and prompts.
      low, high: 95 % interval.
      p: two-sided, of no difference.
    """

    mean: float
    low: float
    high: float
    p: float


def difference(a: Choice, b: Choice) -> Difference:
    """a − b, paired: both answer the same prompts with the same random numbers, seed by seed.

    What another seed and what another prompt would change both count: the difference of seed s at prompt i is taken as
    the mean plus a random part of the seed, one of the prompt and one of both, and the mean has Student's t with
    Satterthwaite's degrees of freedom (crossed random effects: Searle, Casella and McCulloch 1992, ch. 4). Of one seed,
    only what prompts change is known. At a level of KL, the part of a prompt is its jackknife pseudo-value.

    Args:
      a: a point of one method.
      b: of another.

    Raises:
      ValueError: they have no seed in common, or their prompts differ.
    """
    pairs = [(x, y) for x, y in itertools.product(a.runs, b.runs) if x.seed == y.seed]
    if not pairs:
        raise ValueError("the methods have no seed in common, so that nothing can be paired")
    first = pairs[0][0]
    for run in itertools.chain.from_iterable(pairs):
        if run.samples[run.steps[0]].prompts != first.samples[first.steps[0]].prompts:
            raise ValueError(f"{first.name} and {run.name} have answered other prompts; evaluate both on the same")
    paths = [(x.path("test"), y.path("test")) for x, y in pairs]
    mean = float(np.mean([a.reward(*x) - b.reward(*y) for x, y in paths]))
    error, freedom = _standard_error(np.stack([_of_prompts(a, *x) - _of_prompts(b, *y) for x, y in paths]))
    half = float(student.ppf(0.975, freedom)) * error
    p = float(2 * student.sf(abs(mean) / error, freedom)) if error else float(mean == 0)
    return Difference(mean, mean - half, mean + half, p)


def _of_prompts(choice: Choice, kl_TN: np.ndarray, reward_TN: np.ndarray) -> np.ndarray:
    """What each prompt has of the reward at a point, [N]: its own reward at a step, else N·whole − (N − 1)·without."""
    if choice.step is not None:
        return reward_TN[choice.step]
    size = reward_TN.shape[1]
    without_N = [choice.reward(np.delete(kl_TN, i, 1), np.delete(reward_TN, i, 1)) for i in range(size)]
    return size * choice.reward(kl_TN, reward_TN) - (size - 1) * np.array(without_N)


def _standard_error(values_SN: np.ndarray) -> tuple[float, float]:
    """(standard error of the mean of all, its degrees of freedom), where seeds and prompts are drawn.

    Mean squares of seeds, prompts and the rest give the three variances; one that would be negative is 0.
    """
    seeds, size = values_SN.shape
    prompts_N = values_SN.mean(0)
    of_prompts = seeds * prompts_N.var(ddof=1)
    if seeds == 1:
        return float((of_prompts / size) ** 0.5), size - 1
    seeds_S = values_SN.mean(1)
    of_seeds = size * seeds_S.var(ddof=1)
    rest_SN = values_SN - seeds_S[:, None] - prompts_N + values_SN.mean()
    rest = float((rest_SN**2).sum()) / ((seeds - 1) * (size - 1))
    of_seeds, of_prompts = max(of_seeds, rest), max(of_prompts, rest)
    total = of_seeds + of_prompts - rest
    if not total:
        return 0.0, seeds - 1
    parts = of_seeds**2 / (seeds - 1) + of_prompts**2 / (size - 1) + rest**2 / ((seeds - 1) * (size - 1))
    return float((total / (seeds * size)) ** 0.5), total**2 / parts


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
