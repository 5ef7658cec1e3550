"""Many runs from one file: every point of a grid over keys of the config, in one process that shares what it can.

    python -m dpo_jax.sweep --config=experiments/noise/sweep.py --workdir=runs/noise

Data, tokenizer, judge, first parameters and compiled programs are made once; runs that differ in traced numbers only
train together (dpo_jax/population.py). Each run has its own folder, ``WORKDIR/runs/NAME``, as if it had been alone. The
same command continues what was interrupted. On a pod, process i of n takes its share with ``--index=i --count=n``.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import logging

from dpo_jax import buckets, grid, population, train, workdir
from dpo_jax.config import to_json
from dpo_jax.grid import RUNS_FOLDER, Axes, Run
from dpo_jax.progress import duration
from dpo_jax.shared import Shared
from dpo_jax.writers import METRICS_FILE, read_metrics

MISTAKES = (ValueError, OSError, FloatingPointError)  # end one run, not the sweep


def run(
    runs: Sequence[Run],
    folder: Path,
    *,
    index: int = 0,
    count: int = 1,
    together: int | None = None,
    shared: Shared | None = None,
) -> dict[str, str]:
    """Trains all runs of a sweep that are not finished, or this process's share of them.

    Args:
      runs: of ``grid.expand``.
      folder: workdir of the sweep.
      index: number of this process.
      count: of processes.
      together: most runs that train as one population; 1 trains one after the other. None is 8, and 1 on CPUs, where
        a program that is compiled once steps one run after the other faster (experiments/populations).
      shared: what they have in common with other runs of this process.

    Returns:
      {name: message} of the runs that failed.

    Raises:
      ValueError: a bad index, or the folder of a run, finished or not, belongs to another config.
      Stopped: a signal asked to stop; all is saved.
    """
    own = grid.share(runs, index, count)
    if together is None:
        together = 1 if jax.default_backend() == "cpu" else 8
    place = folder / RUNS_FOLDER
    for r in own:
        workdir.check_owner(place / r.name, r.config)
    if index == 0:
        grid.write(folder, runs)
    shared, failed = shared or Shared(), dict[str, str]()
    begin = time.monotonic()
    waiting = [r for r in own if workdir.finished(place / r.name) is None]
    show(folder, runs)
    for group in groups(waiting, together):
        logging.info("now %s", "; ".join(r.name for r in group))
        failed |= _train(group, place, shared)
        show(folder, runs, failed)
    for name, message in failed.items():
        logging.error("%s failed: %s", name, message)
    logging.info(
        "%d of %d runs trained in %s", len(waiting) - len(failed), len(own), duration(time.monotonic() - begin)
    )
    return failed


def groups(runs: Sequence[Run], together: int) -> list[list[Run]]:
    """Runs that may train together, at most so many at a time; says why the others do not."""
    if together == 1:
        logging.info("runs train one after the other; --together=8 trains up to 8 as one population")
        return [[r] for r in runs]
    found: dict[object, list[Run]] = {}
    for r in runs:
        reason = population.obstacle(r.config)
        if reason is not None:
            logging.info("%s trains on its own: %s", r.name, reason)
        key = to_json(grid.traced_apart(r.config)) if reason is None else r.name
        found.setdefault(key, []).append(r)
    return [group[i : i + together] for group in found.values() for i in range(0, len(group), together)]


def _train(group: Sequence[Run], place: Path, shared: Shared) -> dict[str, str]:
    """Trains one run, or several together; returns the messages of those that failed."""
    if len(group) > 1:
        members = {r.name: (r.config, place / r.name) for r in group}
        return {name: str(error) for name, error in population.run(members, shared, MISTAKES).items()}
    try:
        train.run(group[0].config, place / group[0].name, shared)
    except MISTAKES as error:
        return {group[0].name: str(error)}
    return {}


def show(folder: Path, runs: Sequence[Run], failed: dict[str, str] | None = None) -> None:
    """Prints where every run of the sweep stands, those of other processes too."""
    print(table(folder, [r.name for r in runs], failed or {}), file=sys.stderr, flush=True)


def table(folder: Path, names: Sequence[str], failed: dict[str, str] | None = None) -> str:
    """One line a run: its state, and the last numbers that say how it goes."""
    width = max(map(len, names))
    head = f"{'run':<{width}}  {'state':<9}  {'step':>6}  {'loss':>9}  {'reward':>7}  {'KL, nats':>8}"
    lines = [head, "─" * len(head)]
    done = 0
    for name in names:
        state, last = _state(folder / RUNS_FOLDER / name)
        state = "failed" if name in (failed or {}) else state
        done += state == "finished"
        cells = (last.get(k) for k in ("train/loss", "samples/reward", "samples/kl"))
        loss, reward, kl = ("–" if v is None else f"{v:.4f}" for v in cells)
        step = "–" if "step" not in last else f"{last['step']:.0f}"
        lines.append(f"{name:<{width}}  {state:<9}  {step:>6}  {loss:>9}  {reward:>7}  {kl:>8}")
    return "\n".join([*lines, f"{done} of {len(names)} runs finished"])


def _state(place: Path) -> tuple[str, dict[str, float]]:
    last: dict[str, float] = {}
    if (place / METRICS_FILE).is_file():
        for row in read_metrics(place / METRICS_FILE):
            last |= row
    finished = (place / workdir.SUMMARY_FILE).is_file()
    return "finished" if finished else "begun" if last else "waiting", last


def load_axes(path: str) -> Axes:
    """What ``get_axes`` of a config file returns; after a colon, the argument that ``get_config`` gets too.

    Raises:
      ValueError: the file has no ``get_axes``.
    """
    name, _, argument = path.partition(":")
    spec = importlib.util.spec_from_file_location("sweep_file", name)
    assert spec is not None and spec.loader is not None  # get_config has been read from it
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    get_axes: Callable[..., Axes] | None = getattr(module, "get_axes", None)
    if get_axes is None:
        raise ValueError(f"{name} has no get_axes(); a sweep file says there what varies, as in dpo_jax/grid.py")
    return get_axes(argument) if argument else get_axes()


if __name__ == "__main__":
    from absl import app, flags
    from ml_collections import config_flags

    from dpo_jax import config_flag
    from dpo_jax.main import launch

    config = config_flag.define("sweep file, such as experiments/noise/sweep.py")
    workdir_flag = flags.DEFINE_string("workdir", None, "folder of the sweep: made when new, continued when not")
    index_flag = flags.DEFINE_integer("index", 0, "number of this process, when several share the runs")
    count_flag = flags.DEFINE_integer("count", 1, "processes that share the runs", lower_bound=1)
    together_flag = flags.DEFINE_integer(
        "together", None, "most runs that train as one population; 8, and 1 on CPUs", lower_bound=1
    )
    status_flag = flags.DEFINE_bool("status", False, "only prints where every run stands")

    def start() -> None:
        if workdir_flag.value is None or (config.value is None and not status_flag.value):
            raise app.UsageError("--config and --workdir are needed; --status needs --workdir only")
        folder = buckets.local(workdir_flag.value, "the workdir of a sweep")
        if status_flag.value:
            print(table(folder, list(grid.read(folder)[1])))
            return
        flag = flags.FLAGS["config"]
        axes = load_axes(config_flags.get_config_filename(flag))
        runs = grid.expand(config.value, axes, list(config_flags.get_override_values(flag)))
        if run(runs, folder, index=index_flag.value, count=count_flag.value, together=together_flag.value):
            sys.exit(1)

    launch(
        "Trains every point of a grid over keys of the config.",
        "python -m dpo_jax.sweep --config=experiments/noise/sweep.py --workdir=runs/noise",
        start,
        ("config", "workdir", "index", "count", "together", "status"),
    )
