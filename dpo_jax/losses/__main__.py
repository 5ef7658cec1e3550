"""Prints the losses, divergences and metrics as a page of markdown: ``python -m dpo_jax.losses``.

The page is made of the table of losses, the functions' signatures and their docstrings; nothing in it is written twice.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from dpo_jax.losses import LOSSES, Loss
from dpo_jax.losses.divergences import DIVERGENCES
from dpo_jax.losses.hyper import RANGES, SHARED, parameters_of, range_of
from dpo_jax.losses.reporting import GLOSSARY

_SEES = {
    "pairs": "pairs",
    "answers": "answers of either kind (unpaired data, or both answers of a pair)",
    "chosen": "chosen answers only",
}


def page() -> str:
    """The whole page."""
    return "\n".join([*_introduction(), *_losses(), *_shared(), *_divergences(), *_metrics()]) + "\n"


def _introduction() -> Iterator[str]:
    yield "# Losses"
    yield ""
    yield (
        "Written by `python -m dpo_jax.losses`. Choose one with `config.loss.name`, or a weighted sum of several: "
        "`dpo + 0.2*bco_pair + 1.0*sft`. A hyper-parameter that is not set has the default given here; in a sum each "
        "loss keeps its own."
    )
    yield ""
    yield (
        "w is the chosen answer, l the rejected one, |w| and |l| their numbers of tokens; c = logp_w − ref_w and "
        "r = logp_l − ref_l are log-ratios in nats, s a divergence's score of them (s(x) = x for the reverse KL), and "
        "σ the logistic function."
    )
    yield ""


def _losses() -> Iterator[str]:
    yield "| loss | formula | defaults |"
    yield "|---|---|---|"
    for name, loss in LOSSES.items():
        defaults = ", ".join(f"{p} = {value:g}" for p, value in parameters_of(loss).items())
        yield f"| [{name}](#{name}) | {_cell(_formula(loss.fn))} | {defaults or 'none'} |"
    for name, loss in LOSSES.items():
        yield from ["", f"## {name}", ""]
        yield from _loss(name, loss)
    yield ""


def _loss(name: str, loss: Loss) -> Iterator[str]:
    docstring = inspect.getdoc(loss.fn) or ""
    yield f"    {_formula(loss.fn)}"
    yield ""
    explanation = re.split(r"\n(?=Args:)", docstring.split("\n\n", 1)[1])[0].strip()
    yield _plain(explanation)
    yield ""
    yield f"- paper: {(inspect.getdoc(inspect.getmodule(loss.fn)) or '').splitlines()[0]}"
    yield f"- sees: {_SEES[loss.sees]}"
    yield f"- needs: {_needs(loss)}"
    yield f"- token log-probabilities: {loss.reduction}" + ("" if loss.sees != "chosen" else ", whatever the reduction")
    described = _arguments(docstring)
    for parameter, default in parameters_of(loss).items():
        yield f"- `{parameter}` = {default:g}, in {range_of(name, parameter)}: {described[parameter]}"


def _needs(loss: Loss) -> str:
    needs = {
        "a reference": loss.needs_reference,
        "answers to other prompts, for an estimate of the KL": loss.needs_mismatched,
        "log-probabilities of the prompt": loss.needs_prompt,
        "the whole batch at once": loss.couples_batch,
        "a running mean, kept in the checkpoint": bool(loss.state),
    }
    text = ", ".join(what for what, needed in needs.items() if needed) or "nothing but the policy"
    return text + ("; takes any divergence" if loss.takes_divergence else "")


def _shared() -> Iterator[str]:
    yield "## Reductions and weights"
    yield ""
    yield (
        "`config.loss.reduction` is how token log-probabilities become one number an answer: `sum`, `mean` (over "
        "tokens) or `desensitized` (LD-DPO, arXiv 2409.06411: tokens past the length of the shorter answer count for "
        "`length_alpha`). `config.loss.wpo` weighs each pair by exp Σ mean_t [log π(y_t) − log Σ_v π(v)²] of its "
        "answers (WPO, arXiv 2406.11827, eq. 2)."
    )
    yield ""
    for name, default in SHARED.items():
        yield f"- `{name}` = {default:g}, in {RANGES[name]}"
    yield ""


def _divergences() -> Iterator[str]:
    yield "## Divergences"
    yield ""
    yield f"{_plain(inspect.getdoc(inspect.getmodule(DIVERGENCES['alpha'])) or '')}"
    yield ""
    yield "| divergence | s(x) |"
    yield "|---|---|"
    for name, score in DIVERGENCES.items():
        yield f"| {name} | {_cell(_formula(score))} |"
    yield ""


def _metrics() -> Iterator[str]:
    yield "## Metrics"
    yield ""
    yield "| metric | meaning | when to worry |"
    yield "|---|---|---|"
    for name, (meaning, worry) in GLOSSARY.items():
        yield f"| {_cell(name)} | {_cell(meaning)} | {_cell(worry)} |"


def _formula(fn: Callable[..., Any]) -> str:
    return (inspect.getdoc(fn) or "").split("\n\n", 1)[0].rstrip(".")


def _arguments(docstring: str) -> dict[str, str]:
    """{argument: its description} of a docstring's Args."""
    section = docstring.split("Args:\n", 1)[1].split("\n\n", 1)[0]
    entries = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _plain(text: str) -> str:
    """Docstring markup as markdown."""
    text = re.sub(r":\w+:`(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    return re.sub(r"``(.+?)``", r"`\1`", text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    argparse.ArgumentParser(prog="python -m dpo_jax.losses", description=(__doc__ or "").splitlines()[0]).parse_args()
    # A terminal that cannot show β is no reason to fail.
    sys.stdout.buffer.write(page().encode())


if __name__ == "__main__":
    main()
