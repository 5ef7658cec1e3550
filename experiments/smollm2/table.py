"""Prints the README's table from what trajectory.py wrote.

python -m experiments.smollm2.table runs/smollm2/trajectory/*.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from dpo_jax.main import command
from experiments.smollm2.trajectory import relative


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="what trajectory.py has written, a file a run")
    arguments = parser.parse_args(argv)
    with command():
        print("\n".join(table(arguments.runs)))


def table(paths: Sequence[Path]) -> Iterator[str]:
    """One line a run: how far the losses and the worst of the other numbers are apart."""
    yield "| loss | steps | loss, step 1 | loss, last step | gradient norm, worst | log-probabilities, worst |"
    yield "|---|---|---|---|---|---|"
    for path in paths:
        run = json.loads(path.read_text(encoding="utf-8"))
        steps = run["steps"]
        # Recordings of orpo have means over tokens under logps/; its rewards are β times those, here and there.
        logps = "rewards" if run["variant"] == "orpo" else "logps"
        worst = [
            max(relative(step[key]) for step in steps for key in keys if key in step)
            for keys in (("grad_norm",), (f"{logps}/chosen", f"{logps}/rejected"))
        ]
        ends = [relative(steps[i]["loss"]) for i in (0, -1)]
        yield f"| {run['variant']} | {len(steps)} | " + " | ".join(f"{x:.1e}" for x in [*ends, *worst]) + " |"


if __name__ == "__main__":
    main()
