"""A run before its first step: data, built parts, devices, batches, evaluators and what training starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import logging

from dpo_jax import lora, processes, reference, sources, workdir
from dpo_jax.build import build, check_examples, is_adapted, make_parallel, make_pipeline, state_shapes
from dpo_jax.config import Config, DataConfig
from dpo_jax.data.pipeline import source_fingerprint
from dpo_jax.evaluate import Completer, Evaluator, HeldOutLoss, SampledAnswers
from dpo_jax.gradients import make_eval_step
from dpo_jax.hashing import hash_tree
from dpo_jax.models import rolled
from dpo_jax.parallel import Parallel, check_divides
from dpo_jax.rewards import Reward
from dpo_jax.shared import Shared, program_key
from dpo_jax.start import check_tokenizer, describe_start, start_params
from dpo_jax.state import TrainState
from dpo_jax.types import CHOSEN, REJECTED, Params, PreferenceBatch


class OpenedRun:
    """What a config and a workdir stand for, opened and checked; nothing is trained yet.

    Args:
      config: the experiment.
      folder: workdir of the run.
      shared: what it has in common with other runs of this process.

    Attributes:
      data: its examples.
      parts: its model, objective and optimizer.
      parallel: the devices, with the counts of traces.
      pipeline: batches to train on.
      held_out: batches to evaluate on; None when that is not asked for.
      steps: updates of the whole run.
      program: runs with an equal one train with the same compiled step.
      identity: of all that a checkpoint must agree with.
      start_hash: of the parameters that training starts from; None until they are read.
      alone: whether nothing is shared with other runs.

    Raises:
      ValueError: bad config or data.
      OSError: data that cannot be read.
    """

    def __init__(self, config: Config, folder: Path, shared: Shared | None = None) -> None:
        self.config, self.workdir = config, folder
        self.shared, self.alone = shared or Shared(), shared is None
        self._clean_data = clean = dataclasses.replace(config.data, flip=0.0)
        with processes.in_turn("data"):
            opened = self.shared.get(("data", clean), lambda: sources.open_dataset(clean))
        self.data = sources.flipped(opened, config.data.flip, config.seed)
        self.parts = build(config, vocab_size=len(self.data.tokenizer), answers=self.data.answers)
        model = self.parts.model
        rows = model.config.vocab_size
        self.shared.get(("tokenizer", clean, rows), partial(check_tokenizer, self.data.tokenizer, model))
        self.parallel = shared_devices(self.shared, config, model)
        self.shared.get(("said", *self._start_key), self._say_start)
        check_divides(config.data.batch_size, config.train.micro_batches, self.parallel.parts)
        roles, _ = (
            self.shared.get(
                ("examples", source_fingerprint(source), self.parts.shape, rows),
                partial(check_examples, source, self.parts.shape, rows),
            )
            for source in (self.data.train, self.data.held_out)
        )
        for advice in self.parts.objective.advice(roles[CHOSEN], roles[REJECTED], self.parts.hyper.loss):
            logging.warning("%s", advice)
        self.pipeline = make_pipeline(config, self.parts, self.data.train, self.parallel.process)
        held_out = _Head(self.data.held_out, config.eval.examples) if config.eval.examples else None
        self.held_out = None if held_out is None else make_pipeline(config, self.parts, held_out, self.parallel.process)
        self.steps = self._step_count()
        self.program = (program_key(config), len(self.data.tokenizer), self.data.answers, self.steps)
        self.identity = workdir.identity(config, self.data, self.pipeline)
        self.start_hash: str | None = None

    def _say_start(self) -> None:
        logging.info("starts %s", describe_start(self.config, lora.with_adapter(self.parts.model, None)))

    def attach_reference(self, stopping: Callable[[], bool]) -> None:
        """Gives the batches the reference's stored log-probabilities, where the config asks for it.

        Raises:
          Stopped: ``stopping`` said so while the reference scored.
        """
        root = self.config.reference.store
        if root is None:
            return
        assert self.start_hash is not None
        identity = reference.identity_of(self.config, self.parts, self.data.tokenizer, self.start_hash)
        needs = [reference.need_of(self.pipeline, self.steps)]
        if self.held_out is not None:
            needs.append(reference.need_of(self.held_out, None))
        score = reference.ReferencePass(self.config, self.parts, self.parallel, self.start_params)
        store = reference.open_store(root, identity, needs, score, stopping)
        for pipeline in filter(None, (self.pipeline, self.held_out)):
            pipeline.attach = store.attach

    def _step_count(self) -> int:
        if self.config.train.steps is not None:
            return self.config.train.steps
        return max(1, self.pipeline.steps(self.config.train.epochs or 0.0))

    def start_params(self) -> Params:
        """The parameters that training starts from; the same ones when the run continues."""
        init = self.config.init.run or self.config.init.hf
        read = self._read_start_params  # a run alone does not keep them
        params, found = read() if self.alone else self.shared.get(self._start_key, read)
        if found != (self.start_hash or found):
            raise ValueError(
                f"{init} (config.init) holds other parameters than when this run began (hash {found}, expected "
                f"{self.start_hash}); bring them back, or choose another --workdir to start from the new ones"
            )
        self.start_hash = found
        return params

    @property
    def _start_key(self) -> tuple[Any, ...]:
        init, parallel = self.config.init, self.config.parallel
        return "start", init, None if init.run or init.hf else self.config.seed, self.parts.model, parallel

    def _read_start_params(self) -> tuple[Params, str]:
        params = start_params(self.config, lora.with_adapter(self.parts.model, None), self.parallel.targets)
        return params, hash_tree(params)

    def whole_batch(self, step: int) -> PreferenceBatch:
        """The rows of all processes."""
        pipeline = make_pipeline(self.config, self.parts, self.data.train)
        pipeline.attach = self.pipeline.attach
        return pipeline.batch(step - 1)

    def evaluators(self) -> dict[str, Evaluator]:
        """By the prefix of their numbers; the first begins first."""
        evaluators: dict[str, Evaluator] = {}
        if self.config.eval.prompts:
            evaluators["samples"] = self._sampled_answers()
        if self.held_out is not None:
            step = self.shared.get(("eval", self.program), self._make_eval_step)
            evaluators["eval"] = HeldOutLoss(self.held_out, step, self.parallel)
        return evaluators

    def _make_eval_step(self) -> Callable[..., Any]:
        parts, chunk = self.parts, self.config.train.head_chunk
        return self.parallel.eval_step(
            make_eval_step(rolled(parts.model), parts.objective, self.data.answers, chunk, self.parallel.axis)
        )

    def _sampled_answers(self) -> SampledAnswers:
        settings, config = self.config.eval, self.config
        prompts = unique_prompts(self.data.held_out, settings.prompts)
        completer = shared_completer(
            self.shared, config, self.parts.model, self.data.tokenizer, self.parallel, settings.prompts
        )
        return SampledAnswers(
            completer,
            prompts,
            self._sides(),
            shared_reward(self.shared, config.data, settings.reward),
            self.workdir / "samples" if processes.first() else None,
            seed=self.config.seed,
            temperature=settings.temperature,
        )

    def _sides(self) -> Callable[[TrainState], tuple[Params, Params]]:
        """What gives the parameters of (policy, what training started from) for the model, replicated."""
        if is_adapted(self.parts):
            # The base with adapters that add nothing: no second copy, no second program.
            shapes = state_shapes(self.parts).params
            nothing = self.parallel.replicate(jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes))
            return lambda state: (lora.join(state.reference, state.params), lora.join(state.reference, nothing))
        start = self.shared.get(("placed", *self._start_key), lambda: self.parallel.replicate(self.start_params()))
        return lambda state: (state.params, start)


def shared_devices(shared: Shared, config: Config, model: nn.Module) -> Parallel:
    """The devices, one for all that place things on them alike."""
    settings = dataclasses.replace(config.parallel, devices=config.parallel.devices or jax.device_count())
    place = ("devices", settings, model if settings.mode == "mesh" else None)
    return shared.get(place, lambda: make_parallel(settings, model, jax.devices()))


def shared_completer(
    shared: Shared, config: Config, model: nn.Module, tokenizer: Any, parallel: Parallel, rows: int
) -> Completer:
    """What answers prompts, one for all that sample from such a model: it is compiled once."""
    data, chunk = config.data, config.train.head_chunk
    lengths = data.prompt_length, data.answer_length
    return shared.get(
        ("completer", model, sources.tokenizer_folder(data), lengths, rows, chunk, parallel),
        lambda: Completer(
            rolled(model),
            tokenizer,
            parallel,
            prompt_length=data.prompt_length,
            answer_length=data.answer_length,
            rows=rows,
            head_chunk=chunk,
        ),
    )


def shared_reward(shared: Shared, data: DataConfig, name: str) -> Reward:
    """The judge of IMDb texts, read once."""
    return shared.get(("judge", name, data.dir, data.reviews), lambda: sources.imdb_reward(data, name))


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
