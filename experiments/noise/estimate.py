"""Does the audit see how many labels are flipped? Its estimate against the truth, on pairs that are flipped on purpose.

    python -m experiments.noise.estimate --source=runs/imdb --out=experiments/noise/results

Each share of the training pairs is flipped as ``config.data.flip`` does, and looked at as ``dpo_jax.audit`` does.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dpo_jax.data.checks.case import Case
from dpo_jax.data.checks.giveaways import READABLE, label_noise
from dpo_jax.data.example import Example
from dpo_jax.data.noise import Flipped
from dpo_jax.data.prepared import PreparedExamples
from dpo_jax.data.records import Record, Reply
from dpo_jax.data.tokenizer import decode, load_tokenizer
from dpo_jax.main import command
from dpo_jax.page import COLORS, png_of
from dpo_jax.progress import track
from dpo_jax.sources import tokenizer_folder
from dpo_jax.workdir import read_config
from experiments.imdb.sweeps import PAIRS

SHARES, SEEDS = (0.0, 0.1, 0.2, 0.3, 0.4), (0, 1, 2)
TABLE_FILE, FIGURE_FILE = "estimate.csv", "estimate.png"


def main(argv: list[str] | None = None) -> None:
    """Writes the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("runs/imdb"), help="workdir of experiments.imdb.run")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; made when new")
    arguments = parser.parse_args(argv)
    with command():
        folder = arguments.source
        tokenizer = load_tokenizer(tokenizer_folder(read_config(folder / "dpo").data))
        pairs = PreparedExamples(folder / PAIRS, "train")
        points = list(itertools.product(SHARES, SEEDS))
        rows = list(estimates(pairs, tokenizer, track(points, "estimates", unit="estimate")))
        arguments.out.mkdir(parents=True, exist_ok=True)
        with (arguments.out / TABLE_FILE).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        (arguments.out / FIGURE_FILE).write_bytes(png_of(draw(rows)))
        print(f"{len(rows)} estimates of {len(pairs)} pairs; {TABLE_FILE} and {FIGURE_FILE} are in {arguments.out}")


def estimates(pairs: PreparedExamples, tokenizer: object, points: Iterator) -> Iterator[dict[str, float]]:
    """What the audit finds in pairs with flipped labels.

    Args:
      pairs: the clean ones.
      tokenizer: of their texts.
      points: (share, seed) of the flips.

    Yields:
      share and seed; estimate, and the accuracy of the reader of words that it comes from.
    """
    # The same answers come in each estimate, with other labels.
    text = functools.cache(lambda tokens: decode(tokenizer, np.frombuffer(tokens, np.int32)))
    for share, seed in points:
        source = Flipped(pairs, share, seed, "clean")
        cases = [_case(text, source[i]) for i in range(len(source))]
        found = label_noise(cases)[0].numbers
        yield {"share": share, "seed": seed} | {k: round(found[k], 4) for k in ("noise", "accuracy")}


def draw(rows: Sequence[dict[str, float]]) -> Figure:
    """Estimate against truth, a point a seed; hollow where the audit itself gives no estimate."""
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    ax = figure.subplots()
    top = max(SHARES) + 0.1
    ax.plot([0, top], [0, top], "k--", lw=1, label="estimate = truth")
    for spoken, label in (
        (True, "the audit's estimate"),
        (False, f"withheld: its reader is right below {READABLE:.0%}"),
    ):
        own = [row for row in rows if (row["accuracy"] >= READABLE) == spoken]
        x, y = ([row[key] for row in own] for key in ("share", "noise"))
        ax.plot(x, y, "o", color=COLORS[0], mfc=COLORS[0] if spoken else "none", label=label)
    ax.set(xlabel="share of labels that are flipped", ylabel="share that the audit estimates")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=9)
    return figure


def _case(text: Callable[[bytes], str], example: Example) -> Case:
    replies = tuple(Reply(text(answer.tokens.tobytes()), answer.role) for answer in example.answers)
    return Case(str(example.uid), Record(text(example.prompt.tobytes()), replies))


if __name__ == "__main__":
    main()
