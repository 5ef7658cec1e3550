"""Evaluators: each looks at a training state and yields (name, value)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

import flax.linen as nn
import jax
import numpy as np

from dpo_jax import metrics as metrics_lib
from dpo_jax.ahead import Begun
from dpo_jax.answering import Answerer
from dpo_jax.data.example import Answer, Example
from dpo_jax.data.layouts import Shape, concatenated
from dpo_jax.data.pipeline import Pipeline
from dpo_jax.data.tokenizer import decode
from dpo_jax.logprobs import score
from dpo_jax.parallel import Parallel
from dpo_jax.sampling import Samples, row_draws
from dpo_jax.state import Hyper, TrainState
from dpo_jax.types import CHOSEN, Params

Reward = Callable[[Sequence[str]], np.ndarray]

_BEGUN = 9  # batches that devices are given at a time, the one at work among them


class Evaluator(Protocol):
    """Something to be measured now and then during a run.

    A call begins the work on the devices, and the result waits for its numbers, so that several evaluators, and a
    compiler, can be at work together.
    """

    def __call__(self, state: TrainState, hyper: Hyper, step: int) -> Begun[dict[str, float]]: ...


class HeldOutLoss:
    """Loss, accuracy, margins and the other training metrics on held-out examples.

    Args:
      pipeline: the held-out examples.
      step: a compiled evaluation step.
      parallel: its devices.
    """

    def __init__(self, pipeline: Pipeline, step: Callable[..., Any], parallel: Parallel) -> None:
        self._pipeline, self._step, self._parallel = pipeline, step, parallel

    def __call__(self, state: TrainState, hyper: Hyper, step: int) -> Begun[dict[str, float]]:
        parts: list[Any] = []
        for batch in self._pipeline.eval_batches():
            parts.append(self._step(state, self._parallel.shard(batch, 1), hyper))
            if len(parts) >= _BEGUN:
                jax.block_until_ready(parts[-_BEGUN])  # else all batches would lie on the devices
        fetch = self._parallel.unreplicate
        return Begun(lambda: metrics_lib.compute(reduce(metrics_lib.merge, map(fetch, parts)) if parts else {}))


class Completer:
    """Answers prompts from any parameters, and scores answers under any parameters.

    Args:
      model: a family's module.
      tokenizer: a transformers tokenizer.
      parallel: the devices; rows are split over them.
      prompt_length: longest prompt, tokens.
      answer_length: room for an answer, tokens.
      rows: prompts answered at a time, or as many more as divide over the devices.
      head_chunk: targets whose logits exist at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        parallel: Parallel,
        *,
        prompt_length: int,
        answer_length: int,
        rows: int,
        head_chunk: int,
    ) -> None:
        self.tokenizer, self.shape = tokenizer, Shape(1, prompt_length, answer_length)
        limits = {"max_new_tokens": answer_length, "eos": tokenizer.eos_token_id}
        self._answer = Answerer(model, parallel, prompt_length=prompt_length, rows=rows, **limits)
        self.rows = self._answer.rows
        self._score = parallel.row_function(
            lambda params, batch: score(model, params, batch, (1, 1), head_chunk).sum[:, 0, 0], "score_samples"
        )

    def sample(
        self, params: Params, prompts: Sequence[np.ndarray], seed: int, temperature: float, first_row: int = 0
    ) -> Begun[tuple[list[Answer], np.ndarray]]:
        """One answer to each prompt.

        Args:
          params: replicated parameters.
          prompts: int32 [p] each, p at most ``prompt_length``.
          seed: the draws for prompt i depend on (seed, first_row + i) alone, however many rows are sampled at a time.
          temperature: > 0; 1 samples from the model itself.
          first_row: number of the first prompt, when these are a part of many.

        Returns:
          (answers, with the EOS where it was drawn; the log-probability of each under the untempered model, nats,
          float32 [n]).
        """
        samples = self._answer(params, prompts, row_draws(seed, first_row + np.arange(len(prompts))), temperature)
        return Begun(lambda: _to_answers(samples.result()))

    def logps(self, params: Params, prompts: Sequence[np.ndarray], answers: Sequence[Answer]) -> Begun[np.ndarray]:
        """Log-probability of each answer after its prompt, nats, float32 [n]."""
        begun = []
        for start in range(0, len(prompts), self.rows):
            stop = min(start + self.rows, len(prompts))
            examples = [Example(i, prompts[i], (answers[i],)) for i in range(start, stop)]
            batch = concatenated(examples + [examples[0]] * (self.rows - len(examples)), self.shape)
            begun.append((self._score(params, batch), len(examples)))
        return Begun(lambda: np.concatenate([scores.result()[:n] for scores, n in begun]))

    def text(self, tokens: np.ndarray) -> str:
        return decode(self.tokenizer, tokens)


class SampledAnswers:
    """Answers of the policy to held-out prompts: reward, KL from the reference, length, endings, repetition.

    Each evaluation draws with the same random numbers, and writes its answers to ``samples/``. The KL is the mean of
    log π(y) − log π_ref(y): the first as the sampler drew, the second as training scores. So a sampler that drew from
    anything but the policy would show a KL before the first step.

    Args:
      completer: samples and scores.
      prompts: the held-out prompts, int32 [p] each.
      sides: gives the replicated parameters of the policy and of what training started from.
      reward: judges texts; None leaves the reward out.
      folder: where the answers go; None writes none.
      seed: of the draws.
      temperature: of the draws.
    """

    def __init__(
        self,
        completer: Completer,
        prompts: Sequence[np.ndarray],
        sides: Callable[[TrainState], tuple[Params, Params]],
        reward: Reward | None,
        folder: Path | None,
        *,
        seed: int,
        temperature: float,
    ) -> None:
        self._completer, self._prompts, self._sides, self._reward = completer, prompts, sides, reward
        self._folder, self._seed, self._temperature = folder, seed, temperature

    def __call__(self, state: TrainState, hyper: Hyper, step: int) -> Begun[dict[str, float]]:
        policy, reference = self._sides(state)
        drawn = self._completer.sample(policy, self._prompts, self._seed, self._temperature)
        return Begun(lambda: self._judged(step, reference, *drawn.result()))

    def _judged(self, step: int, params: Params, answers: Sequence[Answer], logps: np.ndarray) -> dict[str, float]:
        reference = self._completer.logps(params, self._prompts, answers)
        texts = [
            self._completer.text(np.concatenate([p, a.tokens])) for p, a in zip(self._prompts, answers, strict=True)
        ]
        rewards = None if self._reward is None else np.asarray(self._reward(texts), np.float64)
        ratios = logps - reference.result()
        self._write(step, answers, ratios, rewards)
        return dict(self._numbers(answers, ratios.astype(np.float64), rewards))

    def _numbers(
        self, answers: Sequence[Answer], ratios: np.ndarray, rewards: np.ndarray | None
    ) -> Iterator[tuple[str, float]]:
        eos = self._completer.tokenizer.eos_token_id
        if rewards is not None:
            yield "reward", float(rewards.mean())
            yield "reward_se", standard_error(rewards)
        yield "kl", float(ratios.mean())
        yield "kl_se", standard_error(ratios)
        yield "length", float(np.mean([len(a.tokens) for a in answers]))
        yield "eos_share", float(np.mean([a.tokens[-1] == eos for a in answers]))
        yield "repetition", float(np.mean([repetition(a.tokens) for a in answers]))

    def _write(self, step: int, answers: Sequence[Answer], ratios: np.ndarray, rewards: np.ndarray | None) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for i, (prompt, answer) in enumerate(zip(self._prompts, answers, strict=True)):
            row: dict[str, Any] = {
                "prompt": self._completer.text(prompt),
                "answer": self._completer.text(answer.tokens),
            }
            row |= {"log_ratio": round(float(ratios[i]), 4), "tokens": len(answer.tokens)}
            rows.append(row if rewards is None else row | {"reward": round(float(rewards[i]), 4)})
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (self._folder / f"step_{step:06d}.jsonl").write_text(text, encoding="utf-8")


def standard_error(values: np.ndarray) -> float:
    """Standard error of a mean; nan for fewer than two values."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def repetition(tokens: np.ndarray) -> float:
    """Share of an answer's trigrams that it has had before, in [0, 1); 0 for fewer than two trigrams.

    >>> repetition(np.array([5, 6, 7, 5, 6, 7]))
    0.25
    """
    trigrams = list(zip(tokens[:-2], tokens[1:-1], tokens[2:], strict=True))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def _to_answers(samples: Samples) -> tuple[list[Answer], np.ndarray]:
    rows = zip(samples.tokens_RT, samples.length_R, strict=True)
    answers = [Answer(tokens[:n], np.ones(n, np.float32), CHOSEN) for tokens, n in rows]
    return answers, np.sum(samples.logp_RT, axis=1)
