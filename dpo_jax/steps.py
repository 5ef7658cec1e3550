"""The pure train step: (state, batch, hyper) → (state, metrics).

One compiled step scores the answers through policy and reference parameters, forms the loss over the global batch and
updates the policy, or leaves all as it was where a number is not finite.
"""

from __future__ import annotations

from typing import Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dpo_jax.gradients import GradientOf, make_gradient
from dpo_jax.losses.objective import Objective
from dpo_jax.metrics import Metrics, Ratio, Total
from dpo_jax.optim import AdamW, schedule
from dpo_jax.state import ALONE, Axis, Hyper, StepConfig, TrainState
from dpo_jax.types import Array, Params, PreferenceBatch

SKIPPED = "skipped_steps"  # the metric that counts updates that were not taken


class TrainStep(Protocol):
    """(state, batch, hyper) → (state, metrics); takes no update where it is not ``allowed``."""

    def __call__(
        self, state: TrainState, batch: PreferenceBatch, hyper: Hyper, allowed: Array | bool = True
    ) -> tuple[TrainState, Metrics]: ...


def init_state(objective: Objective, optimizer: AdamW, params: Params, reference: Params | None) -> TrainState:
    """A fresh state. ``reference`` is left out when the objective does not read it."""
    return TrainState(
        step=jnp.int32(0),
        params=params,
        reference=reference if objective.needs_reference else None,
        opt_state=optimizer.init(params),
        loss_state=objective.initial_state(),
    )


def make_train_step(
    model: nn.Module, objective: Objective, optimizer: AdamW, config: StepConfig, axis: Axis = ALONE
) -> TrainStep:
    """Builds the pure train step.

    Args:
      model: a family's module.
      objective: what to minimise.
      optimizer: how parameters follow gradients.
      config: what is compiled in.
      axis: the devices that share the batch.

    Returns:
      The step. Leaves of ``batch`` are [micro-batches, R, …].
    """
    return with_update(make_gradient(model, objective, config, axis), optimizer, config)


def with_update(gradient: GradientOf, optimizer: AdamW, config: StepConfig) -> TrainStep:
    """A train step from a gradient.

    A step whose loss, gradient norm or learning rate is not finite, or that is not ``allowed``, leaves the state as it
    was but for its number; so each array is written where it lay.

    Args:
      gradient: (state, batch, hyper) → (gradient, metrics, statistics).
      optimizer: how parameters follow it.
      config: what is compiled in.
    """

    def step(
        state: TrainState, batch: PreferenceBatch, hyper: Hyper, allowed: Array | bool = True
    ) -> tuple[TrainState, Metrics]:
        grads, metrics, loss_state = gradient(state, batch, hyper)
        norm, one = optax.global_norm(grads), jnp.float32(1.0)
        rate = hyper.learning_rate * schedule(config.schedule, state.step, warmup=config.warmup, steps=config.steps)
        metrics = {**metrics, "grad_norm": Ratio(norm, one), "learning_rate": Ratio(rate, one)}
        taken = allowed & jnp.all(jnp.isfinite(jnp.stack([metrics["loss"].total, norm, rate])))
        params, opt_state = optimizer.update(state.params, state.opt_state, grads, norm, rate, taken)
        number = state.step + 1
        reference = _moved_reference(state.reference, params, number, taken, config)
        loss_state = jax.tree.map(lambda new, old: jnp.where(taken, new, old), loss_state, state.loss_state)
        metrics = {**metrics, SKIPPED: Total(jnp.float32(~taken))}
        return TrainState(number, params, reference, opt_state, loss_state), metrics

    return step


def _moved_reference(
    reference: Params | None, params: Params, step: Array, taken: Array, config: StepConfig
) -> Params | None:
    if reference is None or config.reference_sync_every is None:
        return reference
    rate = jnp.where(taken & (step % config.reference_sync_every == 0), config.reference_sync_rate, 0.0)
    return jax.tree.map(lambda r, p: jnp.where(rate > 0, rate * p + (1 - rate) * r, r), reference, params)
