"""Hyper-parameters of losses: what each takes, which values are allowed, and the numbers of a sum of losses.

In a sum every loss keeps its own numbers, named ``loss.parameter``. A value given as ``beta`` goes to all losses that
take a β; given as ``dpo.beta``, to that one. Losses that are given none keep their paper's.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dpo_jax.losses.base import Loss

# Numbers that belong to the way log-probabilities reach the losses, not to one of them.
SHARED = {"divergence_alpha": 0.5, "length_alpha": 0.5}


@dataclass(frozen=True)
class Interval:
    """Allowed values between ``low`` and ``high``; an end is left out when it is open."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        return above and (value < self.high if self.high_open else value <= self.high) and math.isfinite(value)

    def __str__(self) -> str:
        opening, closing = "(" if self.low_open else "[", ")" if self.high_open else "]"
        return f"{opening}{self.low:g}, {self.high:g}{closing}"


POSITIVE = Interval(0, high_open=True, low_open=True)
NOT_NEGATIVE = Interval(0, high_open=True)
ANY = Interval(-math.inf, low_open=True, high_open=True)

RANGES: dict[str, Interval] = {
    "beta": POSITIVE,
    "label_smoothing": Interval(0, 0.5, high_open=True),
    "desirable_weight": POSITIVE,
    "undesirable_weight": POSITIVE,
    "temperature": POSITIVE,
    "gamma": NOT_NEGATIVE,
    "nll_weight": NOT_NEGATIVE,
    "length_penalty": ANY,
    "offset_scale": NOT_NEGATIVE,
    "penalty": NOT_NEGATIVE,
    "unlikelihood_weight": NOT_NEGATIVE,
    "adaptation": NOT_NEGATIVE,
    "momentum": Interval(0, 1, high_open=True),
    "divergence_alpha": ANY,
    "length_alpha": Interval(0, 1),
}

# Where a loss needs more than the range of its parameter's name: KL to a label of probability 0 is infinite.
STRICTER: dict[tuple[str, str], Interval] = {
    ("exo_pair", "label_smoothing"): Interval(0, 0.5, low_open=True, high_open=True),
}


def parameters_of(loss: Loss) -> dict[str, float]:
    """The keyword-only arguments of a loss with their defaults, less the numbers that its statistic gives."""
    parameters = inspect.signature(loss.fn).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return {name: value for name, value in defaults.items() if value is not inspect.Parameter.empty}


def range_of(loss: str, parameter: str) -> Interval:
    """The values that a loss allows for a parameter of its own.

    Raises:
      ValueError: a parameter that has no range yet, as that of a new loss.
    """
    if parameter not in RANGES:
        raise ValueError(
            f"loss {loss!r} takes {parameter}, whose range nobody has given: add a line {parameter!r} to RANGES in "
            f"dpo_jax/losses/hyper.py, and a placeholder {parameter!r} to loss in configs/base.py"
        )
    return STRICTER.get((loss, parameter), RANGES[parameter])


def fill(
    losses: Mapping[str, Loss], given: Mapping[str, float | None], shared: Iterable[str] = tuple(SHARED)
) -> dict[str, float]:
    """Numbers of all losses: the papers' defaults, overridden by what was given, and checked.

    Args:
      losses: the losses of a sum, by name.
      given: values by ``parameter`` or ``loss.parameter``; None is not given.
      shared: which of ``SHARED`` may be given.

    Returns:
      {"loss.parameter": value}, and the shared numbers under their own names.

    Raises:
      ValueError: a parameter that no loss of the sum takes, or a value that is no number or out of its range.
    """
    defaults = {f"{name}.{p}": v for name, loss in losses.items() for p, v in parameters_of(loss).items()}
    values = {name: value for name, value in given.items() if value is not None}
    for name in values:
        _check_taken(name, losses, set(defaults), set(shared))
    numbers = dict(SHARED) | {name: values[name] for name in SHARED if name in values}
    for full, default in defaults.items():
        # The more special name wins.
        numbers[full] = values.get(full, values.get(full.split(".")[1], default))
    for full, value in numbers.items():
        _check_range(full, value)
    return {name: float(value) for name, value in numbers.items()}


def _check_taken(name: str, losses: Mapping[str, Loss], full: set[str], shared: set[str]) -> None:
    plain = {f.split(".")[1] for f in full}
    if name in full | plain | shared:
        return
    if name in SHARED:
        option = "divergence='alpha'" if name == "divergence_alpha" else "reduction='desensitized'"
        raise ValueError(f"{name} is given, but is read only with {option}; set that, or leave {name} out")
    taken = sorted(plain | shared)
    near = difflib.get_close_matches(name.split(".")[-1], taken, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    sum_ = " + ".join(losses)
    raise ValueError(f"loss {sum_!r} does not take {name}{hint}; it takes {', '.join(taken) or 'no hyper-parameters'}")


def _check_range(full: str, value: float) -> None:
    loss, _, parameter = full.rpartition(".")
    allowed = range_of(loss, parameter)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{full} must be a number in {allowed}, got {value!r}")
    if value not in allowed:
        raise ValueError(f"{full} = {value!r} is out of range; it must be in {allowed}")
