"""What a run is made of while it trains: its state, its traced numbers, and what is compiled into its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from flax import struct

from dpo_jax.optim import Moments
from dpo_jax.types import Array, Params


@struct.dataclass
class TrainState:
    """All that a run needs to go on.

    Attributes:
      step: int32 scalar, updates done.
      params: what is trained: the policy, or the adapters that make it of the reference.
      reference: the frozen reference, and the base of adapters; None when there are none and the objective needs none
        or its log-probabilities are stored. The optimizer never sees it.
      opt_state: the optimizer's moments.
      loss_state: what the losses' statistics remember.
    """

    step: Array
    params: Params
    reference: Params | None
    opt_state: Moments
    loss_state: Any


@struct.dataclass
class Hyper:
    """Traced numbers: changing one does not recompile."""

    loss: dict[str, Array]
    learning_rate: Array


@dataclass(frozen=True)
class StepConfig:
    """What is compiled in.

    Attributes:
      answers: A, answers of an example.
      schedule: name of the learning-rate schedule.
      warmup: its rise, steps.
      steps: updates of the whole run.
      head_chunk: targets whose logits exist at a time.
      reference_sync_every: steps between moves of the reference (TR-DPO, arXiv 2404.09656); None is never.
      reference_sync_rate: α of reference ← α·policy + (1−α)·reference.
      dropout_seed: of what adapters leave out in training; None leaves out nothing.
    """

    answers: int
    schedule: str
    warmup: int
    steps: int
    head_chunk: int
    reference_sync_every: int | None = None
    reference_sync_rate: float = 0.6
    dropout_seed: int | None = None


@dataclass(frozen=True)
class Axis:
    """The devices that share a batch: a pmap axis, or none where one program sees the whole batch.

    Attributes:
      name: of the pmap axis.
      parts: without one, how many parts the compiler splits the rows of the whole batch into.
    """

    name: str | None = None
    parts: int = 1

    def sum(self, tree: Any) -> Any:
        return jax.lax.psum(tree, self.name) if self.name else tree

    def gather(self, tree: Any) -> Any:
        """Joins the leading axes of all devices' arrays."""
        if not self.name:
            return tree
        return jax.tree.map(lambda a: jax.lax.all_gather(a, self.name, tiled=True), tree)

    def own(self, tree: Any, like: Any) -> Any:
        """This device's part of gathered arrays; ``like`` has the leading size of one part."""
        if not self.name:
            return tree
        size = jax.tree.leaves(like)[0].shape[0]
        start = jax.lax.axis_index(self.name) * size
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), tree)


ALONE = Axis()  # one program sees the whole batch
