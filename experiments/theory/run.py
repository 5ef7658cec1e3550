"""Checks the losses against theory: python -m experiments.theory.run --out=/tmp/theory

Three claims with a known answer: DPO reaches the Bradley–Terry optimum on a table; IPO ends at its closed form on
bandits where DPO collapses; robust DPO is unbiased over flipped labels. The README says more.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dpo_jax.main import command
from experiments.theory import bandits, flips, plot, tabular


@dataclass(frozen=True)
class Settings:
    """How much is run; the results folder holds the full one."""

    betas: tuple[float, ...] = (0.1, 0.5, 1.0)
    taus: tuple[float, ...] = (0.1, 0.5, 1.0, 5.0)
    epsilons: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4)
    bandits: tuple[str, ...] = tuple(bandits.BANDITS)
    seeds: int = 5
    table_steps: int = 5000
    bandit_steps: int = 18_000
    draws: int = 100_000


QUICK = Settings(betas=(0.5, 1.0), bandits=("D1", "D3'"), seeds=2, table_steps=1500, bandit_steps=2000, draws=2_000)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.theory.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for tables, numbers and the figure")
    parser.add_argument("--quick", action="store_true", help="fewer bandits, steps and seeds")
    arguments = parser.parse_args(argv)
    with command():
        run(QUICK if arguments.quick else Settings(), arguments.out)


def run(settings: Settings, out: Path) -> dict[str, Any]:
    """Runs all three parts, writes the results to ``out`` and returns their summary."""
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    runs = len(settings.bandits) * len(bandits.LOSSES)
    total = settings.table_steps + runs * settings.bandit_steps + len(settings.epsilons)
    with tqdm(total=total, unit=" steps", desc="theory", dynamic_ncols=True, disable=None) as bar:
        table = tabular.run(settings.betas, settings.seeds, settings.table_steps, bar.update)
        curves = bandits.run(settings.bandits, settings.taus, settings.seeds, settings.bandit_steps, bar.update)
        noise = flips.run(settings.epsilons, settings.draws, bar.update)
    summary = _summarise(table, curves, noise)
    _write(out, summary, curves)
    plot.draw(table, curves, noise, out / "theory.png")
    print((out / "tables.md").read_text())
    print(f"done in {time.monotonic() - start:.0f} s; tables.md, summary.json, bandits.csv and theory.png are in {out}")
    return summary


def _summarise(table: tabular.Tabular, curves: list[bandits.Curves], noise: flips.Flips) -> dict[str, Any]:
    return {
        "tabular": [
            {"beta": beta, "largest_error": error}
            for beta, error in zip(table.betas, table.largest_error(), strict=True)
        ],
        "bandits": [
            {
                "bandit": curve.bandit,
                "tau": tau,
                "loss": curve.loss,
                "policy": [float(p) for p in curve.final()[t].mean(0)],
                "ipo_closed_form": [float(p) for p in curve.optimum[t]],
                "largest_error": float(curve.largest_error()[t]),
            }
            for curve in curves
            for t, tau in enumerate(curve.taus)
        ],
        "flips": [
            {"epsilon": epsilon, "largest_error": error, "largest_deviation": deviation}
            for epsilon, error, deviation in zip(
                noise.epsilons, noise.largest_error(), noise.largest_deviation(), strict=True
            )
        ],
    }


def _write(out: Path, summary: dict[str, Any], curves: list[bandits.Curves]) -> None:
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (out / "tables.md").write_text("\n".join(_tables(summary)) + "\n")
    with (out / "bandits.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["bandit", "loss", "tau", "seed", "action", "probability"])
        for curve in curves:
            writer.writerows(_rows(curve))


def _rows(curve: bandits.Curves) -> Iterable[tuple[Any, ...]]:
    """The end of every run: enough to make the tables, small enough to keep."""
    for t, tau in enumerate(curve.taus):
        for seed, policy in enumerate(curve.final()[t]):
            for action, probability in zip("abc", policy, strict=False):
                yield curve.bandit, curve.loss, tau, seed, action, f"{probability:.6f}"


def _tables(summary: dict[str, Any]) -> Iterable[str]:
    yield "| β | DPO on a table: max over entries and seeds of \\|π − π*\\| |"
    yield "|---|---|"
    for row in summary["tabular"]:
        yield f"| {row['beta']:g} | {row['largest_error']:.1e} |"
    yield ""
    yield "| bandit | τ | IPO, closed form | IPO, learned | worst error | DPO, learned |"
    yield "|---|---|---|---|---|---|"
    by_key = {(r["bandit"], r["tau"], r["loss"]): r for r in summary["bandits"]}
    for (bandit, tau, loss), ipo in by_key.items():
        if loss == "ipo":
            dpo = by_key[bandit, tau, "dpo"]
            yield (
                f"| {bandit} | {tau:g} | {_policy(ipo['ipo_closed_form'])} | {_policy(ipo['policy'])} | "
                f"{ipo['largest_error']:.4f} | {_policy(dpo['policy'])} |"
            )
    yield ""
    yield "| ε | max over margins of \\|E[robust] − clean\\| | sampled mean, largest deviation in standard errors |"
    yield "|---|---|---|"
    for row in summary["flips"]:
        yield f"| {row['epsilon']:g} | {row['largest_error']:.1e} | {row['largest_deviation']:.1f} |"


def _policy(probabilities: list[float]) -> str:
    return " / ".join(f"{p:.4f}" for p in probabilities)


if __name__ == "__main__":
    main()
