"""From hidden states to log-probabilities of answers. All of it in fp32, whatever the model's dtype.

The head runs on targets only, in chunks whose logits are recomputed in the backward pass: [R, L, V] never exists, and
neither does [R, M, V].
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.models.layers import project, training_mask
from dpo_jax.sharding import constrain
from dpo_jax.types import Array, Params, SequenceLogps, TokenBatch


class TokenScores(NamedTuple):
    """fp32 arrays of one shape: log-probability of the target, entropy of the distribution, log Σ_v p(v)²; nats."""

    logp: Array
    entropy: Array
    log_collision: Array


def score(
    model: nn.Module,
    params: Params,
    batch: TokenBatch,
    grouping: tuple[int, int],
    chunk: int,
    dropout_key: Array | None = None,
) -> SequenceLogps:
    """Log-probabilities of all slots of a batch, by example.

    Args:
      model: a family's module.
      params: its parameters.
      batch: R rows whose slots, in order, are X examples of A answers of C parts.
      grouping: (A, C): answers of an example, and slots of an answer (2 when its prompt has one, else 1).
      chunk: targets whose logits exist at a time.
      dropout_key: draws what adapters leave out; None leaves out nothing.

    Returns:
      SequenceLogps of shape [X, A, C].
    """
    return _sum_slots(target_scores(model, params, batch, chunk, dropout_key), batch, grouping)


def target_scores(
    model: nn.Module, params: Params, batch: TokenBatch, chunk: int, dropout_key: Array | None = None
) -> TokenScores:
    """Scores of all targets of a batch, [R, M]; arguments as of :func:`score`."""
    variables = {"params": params}
    mask = training_mask(batch.group_RL, batch.branch_RL)
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    hidden_RLD, _ = model.apply(variables, batch.tokens_RL, batch.position_RL, mask, rngs=rngs)
    states_RMD = jnp.take_along_axis(hidden_RLD, batch.source_RM[:, :, None], axis=1)
    hidden_RMD = constrain(states_RMD, "rows", None, "embed")
    head_VD = model.apply(variables, method="head")
    return token_scores(hidden_RMD, head_VD, batch.target_RM, chunk, model.logit_cap)


def stored(batch: TokenBatch, grouping: tuple[int, int]) -> SequenceLogps:
    """The reference's scores as they are stored in a batch, without a model.

    Args:
      batch: with ``reference_RM``.
      grouping: (A, C), as of :func:`score`.

    Returns:
      SequenceLogps of shape [X, A, C]; entropy and overlap, which are read of a policy alone, are 0.
    """
    assert batch.reference_RM is not None
    zeros = jnp.zeros_like(batch.weight_RM)
    return _sum_slots(TokenScores(batch.reference_RM, zeros, batch.reference_RM), batch, grouping)


def token_scores(
    hidden_RMD: Array, head_VD: Array, target_RM: Array, chunk: int, logit_cap: float | None = None
) -> TokenScores:
    """Scores of targets, ``chunk`` of them at a time.

    Args:
      hidden_RMD: the states that predict the targets.
      head_VD: the output matrix.
      target_RM: int32.
      chunk: targets whose logits exist at a time, as many of each row and at least one.
      logit_cap: c of c·tanh(logit / c); None leaves logits alone.

    Returns:
      TokenScores of shape [R, M]; entropy and log_collision carry no gradient.
    """
    rows, targets = target_RM.shape
    pieces = -(-targets // max(1, chunk // rows))
    size = -(-targets // pieces)
    padding = pieces * size - targets
    # Chunks are of all rows: where rows lie on different devices, each scores its own.
    hidden = jnp.pad(hidden_RMD, ((0, 0), (0, padding), (0, 0))).reshape(rows, pieces, size, -1).swapaxes(0, 1)
    target = jnp.pad(target_RM, ((0, 0), (0, padding))).reshape(rows, pieces, size).swapaxes(0, 1)
    score_chunk = jax.checkpoint(lambda piece: _score_chunk(piece[0], head_VD, piece[1], logit_cap))
    scores = jax.lax.map(score_chunk, (hidden, target))
    return TokenScores(*(a.swapaxes(0, 1).reshape(rows, -1)[:, :targets] for a in scores))


def _score_chunk(hidden_RCD: Array, head_VD: Array, target_RC: Array, logit_cap: float | None) -> TokenScores:
    logits_RCV = constrain(project(hidden_RCD, head_VD, logit_cap), "rows", None, "vocab")
    normalizer_RC = jax.nn.logsumexp(logits_RCV, axis=-1)
    logp_RC = jnp.take_along_axis(logits_RCV, target_RC[:, :, None], axis=-1)[:, :, 0] - normalizer_RC
    logp_RCV = jax.lax.stop_gradient(logits_RCV - normalizer_RC[:, :, None])
    p_RCV = jnp.exp(logp_RCV)
    entropy_RC, collision_RC = -jnp.sum(p_RCV * logp_RCV, axis=-1), jnp.sum(p_RCV * p_RCV, axis=-1)
    return TokenScores(logp_RC, entropy_RC, jnp.log(collision_RC))


def group(array_RS: Array, grouping: tuple[int, int]) -> Array:
    """[R, S] → [X, A, C]."""
    return array_RS.reshape(-1, *grouping)


def _sum_slots(scores: TokenScores, batch: TokenBatch, grouping: tuple[int, int]) -> SequenceLogps:
    slots = batch.role_RS.shape[1]
    weight_RM = batch.weight_RM
    member_RMS = jax.nn.one_hot(batch.slot_RM, slots, dtype=bool) & (weight_RM > 0)[:, :, None]

    def total(values_RM: Array) -> Array:
        # A masked sum rather than a matrix product, which some hardware would round to bf16.
        return group(jnp.sum(jnp.where(member_RMS, (weight_RM * values_RM)[:, :, None], 0.0), axis=1), grouping)

    return SequenceLogps(
        sum=total(scores.logp),
        tail=total(jnp.where(_past_shortest(member_RMS, grouping), scores.logp, 0.0)),
        count=total(jnp.ones_like(weight_RM)),
        entropy=total(scores.entropy),
        overlap=total(jax.lax.stop_gradient(scores.logp) - scores.log_collision),
    )


def _past_shortest(member_RMS: Array, grouping: tuple[int, int]) -> Array:
    """Which targets come after as many tokens as the shortest answer of their example has, bool [R, M]."""
    length_XAC = group(jnp.sum(member_RMS, axis=1), grouping)
    shortest_XAC = jnp.broadcast_to(jnp.min(length_XAC, axis=1, keepdims=True), length_XAC.shape)
    shortest_RS = shortest_XAC.reshape(-1, member_RMS.shape[2])
    rank_RMS = jnp.cumsum(member_RMS, axis=1)  # 1 for a slot's first target
    return jnp.any(member_RMS & (rank_RMS > shortest_RS[:, None, :]), axis=2)
