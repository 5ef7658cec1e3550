"""From hidden states to log-probabilities of answers. All of it in fp32, whatever the model's dtype.

The head runs on targets only, in chunks whose logits are recomputed in the backward pass: [R, L, V] never exists, and
neither does [R, M, V]. Columns of the batch in which no row has a target cost nothing.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.models.layers import outer_sum, project, take_rows, training_mask
from dpo_jax.models.sight import Sight
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
    model: nn.Module,
    params: Params,
    batch: TokenBatch,
    chunk: int,
    dropout_key: Array | None = None,
) -> TokenScores:
    """Scores of all targets of a batch, [R, M]."""
    variables = {"params": params}
    mask = sight(model, batch)
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    hidden_RLD = model.apply(variables, batch.tokens_RL, batch.position_RL, mask, rngs=rngs)
    hidden_RMD = constrain(jax.vmap(take_rows)(hidden_RLD, jnp.asarray(batch.source_RM)), "rows", None, "embed")
    head_VD = model.apply(variables, method="head")
    # Padding has weight 0 and source 0; a turn that is left out has weight 0 too, but is scored for the store.
    used_M = jnp.any((batch.weight_RM > 0) | (batch.source_RM > 0), axis=0)
    return token_scores(hidden_RMD, head_VD, batch.target_RM, chunk, model.logit_cap, used_M)


def sight(model: nn.Module, batch: TokenBatch) -> Array | Sight:
    """Who attends to whom, as the attention of a model reads it."""
    config = getattr(model, "config", None)
    if config is None or config.attention == "dense":
        return training_mask(batch.group_RL, batch.branch_RL)
    return Sight(batch.group_RL, batch.branch_RL, batch.branches)


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
    hidden_RMD: Array,
    head_VD: Array,
    target_RM: Array,
    chunk: int,
    logit_cap: float | None = None,
    used_M: Array | None = None,
) -> TokenScores:
    """Scores of targets, ``chunk`` of them at a time: the same columns of all rows.

    Args:
      hidden_RMD: the states that predict the targets.
      head_VD: the output matrix.
      target_RM: int32.
      chunk: targets whose logits exist at a time, as many of each row and at least one.
      logit_cap: c of c·tanh(logit / c); None leaves logits alone.
      used_M: bool, columns in which some row has a target; nothing is computed after the last. None is all.

    Returns:
      TokenScores of shape [R, M], 0 in chunks after the last column that is used; entropy and log_collision carry no
      gradient.
    """
    rows, targets = target_RM.shape
    count = -(-targets // max(1, chunk // rows))
    size = -(-targets // count)
    padding = count * size - targets
    hidden = jnp.pad(hidden_RMD, ((0, 0), (0, padding), (0, 0)))
    target = jnp.pad(target_RM, ((0, 0), (0, padding)))
    # Chunks are of all rows: where rows lie on different devices, each scores its own.
    last = targets if used_M is None else jnp.max(jnp.where(used_M, jnp.arange(1, targets + 1), 0))
    scores = _score_chunks(hidden, head_VD, target, -(-last // size), size, logit_cap)
    return TokenScores(*(a[:, :targets] for a in scores))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _score_chunks(
    hidden_RMD: Array, head_VD: Array, target_RM: Array, count: Array | int, size: int, cap: float | None
) -> TokenScores:
    """Scores of the first ``count`` chunks of ``size`` columns.

    Its own derivative, since JAX cannot pull back through a loop whose length depends on the data, and would multiply
    fp32 gradients of logits by half-precision matrices in fp32.
    """
    return _score_forward(hidden_RMD, head_VD, target_RM, count, size, cap)[0]


def _score_forward(
    hidden_RMD: Array, head_VD: Array, target_RM: Array, count: Array | int, size: int, cap: float | None
) -> tuple[TokenScores, tuple]:
    head = head_VD.astype(hidden_RMD.dtype)

    def body(i: Array, out: tuple[TokenScores, Array]) -> tuple[TokenScores, Array]:
        hidden_RCD, target_RC = (_columns(a, i, size) for a in (hidden_RMD, target_RM))
        logits_RCV = constrain(project(hidden_RCD, head, cap), "rows", None, "vocab")
        top_RC = jnp.max(logits_RCV, axis=-1)
        mass_RCV = jnp.exp(logits_RCV - top_RC[:, :, None])
        total_RC = jnp.sum(mass_RCV, axis=-1)
        normalizer_RC = top_RC + jnp.log(total_RC)
        logp_RC = jnp.take_along_axis(logits_RCV, target_RC[:, :, None], axis=-1)[:, :, 0] - normalizer_RC
        # Products of rows: CPUs take several times as long for an exponential inside of a sum.
        entropy_RC = normalizer_RC - _row_products(mass_RCV, logits_RCV) / total_RC
        collision_RC = jnp.log(_row_products(mass_RCV, mass_RCV)) - 2 * jnp.log(total_RC)
        new = TokenScores(logp_RC, entropy_RC, collision_RC), normalizer_RC
        return jax.tree.map(lambda whole, part: _with_columns(whole, part, i, size), out, new)

    zeros = jnp.zeros(target_RM.shape, jnp.float32)
    scores, normalizer_RM = jax.lax.fori_loop(0, count, body, (TokenScores(zeros, zeros, zeros), zeros))
    return scores, (hidden_RMD, head_VD, target_RM, count, normalizer_RM)


def _score_backward(size: int, cap: float | None, saved: tuple, cotangent: TokenScores) -> tuple:
    hidden_RMD, head_VD, target_RM, count, normalizer_RM = saved
    head = head_VD.astype(hidden_RMD.dtype)
    vocab = jnp.arange(head.shape[0])[None, None]

    def body(i: Array, out: tuple[Array, Array]) -> tuple[Array, Array]:
        given = (hidden_RMD, target_RM, normalizer_RM, cotangent.logp)
        hidden_RCD, target_RC, normalizer_RC, weight_RC = (_columns(a, i, size) for a in given)
        logits_RCV = constrain(project(hidden_RCD, head, cap), "rows", None, "vocab")
        wide_RCV = (vocab == target_RC[:, :, None]) - jnp.exp(logits_RCV - normalizer_RC[:, :, None])
        slope = 1.0 if cap is None else 1.0 - jnp.square(logits_RCV / cap)
        error_RCV = (weight_RC[:, :, None] * wide_RCV * slope).astype(head.dtype)
        dhidden_RCD = jnp.einsum("rcv,vd->rcd", error_RCV, head, preferred_element_type=jnp.float32)
        dhidden_RMD = _with_columns(out[0], dhidden_RCD, i, size)
        dhead_VD = outer_sum(*(a.reshape(-1, a.shape[-1]) for a in (error_RCV, hidden_RCD)))
        return dhidden_RMD, constrain(out[1] + dhead_VD, "vocab", None)

    zeros = jnp.zeros(hidden_RMD.shape, jnp.float32), jnp.zeros(head.shape, jnp.float32)
    dhidden_RMD, dhead_VD = jax.lax.fori_loop(0, count, body, zeros)
    return dhidden_RMD.astype(hidden_RMD.dtype), dhead_VD.astype(head_VD.dtype), None, None


_score_chunks.defvjp(_score_forward, _score_backward)


def _row_products(a_RCV: Array, b_RCV: Array) -> Array:
    return jnp.einsum("rcv,rcv->rc", a_RCV, b_RCV, precision=jax.lax.Precision.HIGHEST)


def _columns(array: Array, i: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, i * size, size, axis=1)


def _with_columns(array: Array, part: Array, i: Array, size: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(array, part, i * size, axis=1)


def group(array_RS: Array, grouping: tuple[int, int]) -> Array:
    """[R, S] → [X, A, C]."""
    return array_RS.reshape(-1, *grouping)


def members(batch: TokenBatch) -> Array:
    """Which targets count for which slots, bool [R, M, S]."""
    return (batch.slot_RM[:, :, None] == batch.scored_RS[:, None, :]) & (batch.weight_RM > 0)[:, :, None]


def _sum_slots(scores: TokenScores, batch: TokenBatch, grouping: tuple[int, int]) -> SequenceLogps:
    weight_RM, member_RMS = batch.weight_RM, members(batch)

    def total(values_RM: Array, counted_RMS: Array = member_RMS) -> Array:
        # A masked sum rather than a matrix product, which some hardware would round to bf16.
        return group(jnp.sum(jnp.where(counted_RMS, (weight_RM * values_RM)[:, :, None], 0.0), axis=1), grouping)

    return SequenceLogps(
        sum=total(scores.logp),
        tail=total(scores.logp, _past_shortest(member_RMS, grouping)),
        count=total(jnp.ones_like(weight_RM)),
        entropy=total(scores.entropy),
        overlap=total(jax.lax.stop_gradient(scores.logp) - scores.log_collision),
    )


def _past_shortest(member_RMS: Array, grouping: tuple[int, int]) -> Array:
    """Which targets of a slot come after as many as the shortest answer of its example has, bool [R, M, S]."""
    length_XAC = group(jnp.sum(member_RMS, axis=1), grouping)
    shortest_XAC = jnp.broadcast_to(jnp.min(length_XAC, axis=1, keepdims=True), length_XAC.shape)
    shortest_RS = shortest_XAC.reshape(-1, member_RMS.shape[2])
    rank_RMS = jnp.cumsum(member_RMS, axis=1)  # 1 for a slot's first target
    return member_RMS & (rank_RMS > shortest_RS[:, None, :])
