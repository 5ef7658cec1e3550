"""Answers for KTO without their pairs: all, and with a tenth of the desirable ones.

python -m experiments.kto.thin --source=runs/imdb
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dpo_jax.data.example import Answer, Example
from dpo_jax.data.pipeline import Source
from dpo_jax.data.prepared import PreparedExamples, read_metadata
from dpo_jax.data.prepared_writer import write_examples
from dpo_jax.main import command
from dpo_jax.types import CHOSEN
from experiments.imdb.sweeps import PAIRS

SHARES = {"all": 1.0, "tenth": 0.1}  # of the desirable answers that stay, by name of the folder


def main(argv: list[str] | None = None) -> None:
    """Writes a folder for each share, and says what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("runs/imdb"), help="workdir of experiments.imdb.run")
    arguments = parser.parse_args(argv)
    with command():
        for name, share in SHARES.items():
            write(arguments.source / PAIRS, arguments.source / "answers" / name, share)


def write(source: Path, out: Path, share: float) -> None:
    """Writes the answers of prepared pairs as examples of their own.

    Args:
      source: prepared pairs.
      out: where they go.
      share: of the desirable training answers that stay; held-out ones all do.

    Raises:
      OSError: the source cannot be read, or the answers not be written.
    """
    tokenizer = read_metadata(source).tokenizer
    train, held_out = (PreparedExamples(source, split, tokenizer) for split in ("train", "eval"))
    splits = {"train": answers(train, share), "eval": answers(held_out, 1.0)}
    metadata = write_examples(splits, out, name="kto_answers", tokenizer=tokenizer)
    print(f"{metadata.counts['train']} answers of {len(train)} pairs in {out}")


def answers(source: Source, share: float) -> Iterator[Example]:
    """Each answer of each pair; a desirable one stays or goes in all of them. A larger share holds a smaller one."""
    for i in range(len(source)):
        example = source[i]
        for side, answer in enumerate(example.answers):
            if answer.role != CHOSEN or _place(example.prompt, answer) < share:
                yield dataclasses.replace(example, uid=2 * example.uid + side, answers=(answer,))


def _place(prompt: np.ndarray, answer: Answer) -> float:
    """A number from 0 to 1 that looks random, and is the same for the same answer to the same prompt."""
    digest = hashlib.sha256(prompt.tobytes() + b" " + answer.tokens.tobytes()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


if __name__ == "__main__":
    main()
