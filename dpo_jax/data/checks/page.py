"""The audit as one HTML page that needs nothing else: text escaped, plots inside of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dpo_jax import page
from dpo_jax.data.checks.case import Finding

_SHOWN = 50  # rows of a finding


def render(title: str, counts: Mapping[str, Any], findings: Sequence[Finding]) -> str:
    """The page.

    Args:
      title: what was audited.
      counts: numbers of rows, by name.
      findings: of all checks; serious ones come first.

    Returns:
      HTML.
    """
    ordered = sorted(findings, key=lambda f: (not (f.serious and f.count), f.count == 0))
    parts = [
        f"<h1>Audit of <code>{page.text(title)}</code></h1>",
        page.table(["", ""], [[k, v] for k, v in counts.items()]),
    ]
    for finding in ordered:
        parts.append(_section(finding))
    return page.document("Audit", parts)


def _section(finding: Finding) -> str:
    kind = "serious" if finding.serious and finding.count else "none" if not finding.count else ""
    parts = [f'<h2 class="{kind}">{page.text(finding.check)}</h2>', f"<p>{page.text(finding.summary)}</p>"]
    if finding.check in _PLOTS:
        parts.append(_plot(_PLOTS[finding.check], finding.numbers))
    if finding.numbers.get("words") and finding.check == "telling words":
        parts.append(page.table(["word", "z", "better", "worse"], finding.numbers["words"]))
    if finding.rows:
        more = f", the first {_SHOWN}" if len(finding.rows) > _SHOWN else ""
        parts.append(page.folded(f"{len(finding.rows)} rows{more}", page.table(["place", ""], finding.rows[:_SHOWN])))
    return "\n".join(parts)


def _plot(draw: Callable[[Any, Mapping[str, Any]], None], numbers: Mapping[str, Any]) -> str:
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.add_subplot()
    draw(axes, numbers)
    axes.spines[["top", "right"]].set_visible(False)
    return page.picture(page.png_of(figure))


def _draw_lengths(axes: Any, numbers: Mapping[str, Any]) -> None:
    words = numbers["words"]
    most = max((max(values) for values in words.values() if values), default=1)
    bins = np.geomspace(1, max(2, most), 40)
    for name, values in words.items():
        axes.hist(np.maximum(values, 1), bins=bins, histtype="step", label=name)
    axes.set(xscale="log", xlabel="words", ylabel="rows")
    axes.legend(frameon=False)


def _draw_giveaways(axes: Any, numbers: Mapping[str, Any]) -> None:
    features = numbers.get("features", [])[:10][::-1]
    axes.barh([name for name, _ in features], [weight for _, weight in features])
    axes.set(xlabel="weight of a standard deviation: to the right, the better answers have more of it")


def _draw_noise(axes: Any, numbers: Mapping[str, Any]) -> None:
    axes.hist(numbers.get("own", []), bins=np.linspace(0, 1, 41))
    axes.set(xlabel="probability of the given label, from the other rows", ylabel="rows")


_PLOTS: dict[str, Callable[[Any, Mapping[str, Any]], None]] = {
    "lengths": _draw_lengths,
    "give-aways": _draw_giveaways,
    "label noise": _draw_noise,
}
