"""A reward model of preference pairs: the transformer of the policy with a linear head on the last token of an answer.

Bradley and Terry: P(y_w ≻ y_l | x) = σ(r(x, y_w) − r(x, y_l)), fitted by maximum likelihood (arXiv 2203.02155, eq. 1).
DPO needs none of this; it is here so that DPO can be compared with what does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import struct

from dpo_jax.checkpoint import Checkpoints, Retention
from dpo_jax.data.example import Answer, Example
from dpo_jax.data.pipeline import Source
from dpo_jax.models.layers import training_mask
from dpo_jax.opened import OpenedRun
from dpo_jax.optim import schedule
from dpo_jax.state import Axis
from dpo_jax.types import Array, Params


@struct.dataclass
class Rows:
    """Prompts with their answers, side by side in rows that are padded on the right.

    Attributes:
      tokens_RL: int32.
      length_R: int32, tokens of prompt and answer.
    """

    tokens_RL: Array
    length_R: Array


@struct.dataclass
class FitState:
    """Reward parameters and their optimizer's state."""

    step: Array
    params: Params
    opt_state: Any


def rows_of(texts: Sequence[tuple[np.ndarray, Answer]], room: int) -> Rows:
    """Rows of (prompt, answer), each of at most ``room`` tokens."""
    tokens_RL, length_R = np.zeros((len(texts), room), np.int32), np.zeros(len(texts), np.int32)
    for r, (prompt, answer) in enumerate(texts):
        whole = np.concatenate([prompt, answer.tokens])
        tokens_RL[r, : len(whole)], length_R[r] = whole, len(whole)
    return Rows(tokens_RL, length_R)


def rewards(model: nn.Module, params: Params, rows: Rows) -> Array:
    """The reward of each row, float32 [R]: the head on the hidden state of the last token."""
    position_RL = jnp.broadcast_to(jnp.arange(rows.tokens_RL.shape[1]), rows.tokens_RL.shape)
    group_RL = (position_RL < rows.length_R[:, None]).astype(jnp.int32)
    mask_RLL = training_mask(group_RL, jnp.zeros_like(group_RL))
    hidden_RLD = model.apply({"params": params["body"]}, rows.tokens_RL, position_RL, mask_RLL)
    last_RD = jnp.take_along_axis(hidden_RLD, (rows.length_R - 1)[:, None, None], axis=1)[:, 0]
    return last_RD.astype(jnp.float32) @ params["head"]["kernel"]


def bradley_terry(chosen_B: Array, rejected_B: Array) -> tuple[Array, Array]:
    """(mean of −log σ(r_w − r_l) in nats, share of pairs in the right order)."""
    margin_B = chosen_B - rejected_B
    return -jnp.mean(jax.nn.log_sigmoid(margin_B)), jnp.mean(margin_B > 0)


def fit(run: OpenedRun, folder: Path) -> tuple[Params, dict[str, float]]:
    """One epoch over the pairs of a run, from its first parameters, with its optimizer and batch size.

    Args:
      run: whose data, model and optimizer are taken.
      folder: where the model is kept; a finished one is read from there.

    Returns:
      (parameters, numbers: held-out loss and accuracy, steps).
    """
    steps, size, room = len(run.data.train) // run.config.data.batch_size, run.config.data.batch_size, _room(run)
    body = run.start_params()
    width = body["token_embedding"].shape[1]
    params = {"body": jax.tree.map(np.array, body), "head": {"kernel": np.zeros(width, np.float32)}}
    with Checkpoints(folder, Retention(1)) as checkpoints:
        saved = checkpoints.restore_newest({"params": params})
        if saved is not None:
            return saved[0]["params"], saved[1]["numbers"]
        step = run.shared.get(("reward model", run.program), lambda: run.parallel.train_step(_make_step(run, steps)))
        state = run.parallel.replicate(FitState(jnp.int32(0), params, run.parts.optimizer.init(params)))
        rate = run.parallel.replicate(run.parts.hyper.learning_rate)
        for batch in _batches(run.data.train, size, run.config.seed, steps, room):
            state, seen = step(state, run.parallel.shard(batch, 1), rate)
        logging.info("reward model: last batch %s", _scalars(run, seen))
        params = run.parallel.unreplicate(state.params)
        judge = make_judge(run)
        held_out = [run.data.held_out[i] for i in range(len(run.data.held_out))]
        sides = [judge(params, [(e.prompt, e.answers[s]) for e in held_out]) for s in (0, 1)]
        loss, right = (float(value) for value in bradley_terry(*map(jnp.asarray, sides)))
        numbers = {"eval/loss": loss, "eval/accuracy": right, "steps": steps}
        logging.info("reward model: %s", numbers)
        checkpoints.save(steps, {"params": params}, {"numbers": numbers})
    return params, numbers


def make_judge(run: OpenedRun, rows: int = 256) -> Callable[[Params, Sequence[tuple[np.ndarray, Answer]]], np.ndarray]:
    """A compiled (params, [(prompt, answer), …]) → float64 [n], ``rows`` at a time."""
    model = run.parts.model
    compiled = run.shared.get(
        ("rewards", model, rows, run.parallel),
        lambda: run.parallel.row_function(lambda params, batch: rewards(model, params, batch), "rewards"),
    )

    def judge(params: Params, texts: Sequence[tuple[np.ndarray, Answer]]) -> np.ndarray:
        placed, found = run.parallel.replicate(params), []
        for start in range(0, len(texts), rows):
            part = list(texts[start : start + rows])
            batch = rows_of(part + [part[0]] * (rows - len(part)), _room(run))
            found.append(compiled(placed, batch).result()[: len(part)])
        return np.concatenate(found).astype(np.float64)

    return judge


def _make_step(run: OpenedRun, steps: int) -> Callable[..., Any]:
    """(state, batch of pairs, learning rate) → (state, metrics)."""
    model, optimizer, settings = run.parts.model, run.parts.optimizer, run.config.optim

    def step(state: FitState, batch: Rows, rate: Array) -> tuple[FitState, dict[str, Array]]:
        pairs = jax.tree.map(lambda a: a[0], batch)  # one micro-batch

        def loss_of(params: Params) -> tuple[Array, Array]:
            side_B2 = rewards(model, params, pairs).reshape(-1, 2)
            return bradley_terry(side_B2[:, 0], side_B2[:, 1])

        (loss, right), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        grads, loss, right = mean_over(run.parallel.axis, (grads, loss, right))
        now = rate * schedule(settings.schedule, state.step, warmup=settings.warmup_steps, steps=steps)
        norm = optax.global_norm(grads)
        params, opt_state = optimizer.update(state.params, state.opt_state, grads, norm, now)
        return FitState(state.step + 1, params, opt_state), {"loss": loss, "accuracy": right}

    return step


def mean_over(axis: Axis, tree: Any) -> Any:
    """Means over the devices that share a batch."""
    return jax.tree.map(lambda a: a / axis.sum(1.0), axis.sum(tree))


def _batches(source: Source, size: int, seed: int, steps: int, room: int) -> Iterator[Rows]:
    """Pairs in an order drawn by the seed; rows are chosen and rejected in turn."""
    order = np.random.default_rng(seed).permutation(len(source))
    for start in range(0, steps * size, size):
        examples: list[Example] = [source[int(i)] for i in order[start : start + size]]
        yield rows_of([(e.prompt, answer) for e in examples for answer in e.answers], room)


def _room(run: OpenedRun) -> int:
    return run.config.data.prompt_length + run.config.data.answer_length


def _scalars(run: OpenedRun, metrics: Any) -> dict[str, float]:
    return {name: float(value) for name, value in run.parallel.unreplicate(metrics).items()}
