"""From a config to the parts that it stands for: model, objective, optimizer, steps and batches."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from dpo_jax import lora
from dpo_jax.config import Config, ParallelConfig
from dpo_jax.data.example import Example
from dpo_jax.data.layouts import Shape
from dpo_jax.data.pipeline import Described, Pipeline, Source
from dpo_jax.gradients import Scorer
from dpo_jax.guards import Guarded, guard
from dpo_jax.losses.objective import Objective, check_data
from dpo_jax.models import as_read, logical_axes, param_shapes, triton
from dpo_jax.models.sight import LONGEST
from dpo_jax.optim import AdamW
from dpo_jax.parallel import DataParallel, MeshParallel, Parallel
from dpo_jax.placing import copied
from dpo_jax.sharding import mesh_shape
from dpo_jax.start import make_start_model
from dpo_jax.state import Axis, Hyper, StepConfig, TrainState
from dpo_jax.steps import init_state, make_train_step
from dpo_jax.types import Params


@dataclass(frozen=True)
class Parts:
    """What a config stands for, built: everything but the data and the parameters.

    The model has adapters where adapters are trained; the reference may follow the policy (``reference.sync_every``).
    """

    model: nn.Module
    objective: Objective
    hyper: Hyper
    optimizer: AdamW
    shape: Shape
    reference_moves: bool

    @property
    def scores_reference(self) -> bool:
        """Whether the steps score a reference: one is needed, and its log-probabilities are not stored."""
        return self.objective.needs_reference and not self.shape.with_reference


def build(config: Config, *, vocab_size: int, answers: int, platform: str | None = None) -> Parts:
    """Builds the parts of a run.

    Args:
      config: the experiment.
      vocab_size: V of the tokenizer.
      answers: A of the data.
      platform: of the devices: cpu, gpu or tpu; None is that of this machine's.

    Raises:
      ValueError: a paired loss on data with one answer a prompt; adapters for layers that the model does not have.
    """
    objective, numbers = config.objective()
    check_data(objective, answers)
    optim = config.optim
    model = with_attention(make_start_model(config, vocab_size), config, platform or jax.default_backend())
    return Parts(
        model=_adapted(model, config.lora.adapter()),
        objective=objective,
        hyper=Hyper(
            {k: np.asarray(v, np.float32) for k, v in numbers.items()}, np.asarray(optim.learning_rate, np.float32)
        ),
        optimizer=AdamW(
            b1=optim.b1,
            b2=optim.b2,
            epsilon=optim.epsilon,
            weight_decay=optim.weight_decay,
            clip_norm=optim.clip_norm,
        ),
        shape=Shape(
            answers,
            config.data.prompt_length,
            config.data.answer_length,
            objective.needs_prompt,
            config.data.row_length,
            config.data.row_examples,
            with_reference=config.reference.store is not None,
            prompt_answers=config.data.prompt_answers,
        ),
        reference_moves=config.reference.sync_every is not None,
    )


def with_attention(model: nn.Module, config: Config, platform: str) -> nn.Module:
    """The module with the attention that ``config.model.attention`` asks for; why ``auto`` takes dense is logged.

    Raises:
      ValueError: a kernel that these devices, this model or this layout has not.
    """
    wanted = config.model.attention
    kernels = {"auto": _TRIED.get(platform, ()), "dense": ()}.get(wanted, (wanted,))
    reasons = {kernel: _WITHOUT[kernel](model, config, platform) for kernel in kernels}
    if reasons.get(wanted):
        raise ValueError(f"config.model.attention is {wanted!r}, but {reasons[wanted]}: set it to auto or dense")
    found = next((kernel for kernel, reason in reasons.items() if reason is None), "dense")
    if found == "dense" and reasons:
        logging.info("attention is dense: %s", "; ".join(f"not by {k}, for {reason}" for k, reason in reasons.items()))
    return model.clone(config=dataclasses.replace(model.config, attention=found))


def _without_splash(model: nn.Module, config: Config, platform: str) -> str | None:
    length = _row_positions(config)
    if platform != "tpu":
        return f"the devices are of the kind {platform}, and the kernel is for TPUs"
    if not 512 <= length <= LONGEST:
        return f"rows have {length} positions, and the kernel is for 512 to {LONGEST}"
    return None


def _without_cudnn(model: nn.Module, config: Config, platform: str) -> str | None:
    c = model.config
    if reason := _without_gpu_kernels(model, platform):
        return reason
    if config.data.layout != "concatenated":
        return f"rows of the layout {config.data.layout} hold several answers, and the kernel knows causal rows alone"
    if c.attention_cap is not None or any(w and w < _row_positions(config) for w in c.windows or ()):
        return "the model caps its scores or has windows, which the kernel has not"
    if c.size > 128 or c.size % 8:
        return f"the kernel is for heads of 8, 16, … 128, not {c.size}"
    return None


def _without_triton(model: nn.Module, config: Config, platform: str) -> str | None:
    if reason := _without_gpu_kernels(model, platform):
        return reason
    if model.config.size not in triton.SIZES:
        return f"the kernel is for heads of {', '.join(map(str, triton.SIZES))}, not {model.config.size}"
    return None


def _without_gpu_kernels(model: nn.Module, platform: str) -> str | None:
    """What each of the GPUs' kernels needs: such devices, and half precision."""
    if platform != "gpu":
        return f"the devices are of the kind {platform}, and the kernel is for GPUs"
    if (capability := _compute_capability()) < 8.0:
        return f"the kernel is for NVIDIA's compute capability 8.0 and above, not {capability}"
    if jnp.dtype(model.config.dtype).itemsize != 2:
        return f"the kernel is for half precision, not {model.config.dtype}"
    return None


_WITHOUT = {"splash": _without_splash, "cudnn": _without_cudnn, "triton": _without_triton}
# What auto tries, by the devices: the first that there is.
_TRIED = {"tpu": ("splash",), "gpu": ("cudnn", "triton")}


def _compute_capability() -> float:
    """Of the first GPU; 0 where it has none, or one that is no number."""
    try:
        return float(jax.devices()[0].compute_capability)
    except (AttributeError, ValueError):
        return 0.0


def _row_positions(config: Config) -> int:
    return config.data.row_length or config.data.prompt_length + config.data.answer_length


def _adapted(model: nn.Module, adapter: lora.Adapter | None) -> nn.Module:
    if adapter is None:
        return model
    lora.check_layers(adapter, param_shapes(model))
    return lora.with_adapter(model, adapter)


def step_config(config: Config, answers: int, steps: int) -> StepConfig:
    """What the train step of a config compiles in."""
    return StepConfig(
        answers=answers,
        schedule=config.optim.schedule,
        warmup=config.optim.warmup_steps,
        steps=steps,
        head_chunk=config.train.head_chunk,
        reference_sync_every=config.reference.sync_every,
        reference_sync_rate=config.reference.sync_rate,
        dropout_seed=config.seed if config.lora.rank is not None and config.lora.dropout else None,
    )


def guarded_step(config: Config, parts: Parts, steps: int, axis: Axis) -> Any:
    """The train step of a run of ``steps`` updates, pure, with its guard."""
    settings = step_config(config, parts.shape.answers, steps)
    step = make_train_step(parts.model, parts.objective, parts.optimizer, settings, axis)
    return guard(step, config.train.max_skipped)


def scorer(config: Config, parts: Parts) -> Scorer:
    """Scores batches as the run's step does."""
    return Scorer(parts.model, parts.objective, parts.shape.answers, config.train.head_chunk)


def make_parallel(settings: ParallelConfig, model: nn.Module, devices: Sequence[jax.Device]) -> Parallel:
    """The devices of a run, as its config wants them used.

    Args:
      settings: ``config.parallel``.
      model: its module.
      devices: of all processes.

    Raises:
      ValueError: too few devices, axes that do not multiply to them, heads that do not divide.
    """
    wanted = settings.devices or len(devices)
    if wanted > len(devices):
        raise ValueError(f"config.parallel.devices is {wanted}, this machine has {len(devices)}")
    if wanted < len(devices) and jax.process_count() > 1:
        raise ValueError(f"config.parallel.devices is {wanted}; {jax.process_count()} processes use all {len(devices)}")
    parallel: Parallel
    if settings.mode == "pmap":
        parallel = DataParallel(devices[:wanted])
    else:
        shape = mesh_shape(wanted, data=settings.data, fsdp=settings.fsdp, tensor=settings.tensor)
        _check_heads(settings.tensor, model)
        parallel = MeshParallel(devices[:wanted], shape, logical_axes(model))
    return parallel


def _check_heads(tensor: int, model: nn.Module) -> None:
    heads = model.config.key_heads
    if heads % tensor:
        known = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(f"config.parallel.tensor is {tensor}; it must divide the model's {heads} key heads: {known}")


def make_pipeline(config: Config, parts: Parts, source: Source, process: tuple[int, int] = (0, 1)) -> Pipeline:
    """Batches of a source, as a config wants them; ``process`` (index, count) reads its share of each."""
    return Pipeline(
        source,
        parts.shape,
        layout=config.data.layout,
        batch_size=config.data.batch_size,
        seed=config.seed,
        mismatched=parts.objective.needs_mismatched,
        process=process,
    )


def check_examples(source: Source, shape: Shape, vocab_size: int) -> Counter[int]:
    """Looks at all examples, so that one that does not fit is named now, and not in the middle of a run.

    Args:
      source: the examples.
      shape: has room for them.
      vocab_size: V of the model.

    Returns:
      Number of answers by role.

    Raises:
      ValueError: an example with a longer prompt or answer than the shape has room for, or a token that is none.
    """
    if isinstance(source, Described) and _all_fit(source, shape, vocab_size):
        return Counter(source.roles().ravel().tolist())
    roles: Counter[int] = Counter()
    for i in range(len(source)):
        example = source[i]
        _check_example(example, shape, vocab_size)
        roles.update(answer.role for answer in example.answers)
    return roles


def _all_fit(source: Described, shape: Shape, vocab_size: int) -> bool:
    longest = source.lengths().max(axis=0)
    least, greatest = source.token_range()
    short = longest[0] <= shape.prompt_length and longest[1:].max() <= shape.answer_length
    return bool(short and least >= 0 and greatest < vocab_size)


def _check_example(example: Example, shape: Shape, vocab_size: int) -> None:
    lengths = [len(example.prompt), *(len(answer.tokens) for answer in example.answers)]
    if lengths[0] > shape.prompt_length or max(lengths[1:]) > shape.answer_length:
        raise ValueError(
            f"example {example.uid} has a prompt of {lengths[0]} tokens and answers of {lengths[1:]}; there is "
            f"room for {shape.prompt_length} (config.data.prompt_length) and {shape.answer_length} "
            "(config.data.answer_length): raise them, or prepare shorter examples"
        )
    tokens = np.concatenate([example.prompt, *(answer.tokens for answer in example.answers)])
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(
            f"example {example.uid} has tokens from {tokens.min()} to {tokens.max()}; the model has rows for those "
            f"below {vocab_size}: prepare the examples with its tokenizer (config.data.tokenizer)"
        )


def state_shapes(parts: Parts) -> TrainState:
    """Shapes of the whole training state; nothing is computed."""
    base, adapters = lora.split(param_shapes(parts.model))
    return jax.eval_shape(lambda p, a: _state(parts, p, reference_of(parts, p), a), base, adapters)


def fresh_state(parts: Parts, params: Params, adapters: Params | None = None) -> TrainState:
    """The state before the first step.

    Args:
      parts: of the run.
      params: what it starts from.
      adapters: what is trained, of a model with adapters: ``params`` is their base then and the reference, and is not
        copied. Otherwise ``params`` is what is trained, and the reference a copy, where the steps read one.
    """
    reference = reference_of(parts, params)
    if not is_adapted(parts):
        # A copy: the policy's buffers are reused by every step, the reference's stay.
        reference = copied(reference)
    return _state(parts, params, reference, adapters)


def is_adapted(parts: Parts) -> bool:
    """Whether adapters are trained."""
    return lora.adapter_of(parts.model) is not None


def without_base(parts: Parts, state: TrainState) -> TrainState:
    """What a checkpoint holds of a state: the base of adapters stays where the run took it from."""
    return dataclasses.replace(state, reference=None) if is_adapted(parts) else state


def _state(parts: Parts, params: Params, reference: Params | None, adapters: Params | None) -> TrainState:
    trained = adapters if is_adapted(parts) else params
    return dataclasses.replace(init_state(parts.objective, parts.optimizer, trained, None), reference=reference)


def reference_of(parts: Parts, params: Params) -> Params | None:
    """What the steps keep of the parameters: the base of adapters, or a reference that they score. One that does not
    move is only read."""
    if not (is_adapted(parts) or parts.scores_reference):
        return None
    return params if parts.reference_moves else as_read(parts.model, params)


def guarded(state: TrainState, skipped: int) -> Guarded:
    """A state under the guard's eyes."""
    return Guarded(state, jnp.int32(skipped))
