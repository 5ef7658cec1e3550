"""Checks of preference data, for the audit: one module a kind, each (cases) → findings. To add one, add its line."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dpo_jax.data.checks import giveaways, lengths, repeats, rows
from dpo_jax.data.checks.case import Case, Finding

__all__ = ["CHECKS", "Case", "Finding"]

CHECKS: dict[str, Callable[[Sequence[Case]], list[Finding]]] = {
    "answers": rows.answers,
    "repeats": repeats.repeats,
    "contradictions": repeats.contradictions,
    "lengths": lengths.lengths,
    "giveaways": giveaways.giveaways,
    "label noise": giveaways.label_noise,
}
