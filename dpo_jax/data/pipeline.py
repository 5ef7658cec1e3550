"""From a random-access source of examples to batches. A batch is a function of (seed, step) alone.

So the data position of a run is its step, any batch can be made again, and a run that continues reads what it would
have read. Each process of a run makes its own share of the rows of every batch.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol, runtime_checkable

import grain
import numpy as np
from absl import logging

from dpo_jax.data import packing
from dpo_jax.data.example import Example
from dpo_jax.data.layouts import LAYOUTS, Shape, pad_rows
from dpo_jax.data.mismatched import mismatch, mismatched_shape
from dpo_jax.types import PreferenceBatch, TokenBatch

_VERSION = 5  # of the order of examples: change it when the same seed gives other batches
_STEPS = 2**62  # more than any run has
_ROWS = 1  # the stream of random numbers that shuffles rows, beside the one that shuffles examples


class Source(Protocol):
    """A random-access collection of examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@runtime_checkable
class Described(Source, Protocol):
    """A source that knows its examples without reading them."""

    def lengths(self) -> np.ndarray:
        """int32 [n, 1 + answers], tokens of the prompt and of each answer."""
        ...

    def contents(self) -> np.ndarray:
        """int64 [n, 1 + answers], hashes of the prompt and of each answer."""
        ...

    def roles(self) -> np.ndarray:
        """int [n, answers]."""
        ...

    def token_range(self) -> tuple[int, int]:
        """(least, greatest) token."""
        ...


@dataclass
class Filling:
    """How full the rows are that a pipeline has made.

    Attributes:
      rows: rows made.
      positions: their positions.
      useful: positions that hold a token.
      examples: examples in them.
      shapes: the different shapes (rows, positions) made: as many programs will be compiled.
    """

    rows: int
    positions: int
    useful: int
    examples: int
    shapes: set[tuple[int, int]]

    def numbers(self) -> dict[str, float]:
        """Padding share, useful tokens per row, positions per example, and the number of shapes."""
        return {
            "padding_share": 1 - self.useful / max(1, self.positions),
            "useful_tokens_per_row": self.useful / max(1, self.rows),
            "positions_per_example": self.positions / max(1, self.examples),
            "compiled_shapes": float(len(self.shapes)),
        }


class Pipeline:
    """Batches of a source in one layout.

    Args:
      source: the examples.
      shape: what each of them is promised to be.
      layout: a name in LAYOUTS.
      batch_size: examples in a batch, of all processes; in the packed layout rows.
      seed: of the order of the examples.
      mismatched: whether each batch also holds answers of other examples after its prompts (KTO).
      process: (index, count) of this process; it makes its share of each batch.

    Attributes:
      attach: gives an example's answers their stored log-probabilities, for a shape that promises them.
      filling: how full the rows made so far are.

    Raises:
      ValueError: the source is empty, the layout unknown, or an example does not fit into a row.
    """

    def __init__(
        self,
        source: Source,
        shape: Shape,
        *,
        layout: str,
        batch_size: int,
        seed: int,
        mismatched: bool = False,
        process: tuple[int, int] = (0, 1),
    ) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
        if len(source) == 0:
            raise ValueError("the data source has no examples; see how it was prepared")
        if batch_size % process[1]:
            raise ValueError(
                f"data.batch_size {batch_size} does not divide over {process[1]} processes; choose a multiple"
            )
        self.source, self.shape, self.batch_size, self.mismatched = source, shape, batch_size, mismatched
        self.attach: Callable[[Example], Example] = lambda example: example
        self.filling = Filling(0, 0, 0, 0, set())
        self._layout_name, self._layout, self._seed, self._process = layout, LAYOUTS[layout], seed, process
        self._packs = layout == "packed"
        self._order: _Packed | _Single
        if self._packs:
            _check_rows(shape, mismatched)
            self._order = _Packed(_units(source, shape), shape, batch_size, seed)
        else:
            self._order = _Single(len(source), batch_size, seed)

    def batch(self, step: int) -> PreferenceBatch:
        """The batch of one step: this process's rows of it."""
        return self._lay_out(self._order.rows(step))

    def examples(self, step: int) -> list[Example]:
        """The examples of one step, of all processes."""
        return self._read(self._order.rows(step))

    def train_batches(self, first_step: int) -> Iterator[PreferenceBatch]:
        """Batches from a step on, without end, each epoch in a new order; made ahead in the background."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        iterator = iter(grain.MapDataset.range(_STEPS).map(self.batch).to_iter_dataset(options))
        iterator.set_state({"next_index": first_step})
        return iterator

    def eval_batches(self) -> Iterator[PreferenceBatch]:
        """Each example once; the last batch is filled up with rows of padding."""
        for rows in self._order.in_order():
            yield self._lay_out(rows)

    def within_epoch(self, steps: int | None) -> bool:
        """Whether so many training steps are less than a pass over the source; an evaluation (None) is a pass."""
        return steps is not None and steps < self._order.steps_per_epoch

    def scored(self, steps: int | None = None) -> Iterator[Example]:
        """The examples of the batches, and the mismatched ones (other examples' answers).

        Args:
          steps: of a training run, from its first; None takes the batches of an evaluation.

        Yields:
          Everything whose answers the batches hold; some of it more than once.
        """
        if not (self.mismatched or self.within_epoch(steps)):
            yield from (self.source[i] for i in range(len(self.source)))
            return
        for rows in self._order.in_order() if steps is None else map(self._order.rows, range(steps)):
            examples = [self.source[i] for row in rows for i in row.tolist()]
            yield from examples
            if self.mismatched:
                yield from mismatch(examples)

    def steps(self, epochs: float) -> int:
        """Steps of so many passes over the source; at least 1."""
        return max(1, round(epochs * self._order.steps_per_epoch))

    def fingerprint(self) -> dict[str, str]:
        """Identity of all that decides which batch belongs to which step.

        Returns:
          "data": sha256 of the examples; "tokenizer": of the tokenizer, where the source knows it; "pipeline": order,
          layout and shape, readable. Two pipelines with equal fingerprints give equal batches.
        """
        pipeline = {
            "version": _VERSION,
            "layout": self._layout_name,
            "batch_size": self.batch_size,
            "seed": self._seed,
            "mismatched": self.mismatched,
            **asdict(self.shape),
        }
        tokenizer = getattr(self.source, "tokenizer_fingerprint", None)
        return {
            "data": source_fingerprint(self.source),
            **({} if tokenizer is None else {"tokenizer": str(tokenizer)}),
            "pipeline": json.dumps(pipeline, sort_keys=True),
        }

    def _lay_out(self, rows: Sequence[np.ndarray]) -> PreferenceBatch:
        own = self._read(self._share(rows, self.batch_size))
        answers = self._pad(own, self.shape, self.batch_size)
        self._count(answers, len(own))
        return PreferenceBatch(answers, self._mismatched_rows(rows) if self.mismatched else None)

    def _mismatched_rows(self, rows: Sequence[np.ndarray]) -> TokenBatch:
        # Which answers meet which prompts is decided over the batch of all processes.
        others, shape = mismatch(self._read(rows)), mismatched_shape(self.shape)
        if not self._packs:
            return self._pad(self._share(others, self.batch_size), shape, self.batch_size)
        # Their lengths are not those of the plan: they are packed anew, into one batch's rows or a multiple of them.
        assert shape.row_length is not None
        plan = packing.plan_examples(others, row_length=shape.row_length, row_examples=shape.row_examples)
        count = -(-len(plan) // self.batch_size) * self.batch_size
        share = self._share([plan[r] for r in range(len(plan))], count)
        return self._pad([others[i] for row in share for i in row], shape, count)

    def _read(self, rows: Sequence[np.ndarray]) -> list[Example]:
        family = self._order.family
        return [replace(self.source[i], family=family.get(i)) for row in rows for i in row.tolist()]

    def _share(self, rows: Sequence, count: int) -> Sequence:
        """This process's part of ``count`` places, of which the first are taken by ``rows``."""
        index, processes = self._process
        size = count // processes
        return rows[index * size : (index + 1) * size]

    def _pad(self, examples: Sequence[Example], shape: Shape, rows: int) -> TokenBatch:
        batch = self._layout([self.attach(e) for e in examples], shape)
        rows_per_place = 1 if self._packs or not examples else batch.tokens_RL.shape[0] // len(examples)
        if not examples and not self._packs:
            rows_per_place = self._layout([self.attach(self.source[0])], shape).tokens_RL.shape[0]
        return pad_rows(batch, rows // self._process[1] * rows_per_place)

    def _count(self, batch: TokenBatch, examples: int) -> None:
        filling, group_RL = self.filling, np.asarray(batch.group_RL)
        filling.rows += group_RL.shape[0]
        filling.positions += group_RL.size
        filling.useful += int((group_RL != 0).sum())
        filling.examples += examples
        if group_RL.shape not in filling.shapes:
            filling.shapes.add((group_RL.shape[0], group_RL.shape[1]))
            logging.info(
                "%s layout: shape %d is %d rows of %d positions; %d examples in its first batch, %.1f %% padding, "
                "%.0f useful tokens a row",
                self._layout_name,
                len(filling.shapes),
                *group_RL.shape,
                examples,
                100 * (group_RL == 0).mean(),
                (group_RL != 0).sum(axis=1).mean(),
            )


class _Single:
    """One example a place: batches run through shuffled epochs without regard to their borders."""

    family: Mapping[int, int] = {}

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self._count, self._batch_size = count, batch_size
        self._indices = grain.MapDataset.range(count).shuffle(seed=seed).repeat(None)
        self.steps_per_epoch = count / batch_size

    def rows(self, step: int) -> list[np.ndarray]:
        first = step * self._batch_size
        return [np.array([self._indices[i]]) for i in range(first, first + self._batch_size)]

    def in_order(self) -> Iterator[list[np.ndarray]]:
        for start in range(0, self._count, self._batch_size):
            stop = min(start + self._batch_size, self._count)
            yield [np.array([i]) for i in range(start, stop)]


class _Packed:
    """Rows of several examples. Each epoch has a plan of its own, whose rows are spread evenly over its steps.

    Attributes:
      family: of each example that has one.
    """

    def __init__(self, units: packing.Families, shape: Shape, rows: int, seed: int) -> None:
        self._units, self._shape, self._rows, self._seed = units, shape, rows, seed
        together = enumerate(units.members) if shape.prompt_answers else ()
        self.family = {i: number for number, members in together for i in members}
        self._plan_of = functools.lru_cache(maxsize=2)(self._make_plan)
        self._first_steps = [0]  # step at which each epoch begins

    @property
    def steps_per_epoch(self) -> float:
        return float(self._steps_of(self._plan_of(0)))

    def rows(self, step: int) -> list[np.ndarray]:
        epoch = 0
        while step >= self._end_of(epoch):
            epoch += 1
        plan = self._plan_of(epoch)
        first, steps = self._first_steps[epoch], self._steps_of(plan)
        borders = np.linspace(0, len(plan), steps + 1).round().astype(int)
        return [plan[r] for r in range(borders[step - first], borders[step - first + 1])]

    def in_order(self) -> Iterator[list[np.ndarray]]:
        plan = _plan(self._units, np.arange(len(self._units.members)), self._shape)
        for start in range(0, len(plan), self._rows):
            yield [plan[r] for r in range(start, min(start + self._rows, len(plan)))]

    def _end_of(self, epoch: int) -> int:
        if epoch + 1 == len(self._first_steps):
            self._first_steps.append(self._first_steps[epoch] + self._steps_of(self._plan_of(epoch)))
        return self._first_steps[epoch + 1]

    def _steps_of(self, plan: packing.Rows) -> int:
        return -(-len(plan) // self._rows)

    def _make_plan(self, epoch: int) -> packing.Rows:
        plan = _plan(self._units, packing.shuffled(len(self._units.members), self._seed, epoch), self._shape)
        return plan.reordered(packing.shuffled(len(plan), self._seed, epoch, _ROWS))


def _check_rows(shape: Shape, mismatched: bool) -> None:
    if shape.row_length is None:
        raise ValueError("data.row_length is not set; the packed layout needs the positions of a row")
    if shape.prompt_answers is not None and shape.prompt_answers < shape.answers:
        raise ValueError(
            f"data.prompt_answers is {shape.prompt_answers}, and an example has {shape.answers} answers: set it to at "
            "least as many, or leave it unset"
        )
    longest = shape.prompt_length + shape.answers * (shape.answer_length - 1)
    if mismatched and longest > shape.row_length:
        raise ValueError(
            f"this loss pairs prompts with other examples' answers, which takes up to {longest} positions; a row "
            f"has {shape.row_length} (data.row_length): raise it, or lower data.prompt_length or data.answer_length"
        )


def _units(source: Source, shape: Shape) -> packing.Families:
    """What is placed in rows as one: examples, or families of them."""
    lengths = packing.example_lengths(source)
    if shape.prompt_answers is None:
        return packing.single(lengths)
    return packing.families(
        lengths,
        packing.example_contents(source),
        prompt_answers=shape.prompt_answers,
        row_length=shape.row_length or 0,
        row_examples=shape.row_examples,
    )


def _plan(units: packing.Families, order: np.ndarray, shape: Shape) -> packing.Rows:
    """Which examples lie in each row, those of a unit side by side."""
    limits = {"row_length": shape.row_length or 0, "row_examples": shape.row_examples}
    places = packing.plan_rows(units.positions, order, **limits, counts=units.counts)
    rows = [[i for unit in places[r].tolist() for i in units.members[unit]] for r in range(len(places))]
    return packing.Rows.of(rows)


def source_fingerprint(source: Source) -> str:
    """sha256 of a source's examples, hexadecimal: the source's own where it has one, else over what it holds."""
    known = getattr(source, "fingerprint", None)
    if isinstance(known, str):
        return known
    digest = hashlib.sha256()
    for i in range(len(source)):
        example = source[i]
        digest.update(f"{example.uid} {len(example.prompt)} ".encode() + np.asarray(example.prompt, np.int32).tobytes())
        for answer in example.answers:
            digest.update(f"{len(answer.tokens)} {answer.role} {answer.score!r} ".encode())
            digest.update(np.asarray(answer.tokens, np.int32).tobytes())
            digest.update(np.asarray(answer.weights, np.float32).tobytes())
    return digest.hexdigest()
