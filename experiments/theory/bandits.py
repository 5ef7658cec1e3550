"""The bandits of the IPO paper (arXiv 2310.12036, §5.3 and 5.4): few actions, a uniform reference, certain labels.

IPO ends at a distribution that τ sets, DPO at a deterministic one whatever τ is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax.losses.dpo import dpo
from dpo_jax.losses.ipo import ipo
from dpo_jax.types import Array
from experiments.theory.answers import make_answers

LEARNING_RATE, BATCH = 0.01, 9
CHUNK = 500  # steps that a recorded point is the mean of
LOSSES = {"ipo": ipo, "dpo": dpo}


@dataclass(frozen=True)
class Bandit:
    """Pairs (winner, loser) of actions, and where IPO ends on them."""

    actions: int
    pairs: tuple[tuple[int, int], ...]
    ipo_optimum: Callable[[float], list[float]]


def _two(tau: float) -> list[float]:
    p = 1 / (1 + np.exp(-1 / (2 * tau)))
    return [p, 1 - p]


def _chain(tau: float) -> list[float]:
    return list(np.asarray(jax.nn.softmax(jnp.array([1 / (3 * tau), 0.0, -1 / (3 * tau)]))))


def _undecided(tau: float) -> list[float]:
    c = 1 / (2 * np.exp(1 / (2 * tau)) + 1)
    return [(1 - c) / 2, (1 - c) / 2, c]


BANDITS = {
    "two actions": Bandit(2, ((0, 1),), _two),
    "D1": Bandit(3, ((0, 1), (1, 2), (0, 2)), _chain),
    # The paper prints D3 = {a≻b, b≻a}, which gives c no gradient; with b≻c its figure comes out.
    "D3'": Bandit(3, ((0, 1), (1, 0), (1, 2)), _undecided),
}


@dataclass(frozen=True)
class Curves:
    """One bandit under one loss.

    Attributes:
      steps: [points].
      policy: probabilities [points, τ, seed, action], each a mean over the ``CHUNK`` steps before.
      optimum: IPO's closed form [τ, action].
    """

    bandit: str
    loss: str
    taus: tuple[float, ...]
    steps: np.ndarray
    policy: np.ndarray
    optimum: np.ndarray

    def final(self) -> np.ndarray:
        """Where each run is at its end, [τ, seed, action].

        For IPO the mean over the second half: it has arrived long before, but Adam on small batches never stands still.
        For DPO, which is still on its way, the last point.
        """
        points = len(self.policy) // 2 if self.loss == "ipo" else 1
        return self.policy[-points:].mean(0)

    def largest_error(self) -> np.ndarray:
        """max over seeds and actions of |π − IPO's closed form| at the end, [τ]."""
        return np.abs(self.final() - self.optimum[:, None]).max((1, 2))


def run(
    names: tuple[str, ...], taus: tuple[float, ...], seeds: int, steps: int, progress: Callable[[int], None]
) -> list[Curves]:
    """Trains every bandit with every loss; the runs of all τ and seeds go side by side."""
    return [_curves(name, loss, taus, seeds, steps, progress) for name in names for loss in LOSSES]


def _curves(
    name: str, loss: str, taus: tuple[float, ...], seeds: int, steps: int, progress: Callable[[int], None]
) -> Curves:
    bandit, optimizer = BANDITS[name], optax.adam(LEARNING_RATE)
    one = partial(_advance, bandit, LOSSES[loss], optimizer)
    advance = jax.jit(
        jax.vmap(jax.vmap(one, in_axes=(0, 0, None, None)), in_axes=(0, None, 0, None)),
    )
    keys, tau_T = jax.random.split(jax.random.key(1), seeds), jnp.array(taus)
    theta = jnp.zeros((len(taus), seeds, bandit.actions))
    carry = theta, jax.vmap(jax.vmap(optimizer.init))(theta)
    points = [jax.nn.softmax(theta)]
    for start in range(0, steps, CHUNK):
        carry, policy = jax.block_until_ready(advance(carry, keys, tau_T, start))
        points.append(policy)
        progress(CHUNK)
    optimum = np.array([bandit.ipo_optimum(tau) for tau in taus])
    return Curves(name, loss, taus, np.arange(len(points)) * CHUNK, np.asarray(points), optimum)


def _advance(
    bandit: Bandit,
    loss: Callable[..., Array],
    optimizer: optax.GradientTransformation,
    carry: tuple[jax.Array, optax.OptState],
    key: jax.Array,
    tau: jax.Array,
    start: int,
) -> tuple[tuple[jax.Array, optax.OptState], jax.Array]:
    """``CHUNK`` steps of Adam on batches drawn with replacement, and the mean of their policies."""
    pairs = jnp.array(bandit.pairs)

    def batch_loss(theta: jax.Array, drawn_B: jax.Array) -> jax.Array:
        logp, uniform_B = jax.nn.log_softmax(theta), jnp.full(BATCH, -jnp.log(bandit.actions))
        chosen, rejected = (make_answers(logp[pairs[drawn_B, side]], uniform_B) for side in (0, 1))
        return jnp.mean(loss(chosen, rejected, beta=tau))

    def step(carry: Any, number: jax.Array) -> tuple[Any, jax.Array]:
        theta, state = carry
        drawn_B = jax.random.randint(jax.random.fold_in(key, number), (BATCH,), 0, len(bandit.pairs))
        updates, state = optimizer.update(jax.grad(batch_loss)(theta, drawn_B), state)
        theta = theta + updates
        return (theta, state), jax.nn.softmax(theta)

    carry, policies = jax.lax.scan(step, carry, start + jnp.arange(CHUNK))
    return carry, jnp.mean(policies, 0)
