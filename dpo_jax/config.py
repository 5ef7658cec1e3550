"""ConfigDict → frozen dataclasses, checked. Past this module no code sees a ConfigDict."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from dpo_jax import buckets
from dpo_jax.limits import check_values
from dpo_jax.lora import Adapter
from dpo_jax.losses.objective import Objective, make_objective


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
    prompt_answers: int | None
    batch_size: int
    eval_path: str | None
    eval_share: float
    mixture_seed: int
    tokenizer: str | None
    template: str
    turns: str
    truncate: str
    pairs: str
    on_error: str
    max_skips: float
    flip: float


@dataclass(frozen=True)
class ModelConfig:
    family: str
    context_length: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    dtype: str
    param_dtype: str
    output_dtype: str | None
    attention: str
    remat: str
    unroll: int


@dataclass(frozen=True)
class InitConfig:
    run: str | None
    hf: str | None


@dataclass(frozen=True)
class LossConfig:
    name: str
    reduction: str | None
    divergence: str
    wpo: bool
    hyper: Mapping[str, float]


@dataclass(frozen=True)
class ReferenceConfig:
    store: str | None
    sync_every: int | None
    sync_rate: float


@dataclass(frozen=True)
class LoraConfig:
    rank: int | None
    alpha: float
    dropout: float
    layers: str
    init: str | None

    def adapter(self) -> Adapter | None:
        """What the models are told; None trains all parameters."""
        return None if self.rank is None else Adapter(self.layers, self.rank, self.alpha, self.dropout)


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
    max_skipped: int


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
    keep_every: int | None
    keep_best: str | None
    best: str
    on_damage: str


@dataclass(frozen=True)
class ParallelConfig:
    mode: str
    devices: int | None
    data: int | None
    fsdp: int
    tensor: int


@dataclass(frozen=True)
class PlanConfig:
    topology: str | None
    sizes: str | None


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
    lora: LoraConfig
    optim: OptimConfig
    train: RunConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    parallel: ParallelConfig
    plan: PlanConfig
    prefer: PreferConfig

    def objective(self) -> tuple[Objective, dict[str, float]]:
        """The losses with what they need, and their numbers."""
        loss = self.loss
        return make_objective(loss.name, loss.hyper, reduction=loss.reduction, divergence=loss.divergence, wpo=loss.wpo)


def from_config_dict(config: ConfigDict) -> Config:
    """Checks a config and freezes it.

    Raises:
      ValueError: a missing or unknown key, a value of the wrong type or out of range, an unknown name.
    """
    built = _build(Config, config.to_dict(), "config")
    _check(built)
    return built


def from_dict(values: Mapping[str, Any]) -> Config:
    """A config from what ``to_json`` wrote, checked.

    A key that it lacks was added since; where None is allowed, which leaves out what the key is for, it is None.

    Raises:
      ValueError: as of :func:`from_config_dict`.
    """
    values = _with_later_keys(Config, values)
    loss = dict(values["loss"])
    hyper = loss.pop("hyper")
    built = _build(Config, {**values, "loss": {**loss, **hyper}}, "config")
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


def _with_later_keys(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Saved values, and None for optional keys that they lack."""
    found = dict(values)
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint) and isinstance(found.get(name), Mapping):
            found[name] = _with_later_keys(typing.cast(type, hint), found[name])
        elif isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint):
            found.setdefault(name, None)
    return found


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
    check_values(dataclasses.asdict(c))
    _check_init(c)
    objective, _ = c.objective()  # losses know their own names and numbers
    _check_sizes(c)
    _check_data(c)
    _check_train(c)
    _check_parallel(c)
    _check_reference(c, objective)
    _check_lora(c)


def _check_init(c: Config) -> None:
    if c.init.hf == "":
        raise ValueError(
            "config.init.hf is empty: give the folder or hub id of a Hugging Face model, such as --config.init.hf=MODEL"
        )


def _check_sizes(c: Config) -> None:
    if c.init.hf is not None:
        return  # those of the model that is read are checked as it is
    if c.model.layers % c.model.unroll or c.model.width % c.model.heads:
        raise ValueError(
            f"config.model: unroll {c.model.unroll} must divide layers {c.model.layers}, and heads {c.model.heads} "
            f"must divide width {c.model.width}"
        )
    longest = c.data.prompt_length + c.data.answer_length
    if longest > c.model.context_length:
        raise ValueError(
            f"sequences of up to {longest} tokens (config.data.prompt_length + config.data.answer_length) do not fit "
            f"into config.model.context_length {c.model.context_length}; shorten the former or raise the latter"
        )


def _check_data(c: Config) -> None:
    buckets.local(c.data.dir, "config.data.dir")
    if c.data.prompt_answers is not None and c.data.layout != "packed":
        raise ValueError(
            f"config.data.prompt_answers is {c.data.prompt_answers}, and rows of the layout {c.data.layout!r} hold one "
            "example: set config.data.layout=packed, or leave config.data.prompt_answers unset"
        )


def _check_train(c: Config) -> None:
    if (c.train.steps is None) == (c.train.epochs is None):
        raise ValueError(
            "set exactly one of config.train.steps and config.train.epochs; they are "
            f"{c.train.steps} and {c.train.epochs} (--config.train.epochs=None unsets one)"
        )


def _check_parallel(c: Config) -> None:
    mesh = c.parallel
    if mesh.mode == "pmap" and (mesh.data, mesh.fsdp, mesh.tensor) != (None, 1, 1):
        raise ValueError("config.parallel.data, fsdp and tensor are the axes of a mesh: set config.parallel.mode=mesh")


def _check_reference(c: Config, objective: Objective) -> None:
    if c.reference.store is None:
        return
    buckets.local(c.reference.store, "config.reference.store")
    if not objective.needs_reference:
        raise ValueError(
            f"config.reference.store is set, but loss {c.loss.name!r} reads no reference: there is nothing to store; "
            "leave config.reference.store unset"
        )
    if c.reference.sync_every is not None:
        raise ValueError(
            "config.reference.store keeps the log-probabilities of a reference that stands still, and with "
            f"config.reference.sync_every {c.reference.sync_every} it moves: leave one of the two unset"
        )


def _check_lora(c: Config) -> None:
    try:
        re.compile(c.lora.layers)
    except re.error as error:
        raise ValueError(f"config.lora.layers {c.lora.layers!r} is no regular expression: {error}") from error
    if c.model.param_dtype == "bfloat16" and c.lora.rank is None:
        raise ValueError(
            "config.model.param_dtype is 'bfloat16' and config.lora.rank is not set: parameters that are trained must "
            "be in float32, since updates at usual learning rates are lost in the rounding of bfloat16, and a mean "
            "that keeps 0.999 of itself keeps all. For products in bfloat16 set config.model.dtype"
        )
    if c.lora.init is not None and c.lora.rank is None:
        raise ValueError("config.lora.init is set and config.lora.rank is not: set it to the rank of those adapters")
    if c.lora.rank is not None and c.reference.sync_every is not None:
        raise ValueError(
            "config.reference.sync_every moves the reference, and with config.lora.rank that is the frozen base of the "
            "adapters: the policy would move with it. Unset one of them"
        )
