"""From a random-access source of examples to batches. A batch is a function of (seed, step) alone.

So the data position of a run is its step, any batch can be made again, and a run that continues reads what it would have
read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import grain

from dpo_jax.data.example import Example
from dpo_jax.data.layouts import LAYOUTS, Shape, pad_rows
from dpo_jax.types import PreferenceBatch


class Source(Protocol):
    """A random-access collection of examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class Pipeline:
    """Batches of a source in one layout.

    Args:
      source: the examples.
      shape: what each of them is promised to be.
      layout: a name in LAYOUTS.
      batch_size: examples in a batch, of all devices.
      seed: of the order of the examples.
      mismatched: whether each batch also holds answers of other examples after its prompts (KTO).

    Raises:
      ValueError: the source is empty, or the layout unknown.
    """

    def __init__(
        self, source: Source, shape: Shape, *, layout: str, batch_size: int, seed: int, mismatched: bool = False
    ) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
        if len(source) == 0:
            raise ValueError("the data source has no examples; see how it was prepared")
        self.source, self.shape, self.batch_size, self.mismatched = source, shape, batch_size, mismatched
        self._layout = LAYOUTS[layout]
        self._batches = (
            grain.MapDataset.source(source)
            .shuffle(seed=seed)
            .repeat(None)
            .batch(batch_size, drop_remainder=True, batch_fn=list)
        )

    def batch(self, step: int) -> PreferenceBatch:
        """The batch of one step."""
        return self._lay_out(self._batches[step])

    def train_batches(self, first_step: int) -> Iterator[PreferenceBatch]:
        """Batches from a step on, without end, each epoch in a new order; made ahead in the background."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        iterator = iter(self._batches.map(self._lay_out).to_iter_dataset(options))
        iterator.set_state({"next_index": first_step})
        return iterator

    def eval_batches(self) -> Iterator[PreferenceBatch]:
        """Each example once, in order; the last batch is filled up with rows of padding."""
        for start in range(0, len(self.source), self.batch_size):
            stop = min(start + self.batch_size, len(self.source))
            yield self._lay_out([self.source[i] for i in range(start, stop)])

    def _lay_out(self, examples: Sequence[Example]) -> PreferenceBatch:
        others = mismatch(examples) if self.mismatched else None
        return PreferenceBatch(
            answers=self._rows(examples, self.shape),
            mismatched=None if others is None else self._rows(others, replace(self.shape, with_prompt=False)),
        )

    def _rows(self, examples: Sequence[Example], shape: Shape):
        batch = self._layout(examples, shape)
        rows = batch.tokens_RL.shape[0] // len(examples) * self.batch_size
        return pad_rows(batch, rows)


def mismatch(examples: Sequence[Example]) -> list[Example]:
    """Each prompt with the answers of another example: those of the next one with another prompt, in the order of uids.

    So which answers meet which prompt depends on the examples of the batch, not on their order in it. Where all prompts
    are the same there is no mismatched answer, and the next example is taken as it is.

    With uids and prompts (5, "a"), (2, "b"), (9, "a"): the order is 2, 5, 9; 2 "b" gets the answers of 5, 5 "a" those
    of 2 (9 has its own prompt), and 9 "a" those of 2.
    """
    order = sorted(range(len(examples)), key=lambda i: examples[i].uid)
    prompts = [examples[i].prompt.tobytes() for i in order]
    donors = {}
    for place, i in enumerate(order):
        ring = [(place + shift) % len(order) for shift in range(1, len(order))]
        other = next((p for p in ring if prompts[p] != prompts[place]), (place + 1) % len(order))
        donors[i] = order[other]
    return [replace(e, answers=examples[donors[i]].answers) for i, e in enumerate(examples)]
