"""An objective: a weighted sum of losses over a batch of scored answers, with what it needs and what it reports."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpo_jax.losses import LOSSES, Answers, Loss
from dpo_jax.losses.divergences import DIVERGENCES
from dpo_jax.losses.hyper import SHARED, fill, parameters_of
from dpo_jax.losses.parse import check_options, nearest, parse_sum
from dpo_jax.losses.reporting import preference_metrics, statistic_metrics
from dpo_jax.metrics import Ratio, Sum
from dpo_jax.types import CHOSEN, PROMPT, REJECTED, UNUSED, Array, SequenceLogps

REDUCTIONS = ("sum", "mean", "desensitized")


@struct.dataclass
class Scored:
    """X examples with A answers each, scored.

    Leaves are [X, A, C]: C = 1, or 2 with the prompt's slot after each answer's.

    Attributes:
      policy: under the policy; the gradient flows through it.
      reference: under the reference; zeros when the objective needs none.
      role: int32, as in ``TokenBatch.role_RS``.
      score: float32, the annotator's score.
    """

    policy: SequenceLogps
    reference: SequenceLogps
    role: Array
    score: Array


@struct.dataclass
class Totals:
    """Counts over the global batch, known from the data alone: what the sums are divided by."""

    chosen: Array
    pairs: Array
    answers: Array
    chosen_tokens: Array
    chosen_prompt_tokens: Array

    @property
    def full_tokens(self) -> Array:
        """Tokens of the chosen answers with their prompts."""
        return self.chosen_tokens + self.chosen_prompt_tokens


@dataclass(frozen=True)
class Term:
    """One loss of the sum; ``parameters`` are the names of the hyper-parameters that it takes."""

    name: str
    loss: Loss
    parameters: tuple[str, ...]

    def own(self, hyper: Mapping[str, Array]) -> dict[str, Array]:
        """The loss's own numbers, by the names of its arguments."""
        return {p: hyper[f"{self.name}.{p}"] for p in self.parameters}

    def weight(self, hyper: Mapping[str, Array]) -> Array:
        """What the loss is multiplied by in the sum."""
        return hyper[f"{self.name}.weight"]


@dataclass(frozen=True)
class Objective:
    """Losses to be summed, and how log-probabilities reach them. Make one with :func:`make_objective`.

    Attributes:
      terms: the losses.
      reduction: of token log-probabilities; None is each loss's own.
      divergence: a name in ``DIVERGENCES``.
      wpo: whether pairs (or answers, for a loss that sees answers of either kind) are weighted by how likely the policy
        would be to write them: WPO, arXiv 2406.11827, eq. 2. The likelihood term ``sft`` is not weighted.
    """

    terms: tuple[Term, ...]
    reduction: str | None
    divergence: str
    wpo: bool = False

    @property
    def needs_reference(self) -> bool:
        return any(term.loss.needs_reference for term in self.terms)

    @property
    def needs_mismatched(self) -> bool:
        return any(term.loss.needs_mismatched for term in self.terms)

    @property
    def needs_prompt(self) -> bool:
        return any(term.loss.needs_prompt for term in self.terms)

    @property
    def needs_pairs(self) -> bool:
        return any(term.loss.sees == "pairs" for term in self.terms)

    @property
    def couples_batch(self) -> bool:
        return any(term.loss.couples_batch for term in self.terms)

    def initial_state(self) -> dict[str, dict[str, Array]]:
        """What the losses' statistics remember, by loss."""
        return {t.name: {k: jnp.float32(v) for k, v in t.loss.state.items()} for t in self.terms if t.loss.state}

    def advice(self, desirable: int, undesirable: int, hyper: Mapping[str, Any]) -> list[str]:
        """What the losses have to say about the numbers of answers of either kind in the data."""
        found = []
        for term in self.terms:
            if term.loss.advice is not None:
                taken = inspect.signature(term.loss.advice).parameters
                own = {name: float(number) for name, number in term.own(hyper).items() if name in taken}
                found.append(term.loss.advice(desirable, undesirable, **own))
        return [text for text in found if text is not None]

    def totals(self, role: Array, count: Array) -> Totals:
        """Counts of one shard of a batch; add them over shards. ``role`` and ``count`` (tokens) are [X, A, C]."""
        chosen_X = role[:, 0, 0] == CHOSEN
        prompt_X = role[:, 0, -1] == PROMPT
        return Totals(
            chosen=jnp.sum(chosen_X).astype(jnp.float32),
            pairs=jnp.sum(_pair_mask(role)).astype(jnp.float32),
            answers=jnp.sum(role[:, :, 0] != UNUSED).astype(jnp.float32),
            chosen_tokens=jnp.sum(jnp.where(chosen_X, count[:, 0, 0], 0.0)),
            chosen_prompt_tokens=jnp.sum(jnp.where(prompt_X & chosen_X, count[:, 0, -1], 0.0)),
        )

    def mismatched_ratio(self, policy: SequenceLogps, reference: SequenceLogps) -> Array:
        """Log-ratios of mismatched answers under the reduction of the loss that reads them (sum, or mean over tokens).

        A mismatched answer stands alone, so that the length-desensitised reduction, which compares the two answers of a
        pair, is the sum.
        """
        ratio = policy.sum - reference.sum
        return ratio / jnp.maximum(policy.count, 1.0) if self.reduction == "mean" else ratio

    def statistics(
        self,
        hyper: Mapping[str, Array],
        state: Mapping[str, Any],
        scored: Scored | None,
        totals: Totals,
        mismatched_ratio_B: Array | None,
        mismatched_mask_B: Array | None,
        update: bool = True,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Numbers of the global batch that losses take (KTO's z), without a gradient, and what is remembered.

        Args:
          hyper: hyper-parameters by name.
          state: as from :meth:`initial_state`.
          scored: the whole global batch; None unless ``couples_batch``.
          totals: counts of the global batch.
          mismatched_ratio_B: log-ratios of the mismatched answers of the global batch, as from
            :meth:`mismatched_ratio`, nats; None when not needed.
          mismatched_mask_B: bool, which of them are real.
          update: whether running means take in this batch; false in evaluation, so that they do not depend on it.

        Returns:
          ({loss: {number: value}}, the new state).
        """
        numbers, state = {}, dict(state)
        for term in self.terms:
            if term.loss.statistic is None:
                continue
            units, mask_B = self._units(term, hyper, scored, totals) if scored is not None else (None, None)
            numbers[term.name], new = term.loss.statistic(
                state.get(term.name, {}),
                units,
                mask_B,
                mismatched_ratio_B,
                mismatched_mask_B,
                update=update,
                **term.own(hyper),
            )
            if term.loss.state:
                state[term.name] = new
        return jax.lax.stop_gradient((numbers, state))

    def values(
        self, hyper: Mapping[str, Array], scored: Scored, totals: Totals, numbers: Mapping[str, Any]
    ) -> dict[str, tuple[Array, Array]]:
        """(values, mask), both [B], of every term, before its weight in the sum."""
        out: dict[str, tuple[Array, Array]] = {}
        for term in self.terms:
            units, mask_B = self._units(term, hyper, scored, totals)
            values_B = term.loss.fn(*units, **term.own(hyper), **numbers.get(term.name, {}))
            out[term.name] = self._weighted(term, scored, values_B, mask_B), mask_B
        return out

    def _weighted(self, term: Term, scored: Scored, values_B: Array, mask_B: Array) -> Array:
        if self.wpo:
            values_B = values_B * _wpo_weight(term.loss, scored.policy)
        return jnp.where(mask_B, values_B, 0.0)

    def loss(self, hyper: Mapping[str, Array], scored: Scored, totals: Totals, numbers: Mapping[str, Any]) -> Array:
        """This shard's part of the global loss: Σ_terms weight · Σ_B value / (units in the global batch).

        Returns:
          float32 scalar; adding it over shards gives the loss of the whole batch.
        """
        values = self.values(hyper, scored, totals, numbers)
        parts = (t.weight(hyper) * _mean(values[t.name][0], t.loss, totals) for t in self.terms)
        return sum(parts, jnp.float32(0.0))

    def metrics(
        self, hyper: Mapping[str, Array], scored: Scored, totals: Totals, numbers: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What one shard adds to the metrics of the batch; names as in ``reporting.GLOSSARY``.

        Args:
          hyper: hyper-parameters by name.
          scored: the shard.
          totals: counts of the global batch.
          numbers: as from :meth:`statistics`.

        Returns:
          {name: metric of ``dpo_jax.metrics``}, to be added over shards, micro-batches and batches.
        """
        own = self.totals(scored.role, scored.policy.count)
        values = self.values(hyper, scored, totals, numbers)
        means = {t.name: self._means(t, hyper, scored, own, totals, values[t.name][0]) for t in self.terms}
        weighted = [Ratio(t.weight(hyper) * m.numerator, m.denominator) for t in self.terms for m in means[t.name]]
        metrics: dict[str, Any] = {"loss": Sum(tuple(weighted))}
        if len(self.terms) > 1:
            metrics |= {f"loss/{name}": Sum(parts) for name, parts in means.items()}
        policy, reference = (jax.tree.map(lambda a: a[..., 0], s) for s in (scored.policy, scored.reference))
        metrics |= preference_metrics(
            policy,
            reference if self.needs_reference else None,
            scored.role[..., 0],
            self._rewards(hyper, policy, reference),
        )
        return metrics | statistic_metrics(numbers, own.answers)

    def _means(
        self, term: Term, hyper: Mapping[str, Array], scored: Scored, own: Totals, totals: Totals, values_B: Array
    ) -> tuple[Ratio, ...]:
        """A shard's part of a loss: a mean over what it sees and, where it has a likelihood part, one over tokens."""
        loss, total = term.loss, _mean(values_B, term.loss, totals)
        if loss.sees == "chosen":
            return (_share(total, "chosen_tokens", own, totals),)
        if loss.likelihood is None:
            return (_share(total, loss.sees, own, totals),)
        units, mask_B = self._units(term, hyper, scored, totals)
        tokens_B = self._weighted(term, scored, loss.likelihood(*units, **term.own(hyper)), mask_B)
        tokens = _mean(tokens_B, loss, totals)
        unit = "full_tokens" if loss.needs_prompt else "chosen_tokens"
        return _share(total - tokens, loss.sees, own, totals), _share(tokens, unit, own, totals)

    def _rewards(self, hyper: Mapping[str, Array], policy: SequenceLogps, reference: SequenceLogps) -> Array:
        """β times the summed log-ratio or, without a reference, the reduced log-probability.

        β is that of the first loss that has one.
        """
        term = next((t for t in self.terms if "beta" in t.parameters), self.terms[0])
        beta = term.own(hyper).get("beta", jnp.float32(1.0))
        if term.loss.needs_reference:
            return beta * (policy.sum - reference.sum)
        total, divisor = self._reduce(term, policy, hyper)
        return beta * total / divisor

    def _units(
        self, term: Term, hyper: Mapping[str, Array], scored: Scored, totals: Totals
    ) -> tuple[tuple[Any, ...], Array]:
        """The positional arguments of a loss, and which of their B places are real."""
        role_XA = scored.role[:, :, 0]
        answers_XA = self._answers(term, hyper, scored, totals)
        first = jax.tree.map(lambda a: a[:, 0] if a.ndim else a, answers_XA)
        if term.loss.sees == "chosen":
            return (first,), role_XA[:, 0] == CHOSEN
        if term.loss.sees == "pairs":
            second = jax.tree.map(lambda a: a[:, 1] if a.ndim else a, answers_XA)
            return (first, second), _pair_mask(scored.role)
        flat = jax.tree.map(lambda a: a.reshape(-1) if a.ndim else a, answers_XA)
        role_B = role_XA.reshape(-1)
        return (flat, role_B == CHOSEN), role_B != UNUSED

    def _answers(self, term: Term, hyper: Mapping[str, Array], scored: Scored, totals: Totals) -> Answers:
        policy, reference = (jax.tree.map(lambda a: a[..., 0], s) for s in (scored.policy, scored.reference))
        logp, divisor = self._reduce(term, policy, hyper)
        ref = self._reduce(term, reference, hyper)[0] if term.loss.needs_reference else jnp.zeros_like(logp)
        chosen = jnp.maximum(totals.chosen, 1.0)
        return Answers(
            logp_B=logp / divisor,
            reference_B=ref / divisor,
            shaped_B=DIVERGENCES[self.divergence](logp - ref, hyper["divergence_alpha"]) / divisor,
            sum_B=policy.sum,
            count_B=jnp.maximum(policy.count, 1.0),
            prompt_sum_B=scored.policy.sum[..., -1] if self.needs_prompt else jnp.zeros_like(logp),
            score_B=scored.score[..., 0],
            mean_count=jnp.maximum(totals.chosen_tokens, 1.0) / chosen,
            mean_full_count=jnp.maximum(totals.full_tokens, 1.0) / chosen,
        )

    def _reduce(self, term: Term, logps: SequenceLogps, hyper: Mapping[str, Array]) -> tuple[Array, Array]:
        """(sum over tokens, what to divide it by)."""
        reduction = self.reduction or term.loss.reduction
        one = jnp.ones_like(logps.sum)
        if reduction == "mean":
            return logps.sum, jnp.maximum(logps.count, 1.0)
        if reduction == "desensitized":  # LD-DPO (arXiv 2409.06411): tokens past the shorter answer count for α
            return logps.sum - (1 - hyper["length_alpha"]) * logps.tail, one
        return logps.sum, one


def make_objective(
    name: str,
    hyper: Mapping[str, float | None] | None = None,
    *,
    reduction: str | None = None,
    divergence: str = "reverse_kl",
    wpo: bool = False,
) -> tuple[Objective, dict[str, float]]:
    """Builds an objective from a config's words.

    Args:
      name: a loss (``dpo``) or a weighted sum (``dpo + 0.2*bco_pair + 1.0*sft``).
      hyper: hyper-parameters that differ from the papers' defaults: ``beta`` for all losses that take one, ``dpo.beta``
        for one of them. None is not given.
      reduction: of token log-probabilities: sum, mean or desensitized; None is each loss's own.
      divergence: a name in ``DIVERGENCES``.
      wpo: whether pairs are weighted by the policy's own likelihood of them.

    Returns:
      (objective, its hyper-parameters with defaults filled in: numbers to be traced, so that none of them recompiles).

    Raises:
      ValueError: an unknown name, a hyper-parameter that no loss of the sum takes or that is out of its range, or an
        option that no loss of the sum would read.
    """
    weights = parse_sum(name)
    losses = {n: LOSSES[n] for n in weights}
    for what, value, known in (("divergence", divergence, tuple(DIVERGENCES)), ("reduction", reduction, REDUCTIONS)):
        if value is not None and value not in known:
            raise ValueError(f"unknown {what} {value!r}{nearest(value, known)}; known: {', '.join(known)}")
    check_options(losses, reduction, divergence, wpo)
    used = {"divergence_alpha": divergence == "alpha", "length_alpha": reduction == "desensitized"}
    numbers = fill(losses, dict(hyper or {}), [n for n in SHARED if used[n]])
    terms = tuple(Term(n, loss, tuple(parameters_of(loss))) for n, loss in losses.items())
    return Objective(terms, reduction, divergence, wpo), numbers | {f"{n}.weight": w for n, w in weights.items()}


def check_data(objective: Objective, answers: int) -> None:
    """Checks that the data has what the objective compares.

    Args:
      objective: what is to be minimised.
      answers: A, answers of an example: 2 for pairs, 1 for unpaired data.

    Raises:
      ValueError: a loss that compares pairs, on unpaired data.
    """
    paired = [t.name for t in objective.terms if t.loss.sees == "pairs"]
    if paired and answers != 2:
        others = ", ".join(n for n, loss in LOSSES.items() if loss.sees != "pairs")
        raise ValueError(
            f"loss {paired[0]!r} compares a chosen with a rejected answer, but the data has {answers} an example; "
            f"give it pairs, or take a loss for unpaired data: {others}"
        )


def _mean(values_B: Array, loss: Loss, totals: Totals) -> Array:
    """A shard's part of the mean over the global batch."""
    return jnp.sum(values_B) / jnp.maximum(getattr(totals, loss.sees), 1.0)


def _share(value: Array, unit: str, own: Totals, totals: Totals) -> Ratio:
    """A shard's part of a mean over the units of the global batch: adding parts over shards and batches is exact."""
    return Ratio(value * getattr(totals, unit), getattr(own, unit))


def _wpo_weight(loss: Loss, policy: SequenceLogps) -> Array | float:
    """exp Σ_answers mean_t [log π(y_t) − log Σ_v π(v)²] of each unit [B], without a gradient.

    Eq. 2 of arXiv 2406.11827.
    """
    overlap_XA = jax.lax.stop_gradient(policy.overlap[..., 0] / jnp.maximum(policy.count[..., 0], 1.0))
    if loss.sees == "chosen":
        return 1.0
    return jnp.exp(jnp.sum(overlap_XA, axis=1) if loss.sees == "pairs" else overlap_XA.reshape(-1))


def _pair_mask(role: Array) -> Array:
    if role.shape[1] < 2:
        return jnp.zeros(role.shape[0], bool)
    return (role[:, 0, 0] == CHOSEN) & (role[:, 1, 0] == REJECTED)
