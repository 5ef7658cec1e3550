"""The work that is measured: batches of real pairs as token ids, and how many FLOPs they cannot do without."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from dpo_jax.data.encode import Encoded, Encoder, Encoding
from dpo_jax.data.example import Answer, Example
from dpo_jax.data.files import find_files
from dpo_jax.data.formats import parse_row
from dpo_jax.data.layouts import Shape
from dpo_jax.data.pipeline import Pipeline
from dpo_jax.data.preparation import Reader
from dpo_jax.data.tokenizer import open_tokenizer
from dpo_jax.models.config import DecoderConfig
from dpo_jax.types import CHOSEN, REJECTED

LONGEST = 512  # tokens of a prompt with one of its answers; longer pairs are left out, for truncation is not measured
ROW_EXAMPLES = 16  # most pairs of a packed row, and of each 768 positions of longer ones; the mean is 4

Batches = list[list[Example]]


def read_batches(data: str, tokenizer: str, *, rows: int, row_length: int, steps: int) -> Batches:
    """The pairs of a run's first steps: those of its packed rows.

    Args:
      data: a file of preferences.
      tokenizer: folder of a tokenizer.
      rows: of a step.
      row_length: positions of a row.
      steps: wanted.

    Raises:
      ValueError: the file has pairs for fewer.
    """
    pairs = list(read_pairs(data, tokenizer))
    kept = [pair for pair in pairs if longest(pair) <= LONGEST and places(pair) <= row_length]
    logging.info(
        "%d pairs; %d are left out: longer than %d tokens, or than a row", len(pairs), len(pairs) - len(kept), LONGEST
    )
    shape = shape_of([kept], row_length=row_length)
    pipeline = Pipeline(kept, shape, layout="packed", batch_size=rows, seed=0)
    if steps > pipeline.steps(1.0):
        raise ValueError(
            f"{data} has pairs for {pipeline.steps(1.0)} steps of {rows} rows of {row_length} positions; {steps} were "
            "asked for"
        )
    return [pipeline.examples(step) for step in range(steps)]


def read_pairs(data: str, tokenizer: str) -> Iterator[Example]:
    """The pairs of a file of preferences as a tokenizer's tokens."""
    records = (record for _, record in Reader("skip", 1.0).records(find_files(data), parse_row))
    encoder = Encoder(open_tokenizer(Path(tokenizer)), Encoding(LONGEST, LONGEST))
    for chunk in iter(lambda: list(itertools.islice(records, 64)), []):
        for item in encoder.encode(chunk):
            if isinstance(item, Encoded):
                yield from item.examples


def longest(example: Example) -> int:
    """Tokens of the prompt with the longer answer."""
    return len(example.prompt) + max(len(answer.tokens) for answer in example.answers)


def places(example: Example) -> int:
    """Positions that a pair takes where its prompt is laid once."""
    return len(example.prompt) + sum(len(answer.tokens) - 1 for answer in example.answers)


def tokens(batch: Sequence[Example]) -> int:
    """Useful tokens as other trainers count them: each answer with its own prompt."""
    return sum(len(e.prompt) + len(a.tokens) for e in batch for a in e.answers)


def shape_of(batches: Batches, *, row_length: int) -> Shape:
    """The smallest that all pairs fit into, rounded up to multiples of 32 tokens."""
    examples = list(itertools.chain(*batches))
    prompt = max(len(e.prompt) for e in examples)
    answer = max(len(a.tokens) for e in examples for a in e.answers)
    return Shape(
        2,
        prompt_length=-(-prompt // 32) * 32,
        answer_length=-(-answer // 32) * 32,
        row_length=row_length,
        row_examples=max(ROW_EXAMPLES, ROW_EXAMPLES * row_length // 768),
    )


def save(batches: Batches, path: Path) -> None:
    """Writes token ids as JSON: all that a worker needs, in whichever framework."""
    pairs = [
        [{"prompt": e.prompt.tolist(), "answers": [a.tokens.tolist() for a in e.answers]} for e in batch]
        for batch in batches
    ]
    path.write_text(json.dumps(pairs), encoding="utf-8")


def load(path: Path) -> Batches:
    """What :func:`save` wrote."""
    ids = itertools.count()
    return [[_example(next(ids), pair) for pair in batch] for batch in json.loads(path.read_text(encoding="utf-8"))]


def _example(uid: int, pair: dict[str, Any]) -> Example:
    answers = (np.array(tokens, np.int32) for tokens in pair["answers"])
    chosen, rejected = (
        Answer(tokens, np.ones(len(tokens), np.float32), role, score=float(role == CHOSEN))
        for tokens, role in zip(answers, (CHOSEN, REJECTED), strict=True)
    )
    return Example(uid, np.array(pair["prompt"], np.int32), (chosen, rejected))


def needed_flops(config: DecoderConfig, batch: Iterable[Example], *, passes: int) -> float:
    """FLOPs of the matrix products that useful tokens need.

    Each position of a prompt once and of both answers passes through the layers, attends to what it sees and no more,
    and the head is applied where an answer's token is predicted: 2 FLOPs for a weight and a position, and
    4·H·E for a query and a key.

    Args:
      config: of a model with a gated MLP.
      batch: pairs.
      passes: 1 for a forward pass, 2 for a backward pass: 4 with a reference in the step, 3 without.
    """
    total = 0.0
    for example in batch:
        prompt, answers = len(example.prompt), [len(answer.tokens) - 1 for answer in example.answers]
        seen = _triangle(prompt) + sum(_triangle(prompt + n) - _triangle(prompt) for n in answers)
        total += _products(config, places(example), seen, sum(n + 1 for n in answers))
    return passes * total


def sampling_flops(config: DecoderConfig, prompts: Iterable[int], new_tokens: int) -> float:
    """FLOPs of the matrix products that samples need: all but the last token are read, and the head gives each new one.

    Args:
      config: of a model with a gated MLP.
      prompts: tokens of each.
      new_tokens: sampled for each.
    """
    read = [prompt + new_tokens - 1 for prompt in prompts]
    return sum(_products(config, n, _triangle(n), new_tokens) for n in read)


def _products(config: DecoderConfig, positions: int, seen: int, predicted: int) -> float:
    """FLOPs of a forward pass over positions that see so many keys in all, and of so many tokens' logits."""
    c = config
    attention = c.width * c.size * (2 * c.heads + 2 * c.key_heads)
    layer = attention + 3 * c.width * c.mlp_width
    layers = c.layers * (2 * layer * positions + 4 * c.heads * c.size * seen)
    return layers + 2 * c.vocab_size * c.width * predicted


def _triangle(n: int) -> int:
    return n * (n + 1) // 2
