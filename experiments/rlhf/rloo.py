"""RLOO: REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740), on the policy's own samples.

Each step draws K answers to each prompt, has them judged, and takes one step along the gradient of reward − β·KL.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from dpo_jax import flops, workdir
from dpo_jax.build import fresh_state, state_shapes
from dpo_jax.checkpoint import Checkpoints, Retention
from dpo_jax.config import Config
from dpo_jax.data.example import Answer, Example
from dpo_jax.data.layouts import Shape, concatenated
from dpo_jax.evaluate import Completer
from dpo_jax.logprobs import score
from dpo_jax.opened import OpenedRun, unique_prompts
from dpo_jax.optim import schedule
from dpo_jax.progress import Progress
from dpo_jax.shared import Shared
from dpo_jax.state import TrainState
from dpo_jax.types import Array, Params, PreferenceBatch, TokenBatch
from dpo_jax.writers import make_writer
from experiments.rlhf.reward_model import mean_over

Judge = Callable[[Sequence[np.ndarray], Sequence[Answer]], np.ndarray]  # (prompts, answers) → rewards


@dataclass(frozen=True)
class Settings:
    """What RLOO has beside a config.

    Attributes:
      reward: where rewards come from; a name.
      beta: β, price of KL(policy ‖ reference), reward a nat.
      answers: K, sampled for each prompt, at least 2.
      prompts: answered in a step.
    """

    reward: str
    beta: float
    answers: int
    prompts: int


@struct.dataclass
class Drawn:
    """Answers that the policy has just given: rows of tokens, and the reward of each."""

    tokens: TokenBatch
    reward_R: Array


def advantages(reward_XK: Array) -> Array:
    """R_i − mean of the other K − 1 rewards of the prompt, [X, K] (arXiv 2402.14740)."""
    others_XK = (jnp.sum(reward_XK, axis=1, keepdims=True) - reward_XK) / (reward_XK.shape[1] - 1)
    return reward_XK - others_XK


def loss(logp_XK: Array, reference_XK: Array, reward_XK: Array, beta: Array | float) -> Array:
    """−mean of A·log π(y|x), whose gradient is that of −(E r − β·KL) on average over the policy's samples.

    The reward of an answer is r − β(log π − log π_ref), a number without a gradient.

    Args:
      logp_XK: log π(y|x) of K answers to each of X prompts, nats.
      reference_XK: the same under the reference.
      reward_XK: r(x, y).
      beta: β.

    Returns:
      float32 scalar.
    """
    penalised_XK = reward_XK - beta * (logp_XK - reference_XK)
    return -jnp.mean(jax.lax.stop_gradient(advantages(penalised_XK)) * logp_XK)


class Rloo(OpenedRun):
    """A run of RLOO, evaluated by what evaluates runs of DPO.

    Args:
      config: model, data, optimizer, steps and evaluation; its loss names what held-out pairs are looked at with.
      folder: workdir of the run.
      settings: of RLOO.
      judge: gives the rewards.
      shared: what it has in common with other runs of this process.
    """

    def __init__(self, config: Config, folder: Path, settings: Settings, judge: Judge, shared: Shared) -> None:
        super().__init__(config, folder, shared)
        self._settings, self._judge = settings, judge
        self._prompts = unique_prompts(self.data.train, len(self.data.train))
        self._rows = settings.prompts * settings.answers
        self._shape = Shape(1, config.data.prompt_length, config.data.answer_length)
        self._completer = shared.get(("rloo", self.parts.model, self._rows), self._make_completer)
        key = ("rloo step", self.program, settings.answers)
        self._step = shared.get(key, lambda: self.parallel.train_step(self._make_step()))
        self.cost: Counter[str] = Counter()

    def train(self) -> dict[str, float]:
        """Trains to the last step, from the newest checkpoint where there is one. Returns the last numbers."""
        identity = self.identity | {"rloo": asdict(self._settings)}
        admit = lambda meta: workdir.check_identity(meta["identity"], identity, self.workdir)  # noqa: E731
        with Checkpoints(self.workdir, Retention(1)) as checkpoints:
            params = jax.tree.map(np.array, self.start_params())  # a copy: every step reuses the buffers
            saved = checkpoints.restore_newest(state_shapes(self.parts), admit)
            state, meta = saved or (fresh_state(self.parts, params), {"cost": {}})
            self.cost.update(meta["cost"])
            first, latest = int(state.step), dict[str, float]()
            state, evaluators = self.parallel.replicate(state), self.evaluators()
            hyper = self.parallel.replicate(self.parts.hyper)
            beta = self.parallel.replicate(np.float32(self._settings.beta))
            with make_writer(self.workdir, first or None) as writer, Progress(self.steps, "rloo", start=first) as bar:
                for number in range(first, self.steps + 1):
                    if number > first:
                        state, numbers = self._advance(state, number, (hyper.learning_rate, beta))
                        writer.write(number, numbers, "train")
                        bar.update(1, reward=numbers["reward"])
                    if number % self.config.eval.every == 0 or number == self.steps:
                        for prefix, evaluator in evaluators.items() if number > first or first == 0 else ():
                            found = evaluator(state, hyper, number).result()
                            writer.write(number, found, prefix)
                            latest |= {f"{prefix}/{name}": value for name, value in found.items()}
                    if number > first and (number % self.config.checkpoint.every == 0 or number == self.steps):
                        writer.flush()
                        saved_state = self.parallel.unreplicate(state)
                        checkpoints.save(number, saved_state, {"identity": identity, "cost": dict(self.cost)})
        return latest | {f"cost/{name}": float(value) for name, value in self.cost.items()}

    def _advance(self, state: TrainState, number: int, hyper: Any) -> tuple[TrainState, dict[str, float]]:
        """One step: sample, judge, update."""
        clocks = [time.process_time()]
        prompts = self._prompts_of(number)
        drawn = self._completer.sample(state.params, prompts, self.config.seed, 1.0, first_row=number * self._rows)
        answers, _ = drawn.result()
        clocks.append(time.process_time())
        reward_R = np.asarray(self._judge(prompts, answers), np.float32)
        clocks.append(time.process_time())
        rows = zip(prompts, answers, strict=True)
        tokens = concatenated([Example(i, prompt, (answer,)) for i, (prompt, answer) in enumerate(rows)], self._shape)
        state, metrics = self._step(state, self.parallel.shard(Drawn(tokens, reward_R), 1), hyper)
        numbers = {name: float(value) for name, value in self.parallel.unreplicate(metrics).items()}
        clocks.append(time.process_time())
        self._count(tokens)
        if self.cost["steps"] > 1:  # the first compiles
            spent = dict(zip(("sampling", "judging", "updating"), np.diff(clocks), strict=True))
            self.cost.update({f"cpu_seconds/{name}": float(value) for name, value in spent.items()})
        return state, numbers

    def _prompts_of(self, number: int) -> list[np.ndarray]:
        """Each prompt K times; a function of (seed, step), every epoch in an order of its own."""
        size, count = self._settings.prompts, len(self._prompts)
        places = range((number - 1) * size, number * size)
        orders = {
            e: np.random.default_rng([self.config.seed, e]).permutation(count) for e in {p // count for p in places}
        }
        return [self._prompts[orders[p // count][p % count]] for p in places for _ in range(self._settings.answers)]

    def _count(self, tokens: TokenBatch) -> None:
        """Tokens, and products that the mathematics asks for: sampling is a fifth pass."""
        params, batch = state_shapes(self.parts).params, PreferenceBatch(tokens)
        needed = flops.useful_flops(self.parts.model.config, params, batch, reference=True) * 5 / 4
        self.cost.update({"steps": 1, "sampled_tokens": int(tokens.weight_RM.sum()), "flops": needed})

    def _make_completer(self) -> Completer:
        data = self.config.data
        return Completer(
            self.parts.model,
            self.data.tokenizer,
            self.parallel,
            prompt_length=data.prompt_length,
            answer_length=data.answer_length,
            rows=self._rows,
            head_chunk=self.config.train.head_chunk,
        )

    def _make_step(self) -> Callable[..., Any]:
        """(state, drawn answers, (learning rate, β)) → (state, metrics)."""
        model, optim, steps, chunk = self.parts.model, self.config.optim, self.steps, self.config.train.head_chunk
        optimizer, axis, K = self.parts.optimizer, self.parallel.axis, self._settings.answers

        def step(state: TrainState, batch: Drawn, hyper: tuple[Array, Array]) -> tuple[TrainState, dict[str, Array]]:
            drawn = jax.tree.map(lambda a: a[0], batch)  # one micro-batch
            rate, beta = hyper
            logps = lambda params: score(model, params, drawn.tokens, (1, 1), chunk).sum.reshape(-1, K)  # noqa: E731
            reference_XK, reward_XK = logps(state.reference), drawn.reward_R.reshape(-1, K)

            def loss_of(params: Params) -> tuple[Array, Array]:
                logp_XK = logps(params)
                return loss(logp_XK, reference_XK, reward_XK, beta), jnp.mean(logp_XK - reference_XK)

            (value, kl), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
            grads, numbers = mean_over(axis, (grads, {"loss": value, "kl": kl, "reward": jnp.mean(reward_XK)}))
            norm = optax.global_norm(grads)
            now = rate * schedule(optim.schedule, state.step, warmup=optim.warmup_steps, steps=steps)
            params, opt_state = optimizer.update(state.params, state.opt_state, grads, norm, now)
            after = TrainState(state.step + 1, params, state.reference, opt_state, state.loss_state)
            return after, {**numbers, "grad_norm": norm}

        return step
