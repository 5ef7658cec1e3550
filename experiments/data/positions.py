"""How many positions a model computes for each pair, by layout, beside padding both sides to the batch's longest.

python -m experiments.data.positions --data=harmless-base-test.jsonl.gz
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags, logging

from dpo_jax.data import packing
from dpo_jax.data.encode import Encoded, Encoder, Encoding
from dpo_jax.data.example import Example
from dpo_jax.data.files import find_files
from dpo_jax.data.formats import parse_row
from dpo_jax.data.layouts import Shape
from dpo_jax.data.pipeline import Pipeline
from dpo_jax.data.preparation import Reader
from dpo_jax.data.tokenizer import train_tokenizer
from dpo_jax.main import command, parse_flags

_DATA = flags.DEFINE_string("data", None, "Preference pairs: a file, a folder or a glob.", required=True)
_OUT = flags.DEFINE_string("out", None, "Where the numbers go as JSON; None only prints them.")
_VOCAB = flags.DEFINE_integer("vocab_size", 8192, "Of the tokenizer that is trained on the data.")
_ROW = flags.DEFINE_integer("row_length", 512, "Positions of a packed row.")
_PROMPT = flags.DEFINE_integer("prompt_length", 256, "Longest prompt, tokens.")
_ANSWER = flags.DEFINE_integer("answer_length", 129, "Longest answer, tokens.")
_EXAMPLES = flags.DEFINE_integer("row_examples", 16, "Most pairs in a packed row.")
_BATCH = flags.DEFINE_integer("batch_size", 16, "Pairs in a batch, which the padding to the longest depends on.")


def read_pairs() -> tuple[list[Example], int]:
    """The pairs of the files, encoded, and how many rows they come from."""
    reader = Reader("skip", 1.0)
    records = [record for _, record in reader.records(find_files(_DATA.value), parse_row)]
    texts = [text for r in records for text in (r.prompt_text(), *(reply.text() for reply in r.replies))]
    encoder = Encoder(train_tokenizer(texts, _VOCAB.value), Encoding(_PROMPT.value, _ANSWER.value))
    encoded = [item for item in encoder.encode(records) if isinstance(item, Encoded)]
    for note in ("prompts truncated", "answers that lost their EOS"):
        logging.info("%s: %d", note, sum(item.notes[note] for item in encoded))
    return [example for item in encoded for example in item.examples], reader.tally.rows


def positions_of(layout: str, examples: Sequence[Example]) -> dict[str, float]:
    """Positions per pair, and the share of them that holds a token, over an epoch."""
    shape = Shape(2, _PROMPT.value, _ANSWER.value, row_length=_ROW.value, row_examples=_EXAMPLES.value)
    rows = 8 if layout == "packed" else _BATCH.value
    pipeline = Pipeline(examples, shape, layout=layout, batch_size=rows, seed=0)
    for _ in pipeline.eval_batches() if layout != "packed" else map(pipeline.batch, range(pipeline.steps(1.0))):
        pass
    filling = pipeline.filling
    return {"positions": filling.positions / filling.examples, "useful": filling.useful / filling.positions}


def padded_to_longest(examples: Sequence[Example]) -> dict[str, float]:
    """Both sides, each with the prompt, padded to the longest of its batch."""
    lengths = packing.example_lengths(examples)[packing.shuffled(len(examples), 0, 0)]
    sides = lengths[:, :1] + lengths[:, 1:]
    batches = [sides[i : i + _BATCH.value] for i in range(0, len(sides), _BATCH.value)]
    positions = sum(batch.size * batch.max() for batch in batches)
    return {"positions": float(positions / len(examples)), "useful": float(sides.sum() / positions)}


@command()
def main(_: Sequence[str]) -> None:
    examples, rows = read_pairs()
    table = {"padded to the longest of the batch": padded_to_longest(examples)}
    table |= {layout: positions_of(layout, examples) for layout in ("concatenated", "shared_prefix", "packed")}
    lengths = packing.example_lengths(examples)
    print(
        f"{len(examples)} pairs of {rows} rows; median tokens (prompt, chosen, rejected): {np.median(lengths, axis=0)}"
    )
    print("| layout | positions a pair | useful |\n|---|---|---|")
    for name, numbers in table.items():
        print(f"| {name} | {numbers['positions']:.1f} | {100 * numbers['useful']:.1f} % |")
    if _OUT.value:
        Path(_OUT.value).write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
