"""The picture and the costs of experiments.betas.run, of what is finished.

python -m experiments.betas.results --workdir=runs/betas --out=experiments/betas/results
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from dpo_jax import flops, grid, results
from dpo_jax.build import fresh_state, guarded, guarded_step
from dpo_jax.config import Config, from_dict
from dpo_jax.figures import KL_LABEL, style
from dpo_jax.main import command
from dpo_jax.opened import OpenedRun
from dpo_jax.page import COLORS
from dpo_jax.results import Result
from dpo_jax.shared import Shared
from dpo_jax.workdir import SUMMARY_FILE
from experiments.betas.run import BEST_FILE

_TIMED = 20  # steps


def main(argv: list[str] | None = None) -> None:
    """Writes ``frontier.csv``, ``frontier.png`` and ``cost.csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="folder of experiments.betas.run")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    arguments = parser.parse_args(argv)
    with command():
        write(arguments.workdir, arguments.out)


def write(folder: Path, out: Path) -> None:
    """Writes the results of a workdir.

    Args:
      folder: of experiments.betas.run.
      out: where they go; made when it does not exist.
    """
    out.mkdir(parents=True, exist_ok=True)
    _, runs, missing = results.load(folder)
    best = json.loads((folder / BEST_FILE).read_text(encoding="utf-8")) if (folder / BEST_FILE).is_file() else []
    rows = [
        {"method": r.method, "setting": " ".join(r.setting), "seed": r.seed, "step": int(row["step"])}
        | {name: round(row[f"samples/{name}"], 4) for name in ("kl", "kl_se", "reward", "reward_se", "length")}
        for r in runs
        for row in r.rows
        if "samples/reward" in row
    ]
    _write_csv(out / "frontier.csv", rows)
    _write_csv(out / "cost.csv", costs(folder, runs))
    draw(runs, best, out / "frontier.png")
    print(f"{len(runs)} runs, {len(missing)} not finished; frontier.csv, cost.csv and frontier.png are in {out}")


def costs(folder: Path, runs: list[Result]) -> list[dict[str, Any]]:
    """What a run of each method has cost, evaluations and compiling left out: a row a method."""
    rows, shared = [], Shared()
    for method, group in itertools.groupby(sorted(runs, key=lambda r: r.method), key=lambda r: r.method):
        one = next(group)
        summary = json.loads((folder / grid.RUNS_FOLDER / one.name / SUMMARY_FILE).read_text(encoding="utf-8"))
        spent = {name.removeprefix("cost/"): value for name, value in summary.items() if name.startswith("cost/")}
        if not spent:
            spent = _preference_cost(from_dict(dict(one.config)), shared)
        seconds = sum(value for name, value in spent.items() if name.startswith("cpu_seconds"))
        row = {"method": method, "steps": int(spent["steps"]), "sampled_tokens": int(spent["sampled_tokens"])}
        rows.append(row | {"teraflop": round(spent["flops"] / 1e12, 3), "cpu_seconds": round(seconds, 1)})
    return rows


def _preference_cost(config: Config, shared: Shared) -> dict[str, float]:
    """Of a run without sampling: counted, and CPU seconds from a few of its steps."""
    quick = dataclasses.replace(config, reference=dataclasses.replace(config.reference, store=None))
    with tempfile.TemporaryDirectory() as folder:
        run = OpenedRun(quick, Path(folder), shared)
        make = lambda: run.parallel.train_step(guarded_step(quick, run.parts, run.steps, run.parallel.axis))  # noqa: E731
        step = shared.get(("cost", run.program), make)
        state = run.parallel.replicate(guarded(fresh_state(run.parts, run.start_params()), 0))
        hyper, begin = run.parallel.replicate(run.parts.hyper), 0.0
        for batch in itertools.islice(run.pipeline.train_batches(0), _TIMED + 1):
            state, _ = jax.block_until_ready(step(state, run.parallel.shard(batch, 1), hyper))
            begin = begin or time.process_time()  # the first step compiles
            last = batch
        seconds = (time.process_time() - begin) / _TIMED * run.steps
        reference = run.parts.objective.needs_reference
        one = flops.useful_flops(run.parts.model.config, run.start_params(), last, reference=reference)
    return {"steps": run.steps, "sampled_tokens": 0, "flops": one * run.steps, "cpu_seconds": seconds}


def draw(runs: list[Result], best: list[dict[str, Any]], path: Path) -> None:
    """Reward against KL: means over seeds at each evaluation, bars of one standard error over seeds."""
    matplotlib.use("Agg")
    figure, ax = plt.subplots(figsize=(7.2, 5.8), layout="constrained")
    methods = list(dict.fromkeys((r.method, r.setting) for r in runs))
    for i, (method, setting) in enumerate(methods):
        own = [r for r in runs if (r.method, r.setting) == (method, setting)]
        steps = min(len(r.samples) for r in own)
        paths = np.array([[[s.kl.mean(), s.rewards.mean()] for s in list(r.samples.values())[:steps]] for r in own])
        kl, reward = paths.mean(0).T
        errors = paths.std(0).T / max(len(own) - 1, 1) ** 0.5
        again = {"mfc": "none", "lw": 2.5} if i >= len(COLORS) else {}  # colours come round again
        label = " ".join([method, *setting]) if len({s for _, s in methods}) > 1 else method
        ax.errorbar(kl, reward, xerr=errors[0], yerr=errors[1], elinewidth=0.8, label=label, **style(i) | again)
    for chosen, dashes in (("truth", "--"), ("learned", ":")):
        if best:
            kl = [row["kl"] for row in best[0]["rows"]]
            reward = np.mean([[row[chosen] for row in one["rows"]] for one in best], 0)
            ax.plot(kl, reward, "k" + dashes, lw=1.2, label=f"best of N, chosen by the {chosen} reward")
    ax.set(xlabel=KL_LABEL, ylabel="reward of samples, P(positive)")
    ax.grid(alpha=0.3)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
