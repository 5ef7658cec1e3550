"""The figure of the experiment."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from experiments.theory.bandits import Curves
from experiments.theory.flips import Flips
from experiments.theory.tabular import Tabular

_COLORS = plt.get_cmap("viridis")(np.linspace(0.0, 0.85, 4))


def draw(tabular: Tabular, curves: list[Curves], flips: Flips, path: Path) -> None:
    """Four panels: the table's optimum, the two bandits over time, and the flipped labels."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8.5), layout="constrained")
    _draw_table(axes[0, 0], tabular)
    _draw_bandit(axes[0, 1], curves, "D1", 0, "π(a)")
    _draw_bandit(axes[1, 0], curves, "D3'", 2, "π(c)")
    _draw_flips(axes[1, 1], flips)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_table(ax: Axes, tabular: Tabular) -> None:
    for i, (beta, color) in enumerate(zip(tabular.betas, _COLORS[::-1], strict=False)):
        optimum, learned = (np.asarray(a[i]).ravel() for a in (tabular.optimum, tabular.learned))
        ax.plot(optimum, learned, "o", color=color, markersize=5 - i, alpha=0.8, label=f"β = {beta:g}")
    ax.plot([0, 1], [0, 1], color="0.5", linewidth=0.8, zorder=0)
    ax.set(
        title="DPO reaches the Bradley–Terry optimum",
        xlabel="π_ref exp(ρ/β) / Z",
        ylabel="probability learned",
    )
    ax.legend(frameon=False)


def _draw_bandit(ax: Axes, curves: list[Curves], bandit: str, action: int, label: str) -> None:
    for curve in (c for c in curves if c.bandit == bandit):
        for t, (tau, color) in enumerate(zip(curve.taus, _COLORS, strict=False)):
            values = curve.policy[:, t, :, action]
            style = "-" if curve.loss == "ipo" else ":"
            name = f"τ = {tau:g}" if curve.loss == "ipo" else None
            ax.plot(curve.steps, values.mean(1), style, color=color, label=name)
            ax.fill_between(curve.steps, values.min(1), values.max(1), color=color, alpha=0.15, linewidth=0)
            if curve.loss == "ipo":
                ax.plot(curve.steps[-1], curve.optimum[t, action], "x", color=color, markersize=9, clip_on=False)
    ax.set(
        title=f"{bandit}: IPO (solid), its closed form (×), DPO (dotted)",
        xlabel="step",
        ylabel=label,
        ylim=(-0.03, 1.03) if action == 0 else (-0.01, 0.36),
    )
    ax.legend(frameon=False, loc=(0.5, 0.12) if action == 0 else (0.5, 0.2), ncols=2)


def _draw_flips(ax: Axes, flips: Flips) -> None:
    for i, (epsilon, color) in enumerate(zip(flips.epsilons, _COLORS, strict=False)):
        ax.errorbar(
            flips.margins,
            flips.sampled[i],
            3 * flips.error[i],
            fmt="o",
            color=color,
            markersize=3,
            linewidth=1,
            label=f"robust, ε = {epsilon:g}",
        )
        ax.plot(flips.margins, flips.plain[i], ":", color=color)
    ax.plot(flips.margins, flips.clean[0], color="0.2", linewidth=1.2, label="dpo, clean labels")
    ax.plot([], [], ":", color="0.4", label="dpo, flipped labels")
    ax.set(title="Mean loss over flipped labels (bars: 3 standard errors)", xlabel="βΔ", ylabel="loss")
    ax.legend(frameon=False)
