"""What a loss sees, and what its table entry declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import jax.numpy as jnp
from flax import struct

from dpo_jax.types import Array

Reduction = Literal["sum", "mean", "desensitized"]


@struct.dataclass
class Answers:
    """B answers, one an example. All log-probabilities are fp32, in nats.

    Attributes:
      logp_B: policy log-probability under the loss's reduction (sum, token mean or length-desensitised).
      reference_B: the same under the reference; 0 for a loss that needs none.
      shaped_B: s(log-ratio), the divergence's score (``losses/divergences.py``); under the reduction ``mean`` it is the
        score of the summed log-ratio, divided by the number of tokens. The plain log-ratio for the reverse KL.
      sum_B: policy log-probability, always summed over tokens; for likelihood terms.
      count_B: number of tokens (Σ of their weights), at least 1.
      prompt_sum_B: policy log-probability of the prompt, summed; 0 unless the loss declares ``needs_prompt``.
      score_B: the annotator's score, 0 where the data has none.
      mean_count: scalar, mean ``count_B`` of the chosen answers of the global batch: ``-sum_B / mean_count``, averaged
        over answers, is the token-mean negative log-likelihood, whatever the micro-batch.
      mean_full_count: scalar, the same with the tokens of the prompt included.
    """

    logp_B: Array
    reference_B: Array
    shaped_B: Array
    sum_B: Array
    count_B: Array
    prompt_sum_B: Array
    score_B: Array
    mean_count: Array
    mean_full_count: Array

    @property
    def ratio_B(self) -> Array:
        """log π(y|x) − log π_ref(y|x) under the loss's reduction, nats."""
        return self.logp_B - self.reference_B


@dataclass(frozen=True)
class Loss:
    """A row of the table of losses.

    ``fn`` takes, by ``sees``, ``(chosen)``, ``(chosen, rejected)`` or ``(answers, desirable_B)``, then its
    hyper-parameters as keyword-only arguments whose defaults are the paper's (or, where it names none, the customary),
    and returns one value per answer or pair, [B].

    Attributes:
      fn: the loss.
      likelihood: the part of ``fn`` that is a mean over the chosen answers' tokens; it takes the same arguments, and
        ignores those that it does not need. None has no such part.
      sees: "chosen" answers only, "pairs", or "answers" of either kind.
      needs_reference: whether it reads ``reference_B`` (through ``ratio_B`` or ``shaped_B``).
      needs_mismatched: whether its statistic reads answers of other examples (KTO).
      needs_prompt: whether it reads ``prompt_sum_B``.
      couples_batch: whether one value depends on the log-probabilities of other answers of the global batch.
      reduction: the paper's reduction of token log-probabilities.
      statistic: ``(state, units, mask_B, mismatched_ratio_B, mismatched_mask_B, *, update, **hyper) → (numbers,
        state)``, computed on the global batch without a gradient before the loss; ``units`` are the loss's positional
        arguments (None unless ``couples_batch``), and ``update`` is false in evaluation, where nothing is remembered.
        The numbers are passed to ``fn`` as keyword arguments.
      state: what the statistic remembers from step to step, with its initial values.
      takes_divergence: whether it reads ``shaped_B``, so that another divergence than the reverse KL makes sense.
      advice: ``(desirable, undesirable, **weights) → str | None``: a warning about how many answers of either kind the
        data has, from the loss's hyper-parameters that it names; None when all is well.
    """

    fn: Callable[..., Array]
    likelihood: Callable[..., Array] | None = field(default=None, kw_only=True)
    sees: Literal["chosen", "pairs", "answers"]
    needs_reference: bool = True
    needs_mismatched: bool = False
    needs_prompt: bool = False
    couples_batch: bool = False
    reduction: Reduction = "sum"
    statistic: Callable[..., tuple[dict[str, Array], dict[str, Array]]] | None = None
    state: Mapping[str, float] = field(default_factory=dict)
    takes_divergence: bool = False
    advice: Callable[..., str | None] | None = None


def masked_mean(values_B: Array, mask_B: Array) -> Array:
    """Mean over the places where ``mask_B`` holds; 0 when it holds nowhere."""
    total = jnp.sum(jnp.where(mask_B, values_B, 0.0))
    return total / jnp.maximum(jnp.sum(mask_B), 1)
