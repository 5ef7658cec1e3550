"""What keeps a run from going on with wrong numbers: steps that are not finite, and warnings in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dpo_jax.gradients import Scorer, make_gradient
from dpo_jax.metrics import Metrics
from dpo_jax.state import ALONE, Axis, Hyper, StepConfig, TrainState
from dpo_jax.steps import SKIPPED, TrainStep
from dpo_jax.trees import named_leaves
from dpo_jax.types import Array, PreferenceBatch


@struct.dataclass
class Guarded:
    """A training state, and how many steps were left out of it because they were not finite (int32 scalar)."""

    state: TrainState
    skipped: Array


def guard(step: TrainStep, limit: int) -> Callable[[Guarded, PreferenceBatch, Hyper], tuple[Guarded, Metrics]]:
    """A train step that counts the updates that were not taken because they were not finite.

    When more than ``limit`` have been skipped, the state stands still: the host, which looks one step late, finds it as
    it was before that step.

    Args:
      step: leaves the state as it was where a number is not finite, or where it is told to.
      limit: skipped steps that a run survives; 0 stops at the first.

    Returns:
      The guarded step. Metrics of a skipped step are empty, but for ``SKIPPED``.
    """

    def guarded(carry: Guarded, batch: PreferenceBatch, hyper: Hyper) -> tuple[Guarded, Metrics]:
        over = carry.skipped > limit
        state, metrics = step(carry.state, batch, hyper, ~over)
        left_out = metrics[SKIPPED]
        taken = left_out.value == 0
        skipped = carry.skipped + (~over & ~taken)
        # The number of a skipped step is used up: it is the position in the data and in the schedule.
        state = dataclasses.replace(state, step=jnp.where(skipped > limit, carry.state.step, state.step))
        metrics = jax.tree.map(lambda m: jnp.where(taken, m, jnp.zeros_like(m)), dict(metrics))
        return Guarded(state, skipped), {**metrics, SKIPPED: left_out}

    return guarded


def make_probe(
    scorer: Scorer,
    config: StepConfig,
    axis: Axis = ALONE,
) -> Callable[[TrainState, PreferenceBatch, Hyper], dict[str, Any]]:
    """Builds the pure function (state, batch, hyper) → the tensors that a step passes through, in its order.

    Args:
      scorer: of the run.
      config: of the run's step.
      axis: the devices that share the batch.

    Returns:
      The probe. Log-probabilities are [micro-batches, X, A, C], all slots in order; gradients are like the parameters.
    """
    gradient = make_gradient(scorer.model, scorer.objective, config, axis)

    def probe(state: TrainState, batch: PreferenceBatch, hyper: Hyper) -> dict[str, Any]:
        own = scorer.of(state)
        grads, metrics, _ = gradient(state, batch, hyper)
        return {
            "params": state.params,
            "reference": state.reference,
            "opt_state": state.opt_state,
            _POLICY: jax.lax.map(lambda b: own.policy(state.params, b).sum, batch.answers),
            _REFERENCE: jax.lax.map(lambda b: own.reference(state.reference, b).sum, batch.answers),
            "loss": metrics["loss"].total,
            "gradient": grads,
        }

    return probe


@dataclass(frozen=True)
class Finding:
    """Where a step stops being finite: the first tensor, and the rows of the batch that are not finite in it."""

    tensor: str
    rows: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.tensor + (f", in row(s) {_some(self.rows)} of the batch" if self.rows else "")


# In the order of a step: compiled functions hand dictionaries back with their keys sorted.
_POLICY, _REFERENCE = "log-probabilities of the policy", "log-probabilities of the reference"
_ORDER = ("params", "reference", "opt_state", _POLICY, _REFERENCE, "loss", "gradient")


def first_not_finite(tensors: Mapping[str, Any], slots: int) -> Finding | None:
    """Looks at what a probe returned, on the host.

    Args:
      tensors: by name; log-probabilities are of all slots, in the order of rows.
      slots: S, slots of a row.

    Returns:
      The first tensor with a value that is not finite, None when all are.
    """
    for name in _ORDER:
        for path, leaf in named_leaves(tensors[name]).items():
            bad = ~finite(leaf)
            if bad.any():
                places = np.flatnonzero(bad) // slots if name in (_POLICY, _REFERENCE) else ()
                return Finding("/".join(filter(None, (name, path))), tuple(sorted({int(row) for row in places})))
    return None


def finite(array: Any) -> np.ndarray:
    """Which numbers of an array are finite; parameters that lie as bits (``models.as_read``) are looked at as bf16."""
    numbers = np.asarray(array)
    return np.isfinite(numbers.view(jnp.bfloat16) if numbers.dtype == np.uint16 else numbers)


class Watch:
    """Looks at a run's numbers and warns, once each, of what usually means that something is wrong.

    Args:
      needs_reference: whether the objective compares the policy with a reference.
      after: step up to which the policy is not expected to have moved, such as the end of the warm-up.
    """

    PATIENCE = 3  # lines of metrics in a row

    def __init__(self, needs_reference: bool, after: int = 0) -> None:
        self._needs_reference, self._after = needs_reference, after
        self._entropy: float | None = None
        self._stuck = self._equal = 0
        self._said: set[str] = set()

    def memory(self) -> dict[str, Any]:
        """What a run that goes on from here must know to warn as this one would; JSON values."""
        return {"entropy": self._entropy, "stuck": self._stuck, "equal": self._equal, "said": sorted(self._said)}

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Goes on from what ``memory`` gave."""
        self._entropy, self._stuck, self._equal = memory["entropy"], memory["stuck"], memory["equal"]
        self._said = set(memory["said"])

    def first_step(self, numbers: Mapping[str, float]) -> Iterator[str]:
        """Warnings about the numbers of step 1, which are measured before its update."""
        margin = numbers.get("rewards/margins", 0.0)
        # Policy and reference are the same parameters; fp32 sums in another order differ by far less.
        if self._needs_reference and abs(margin) > 1e-3:
            yield (
                f"margins are {margin:.4g} at step 0, where the policy is its reference: expected 0. The two are "
                "scored differently (dtype, layout, dropout), or their parameters are not the same"
            )

    def look(self, step: int, numbers: Mapping[str, float]) -> Iterator[str]:
        """Warnings about one line of metrics.

        Args:
          step: of the line.
          numbers: its values by name.

        Yields:
          Sentences.
        """
        signs = {
            "equal": (self._equals_reference(step, numbers), self._equal_words(step)),
            "stuck": (self._is_stuck(step, numbers), self._stuck_words(step)),
            "entropy": (self._collapses(numbers), self._entropy_words(step, numbers)),
        }
        for name, (seen, words) in signs.items():
            if seen and name not in self._said:
                self._said.add(name)
                yield words
                return  # one cause shows in several signs

    def _equals_reference(self, step: int, numbers: Mapping[str, float]) -> bool:
        expected = self._needs_reference and step > self._after
        same = expected and numbers.get("log_ratio/mean") == 0.0 and not numbers.get("rewards/margins")
        self._equal = self._equal + 1 if same else 0
        return self._equal >= self.PATIENCE

    def _is_stuck(self, step: int, numbers: Mapping[str, float]) -> bool:
        expected = self._needs_reference and step > self._after
        near = expected and abs(numbers.get("loss", math.nan) - math.log(2)) < 1e-4
        self._stuck = self._stuck + 1 if near else 0
        return self._stuck >= self.PATIENCE

    def _collapses(self, numbers: Mapping[str, float]) -> bool:
        entropy = numbers.get("entropy", math.nan)
        if self._entropy is None and math.isfinite(entropy):
            self._entropy = entropy
        return self._entropy is not None and entropy < 0.1 * self._entropy

    @staticmethod
    def _equal_words(step: int) -> str:
        return (
            f"after {step} steps the policy still equals its reference to the last bit: is optim.learning_rate 0 (or "
            "so small that fp32 rounds updates away), or does no gradient reach the parameters?"
        )

    @staticmethod
    def _stuck_words(step: int) -> str:
        return (
            f"the loss is still log 2 = 0.6931 at step {step}: the policy does not tell chosen from rejected answers. "
            "Are they different, do their tokens have weights, is optim.learning_rate too small?"
        )

    def _entropy_words(self, step: int, numbers: Mapping[str, float]) -> str:
        return (
            f"at step {step} the entropy of the policy is {numbers.get('entropy', math.nan):.3g} nats a token, below a "
            f"tenth of the {self._entropy or 0.0:.3g} at the start: it collapses onto few answers. Look at samples; a "
            "larger loss.beta or a smaller learning rate keeps it nearer to the reference"
        )


def _some(values: Any, most: int = 8) -> str:
    values = list(values)
    return ", ".join(map(str, values[:most])) + (f" and {len(values) - most} more" if len(values) > most else "")
