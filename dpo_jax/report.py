"""What a sweep found, as one page: frontier, curves, comparisons at the best point and at equal KL, samples, configs.

    python -m dpo_jax.report --workdir=runs/noise --out=runs/noise/report

writes ``report.html``, which needs nothing else, and the PNGs and CSVs behind it.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dpo_jax import buckets, comparison, figures, page, results
from dpo_jax.comparison import Choice
from dpo_jax.results import HALVES, Result, Roles

PAGE_FILE = "report.html"
_SHOWN = 12  # prompts in the sample browser


@dataclass(frozen=True)
class Sweep:
    """Results in the order in which they are shown.

    Attributes:
      roles: of the axes.
      results: of the finished runs.
      missing: names of the others.
      levels: of KL at which methods are compared, nats.
    """

    roles: Roles
    results: Sequence[Result]
    missing: Sequence[str]
    levels: Sequence[float]

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(r.method for r in self.results))

    @property
    def conditions(self) -> list[tuple[str, ...]]:
        return list(dict.fromkeys(r.condition for r in self.results))

    def named(self, condition: tuple[str, ...]) -> str:
        """A condition in words."""
        pairs = zip(self.roles.conditions, condition, strict=True)
        return ", ".join(f"{axis.rpartition('.')[2]} {label}" for axis, label in pairs) or "all runs"

    def points(self) -> dict[str, dict[tuple[str, str], Choice]]:
        """Where methods are compared → (condition, method) → what the method chose there."""
        found: dict[str, dict[tuple[str, str], Choice]] = {"best point": {}}
        found |= {f"KL {level:g} nats": {} for level in self.levels}
        for condition in self.conditions:
            for method in self.methods:
                settings = comparison.by_setting(self.results, method, condition)
                choices = [comparison.best_point(settings)]
                choices += [comparison.best_at_kl(settings, level) for level in self.levels]
                for place, choice in zip(found.values(), choices, strict=True):
                    if choice is not None:
                        place[self.named(condition), method] = choice
        return found


def write(sweep: Sweep, title: str, out: Path) -> Path:
    """Writes the page, the pictures and the tables.

    Args:
      sweep: what to report.
      title: of the page.
      out: folder; made when it does not exist.

    Returns:
      The page.

    Raises:
      OSError: the folder cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    points = sweep.points()
    tables = {
        "best": _point_rows(points),
        "comparisons": _comparison_rows(points, sweep.methods),
        "fairness": _fairness_rows(sweep),
        "configs": _config_rows(sweep.results),
    }
    for name, rows in {**tables, "evaluations": list(_evaluation_rows(sweep))}.items():
        _write_csv(out / f"{name}.csv", rows)
    pictures = {}
    for name, figure in _figures(sweep, points).items():
        png = page.png_of(figure)
        (out / f"{name}.png").write_bytes(png)
        pictures[name] = page.picture(png, name)
    path = out / PAGE_FILE
    content = page.document(f"Report of {title}", _parts(sweep, title, tables, pictures, points))
    path.write_text(content, encoding="utf-8")
    return path


def _parts(
    sweep: Sweep, title: str, tables: Mapping[str, list[dict[str, Any]]], pictures: Mapping[str, str], points: Any
) -> Iterator[str]:
    roles = sweep.roles
    yield f"<h1>Report of <code>{page.text(title)}</code></h1>"
    yield _note(
        f"{len(sweep.results)} runs. Methods: {roles.compared} ({', '.join(sweep.methods)}). Tuned: "
        f"{', '.join(roles.tuned) or 'nothing'}. Seeds: {', '.join(sorted({r.seed for r in sweep.results}))}. "
        f"Conditions: {', '.join(roles.conditions) or 'one'}."
    )
    if sweep.missing:
        names = ", ".join(sweep.missing)
        yield f'<p class="serious">{len(sweep.missing)} runs are not finished and left out: {page.text(names)}</p>'
    yield "<h2>Reward of the test half</h2>"
    yield _note(
        "Setting and step are those with the best reward on the validation half of the held-out prompts; at a level of "
        "KL, the setting, and the reward is interpolated along each run's path. ± is the 95 % interval over seeds "
        "(Student's t; – for a single seed)."
    )
    yield _wide(pictures["across"]) + _wide(_table(tables["best"]))
    yield "<h2>Paired comparisons</h2>"
    yield _note(
        f"Reward of a method less that of {sweep.methods[0]}, test half. Both answer the same prompts with the same "
        "random numbers; intervals and p are Student's t, for what other seeds and other prompts would change (prompts "
        "alone where there is one seed). p (Holm) is adjusted for all rows."
    )
    yield _wide(_table(tables["comparisons"]))
    yield "<h2>Reward against KL</h2>" + _note("All evaluations of all runs; rings are the chosen points.")
    yield _wide(pictures["frontier"])
    yield "<h2>Curves</h2>" + _note("Of the chosen settings: means over seeds, bands are 95 % intervals.")
    yield from (_wide(picture) for name, picture in pictures.items() if name.startswith("curves"))
    yield "<h2>Is the comparison fair?</h2>" + _wide(_table(tables["fairness"]))
    yield from _unfair(sweep, tables["fairness"])
    yield "<h2>Samples side by side</h2>" + _note("Test half, first seed, chosen point; rewards in brackets.")
    yield from _browser(sweep, points["best point"])
    yield "<h2>What differs between the configs</h2>" + page.folded("by run", _wide(_table(tables["configs"])))
    everything = json.dumps(sweep.results[0].config, indent=1)
    yield page.folded(f"the whole config of {sweep.results[0].name}", f"<pre>{page.text(everything)}</pre>")


def _point_rows(points: Mapping[str, Mapping[tuple[str, str], Choice]]) -> list[dict[str, Any]]:
    rows = []
    for place, choices in points.items():
        for (condition, method), choice in choices.items():
            values = choice.values("test")
            run, step = choice.runs[0], choice.step
            kl = [] if step is None else [r.path("test")[0].mean(1)[step] for r in choice.runs]
            when = [] if step is None else [f"step {run.steps[step]}"]
            rows.append(
                {
                    "at": place,
                    "condition": condition,
                    "method": method,
                    "reward": _number(values.mean()),
                    "±": _number(comparison.interval(values)),
                    "KL, nats": _number(float(np.mean(kl)), 2) if kl else f"{choice.level:g}",
                    "seeds": len(values),
                    "chosen": ", ".join([*run.setting, *when]) or "–",
                    "of": choice.tried,
                }
            )
    return rows


def _comparison_rows(
    points: Mapping[str, Mapping[tuple[str, str], Choice]], methods: Sequence[str]
) -> list[dict[str, Any]]:
    rows, p_values = [], []
    for place, choices in points.items():
        for (condition, method), choice in choices.items():
            base = choices.get((condition, methods[0]))
            if method == methods[0] or base is None:
                continue
            d = comparison.difference(choice, base)
            p_values.append(d.p if math.isfinite(d.p) else 1.0)
            rows.append(
                {
                    "at": place,
                    "condition": condition,
                    "comparison": f"{method} − {methods[0]}",
                    "difference": _number(d.mean),
                    "95 % interval": f"{_number(d.low)} … {_number(d.high)}",
                    "p": _number(d.p),
                }
            )
    adjusted = comparison.holm(p_values)
    return [{**row, "p (Holm)": _number(p)} for row, p in zip(rows, adjusted, strict=True)]


def _fairness_rows(sweep: Sweep) -> list[dict[str, Any]]:
    """What every method was given; columns that are not the same for all are unfair."""
    rows = []
    for method in sweep.methods:
        own = [r for r in sweep.results if r.method == method]
        steps = {int(r.rows[-1]["step"]) for r in own}
        seen = {_seen(r) for r in own}
        rows.append(
            {
                "method": method,
                "runs": len(own),
                "conditions": len({r.condition for r in own}),
                "settings tried": len({r.setting for r in own}),
                "seeds": ", ".join(sorted({r.seed for r in own})),
                "steps": ", ".join(map(str, sorted(steps))),
                "seen": ", ".join(sorted(seen)),
                "evaluations": ", ".join(map(str, sorted({len(r.steps) for r in own}))),
            }
        )
    return rows


def _seen(result: Result) -> str:
    """How much a run has read; a row of the packed layout holds as many examples as there is room for."""
    data = result.config["data"]
    unit = "rows" if data["layout"] == "packed" else "examples"
    return f"{int(result.rows[-1]['step']) * data['batch_size']} {unit}"


def _unfair(sweep: Sweep, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What stands in the way of a fair comparison; that nothing does, where it is so."""
    columns = [name for name in rows[0] if name != "method" and len({row[name] for row in rows}) > 1]
    if columns:
        yield f'<p class="serious">Methods were not given the same: {page.text(", ".join(columns))}.</p>'
    orders: dict[tuple[Any, ...], set[str]] = {}
    for r in sweep.results:
        orders.setdefault((r.condition, r.seed), set()).add(repr((r.config["seed"], r.config["data"])))
    if any(len(order) > 1 for order in orders.values()):
        yield '<p class="serious">Runs of one seed have not all read the same data in the same order.</p>'
    elif not columns:
        yield '<p class="none">All methods were given the same; runs of a seed read the same data in one order.</p>'


def _config_rows(runs: Sequence[Result]) -> list[dict[str, Any]]:
    flat = [dict(_flatten(run.config)) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    different = [key for key in keys if len({repr(values.get(key)) for values in flat}) > 1]
    return [{"run": r.name, **{k: v.get(k, "–") for k in different}} for r, v in zip(runs, flat, strict=True)]


def _flatten(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{path}{key}.")
        else:
            yield path + key, value


def _evaluation_rows(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Every evaluation of every run, with rewards and KL of both halves."""
    for run in sweep.results:
        numbers = {int(row["step"]): row for row in run.rows}
        halves = {half: run.path(half) for half in HALVES}
        for t, step in enumerate(run.steps):
            place = {"run": run.name, "method": run.method, "condition": sweep.named(run.condition), "seed": run.seed}
            means = {
                f"{name} {half}": float(values[t].mean())
                for half, pair in halves.items()
                for name, values in zip(("kl", "reward"), pair, strict=True)
            }
            yield {**place, "step": step, **means, **{k: v for k, v in numbers.get(step, {}).items() if "/" in k}}


def _figures(sweep: Sweep, points: Mapping[str, Mapping[tuple[str, str], Choice]]) -> dict[str, Figure]:
    names = {condition: sweep.named(condition) for condition in sweep.conditions}
    best = points["best point"]
    panels = {
        name: {m: [r for r in sweep.results if (r.method, r.condition) == (m, c)] for m in sweep.methods}
        for c, name in names.items()
    }
    rewards = {
        place: {key: choice.values("test") for key, choice in choices.items()} for place, choices in points.items()
    }
    axis = ", ".join(sweep.roles.conditions) or "all runs"
    found = {
        "across": figures.across({k: v for k, v in rewards.items() if v}, list(names.values()), axis),
        "frontier": figures.frontier(panels, sweep.methods, best),
    }
    for i, name in enumerate(names.values()):
        chosen = {m: best[name, m].runs for m in sweep.methods if (name, m) in best}
        found[f"curves_{i}"] = figures.curves(chosen, sweep.methods, name)
    return found


def _browser(sweep: Sweep, best: Mapping[tuple[str, str], Choice]) -> Iterator[str]:
    for condition in map(sweep.named, sweep.conditions):
        chosen = {m: best[condition, m] for m in sweep.methods if (condition, m) in best}
        if not chosen:
            continue
        columns: dict[str, results.Samples] = {}
        first = next(iter(chosen.values())).runs[0]
        columns["reference"] = first.samples[first.steps[0]]
        for method, choice in chosen.items():
            columns[method] = choice.runs[0].samples[choice.runs[0].steps[choice.step or 0]]
        shown = np.flatnonzero(results.half_of(columns["reference"].prompts) == "test")[:_SHOWN]
        rows = [
            [columns["reference"].prompts[i], *(f"[{s.rewards[i]:.2f}] {s.answers[i]}" for s in columns.values())]
            for i in shown
        ]
        yield page.folded(condition, _wide(page.table(["prompt", *columns], rows)))


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    return page.table(list(rows[0]), [list(row.values()) for row in rows]) if rows else _note("Nothing to show.")


def _wide(content: str) -> str:
    return f'<div class="wide">{content}</div>'


def _note(words: str) -> str:
    return f'<p class="note">{page.text(words)}</p>'


def _number(value: float, places: int = 3) -> str:
    return f"{value:.{places}f}" if math.isfinite(value) else "–"


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    names = dict.fromkeys(name for row in rows for name in row)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(names), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def run(
    folder: Path,
    out: Path,
    *,
    compared: str | None = None,
    tuned: Sequence[str] | None = None,
    seeds: str = "seed",
    levels: Sequence[float] = (),
) -> Path:
    """Reports on a sweep.

    Args:
      folder: its workdir.
      out: where the page goes.
      compared, tuned, seeds: roles of the axes, as of ``results.roles_of``.
      levels: of KL, nats; none are chosen from the runs.

    Returns:
      The page.

    Raises:
      OSError: no sweep, or a folder that cannot be written.
      ValueError: nothing is finished, or there is nothing to compare.
    """
    roles, found, missing = results.load(folder, compared, tuned, seeds)
    return write(Sweep(roles, found, missing, list(levels) or comparison.levels_of(found)), str(folder), out)


if __name__ == "__main__":
    from absl import app, flags

    from dpo_jax.main import command, parse_flags

    flags.DEFINE_string("workdir", None, "folder of the sweep", required=True)
    flags.DEFINE_string("out", None, "folder of the report; <workdir>/report by default")
    flags.DEFINE_string("compare", None, "axis whose values are compared; by default the first that is not tuned")
    flags.DEFINE_list("tune", None, "axes whose values are chosen among; optim.learning_rate by default")
    flags.DEFINE_string("seeds", "seed", "axis of repetitions")
    flags.DEFINE_list("kl", [], "levels of KL to compare at, nats; by default three that all methods reach")

    def _main(_: list[str]) -> None:
        f = flags.FLAGS
        with command():
            workdir = buckets.local(f.workdir, "the workdir of a sweep")
            out = Path(f.out or workdir / "report")
            levels = [float(level) for level in f.kl]
            print(run(workdir, out, compared=f.compare, tuned=f.tune, seeds=f.seeds, levels=levels))

    app.run(_main, flags_parser=parse_flags)
