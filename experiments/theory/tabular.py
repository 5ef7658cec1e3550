"""DPO on a table of probabilities, with infinitely many Bradley–Terry labels.

The optimum is known (arXiv 2305.18290, §4): π(y|x) ∝ π_ref(y|x) exp(ρ(x, y)/β). Expectations over labels are exact
here: every ordered pair of answers is there, weighted by the probability of its label.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpo_jax.losses.dpo import dpo
from experiments.theory.answers import make_answers

PROMPTS, ANSWERS = 4, 6
LEARNING_RATE = 0.05
CHUNK = 250  # steps between two moves of the progress bar


@dataclass(frozen=True)
class Tabular:
    """Probabilities by [β, seed, prompt, answer]."""

    betas: tuple[float, ...]
    learned: jax.Array
    optimum: jax.Array

    def largest_error(self) -> list[float]:
        """max |π − π*| for each β."""
        return [float(e) for e in jnp.max(jnp.abs(self.learned - self.optimum), axis=(1, 2, 3))]


def run(betas: tuple[float, ...], seeds: int, steps: int, progress: Callable[[int], None]) -> Tabular:
    """Trains one table for each β and seed, all at once."""
    keys = jax.random.split(jax.random.key(0), seeds)
    reward_SXY, reference_SXY = jax.vmap(_problem)(keys)
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    grid = partial(jax.vmap, in_axes=(0, None, None, 0))
    seeded = partial(jax.vmap, in_axes=(0, 0, 0, None))
    advance = jax.jit(grid(seeded(partial(_advance, optimizer, CHUNK))))
    theta = jnp.broadcast_to(reference_SXY, (len(betas), *reference_SXY.shape))
    carry = theta, jax.vmap(jax.vmap(optimizer.init))(theta)
    beta_T = jnp.array(betas)
    for _ in range(steps // CHUNK):
        carry = jax.block_until_ready(advance(carry, reward_SXY, reference_SXY, beta_T))
        progress(CHUNK)
    optimum = jax.nn.softmax(reference_SXY[None] + reward_SXY[None] / beta_T[:, None, None, None])
    return Tabular(betas, jax.nn.softmax(carry[0]), optimum)


def expected_loss(theta_XY: jax.Array, reward_XY: jax.Array, reference_XY: jax.Array, beta: Any) -> jax.Array:
    """E over prompts, pairs of answers and Bradley–Terry labels of DPO's loss."""
    policy_XY, reference_XY = jax.nn.log_softmax(theta_XY), jax.nn.log_softmax(reference_XY)
    first, second = jnp.meshgrid(jnp.arange(ANSWERS), jnp.arange(ANSWERS), indexing="ij")
    chosen, rejected = (
        make_answers(policy_XY[:, y.ravel()].ravel(), reference_XY[:, y.ravel()].ravel()) for y in (first, second)
    )
    wins = jax.nn.sigmoid(reward_XY[:, first.ravel()] - reward_XY[:, second.ravel()])
    return jnp.mean(wins.ravel() * dpo(chosen, rejected, beta=beta))


def _problem(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    reward_key, reference_key = jax.random.split(key)
    reward_XY = jax.random.normal(reward_key, (PROMPTS, ANSWERS))
    return reward_XY, jax.nn.log_softmax(jax.random.normal(reference_key, (PROMPTS, ANSWERS)))


def _advance(
    optimizer: optax.GradientTransformation,
    steps: int,
    carry: tuple[jax.Array, optax.OptState],
    reward_XY: jax.Array,
    reference_XY: jax.Array,
    beta: jax.Array,
) -> tuple[jax.Array, optax.OptState]:
    def step(carry: Any, _: None) -> tuple[Any, None]:
        theta, state = carry
        updates, state = optimizer.update(jax.grad(expected_loss)(theta, reward_XY, reference_XY, beta), state)
        return (theta + updates, state), None

    return jax.lax.scan(step, carry, None, steps)[0]
