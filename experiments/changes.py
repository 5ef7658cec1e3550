"""How numbers of a sweep's runs changed from their first evaluation to their last, or to a KL: a Markdown table.

python -m experiments.changes --workdir=runs/orpo --metrics=eval/logps/chosen_per_token,eval/logps/rejected_per_token
python -m experiments.changes --workdir=runs/length --metrics=samples/length --kl=1.5
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dpo_jax import grid
from dpo_jax.comparison import at_kl
from dpo_jax.main import command
from dpo_jax.workdir import SUMMARY_FILE
from dpo_jax.writers import METRICS_FILE, read_metrics

KL = "samples/kl"


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="folder of a sweep")
    parser.add_argument(
        "--metrics", required=True, help="names of metrics.jsonl, with commas between; one - other is a difference"
    )
    parser.add_argument("--kl", type=float, help="where KL first reaches so many nats, in place of the last evaluation")
    arguments = parser.parse_args(argv)
    with command():
        print("\n".join(table(arguments.workdir, arguments.metrics.split(","), arguments.kl)))


def table(workdir: Path, metrics: Sequence[str], level: float | None = None) -> Iterator[str]:
    """One line for each point of the sweep, the mean over seeds and its standard error.

    Args:
      workdir: of the sweep.
      metrics: names of metrics.
      level: KL of samples, nats, at which a run is looked at, linear between evaluations; None is at its end. The mean
        is nan where a run stays below.

    Raises:
      ValueError: no run is finished, or none has such a metric.
    """
    points = {
        name: {axis: label for axis, label in point.items() if axis != "seed"}
        for name, point in grid.read(workdir)[1].items()
        if (workdir / grid.RUNS_FOLDER / name / SUMMARY_FILE).is_file()
    }
    if not points:
        raise ValueError(f"no run of {workdir} is finished: python -m dpo_jax.sweep --workdir={workdir} --status tells")
    axes, until = list(next(iter(points.values()))), "last" if level is None else f"at {level:g} nats"
    yield "| " + " | ".join([*axes, "seeds", *(f"{metric}: first → {until}" for metric in metrics)]) + " |"
    yield "|" + "---|" * (len(axes) + 1 + len(metrics))
    by_point = lambda name: tuple(points[name].values())  # noqa: E731
    for labels, names in itertools.groupby(sorted(points, key=by_point), key=by_point):
        rows = [[ends(workdir / grid.RUNS_FOLDER / name, metric, level) for metric in metrics] for name in names]
        cells = (
            f"{mean_and_error(first)} → {mean_and_error(last)}" for first, last in np.moveaxis(np.array(rows), 0, 2)
        )
        yield "| " + " | ".join([*labels, str(len(rows)), *cells]) + " |"


def ends(folder: Path, metric: str, level: float | None = None) -> tuple[float, float]:
    """A metric, or ``one - other``, at its first step, and at its last or where KL first reaches a level.

    Raises:
      ValueError: the run has none of that name; those that it has are listed.
    """
    metric, _, other = metric.partition(" - ")
    if other:
        (first, last), (less_first, less_last) = ends(folder, metric, level), ends(folder, other, level)
        return first - less_first, last - less_last
    values = _by_step(folder, metric)
    steps = sorted(values)
    if level is None:
        return values[steps[0]], values[steps[-1]]
    kl = _by_step(folder, KL)
    both = [step for step in steps if step in kl]
    return values[steps[0]], at_kl(np.array([kl[s] for s in both]), np.array([values[s] for s in both]), level)


def _by_step(folder: Path, metric: str) -> dict[int, float]:
    rows = read_metrics(folder / METRICS_FILE)
    found = {row["step"]: row[metric] for row in rows if metric in row}
    if not found:
        known = ", ".join(sorted({name for row in rows for name in row}))
        raise ValueError(f"{folder} has no metric {metric!r}; it has {known}")
    return found


def mean_and_error(values: np.ndarray) -> str:
    """A mean and, of several values, its standard error."""
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{error}"


if __name__ == "__main__":
    main()
