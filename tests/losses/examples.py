"""Answers and scored batches for tests of losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.losses import LOSSES, Answers
from dpo_jax.losses.hyper import parameters_of
from dpo_jax.losses.objective import Objective, Scored
from dpo_jax.types import CHOSEN, PROMPT, REJECTED, UNUSED, Array, SequenceLogps


def make_answers(
    logp: Sequence[float] | Array,
    reference: Sequence[float] | Array | float = 0.0,
    *,
    count: Sequence[float] | float = 1.0,
    score: Sequence[float] | float = 0.0,
    prompt_sum: float = 0.0,
) -> Answers:
    """Answers with the reverse KL and summed log-probabilities; ``mean_count`` is that of these answers."""
    logp_B = jnp.asarray(logp, jnp.float32)
    reference_B, count_B, score_B, prompt_B = (
        jnp.broadcast_to(jnp.asarray(a, jnp.float32), logp_B.shape) for a in (reference, count, score, prompt_sum)
    )
    return Answers(
        logp_B=logp_B,
        reference_B=reference_B,
        shaped_B=logp_B - reference_B,
        sum_B=logp_B,
        count_B=count_B,
        prompt_sum_B=prompt_B,
        score_B=score_B,
        mean_count=jnp.mean(count_B),
        mean_full_count=jnp.mean(count_B) + 3.0,
    )


def sum_tokens(tokens: Array, collision: Array, mask: np.ndarray) -> SequenceLogps:
    """Sums token log-probabilities [X, A, C, T] over the last axis; differentiable in ``tokens``.

    ``tail`` starts after as many tokens as the example's shortest answer has.
    """
    length_XA = mask[..., 0, :].sum(-1)
    tail = mask & (np.arange(mask.shape[-1]) >= length_XA.min(1)[:, None, None, None])
    return SequenceLogps(
        sum=jnp.sum(tokens * mask, -1),
        tail=jnp.sum(tokens * tail, -1),
        count=jnp.asarray(mask.sum(-1), jnp.float32),
        entropy=jnp.asarray(mask.sum(-1) * 0.5, jnp.float32),
        overlap=jnp.sum((tokens - collision) * mask, -1),
    )


def make_scored(
    rng: np.random.Generator,
    examples: int,
    *,
    answers: int = 2,
    unused: int = 0,
    length: int = 6,
    spread: float = 1.0,
    roles: Sequence[int] | None = None,
) -> Scored:
    """Random scores of pairs (or single answers), each with a slot for its prompt; the last ``unused`` are padding."""
    shape = (examples, answers, 2)
    lengths = rng.integers(1, length + 1, shape)
    mask = np.arange(length) < lengths[..., None]
    role = np.full(shape, PROMPT, np.int32)
    role[..., 0] = np.asarray(roles)[:, None] if roles is not None else [CHOSEN, REJECTED][:answers]
    used = np.arange(examples) < examples - unused
    role[~used] = UNUSED
    mask = mask & used[:, None, None, None]

    def draw() -> SequenceLogps:
        tokens, collision = (jnp.asarray(-spread * rng.gamma(1.5, 1.0, mask.shape), jnp.float32) for _ in range(2))
        return sum_tokens(tokens, collision, mask)

    return Scored(draw(), draw(), jnp.asarray(role), jnp.asarray(rng.normal(size=shape), jnp.float32))


def prepare(
    objective: Objective, hyper: dict[str, float], scored: Scored, mismatched: Sequence[float] = (0.3, -0.1, 0.7)
) -> tuple:
    """(totals, numbers) of a batch that one device sees whole."""
    totals = objective.totals(scored.role, scored.policy.count)
    ratio_B = jnp.asarray(mismatched, jnp.float32)
    numbers, _ = objective.statistics(
        hyper, objective.initial_state(), scored, totals, ratio_B, jnp.ones(ratio_B.shape, bool)
    )
    return totals, numbers


def evaluate(name: str, chosen: Answers, rejected: Answers, **hyper: float) -> Array:
    """Values [B] of a loss on pairs; one that sees answers of either kind gives [2B], the chosen ones first.

    Statistics are those of a first step on this batch; KTO's reference point is 0 unless ``reference_point`` is given.
    """
    loss = LOSSES[name]
    numbers: dict[str, Any] = {}
    if loss.sees == "answers":
        mean_count = chosen.mean_count
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]) if a.ndim else mean_count, chosen, rejected)
        size = chosen.logp_B.shape[0]
        units: tuple[Any, ...] = (both, jnp.arange(2 * size) < size)
    else:
        units = (chosen,) if loss.sees == "chosen" else (chosen, rejected)
    mask_B = jnp.ones(units[0].logp_B.shape, bool)
    if loss.statistic is not None:
        state = {k: jnp.float32(v) for k, v in loss.state.items()}
        ratio_B = jnp.full(3, hyper.pop("reference_point", 0.0))
        own = parameters_of(loss) | hyper
        numbers, _ = loss.statistic(state, units, mask_B, ratio_B, jnp.ones(3, bool), update=True, **own)
        numbers = jax.lax.stop_gradient(numbers)
    return loss.fn(*units, **hyper, **numbers)
