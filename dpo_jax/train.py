"""One training run: supervised fine-tuning or any preference loss, from a config into a workdir.

The same command continues a run that was interrupted, and says so when the run is finished.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from dpo_jax import metrics as metrics_lib
from dpo_jax import sources
from dpo_jax.checkpoint import Checkpoints, load_params
from dpo_jax.config import Config, differences, to_json
from dpo_jax.data.layouts import Shape
from dpo_jax.data.pipeline import Pipeline
from dpo_jax.evaluate import Completer, Evaluator, HeldOutLoss, SampledAnswers
from dpo_jax.losses.objective import Objective, check_data
from dpo_jax.models import init_params, make_model
from dpo_jax.optim import make_optimizer
from dpo_jax.parallel import DataParallel, check_divides
from dpo_jax.progress import Progress, duration
from dpo_jax.steps import Hyper, StepConfig, TrainState, init_state, make_eval_step, make_train_step
from dpo_jax.trees import parameter_count
from dpo_jax.types import Params
from dpo_jax.writers import Writer, make_writer

CONFIG_FILE, SUMMARY_FILE = "config.json", "summary.json"


@dataclass(frozen=True)
class Parts:
    """What a config stands for, built: everything but the data and the parameters."""

    model: nn.Module
    objective: Objective
    hyper: Hyper
    optimizer: optax.GradientTransformation
    shape: Shape


def build(config: Config, *, vocab_size: int, answers: int) -> Parts:
    """Builds the parts of a run.

    Args:
      config: the experiment.
      vocab_size: V of the tokenizer.
      answers: A of the data.

    Raises:
      ValueError: a paired loss on data with one answer a prompt.
    """
    objective, numbers = config.objective()
    check_data(objective, answers)
    fields = {f.name: getattr(config.model, f.name) for f in dataclasses.fields(config.model)}
    fields |= {"dtype": jnp.dtype(config.model.dtype), "vocab_size": vocab_size}
    family = fields.pop("family")
    optim = config.optim
    return Parts(
        model=make_model(family, fields),
        objective=objective,
        hyper=Hyper({k: np.float32(v) for k, v in numbers.items()}, np.float32(optim.learning_rate)),
        optimizer=make_optimizer(
            b1=optim.b1,
            b2=optim.b2,
            epsilon=optim.epsilon,
            weight_decay=optim.weight_decay,
            clip_norm=optim.clip_norm,
        ),
        shape=Shape(answers, config.data.prompt_length, config.data.answer_length, objective.needs_prompt),
    )


def step_config(config: Config, answers: int, steps: int) -> StepConfig:
    """What the train step of a config compiles in."""
    return StepConfig(
        answers=answers,
        schedule=config.optim.schedule,
        warmup=config.optim.warmup_steps,
        steps=steps,
        head_chunk=config.train.head_chunk,
        reference_sync_every=config.reference.sync_every,
        reference_sync_rate=config.reference.sync_rate,
    )


def run(config: Config, workdir: str | os.PathLike[str]) -> dict[str, float]:
    """Trains until the config's last step, continuing from the newest checkpoint where there is one.

    Args:
      config: the experiment.
      workdir: folder of this run.

    Returns:
      The last numbers of every metric.

    Raises:
      ValueError: bad config or data, a workdir of another config, a checkpoint of another model.
      OSError: the workdir cannot be written.
      FloatingPointError: the loss is not finite.
    """
    workdir = Path(workdir)
    claim(workdir, config)
    if (workdir / SUMMARY_FILE).is_file():
        logging.info("%s is finished; remove it, or choose another --workdir, to train anew.", workdir)
        return json.loads((workdir / SUMMARY_FILE).read_text())
    begin = time.monotonic()
    trainer = Trainer(config, workdir)
    summary = trainer.train()
    _write_atomically(workdir / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    logging.info("finished in %s; results in %s", duration(time.monotonic() - begin), workdir)
    return summary


def claim(workdir: Path, config: Config) -> None:
    """Makes a workdir a config's own.

    Raises:
      ValueError: it belongs to another config; the keys that differ are listed.
      OSError: it cannot be written.
    """
    path = workdir / CONFIG_FILE
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            _write_atomically(path, to_json(config))
    except OSError as error:
        raise OSError(f"cannot write to the workdir {workdir}: {error}; make it writable or choose another") from error
    lines = differences(json.loads(to_json(config)), json.loads(path.read_text()))
    if lines:
        raise ValueError(
            "\n  ".join([f"the workdir {workdir} belongs to another config:", *lines])
            + "\nchoose another --workdir, or remove that one to start anew"
        )


class Trainer:
    """A run being run: built parts, data and devices.

    Attributes:
      parallel: the devices, with the counts of traces.
    """

    def __init__(self, config: Config, workdir: Path) -> None:
        self.config, self.workdir = config, workdir
        self.parallel = DataParallel(_devices(config))
        check_divides(config.data.batch_size, config.train.micro_batches, len(self.parallel.devices))
        self.data = sources.open_dataset(config.data)
        self.parts = build(config, vocab_size=len(self.data.tokenizer), answers=self.data.answers)
        self.pipeline = self._pipeline(self.data.train)
        self.steps = self._step_count()
        settings = step_config(config, self.data.answers, self.steps)
        parts, axis = self.parts, self.parallel.axis
        self._train_step = self.parallel.train_step(
            make_train_step(parts.model, parts.objective, parts.optimizer, settings, axis)
        )

    def train(self) -> dict[str, float]:
        """The loop. Returns the last numbers of every metric."""
        with Checkpoints(self.workdir, self.config.checkpoint.keep) as checkpoints:
            state, tokens, start = self._restore_or_init(checkpoints)
            self._announce(state, start)
            evaluators = self._evaluators(start)
            with make_writer(self.workdir, start or None, jax.process_index()) as writer:
                return self._loop(state, tokens, start, checkpoints, writer, evaluators)

    def _loop(
        self,
        state: TrainState,
        tokens: float,
        start: int,
        checkpoints: Checkpoints,
        writer: Writer,
        evaluators: Mapping[str, Evaluator],
    ) -> dict[str, float]:
        every = self.config
        hyper = self.parallel.replicate(self.parts.hyper)
        state = self.parallel.replicate(state)
        log = _Log(self, writer, tokens, start)
        if start == 0:
            log.evaluate(evaluators, state, hyper, 0)
        batches = self.pipeline.train_batches(start)
        with Progress(self.steps, self.config.loss.name, start=start, process_index=jax.process_index()) as progress:
            for step in range(start + 1, self.steps + 1):
                batch = self.parallel.shard(next(batches), self.config.train.micro_batches)
                state, metrics = self._train_step(state, batch, hyper)
                log.add(step, metrics, progress)
                last = step == self.steps
                if step % every.eval.every == 0 or last:
                    log.fetch(progress)
                    log.evaluate(evaluators, state, hyper, step)
                if step % every.checkpoint.every == 0 or last:
                    log.fetch(progress)
                    self._save(checkpoints, step, state, log.tokens, writer)
        log.finish()
        return log.latest

    def _save(self, checkpoints: Checkpoints, step: int, state: TrainState, tokens: float, writer: Writer) -> None:
        writer.flush()
        checkpoints.save(step, self.parallel.unreplicate(state), {"tokens": tokens, "config": json.loads(to_json(self.config))})

    def _restore_or_init(self, checkpoints: Checkpoints) -> tuple[TrainState, float, int]:
        step = checkpoints.latest_step()
        if step is None:
            params = self._first_params()
            # A copy: the policy's buffers are reused by every step, the reference's stay.
            reference = jax.tree.map(np.array, params)
            return init_state(self.parts.objective, self.parts.optimizer, params, reference), 0.0, 0
        like = jax.eval_shape(
            lambda p: init_state(self.parts.objective, self.parts.optimizer, p, p), self._param_shapes()
        )
        state, meta = checkpoints.restore(step, like)
        return state, float(meta["tokens"]), step

    def _first_params(self) -> Params:
        if self.config.init.run is not None:
            return load_params(Path(self.config.init.run), self._param_shapes())
        return init_params(self.parts.model, jax.random.key(self.config.seed))

    def _param_shapes(self) -> Params:
        return jax.eval_shape(lambda: init_params(self.parts.model, jax.random.key(0)))

    def _pipeline(self, source: sources.Source) -> Pipeline:
        return Pipeline(
            source,
            self.parts.shape,
            layout=self.config.data.layout,
            batch_size=self.config.data.batch_size,
            seed=self.config.seed,
            mismatched=self.parts.objective.needs_mismatched,
        )

    def _step_count(self) -> int:
        if self.config.train.steps is not None:
            return self.config.train.steps
        return max(1, round(self.config.train.epochs * len(self.data.train) / self.config.data.batch_size))

    def _evaluators(self, start: int) -> dict[str, Evaluator]:
        evaluators: dict[str, Evaluator] = {}
        settings, parts = self.config.eval, self.parts
        if settings.examples:
            step = make_eval_step(
                parts.model, parts.objective, self.data.answers, self.config.train.head_chunk, self.parallel.axis
            )
            held_out = _Head(self.data.held_out, settings.examples)
            evaluators["eval"] = HeldOutLoss(self._pipeline(held_out), self.parallel.eval_step(step), self.parallel)
        if settings.prompts:
            evaluators["samples"] = self._sampled_answers()
        return evaluators

    def _sampled_answers(self) -> SampledAnswers:
        settings = self.config.eval
        prompts = unique_prompts(self.data.held_out, settings.prompts)
        completer = Completer(
            self.parts.model,
            self.data.tokenizer,
            self.parallel,
            prompt_length=self.config.data.prompt_length,
            answer_length=self.config.data.answer_length,
            rows=len(prompts),
            head_chunk=self.config.train.head_chunk,
        )
        return SampledAnswers(
            completer,
            prompts,
            self.parallel.replicate(self._first_params()),
            sources.imdb_reward(self.config.data, settings.reward),
            self.workdir / "samples",
            seed=self.config.seed,
            temperature=settings.temperature,
        )

    def _announce(self, state: TrainState, start: int) -> None:
        logging.info(
            "%s: %.2f M parameters, %d examples, %d steps of %d on %d device(s)%s",
            self.config.loss.name,
            parameter_count(state.params) / 1e6,
            len(self.data.train),
            self.steps,
            self.config.data.batch_size,
            len(self.parallel.devices),
            f"; continues after step {start}" if start else "",
        )


class _Log:
    """Metrics on their way to the writer: fetched one step late, so that the devices never wait for the host."""

    def __init__(self, trainer: Trainer, writer: Writer, tokens: float, start: int) -> None:
        self._trainer, self._writer, self.tokens = trainer, writer, tokens
        self._pending: tuple[int, Any] | None = None
        self._window: Any = None
        self.latest: dict[str, float] = {}
        self._clock = _Clock()
        self._start = start

    def add(self, step: int, metrics: Any, progress: Progress) -> None:
        self.fetch(progress)
        self._pending = step, metrics

    def fetch(self, progress: Progress) -> None:
        """Waits for the step before, checks its loss, and writes when a line is due."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        metrics = self._trainer.parallel.unreplicate(metrics)
        loss = metrics["loss"].compute()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss of step {step} is {loss}; the last checkpoint is from before it. Lower optim.learning_rate, or look "
                f"at the batch of seed {self._trainer.config.seed}, step {step - 1}"
            )
        answers = metrics["tokens"].compute()
        self.tokens += answers
        self._clock.count(answers, self._trainer.config.data.batch_size)
        self._window = metrics if self._window is None else metrics_lib.merge(self._window, metrics)
        progress.update(loss=loss)
        if step % self._trainer.config.train.log_every == 0 or step == self._trainer.steps:
            numbers = metrics_lib.compute({k: v for k, v in self._window.items() if k != "tokens"})
            self._write(step, {**numbers, "tokens": self.tokens}, "train")
            self._writer.write_timings(step, self._clock.rates())
            self._window = None

    def evaluate(self, evaluators: Mapping[str, Evaluator], state: TrainState, hyper: Hyper, step: int) -> None:
        with self._clock.stopped():
            for prefix, evaluator in evaluators.items():
                self._write(step, dict(evaluator(state, hyper, step)), prefix)

    def finish(self) -> None:
        for name, rate in self._clock.rates().items():
            logging.info("%s: %.0f", name.replace("_", " "), rate)

    def _write(self, step: int, numbers: Mapping[str, float], prefix: str) -> None:
        self._writer.write(step, numbers, prefix)
        self.latest |= {f"{prefix}/{name}": value for name, value in numbers.items()} | {"step": step}


class _Clock:
    """Rates over the time spent training: without compilation (the first step) and without evaluation."""

    def __init__(self) -> None:
        self._tokens = self._examples = 0.0
        self._seconds = 0.0
        self._since: float | None = None

    def count(self, tokens: float, examples: int) -> None:
        now = time.monotonic()
        if self._since is not None:
            self._seconds += now - self._since
            self._tokens, self._examples = self._tokens + tokens, self._examples + examples
        self._since = now

    def stopped(self) -> _Stopped:
        return _Stopped(self)

    def restart(self) -> None:
        if self._since is not None:
            self._since = time.monotonic()

    def rates(self) -> dict[str, float]:
        if not self._seconds:
            return {}
        return {
            "tokens_per_second": self._tokens / self._seconds,
            "examples_per_second": self._examples / self._seconds,
        }


@dataclass(frozen=True)
class _Stopped:
    clock: _Clock

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self.clock.restart()


class _Head:
    """The first examples of a source."""

    def __init__(self, source: sources.Source, count: int) -> None:
        self._source, self._count = source, min(count, len(source))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        return self._source[index]


def unique_prompts(source: sources.Source, count: int) -> list[np.ndarray]:
    """The first different prompts of a source, in order, at most ``count``."""
    found: dict[bytes, np.ndarray] = {}
    for i in range(len(source)):
        if len(found) == count:
            break
        prompt = source[i].prompt
        found.setdefault(prompt.tobytes(), prompt)
    return list(found.values())


def _devices(config: Config) -> list[jax.Device]:
    devices, wanted = jax.local_devices(), config.parallel.devices
    if wanted is not None and wanted > len(devices):
        raise ValueError(f"config.parallel.devices is {wanted}, this machine has {len(devices)}")
    return devices[:wanted]


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    from dpo_jax.main import main

    main("Trains one run: supervised fine-tuning or any preference loss.", run)
