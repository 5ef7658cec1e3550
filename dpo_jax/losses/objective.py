"""An objective: a weighted sum of losses over a batch of scored answers, with what it needs and what it reports."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpo_jax.losses import LOSSES, Answers, Loss
from dpo_jax.losses.divergences import DIVERGENCES
from dpo_jax.types import CHOSEN, PROMPT, REJECTED, UNUSED, Array, SequenceLogps

REDUCTIONS = ("sum", "mean", "desensitized")


@struct.dataclass
class Scored:
    """X examples with A answers each, scored. Leaves are [X, A, C]: C = 1, or 2 with the prompt's slot after each answer's.

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


@dataclass(frozen=True)
class Term:
    """One loss of the sum; ``defaults`` are the hyper-parameters that it takes."""

    name: str
    loss: Loss
    defaults: Mapping[str, float]


@dataclass(frozen=True)
class Objective:
    """Losses to be summed, and how log-probabilities reach them. Make one with :func:`make_objective`."""

    terms: tuple[Term, ...]
    reduction: str | None
    divergence: str

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

    def statistics(
        self,
        hyper: Mapping[str, Array],
        state: Mapping[str, Any],
        scored: Scored | None,
        totals: Totals,
        mismatched_ratio_B: Array | None,
        mismatched_mask_B: Array | None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Numbers of the global batch that losses take (KTO's z), and what is remembered; no gradient flows through them.

        Args:
          hyper: hyper-parameters by name.
          state: as from :meth:`initial_state`.
          scored: the whole global batch; None unless ``couples_batch``.
          totals: counts of the global batch.
          mismatched_ratio_B: summed log-ratios of the mismatched answers of the global batch, nats; None when not needed.
          mismatched_mask_B: bool, which of them are real.

        Returns:
          ({loss: {number: value}}, the new state).
        """
        numbers, state = {}, dict(state)
        for term in self.terms:
            if term.loss.statistic is None:
                continue
            units, mask_B = self._units(term, hyper, scored, totals) if scored is not None else (None, None)
            own = {name: hyper[name] for name in term.defaults}
            numbers[term.name], new = term.loss.statistic(
                state.get(term.name, {}), units, mask_B, mismatched_ratio_B, mismatched_mask_B, **own
            )
            if term.loss.state:
                state[term.name] = new
        return jax.lax.stop_gradient((numbers, state))

    def values(
        self, hyper: Mapping[str, Array], scored: Scored, totals: Totals, numbers: Mapping[str, Any]
    ) -> dict[str, tuple[Array, Array]]:
        """(values, mask), both [B], of every term."""
        out = {}
        for term in self.terms:
            units, mask_B = self._units(term, hyper, scored, totals)
            own = {name: hyper[name] for name in term.defaults} | dict(numbers.get(term.name, {}))
            out[term.name] = jnp.where(mask_B, term.loss.fn(*units, **own), 0.0), mask_B
        return out

    def loss(
        self, hyper: Mapping[str, Array], scored: Scored, totals: Totals, numbers: Mapping[str, Any]
    ) -> tuple[Array, Array]:
        """This shard's part of the global loss: Σ_terms weight · Σ_B value / (units in the global batch).

        Returns:
          (loss, the same), the second for ``has_aux``: adding either over shards gives the loss of the whole batch.
        """
        values = self.values(hyper, scored, totals, numbers)
        total = jnp.float32(0.0)
        for term in self.terms:
            count = jnp.maximum(getattr(totals, term.loss.sees), 1.0)
            total += hyper[_weight_name(term.name)] * jnp.sum(values[term.name][0]) / count
        return total, total

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
        logp = self._reduce(term, policy, hyper)
        ref = self._reduce(term, reference, hyper) if term.loss.needs_reference else jnp.zeros_like(logp)
        chosen = jnp.maximum(totals.chosen, 1.0)
        return Answers(
            logp_B=logp,
            reference_B=ref,
            shaped_B=DIVERGENCES[self.divergence](logp - ref, hyper["divergence_alpha"]),
            sum_B=policy.sum,
            count_B=jnp.maximum(policy.count, 1.0),
            prompt_sum_B=scored.policy.sum[..., -1] if self.needs_prompt else jnp.zeros_like(logp),
            score_B=scored.score[..., 0],
            mean_count=jnp.maximum(totals.chosen_tokens, 1.0) / chosen,
            mean_full_count=jnp.maximum(totals.chosen_tokens + totals.chosen_prompt_tokens, 1.0) / chosen,
        )

    def _reduce(self, term: Term, logps: SequenceLogps, hyper: Mapping[str, Array]) -> Array:
        reduction = self.reduction or term.loss.reduction
        if reduction == "mean":
            return logps.sum / jnp.maximum(logps.count, 1.0)
        if reduction == "desensitized":  # LD-DPO (arXiv 2409.06411): tokens past the shorter answer count for α
            return logps.sum - (1 - hyper["length_alpha"]) * logps.tail
        return logps.sum


def make_objective(
    name: str, hyper: Mapping[str, float] | None = None, *, reduction: str | None = None, divergence: str = "reverse_kl"
) -> tuple[Objective, dict[str, float]]:
    """Builds an objective from a config's words.

    Args:
      name: a loss (``dpo``) or a weighted sum (``dpo + 0.2*bco_pair + 1.0*sft``).
      hyper: hyper-parameters that differ from the papers' defaults, by name.
      reduction: of token log-probabilities: sum, mean or desensitized; None is each loss's own.
      divergence: a name in ``DIVERGENCES``.

    Returns:
      (objective, its hyper-parameters with defaults filled in: numbers to be traced).

    Raises:
      ValueError: an unknown name, or a hyper-parameter that no loss of the sum takes or that is out of its range.
    """
    weights = _parse_sum(name)
    terms = tuple(Term(n, LOSSES[n], hyper_parameters(LOSSES[n])) for n in weights)
    for what, value, known in (("divergence", divergence, tuple(DIVERGENCES)), ("reduction", reduction, REDUCTIONS)):
        if value is not None and value not in known:
            raise ValueError(f"unknown {what} {value!r}; known: {', '.join(known)}")
    numbers = {"divergence_alpha": 0.5, "length_alpha": 0.5}
    for term in terms:
        numbers |= term.defaults
    given = dict(hyper or {})
    unknown = sorted(set(given) - set(numbers))
    if unknown:
        raise ValueError(f"loss {name!r} does not take {', '.join(unknown)}; it takes {', '.join(sorted(numbers))}")
    numbers |= given
    return Objective(terms, reduction, divergence), numbers | {_weight_name(n): w for n, w in weights.items()}


def hyper_parameters(loss: Loss) -> dict[str, float]:
    """The keyword-only arguments of a loss with their defaults, less the numbers that its statistic gives."""
    parameters = inspect.signature(loss.fn).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return {name: value for name, value in defaults.items() if value is not inspect.Parameter.empty}


def _parse_sum(name: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for part in name.split("+"):
        match = re.fullmatch(r"\s*(?:([0-9.eE-]+)\s*\*)?\s*([a-z_0-9]+)\s*", part)
        if not match:
            raise ValueError(f"cannot read loss {name!r}; write a name, or a sum like 'dpo + 0.5*sft'")
        weight, loss = match.groups()
        if loss not in LOSSES:
            near = difflib.get_close_matches(loss, LOSSES, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown loss {loss!r}; {hint}known: {', '.join(LOSSES)}")
        if loss in weights:
            raise ValueError(f"loss {loss!r} stands twice in {name!r}")
        weights[loss] = float(weight or 1.0)
    return weights


def _pair_mask(role: Array) -> Array:
    if role.shape[1] < 2:
        return jnp.zeros(role.shape[0], bool)
    return (role[:, 0, 0] == CHOSEN) & (role[:, 1, 0] == REJECTED)


def _weight_name(loss: str) -> str:
    return f"weight_{loss}"
