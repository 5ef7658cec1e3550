"""The loss of a batch and its gradient, over the *global* batch, whatever the number of devices and micro-batches.

Losses are separable or coupled. A separable loss is a sum over answers whose counts are known from the data alone, so
each micro-batch pulls its own part of the gradient back. A coupled loss (AOT's sort, a running mean of rewards) needs
all log-probabilities first: they are gathered, the loss is differentiated with respect to them, and each device pulls
its own slice back, micro-batch by micro-batch. Both are exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax import lora
from dpo_jax.logprobs import group, members, score, stored
from dpo_jax.losses.objective import Objective, Scored, Totals
from dpo_jax.metrics import Metrics, Total
from dpo_jax.state import ALONE, Axis, Hyper, StepConfig, TrainState
from dpo_jax.types import UNUSED, Array, Params, PreferenceBatch, SequenceLogps, TokenBatch

# (state, batch, hyper) → (gradient, metrics, what the losses' statistics remember), each of the whole batch.
GradientOf = Callable[[TrainState, PreferenceBatch, Hyper], tuple[Params, Metrics, Any]]


def make_gradient(model: nn.Module, objective: Objective, config: StepConfig, axis: Axis = ALONE) -> GradientOf:
    """Builds the pure function (state, batch, hyper) → (gradient, metrics, statistics); takes no update.

    Args:
      model: a family's module.
      objective: what to minimise.
      config: what is compiled in.
      axis: the devices that share the batch.

    Returns:
      The function. Leaves of ``batch`` are [micro-batches, R, …].
    """
    unbound = Scorer(model, objective, config.answers, config.head_chunk * axis.parts)

    def gradient(state: TrainState, batch: PreferenceBatch, hyper: Hyper) -> tuple[Params, Metrics, Any]:
        key = _dropout_keys(config, state.step, batch, axis)
        work = _begin(unbound.of(state), state, batch, hyper, axis, key)
        grads, metrics, loss_state = work.coupled() if objective.couples_batch else work.separable()
        metrics = {**metrics, "tokens": Total(jnp.sum(_counts(batch.answers)))}
        return axis.sum(grads), axis.sum(metrics), loss_state

    return gradient


def make_eval_step(
    model: nn.Module,
    objective: Objective,
    answers: int,
    head_chunk: int,
    axis: Axis = ALONE,
) -> Callable[[TrainState, PreferenceBatch, Hyper], Metrics]:
    """Builds the pure evaluation step: metrics of one batch, to be merged over batches, without an update."""
    unbound = Scorer(model, objective, answers, head_chunk * axis.parts)

    def step(state: TrainState, batch: PreferenceBatch, hyper: Hyper) -> Metrics:
        work = _begin(unbound.of(state), state, batch, hyper, axis)
        policy = _over_micro(lambda b: work.scorer.policy(state.params, b), batch.answers)
        scored = axis.gather(_flat(work.scorer.scored(policy, work.reference, batch.answers)))
        numbers, _ = work.statistics(scored, update=False)
        return objective.metrics(hyper.loss, scored, work.totals, numbers)

    return step


@dataclass(frozen=True)
class Scorer:
    """Scores token batches by example, as the objective asks.

    Attributes:
      model: a family's module, with adapters where adapters are trained.
      objective: what asks.
      answers: A, answers of an example.
      chunk: targets whose logits exist at a time.
      base: what the adapters stand on that are trained; None when whole models are.
    """

    model: nn.Module
    objective: Objective
    answers: int
    chunk: int
    base: Params | None = None

    def of(self, state: TrainState) -> Scorer:
        """The same for the parameters of a state."""
        base = state.reference if lora.adapter_of(self.model) else None
        return dataclasses.replace(self, base=jax.lax.stop_gradient(base))

    @property
    def grouping(self) -> tuple[int, int]:
        return self.answers, 2 if self.objective.needs_prompt else 1

    def policy(self, params: Params, batch: TokenBatch, dropout_key: Array | None = None) -> SequenceLogps:
        """[X, A, C]."""
        return self._score_policy(params, batch, self.grouping, dropout_key)

    def reference(self, params: Params | None, batch: TokenBatch) -> SequenceLogps:
        """[X, A, C] without a gradient: as stored in the batch, where they are; zeros when the objective needs none."""
        if not self.objective.needs_reference:
            zeros = jnp.zeros_like(group(batch.role_RS, self.grouping), jnp.float32)
            return SequenceLogps(zeros, zeros, zeros, zeros, zeros)
        return self._score_reference(params, batch, self.grouping)

    def mismatched_ratio(self, state: TrainState, batch: TokenBatch) -> tuple[Array, Array]:
        """(log-ratios in nats, which of them are real), both [R·S], without a gradient."""
        grouping = (batch.role_RS.shape[1], 1)
        policy = self._score_policy(state.params, batch, grouping)
        reference = self._score_reference(state.reference, batch, grouping)
        return self.objective.mismatched_ratio(policy, reference).reshape(-1), (batch.role_RS != UNUSED).reshape(-1)

    def scored(self, policy: SequenceLogps, reference: SequenceLogps, batch: TokenBatch) -> Scored:
        shape = policy.sum.shape
        return Scored(policy, reference, batch.role_RS.reshape(shape), batch.score_RS.reshape(shape))

    def _score_policy(
        self, params: Params, batch: TokenBatch, grouping: tuple[int, int], dropout_key: Array | None = None
    ) -> SequenceLogps:
        whole = params if self.base is None else lora.join(self.base, params)
        return score(self.model, whole, batch, grouping, self.chunk, dropout_key)

    def _score_reference(self, params: Params | None, batch: TokenBatch, grouping: tuple[int, int]) -> SequenceLogps:
        if batch.reference_RM is not None:
            return stored(batch, grouping)
        model = lora.with_adapter(self.model, None)
        return jax.lax.stop_gradient(score(model, jax.lax.stop_gradient(params), batch, grouping, self.chunk))


@dataclass(frozen=True)
class _Work:
    """A batch on its way to a gradient, with what is known before it.

    Attributes:
      scorer: of the state's parameters.
      state: that the gradient is of.
      batch: this device's.
      hyper: traced numbers.
      axis: the devices that share the batch.
      totals: counts of the global batch.
      reference: its scores, [micro, X, A, C].
      mismatched: (log-ratios, which of them are real) of the global batch, [B] each; None when the objective asks for
        none.
      dropout_key: for each micro-batch, [micro]; None when nothing is left out.
    """

    scorer: Scorer
    state: TrainState
    batch: PreferenceBatch
    hyper: Hyper
    axis: Axis
    totals: Totals
    reference: SequenceLogps
    mismatched: tuple[Array | None, Array | None]
    dropout_key: Array | None

    def separable(self) -> tuple[Params, Metrics, Any]:
        """Gradient and metrics of this device's shard, micro-batch by micro-batch."""
        numbers, loss_state = self.statistics(None)

        def gradient(piece: tuple[TokenBatch, SequenceLogps, Array | None]) -> tuple[Params, Metrics]:
            tokens, reference, key = piece
            policy, pull_back = jax.vjp(lambda params: self.scorer.policy(params, tokens, key), self.state.params)
            cotangent, metrics = self._differentiate(self.scorer.scored(policy, reference, tokens), numbers)
            return pull_back(cotangent)[0], metrics

        grads, metrics = _sum_over_micro(gradient, (self.batch.answers, self.reference, self.dropout_key))
        return grads, metrics, loss_state

    def coupled(self) -> tuple[Params, Metrics, Any]:
        """The same for a loss that sees the whole batch: all log-probabilities first, then they are pulled back."""
        axis, params, pieces = self.axis, self.state.params, (self.batch.answers, self.dropout_key)
        single = self.batch.answers.tokens_RL.shape[0] == 1
        score_all = lambda p: _over_micro(lambda piece: self.scorer.policy(p, *piece), pieces)  # noqa: E731
        # One micro-batch keeps its activations; several are scored once more when they are pulled back.
        policy, pull_back = jax.vjp(score_all, params) if single else (score_all(params), None)
        whole = axis.gather(_flat(self.scorer.scored(policy, self.reference, self.batch.answers)))
        numbers, loss_state = self.statistics(whole)
        cotangent, metrics = self._differentiate(whole, numbers)
        cotangent = jax.tree.map(_unflat, axis.own(cotangent, _flat(policy)), policy)
        # Every device has computed the metrics of the whole batch; each reports its share of their sum.
        metrics = jax.tree.map(lambda m: m / axis.sum(1.0), metrics)
        if pull_back is not None:
            return pull_back(cotangent)[0], metrics, loss_state

        def gradient(piece: tuple[tuple[TokenBatch, Array | None], SequenceLogps]) -> Params:
            tokens_and_key, own_cotangent = piece
            return jax.vjp(lambda p: self.scorer.policy(p, *tokens_and_key), params)[1](own_cotangent)[0]

        return _sum_over_micro(gradient, (pieces, cotangent)), metrics, loss_state

    def statistics(self, scored: Scored | None, update: bool = True) -> tuple[dict[str, Any], Any]:
        """(numbers that the loss reads of the whole batch, what its statistics remember)."""
        objective, loss_state = self.scorer.objective, self.state.loss_state
        return objective.statistics(self.hyper.loss, loss_state, scored, self.totals, *self.mismatched, update=update)

    def _differentiate(self, scored: Scored, numbers: Mapping[str, Any]) -> tuple[SequenceLogps, Metrics]:
        """Gradient of the loss with respect to the policy's log-probabilities, and the metrics."""
        objective, values = self.scorer.objective, self.hyper.loss

        def loss(policy: SequenceLogps) -> Array:
            return objective.loss(values, dataclasses.replace(scored, policy=policy), self.totals, numbers)

        return jax.grad(loss)(scored.policy), objective.metrics(values, scored, self.totals, numbers)


def _begin(
    scorer: Scorer,
    state: TrainState,
    batch: PreferenceBatch,
    hyper: Hyper,
    axis: Axis,
    dropout_key: Array | None = None,
) -> _Work:
    shape = (*batch.answers.role_RS.shape[:1], -1, *scorer.grouping)
    role, count = batch.answers.role_RS.reshape(shape), _counts(batch.answers).reshape(shape)
    totals = scorer.objective.totals(*_flat((role, count)))
    reference = _over_micro(lambda b: scorer.reference(state.reference, b), batch.answers)
    mismatched = None, None
    if scorer.objective.needs_mismatched:
        pieces = _over_micro(lambda b: scorer.mismatched_ratio(state, b), batch.mismatched)
        mismatched = axis.gather(_flat(jax.lax.stop_gradient(pieces)))
    return _Work(scorer, state, batch, hyper, axis, axis.sum(totals), reference, mismatched, dropout_key)


def _dropout_keys(config: StepConfig, step: Array, batch: PreferenceBatch, axis: Axis) -> Array | None:
    """One for each micro-batch, a function of (seed, step, device, micro-batch): a continued run draws the same."""
    if config.dropout_seed is None:
        return None
    key = jax.random.fold_in(jax.random.key(config.dropout_seed), step)
    key = jax.random.fold_in(key, jax.lax.axis_index(axis.name) if axis.name else 0)
    return jax.random.split(key, batch.answers.tokens_RL.shape[0])


def _counts(batch: TokenBatch) -> Array:
    """Σ of weights by slot, [micro, R, S]."""
    return jax.vmap(lambda b: jnp.sum(jnp.where(members(b), b.weight_RM[:, :, None], 0.0), axis=1))(batch)


def _flat(tree: Any) -> Any:
    """Joins the micro-batch axis and the one after it, that of the rows first: they stay where they lie on a mesh."""
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(-1, *a.shape[2:]), tree)


def _unflat(flat: Array, like: Array) -> Array:
    """The inverse, to the shape of ``like``."""
    return flat.reshape(like.shape[1], like.shape[0], *like.shape[2:]).swapaxes(0, 1)


def _over_micro(fn: Callable[[Any], Any], pieces: Any) -> Any:
    """Maps over the leading axis, one micro-batch at a time; a single one is not wrapped in a loop."""
    if jax.tree.leaves(pieces)[0].shape[0] == 1:
        return jax.tree.map(lambda a: a[None], fn(jax.tree.map(lambda a: a[0], pieces)))
    return jax.lax.map(fn, pieces)


def _sum_over_micro(fn: Callable[[Any], Any], pieces: Any) -> Any:
    """Σ of ``fn`` over micro-batches, in constant memory."""
    first = jax.tree.map(lambda a: a[0], pieces)
    if jax.tree.leaves(pieces)[0].shape[0] == 1:
        return fn(first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(fn, first))
    add = partial(jax.tree.map, jnp.add)
    return jax.lax.scan(lambda total, piece: (add(total, fn(piece)), None), zeros, pieces)[0]
