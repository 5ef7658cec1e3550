"""Reads the words of a config: sums of losses, and options that go with them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from dpo_jax.losses import LOSSES, Loss


def check_options(losses: Mapping[str, Loss], reduction: str | None, divergence: str, wpo: bool) -> None:
    """Options that a loss would silently ignore are errors."""
    deaf = [n for n, loss in losses.items() if loss.needs_reference and not loss.takes_divergence]
    hearing = [n for n, loss in losses.items() if loss.takes_divergence]
    if divergence != "reverse_kl" and (deaf or not hearing):
        takers = ", ".join(n for n, loss in LOSSES.items() if loss.takes_divergence)
        raise ValueError(
            f"loss {(deaf or list(losses))[0]!r} is defined for the reverse KL alone, got divergence {divergence!r}; "
            f"losses that take another: {takers}"
        )
    if all(loss.sees == "chosen" for loss in losses.values()) and (reduction is not None or wpo):
        option = "wpo" if reduction is None else f"reduction {reduction!r}"
        raise ValueError(f"loss {' + '.join(losses)!r} is a plain likelihood and does not read {option}; leave it out")


_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_TERM = re.compile(rf"\s*(?:({_NUMBER})\s*\*\s*)?([A-Za-z_]\w*)\s*")


def parse_sum(name: str) -> dict[str, float]:
    """{loss: weight} of ``dpo + 1e-3*sft``."""
    weights: dict[str, float] = {}
    position = 0
    while True:
        match = _TERM.match(name, position)
        if not match or (match.end() < len(name) and name[match.end()] != "+"):
            raise ValueError(f"cannot read loss {name!r}; write a name, or a sum like 'dpo + 0.5*sft'")
        weight, loss = match.groups()
        if loss not in LOSSES:
            raise ValueError(f"unknown loss {loss!r}{nearest(loss, tuple(LOSSES))}; known: {', '.join(LOSSES)}")
        if loss in weights:
            raise ValueError(f"loss {loss!r} stands twice in {name!r}; add the weights up and name it once")
        weights[loss] = float(weight or 1.0)
        if match.end() == len(name):
            return weights
        position = match.end() + 1


def nearest(word: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
