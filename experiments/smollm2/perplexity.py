"""What runs have done to a model's command of plain text: its perplexity on film reviews, beside held-out pairs.

python -m experiments.smollm2.perplexity --workdir=runs/smollm2/losses
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from dpo_jax import grid
from dpo_jax.data.imdb import load_reviews
from dpo_jax.main import command
from dpo_jax.progress import track
from dpo_jax.workdir import SUMMARY_FILE
from experiments.changes import ends
from experiments.fluency import open_judge

METRICS = ("eval/rewards/accuracies", "eval/rewards/margins")


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="folder of a sweep over one Hugging Face model")
    parser.add_argument("--reviews", type=int, default=100, help="how many are read, up to 256 tokens of each")
    arguments = parser.parse_args(argv)
    with command():
        texts = [review.text for review in load_reviews("eval", "runs/imdb/data")[: arguments.reviews]]
        print("\n".join(table(arguments.workdir, texts)))


def table(workdir: Path, texts: Sequence[str]) -> Iterator[str]:
    """One line for each finished run: what it started from, and what it came to.

    Args:
      workdir: of the sweep.
      texts: plain ones.

    Raises:
      ValueError: no run is finished.
    """
    names = [name for name in grid.read(workdir)[1] if (workdir / grid.RUNS_FOLDER / name / SUMMARY_FILE).is_file()]
    if not names:
        raise ValueError(f"no run of {workdir} is finished: python -m dpo_jax.sweep --workdir={workdir} --status tells")
    yield "| run | perplexity of a token, before → after | " + " | ".join(f"{m}, last" for m in METRICS) + " |"
    yield "|---|---|" + "---|" * len(METRICS)
    before = perplexity(workdir / grid.RUNS_FOLDER / names[0], texts, start=True)
    for name in track(names, "perplexity", unit="run"):
        folder = workdir / grid.RUNS_FOLDER / name
        cells = [f"{ends(folder, metric)[1]:.3f}" for metric in METRICS]
        after = perplexity(folder, texts, start=False)
        yield f"| {name} | {before:.2f} → {after:.2f} | " + " | ".join(cells) + " |"


def perplexity(workdir: Path, texts: Sequence[str], *, start: bool) -> float:
    """exp of the mean −log-probability of a token, of a run's policy or of what it started from."""
    cost = open_judge(workdir, start=start)([""] * len(texts), texts)
    return math.exp(cost.nats / cost.tokens)


if __name__ == "__main__":
    main()
