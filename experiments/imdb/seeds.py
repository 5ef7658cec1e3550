"""Several seeds of the sentiment experiment in one table and one picture.

python -m experiments.imdb.seeds --out=experiments/imdb/results runs/imdb-0 runs/imdb-1 runs/imdb-2
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from dpo_jax.main import command
from experiments.imdb import report


def main() -> None:
    """Reads finished workdirs, writes ``seeds.md`` and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdirs", nargs="+", type=Path, help="folders of finished experiments")
    parser.add_argument("--out", type=Path, required=True, help="where the table and the picture go")
    arguments = parser.parse_args()
    with command():
        write(arguments.workdirs, arguments.out)


def write(workdirs: list[Path], out: Path) -> None:
    """Writes the table of all seeds and the picture of their paths.

    Args:
      workdirs: folders of finished experiments.
      out: folder of the results.
    """
    out.mkdir(parents=True, exist_ok=True)
    runs = [report.evaluations_of(workdir) for workdir in workdirs]
    best = [report.best_of(workdir) for workdir in workdirs]
    table = _table(workdirs, runs, [reward for _, reward in best])
    (out / "seeds.md").write_text(table, encoding="utf-8")
    report.draw(runs, (best[0][0], float(np.mean([reward for _, reward in best]))), out / report.FIGURE)
    print(table)
    print(f"table and picture in {out}")


def _table(workdirs: list[Path], runs: list[list[dict[str, float]]], best: list[float]) -> str:
    seeds = [json.loads((workdir / "dpo" / "config.json").read_text())["seed"] for workdir in workdirs]
    lines = ["| | " + " | ".join(f"seed {seed}" for seed in seeds) + " |", "|---" * (len(runs) + 1) + "|"]
    lines.append(_row("reward of the reference", [rows[0]["samples/reward"] for rows in runs], "{:.3f}"))
    lines.append(_row("best of 4 answers of the reference", best, "{:.3f}"))
    for name, (title, form) in report.ROWS.items():
        lines.append(_row(title, [rows[-1][name] for rows in runs], form))
    return "\n".join(lines) + "\n"


def _row(title: str, values: list[float], form: str) -> str:
    return f"| {title} | " + " | ".join(form.format(value) for value in values) + " |"


if __name__ == "__main__":
    main()
