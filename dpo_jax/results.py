"""What the runs of a sweep have found: metrics and samples, by method, condition, setting and seed.

The axes of a sweep play four roles. Values of the *compared* axis are the methods; those of the *tuned* axes are
settings, among which each method may choose; *seeds* are repetitions; whatever is left is a condition, such as a share
of noise, within which methods are compared.

Held-out prompts fall into two halves by the hash of their text: settings and steps are chosen on the validation half,
and the numbers that are reported come from the test half.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax import grid
from dpo_jax.workdir import CONFIG_FILE, SUMMARY_FILE
from dpo_jax.writers import METRICS_FILE, read_metrics, split_lines

HALVES = ("validation", "test")


@dataclass(frozen=True)
class Roles:
    """What each axis of a sweep is for.

    Attributes:
      compared: the axis whose values are the methods.
      tuned: axes of settings.
      seeds: axis of repetitions; None where there is none.
      conditions: the other axes.
      labels: of each axis, in order.
    """

    compared: str
    tuned: tuple[str, ...]
    seeds: str | None
    conditions: tuple[str, ...]
    labels: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Samples:
    """Answers of an evaluation, a prompt each; arrays are float64 [n].

    Attributes:
      prompts: their texts.
      answers: their texts.
      rewards: of prompt and answer.
      kl: log π(y|x) − log π_ref(y|x), nats: their mean estimates the KL of policy from reference.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    rewards: np.ndarray
    kl: np.ndarray


@dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
      name: of the run.
      method: label on the compared axis.
      condition: labels on the axes of conditions.
      setting: labels on the tuned axes.
      seed: label on the axis of seeds, "" without one.
      config: as it is kept beside the run.
      rows: lines of ``metrics.jsonl``.
      samples: by step, rising.
    """

    name: str
    method: str
    condition: tuple[str, ...]
    setting: tuple[str, ...]
    seed: str
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, float]]
    samples: Mapping[int, Samples]

    @property
    def steps(self) -> list[int]:
        """Steps with samples."""
        return list(self.samples)

    def path(self, half: str) -> tuple[np.ndarray, np.ndarray]:
        """(KL, reward) of every prompt of a half at every evaluation, float64 [steps, prompts]."""
        first = self.samples[self.steps[0]]
        own = half_of(first.prompts) == half
        return tuple(np.stack([getattr(s, key)[own] for s in self.samples.values()]) for key in ("kl", "rewards"))  # type: ignore[return-value]


def half_of(prompts: Sequence[str]) -> np.ndarray:
    """The half that each prompt belongs to, whatever else is sampled: an array of names in HALVES."""
    return np.array([HALVES[hashlib.sha256(prompt.encode()).digest()[0] % 2] for prompt in prompts])


def roles_of(
    labels: Mapping[str, Sequence[str]], compared: str | None, tuned: Sequence[str] | None, seeds: str
) -> Roles:
    """What each axis is for; what is not said is taken from the names of the axes.

    Args:
      labels: of each axis, in order.
      compared: None is the first axis that has several values and no other role.
      tuned: None is the learning rate, where it is an axis.
      seeds: axis of repetitions.

    Raises:
      ValueError: an axis that does not exist, or nothing to compare.
    """
    tuned = tuple(tuned) if tuned is not None else tuple(axis for axis in ("optim.learning_rate",) if axis in labels)
    unknown = [axis for axis in (*tuned, *([compared] if compared else [])) if axis not in labels]
    if unknown:
        raise ValueError(f"the sweep has no axis {', '.join(unknown)}; it has {', '.join(labels)}")
    others = [axis for axis in labels if axis != seeds and axis not in tuned]
    several = [axis for axis in others if len(labels[axis]) > 1]
    chosen = compared or next(iter([*several, *others]), None)
    if chosen is None:
        raise ValueError(f"the sweep has nothing to compare: its axes are {', '.join(labels)}; give --compare=AXIS")
    conditions = tuple(axis for axis in others if axis != chosen and len(labels[axis]) > 1)
    return Roles(chosen, tuned, seeds if seeds in labels else None, conditions, labels)


def load(folder: Path, compared: str | None = None, tuned: Sequence[str] | None = None, seeds: str = "seed") -> tuple:
    """The finished runs of a sweep.

    Args:
      folder: workdir of the sweep.
      compared: axis of the methods.
      tuned: axes of settings.
      seeds: axis of repetitions.

    Returns:
      (Roles, list of Results, names of runs that are not finished).

    Raises:
      OSError: no sweep, or a run that cannot be read.
      ValueError: no run is finished, or one has no samples to compare.
    """
    labels, points = grid.read(folder)
    roles = roles_of(labels, compared, tuned, seeds)
    results, missing = [], []
    for name, point in points.items():
        place = folder / grid.RUNS_FOLDER / name
        if not (place / SUMMARY_FILE).is_file():
            missing.append(name)
            continue
        samples = {int(p.stem.removeprefix("step_")): _read_samples(p) for p in sorted(place.glob("samples/step_*"))}
        if not samples:
            raise ValueError(f"run {name} has no samples; set config.eval.prompts, so that rewards can be compared")
        results.append(
            Result(
                name,
                point[roles.compared],
                tuple(point[axis] for axis in roles.conditions),
                tuple(point[axis] for axis in roles.tuned),
                point[roles.seeds] if roles.seeds else "",
                json.loads((place / CONFIG_FILE).read_text(encoding="utf-8")),
                read_metrics(place / METRICS_FILE),
                samples,
            )
        )
    if not results:
        raise ValueError(
            f"no run of {folder} is finished; python -m dpo_jax.sweep --status --workdir={folder} shows all"
        )
    return roles, results, missing


def _read_samples(path: Path) -> Samples:
    rows = [json.loads(line) for line in split_lines(path.read_text(encoding="utf-8"))]
    prompts, answers = (tuple(row[key] for row in rows) for key in ("prompt", "answer"))
    rewards, kl = (np.array([row.get(key, np.nan) for row in rows]) for key in ("reward", "log_ratio"))
    return Samples(prompts, answers, rewards, kl)
