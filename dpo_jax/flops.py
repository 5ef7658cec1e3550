"""Products of a training step, counted from the model: a compiler's own count takes the body of a scan once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from dpo_jax import lora
from dpo_jax.logprobs import sight
from dpo_jax.models.config import ATTENDED, REMAT, DecoderConfig
from dpo_jax.models.flash import block_count
from dpo_jax.models.sight import Sight
from dpo_jax.models.splash import visited_pairs
from dpo_jax.trees import named_leaves
from dpo_jax.types import Params, PreferenceBatch, TokenBatch

# Products of a pass over pairs of query and key: scores and sums are two; JAX's kernels compute the scores again for
# each of the three gradients that they return in two parts.
_FORWARD, _KERNEL_BACKWARD = 2, 7


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a step, over all chips.

    Attributes:
      useful: what the mathematics asks for: forward and backward pass of what is trained, forward pass of the
        reference; scores of the keys that a token sees, logits of targets.
      spent: what the program does: scores that are masked, padding, and what is computed again in the backward pass.
    """

    useful: float
    spent: float


@dataclass(frozen=True)
class Forward:
    """Products of one forward pass over a batch.

    A token and a matrix of n numbers are 2n operations; a pair of query and key is 4·H·E: its score and its sum.

    Attributes:
      base: products with the layers' matrices.
      adapters: products with those of adapters.
      attention: scores and sums.
      head: logits of the targets.
    """

    base: float
    adapters: float
    attention: float
    head: float


def forward(config: DecoderConfig, params: Params, *, tokens: int, pairs: float, targets: int) -> Forward:
    """Counts a forward pass.

    Args:
      config: of the model.
      params: its parameters, or their shapes.
      tokens: of all rows.
      pairs: of a query and a key that it sees, summed over layers.
      targets: whose logits are needed.
    """
    sizes = {name: math.prod(leaf.shape) for name, leaf in named_leaves(params).items()}
    return Forward(
        base=2.0 * tokens * sum(size for name, size in sizes.items() if name.endswith("kernel")),
        adapters=2.0 * tokens * sum(size for name, size in sizes.items() if lora.is_adapter(name)),
        attention=2.0 * _FORWARD * pairs * config.heads * config.size,
        head=2.0 * targets * config.vocab_size * config.width,
    )


def useful_flops(
    config: DecoderConfig, params: Params, batch: PreferenceBatch, *, reference: bool, full: bool = True
) -> float:
    """Counts what the mathematics of a step asks for on the tokens of a batch, not on its padding.

    Args:
      config: of the model.
      params: its parameters, or their shapes.
      batch: on the host.
      reference: whether the reference is scored too.
      full: whether all parameters are trained, not adapters alone. A frozen matrix has no gradient: the pass back
        through it is one product, not two.
    """
    needed = _needed(config, params, batch.answers)
    trained = (3 if full else 2) * (needed.base + needed.head) + 3 * (needed.attention + needed.adapters)
    useful = trained + reference * (needed.base + needed.attention + needed.head)
    if batch.mismatched is None:
        return useful
    only_scored = _needed(config, params, batch.mismatched)
    without = only_scored.base + only_scored.attention + only_scored.head
    return useful + without * (1 + reference) + only_scored.adapters


@dataclass(frozen=True)
class Passes:
    """How often rows go through a model in a step.

    Attributes:
      trained: forward and back through the policy.
      policy: forward alone.
      reference: forward through the reference, which has no adapters.
    """

    trained: int
    policy: int
    reference: int


def step_passes(batch: PreferenceBatch, *, reference: bool, scored_twice: bool) -> Iterator[tuple[TokenBatch, Passes]]:
    """Yields (rows, their passes) of a batch; arguments are those of :func:`step_work`."""
    yield batch.answers, Passes(1, int(scored_twice), int(reference))
    if batch.mismatched is not None:
        yield batch.mismatched, Passes(0, 1, int(reference))


def step_work(model: nn.Module, params: Params, batch: PreferenceBatch, *, reference: bool, scored_twice: bool) -> Work:
    """Counts a step.

    Args:
      model: with adapters where adapters are trained.
      params: its parameters, or their shapes.
      batch: the whole batch, as numpy arrays.
      reference: whether the reference is scored too.
      scored_twice: whether a coupled loss scores micro-batches once before it pulls them back.
    """
    config, adapted = model.config, lora.adapter_of(model) is not None
    useful = useful_flops(config, params, batch, reference=reference, full=not adapted)
    parts = step_passes(batch, reference=reference, scored_twice=scored_twice)
    spent = sum(_body(model, params, rows, passes) + _head(config, rows, passes, adapted) for rows, passes in parts)
    return Work(useful, spent)


def dot_flops(jaxpr: Any, trips: int = 0) -> int:
    """FLOPs of all matrix products of a traced program but those inside of kernels, 2 for each multiplication.

    Args:
      jaxpr: as from ``jax.make_jaxpr(step)(…).jaxpr``.
      trips: of each loop whose length depends on the data.
    """
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            ((left, _), _) = equation.params["dimension_numbers"]
            contracted = math.prod(equation.invars[0].aval.shape[axis] for axis in left)
            total += 2 * contracted * math.prod(equation.outvars[0].aval.shape)
        elif name != "pallas_call":
            times = {"scan": equation.params.get("length"), "while": trips}.get(name, 1)
            counts = [dot_flops(inner, trips) for inner in inner_programs(equation)]
            total += times * (max(counts) if name == "cond" else sum(counts))  # one branch is taken
    return total


def inner_programs(equation: Any) -> Iterator[Any]:
    """The traced programs that an equation holds: bodies of loops, branches, calls.

    Of what differs between platforms, it is that of those which are not named.
    """
    params = dict(equation.params)
    if params.get("branches_platforms"):
        params["branches"] = params["branches"][-1:]
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def _needed(config: DecoderConfig, params: Params, rows: TokenBatch) -> Forward:
    """A pass over the tokens of a batch: each sees those before it in its own sequence, and itself."""
    position, real = np.asarray(rows.position_RL), np.asarray(rows.group_RL) != 0
    pairs = float(sum(np.minimum(position + 1, w)[real].sum(dtype=np.float64) for w in _windows(config)))
    targets = int(np.count_nonzero(rows.weight_RM))
    return forward(config, params, tokens=int(real.sum()), pairs=pairs, targets=targets)


def _body(model: nn.Module, params: Params, batch: TokenBatch, passes: Passes) -> float:
    """What the layers compute in a step."""
    rows, length = batch.tokens_RL.shape
    row = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), batch)
    base, adapters = lora.split(params)
    trained, frozen = (adapters, base) if adapters else (base, {})
    blocks = block_count(length)
    trips = blocks * (blocks + 1) // 2  # as many pairs of blocks as rows of one sequence visit, each beside others
    dense = rows * (
        passes.trained * _needed_flops(trips, partial(_both, model), trained, frozen, row)
        + passes.policy * _needed_flops(trips, partial(_hidden, model), params, row)
        + passes.reference * _needed_flops(trips, partial(_hidden, lora.with_adapter(model, None)), base, row)
    )
    if not isinstance(jax.eval_shape(lambda r: sight(model, r), row), Sight):
        return dense
    c = model.config
    kept = REMAT[c.remat]
    both = _FORWARD * (1 + (kept is not None and ATTENDED not in kept)) + _KERNEL_BACKWARD
    products = passes.trained * both + _FORWARD * (passes.policy + passes.reference)
    windows = [None if w >= length else w for w in _windows(c)]
    whole = Sight(batch.group_RL, batch.branch_RL, batch.branches)
    seen = {w: visited_pairs(whole, w) for w in set(windows)}
    return dense + 2.0 * products * c.heads * c.size * sum(seen[w] for w in windows)


def _hidden(model: nn.Module, params: Params, row: TokenBatch) -> Any:
    return model.apply({"params": params}, row.tokens_RL, row.position_RL, sight(model, row))


def _both(model: nn.Module, trained: Params, frozen: Params, row: TokenBatch) -> Any:
    """Forward and back."""
    out, pull_back = jax.vjp(lambda p: _hidden(model, lora.join(frozen, p), row), trained)
    return out, pull_back(jnp.ones_like(out))


def _head(config: DecoderConfig, batch: TokenBatch, passes: Passes, frozen: bool) -> float:
    """Logits of every column that some row has a target in; the pass back computes them again."""
    used = np.flatnonzero(np.any((np.asarray(batch.weight_RM) > 0) | (np.asarray(batch.source_RM) > 0), axis=0))
    columns = int(used[-1]) + 1 if used.size else 0
    products = passes.trained * (3 if frozen else 4) + passes.policy + passes.reference
    return 2.0 * products * batch.tokens_RL.shape[0] * columns * config.vocab_size * config.width


def _needed_flops(trips: int, fn: Any, *args: Any) -> int:
    closed = jax.make_jaxpr(fn)(*args)
    # What is computed again and read by nobody is left out, as compilers do.
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return dot_flops(jaxpr, trips)


def _windows(config: DecoderConfig) -> list[int]:
    """How many positions a token sees, for each layer."""
    everything = np.iinfo(np.int32).max
    return [w or everything for w in config.windows or (None,) * config.layers]
