"""ConfigDict → frozen dataclasses, checked. Past this module no code sees a ConfigDict."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from dpo_jax.losses.objective import Objective, make_objective
from dpo_jax.models import FAMILIES
from dpo_jax.optim import SCHEDULES


@dataclass(frozen=True)
class DataConfig:
    source: str
    path: str | None
    dir: str
    reviews: str
    vocab_size: int
    continuations: bool
    layout: str
    prompt_length: int
    answer_length: int
    row_length: int | None
    row_examples: int
    batch_size: int
    eval_path: str | None
    eval_share: float
    tokenizer: str | None
    template: str
    turns: str
    truncate: str
    pairs: str
    on_error: str
    max_skips: float


@dataclass(frozen=True)
class ModelConfig:
    family: str
    context_length: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    dtype: str
    unroll: int


@dataclass(frozen=True)
class InitConfig:
    run: str | None


@dataclass(frozen=True)
class LossConfig:
    name: str
    reduction: str | None
    divergence: str
    wpo: bool
    hyper: Mapping[str, float]


@dataclass(frozen=True)
class ReferenceConfig:
    sync_every: int | None
    sync_rate: float


@dataclass(frozen=True)
class OptimConfig:
    learning_rate: float
    schedule: str
    warmup_steps: int
    b1: float
    b2: float
    epsilon: float
    weight_decay: float
    clip_norm: float | None


@dataclass(frozen=True)
class RunConfig:
    steps: int | None
    epochs: float | None
    micro_batches: int
    head_chunk: int
    log_every: int


@dataclass(frozen=True)
class EvalConfig:
    every: int
    examples: int
    prompts: int
    temperature: float
    reward: str


@dataclass(frozen=True)
class CheckpointConfig:
    every: int
    keep: int | None


@dataclass(frozen=True)
class ParallelConfig:
    devices: int | None


@dataclass(frozen=True)
class PreferConfig:
    prompts: int
    eval_prompts: int
    answers: int
    min_prompt: int
    max_prompt: int
    temperature: float
    batch_size: int
    reward: str


@dataclass(frozen=True)
class Config:
    """A whole experiment; ``configs/base.py`` says what each key means."""

    seed: int
    data: DataConfig
    model: ModelConfig
    init: InitConfig
    loss: LossConfig
    reference: ReferenceConfig
    optim: OptimConfig
    train: RunConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    parallel: ParallelConfig
    prefer: PreferConfig

    def objective(self) -> tuple[Objective, dict[str, float]]:
        """The losses with what they need, and their numbers."""
        loss = self.loss
        return make_objective(
            loss.name, loss.hyper, reduction=loss.reduction, divergence=loss.divergence, wpo=loss.wpo
        )


def from_config_dict(config: ConfigDict) -> Config:
    """Checks a config and freezes it.

    Raises:
      ValueError: a missing or unknown key, a value of the wrong type or out of range, an unknown name.
    """
    built = _build(Config, config.to_dict(), "config")
    _check(built)
    return built


def to_json(config: Config) -> str:
    """The config as it is kept beside a run."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def differences(got: Mapping[str, Any], expected: Mapping[str, Any], path: str = "config") -> list[str]:
    """Keys in which two configs (nested dicts) differ, with both values."""
    lines = []
    for key in [*expected, *(k for k in got if k not in expected)]:
        a, b = got.get(key), expected.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{path}.{key}")
        elif a != b:
            lines.append(f"{path}.{key}: {a!r} here, {b!r} there")
    return lines


def _build(kind: type, values: Mapping[str, Any], path: str) -> Any:
    if kind is LossConfig:
        values = _gather_hyper(values)
    hints = typing.get_type_hints(kind)
    unknown, missing = sorted(set(values) - set(hints)), sorted(set(hints) - set(values))
    if unknown or missing:
        raise ValueError(
            f"{path} has unknown keys {unknown} and lacks {missing}; start from configs/base.py, which has every key"
        )
    return kind(**{name: _value(hint, values[name], f"{path}.{name}") for name, hint in hints.items()})


def _gather_hyper(values: Mapping[str, Any]) -> dict[str, Any]:
    """Moves the hyper-parameters that are set into one mapping: which exist is the losses' business."""
    fixed = {key: values[key] for key in ("name", "reduction", "divergence", "wpo") if key in values}
    hyper = {key: value for key, value in values.items() if key not in fixed and value is not None}
    return {**fixed, "hyper": hyper}


def _value(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, path)
    if typing.get_origin(hint) is not None and issubclass(typing.get_origin(hint), Mapping):
        return {key: _value(float, number, f"{path}.{key}") for key, number in value.items()}
    accepted = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in accepted and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) not in accepted:
        names = " or ".join(t.__name__.replace("NoneType", "None") for t in accepted)
        raise ValueError(f"{path} is {value!r} ({type(value).__name__}); expected {names}")
    return value


def _check(c: Config) -> None:
    _check_positive(c)
    for path, value, known in (
        ("model.family", c.model.family, FAMILIES),
        ("optim.schedule", c.optim.schedule, SCHEDULES),
        ("model.dtype", c.model.dtype, ("float32", "bfloat16")),
    ):
        if value not in known:
            raise ValueError(f"config.{path} is {value!r}; known: {', '.join(known)}")
    if (c.train.steps is None) == (c.train.epochs is None):
        raise ValueError("set exactly one of config.train.steps and config.train.epochs")
    if c.model.layers % c.model.unroll or c.model.width % c.model.heads:
        raise ValueError(
            f"config.model: unroll {c.model.unroll} must divide layers {c.model.layers}, and heads {c.model.heads} must "
            f"divide width {c.model.width}"
        )
    longest = c.data.prompt_length + c.data.answer_length
    if longest > c.model.context_length:
        raise ValueError(
            f"sequences of up to {longest} tokens (config.data.prompt_length + config.data.answer_length) do not fit "
            f"into config.model.context_length {c.model.context_length}; shorten the former or raise the latter"
        )
    c.objective()


def _check_positive(c: Config) -> None:
    free = {"warmup_steps", "weight_decay", "examples", "prompts", "eval_prompts", "b1", "b2", "label_smoothing", "seed"}
    for section, values in dataclasses.asdict(c).items():
        if not isinstance(values, dict) or section == "loss":
            continue
        for key, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if value < 0 or (value == 0 and key not in free):
                expected = "0 or more" if key in free else "more than 0"
                raise ValueError(f"config.{section}.{key} is {value}; expected {expected}")
