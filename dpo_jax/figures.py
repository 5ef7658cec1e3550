"""The pictures of a report: methods by colour, marker and dash; error bars are 95 % intervals over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dpo_jax.comparison import Choice, interval
from dpo_jax.page import COLORS, DASHES, MARKERS
from dpo_jax.results import Result

CURVES = {
    "samples/reward": "reward of samples",
    "samples/kl": "KL(policy ‖ reference),\nnats a sequence",
    "eval/rewards/margins": "implicit margin,\nβ · nats",
    "eval/rewards/accuracies": "implicit accuracy,\nshare of held-out pairs",
    "eval/logps/chosen": "log π(chosen), nats",
    "eval/logps/rejected": "log π(rejected), nats",
    "samples/length": "length of samples, tokens",
    "eval/entropy": "entropy, nats a token",
}
KL_LABEL = "KL(policy ‖ reference), nats a sequence"


def style(index: int) -> dict[str, Any]:
    """How the lines of a method look."""
    i = index % len(COLORS)
    return {"color": COLORS[i], "marker": MARKERS[i], "linestyle": DASHES[i], "ms": 4, "lw": 1.3}


def frontier(
    panels: Mapping[str, Mapping[str, Sequence[Result]]], methods: Sequence[str], chosen: Mapping[tuple, Choice | None]
) -> Figure:
    """Reward against KL on the test half: a point every evaluation of every run; the chosen points are ringed.

    Args:
      panels: condition → method → its runs.
      methods: in order.
      chosen: (condition, method) → the point that was chosen.
    """
    figure, axes = _panels(len(panels), (4.6, 3.6))
    for ax, (condition, by_method) in zip(axes, panels.items(), strict=False):
        for i, method in enumerate(methods):
            for n, run in enumerate(by_method.get(method, ())):
                kl, reward = (a.mean(1) for a in run.path("test"))
                ax.plot(kl, reward, **{**style(i), "lw": 0.7}, alpha=0.7, label=method if n == 0 else None)
            choice = chosen.get((condition, method))
            if choice is not None:
                for run in choice.runs:
                    kl, reward = (a.mean(1)[choice.step] for a in run.path("test"))
                    ax.plot(kl, reward, "o", ms=10, mfc="none", mec=COLORS[i % len(COLORS)], mew=1.2)
        ax.set(xlabel=KL_LABEL, title=condition)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("reward of samples, test half")
    _legend(figure, axes[0])
    return figure


def curves(by_method: Mapping[str, Sequence[Result]], methods: Sequence[str], title: str) -> Figure:
    """Numbers over steps: means over seeds, with 95 % intervals as bands.

    Args:
      by_method: method → the runs of its chosen setting, a seed each.
      methods: in order.
      title: of the whole picture.
    """
    figure, axes = _panels(len(CURVES), (2.9, 2.3), columns=4)
    for ax, (name, label) in zip(axes, CURVES.items(), strict=False):
        for i, method in enumerate(methods):
            tables = [{int(r["step"]): r[name] for r in run.rows if name in r} for run in by_method.get(method, ())]
            steps = sorted(set.intersection(*(set(t) for t in tables))) if tables else []
            values = np.array([[t[s] for s in steps] for t in tables])
            if not steps:
                continue
            mean, half = values.mean(0), np.array([interval(column) for column in values.T])
            ax.plot(steps, mean, **{**style(i), "ms": 2.5}, label=method)
            ax.fill_between(steps, mean - half, mean + half, color=COLORS[i % len(COLORS)], alpha=0.15, lw=0)
        ax.set(xlabel="step")
        ax.set_ylabel(label, fontsize=8)
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    _legend(figure, axes[0])
    return figure


def across(values: Mapping[str, Mapping[tuple[str, str], np.ndarray]], conditions: Sequence[str], axis: str) -> Figure:
    """Reward of the methods under every condition, with 95 % intervals over seeds.

    Args:
      values: panel → (condition, method) → rewards, a seed each.
      conditions: in order.
      axis: what the conditions are.
    """
    figure, axes = _panels(len(values), (4.2, 3.4))
    for ax, (title, table) in zip(axes, values.items(), strict=False):
        methods = list(dict.fromkeys(method for _, method in table))
        for i, method in enumerate(methods):
            known = [(n, table[c, method]) for n, c in enumerate(conditions) if (c, method) in table]
            x = np.array([n for n, _ in known]) + 0.06 * (i - (len(methods) - 1) / 2)
            means = [v.mean() for _, v in known]
            errors = [np.nan_to_num(interval(v)) for _, v in known]
            ax.errorbar(x, means, yerr=errors, capsize=3, label=method, **style(i))
        ax.set_xticks(range(len(conditions)), conditions, fontsize=8)
        ax.set(xlabel=axis, title=title)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("reward of samples, test half")
    _legend(figure, axes[0])
    return figure


def _panels(count: int, size: tuple[float, float], columns: int = 3) -> tuple[Figure, list[Any]]:
    columns = 2 if count == 4 else min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows + 0.5), layout="constrained")
    grid = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for ax in grid[count:]:
        ax.set_axis_off()
    return figure, list(grid)


def _legend(figure: Figure, ax: Any) -> None:
    handles, labels = ax.get_legend_handles_labels()
    entry = 0.8 + 0.09 * max(map(len, labels), default=0)  # inches: its line and blanks, and each letter
    columns = max(1, min(6, len(labels), int(figure.get_figwidth() / entry)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
