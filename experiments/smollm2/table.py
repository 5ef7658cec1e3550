"""Prints the README's table from what trajectory.py wrote.

python -m experiments.smollm2.table runs/smollm2/trajectory/*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from experiments.smollm2.trajectory import relative


def main() -> None:
    """One line a run: how far the losses and the worst of the other numbers are apart."""
    print("| loss | steps | loss, step 1 | loss, last step | gradient norm, worst | log-probabilities, worst |")
    print("|---|---|---|---|---|---|")
    for path in sys.argv[1:]:
        run = json.loads(Path(path).read_text(encoding="utf-8"))
        steps = run["steps"]
        # Recordings of orpo have means over tokens under logps/; its rewards are β times those, here and there.
        logps = "rewards" if run["variant"] == "orpo" else "logps"
        worst = [
            max(relative(step[key]) for step in steps for key in keys if key in step)
            for keys in (("grad_norm",), (f"{logps}/chosen", f"{logps}/rejected"))
        ]
        ends = [relative(steps[i]["loss"]) for i in (0, -1)]
        print(f"| {run['variant']} | {len(steps)} | " + " | ".join(f"{x:.1e}" for x in [*ends, *worst]) + " |")


if __name__ == "__main__":
    main()
