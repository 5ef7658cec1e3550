"""Pairs with a bias toward length: those of an experiment whose longer answer won, and a share of the others.

python -m experiments.length.pairs --source=runs/imdb
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dpo_jax.data.example import Example
from dpo_jax.data.prepared import PreparedExamples, read_metadata
from dpo_jax.data.prepared_writer import write_examples
from dpo_jax.main import command
from dpo_jax.types import CHOSEN
from experiments.imdb.sweeps import PAIRS

SHORTER = 0.25  # share of the pairs whose shorter answer won that is kept


def main(argv: list[str] | None = None) -> None:
    """Writes the biased pairs, and says how often the longer answer wins."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("runs/imdb"), help="workdir of experiments.imdb.run")
    arguments = parser.parse_args(argv)
    with command():
        write(arguments.source / PAIRS, arguments.source / "length_biased")


def write(source: Path, out: Path) -> None:
    """Writes the biased training pairs of a folder, and its held-out pairs as they are.

    Args:
      source: prepared pairs.
      out: where the others go.

    Raises:
      OSError: the source cannot be read, or the others not be written.
    """
    tokenizer = read_metadata(source).tokenizer
    train, held_out = (PreparedExamples(source, split, tokenizer) for split in ("train", "eval"))
    kept = [example for example in examples(train) if keeps(example)]
    wins = np.mean([sign(example) for example in kept if sign(example)]) / 2 + 0.5
    write_examples({"train": kept, "eval": examples(held_out)}, out, name="length_biased", tokenizer=tokenizer)
    print(f"{len(kept)} of {len(train)} pairs kept; the longer answer wins {wins:.0%} of them")


def keeps(example: Example) -> bool:
    """Whether a pair stays: drawn by its own number, so that neither order nor split matters."""
    return sign(example) > 0 or (sign(example) < 0 and np.random.default_rng(example.uid).random() < SHORTER)


def sign(example: Example) -> int:
    """1 when the chosen answer is the longer one, −1 when it is the shorter one, else 0."""
    chosen, rejected = sorted(example.answers, key=lambda answer: answer.role != CHOSEN)
    return int(np.sign(len(chosen.tokens) - len(rejected.tokens)))


def examples(source: PreparedExamples) -> Iterator[Example]:
    for i in range(len(source)):
        yield source[i]


if __name__ == "__main__":
    main()
