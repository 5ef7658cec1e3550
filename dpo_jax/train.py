"""One training run: supervised fine-tuning or any preference loss, from a config into a workdir.

The same command continues a run that was interrupted, and says so when the run is finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from dpo_jax import buckets, processes, reproducer, workdir
from dpo_jax.build import (
    fresh_state,
    guarded,
    guarded_step,
    is_adapted,
    reference_of,
    state_shapes,
    without_base,
)
from dpo_jax.checkpoint import Checkpoints, Retention
from dpo_jax.chips import peak_flops
from dpo_jax.config import Config
from dpo_jax.data.pipeline import Pipeline
from dpo_jax.evaluate import Evaluator
from dpo_jax.flops import useful_flops
from dpo_jax.guards import SKIPPED, Guarded, Watch, finite
from dpo_jax.hashing import hash_tree, own_parts
from dpo_jax.logbook import Logbook
from dpo_jax.meter import Compilations, Meter
from dpo_jax.models import param_shapes
from dpo_jax.opened import OpenedRun
from dpo_jax.placing import copied
from dpo_jax.profile import FOLDER as PROFILE_FOLDER
from dpo_jax.profile import Profile
from dpo_jax.progress import Progress, duration
from dpo_jax.shared import Shared
from dpo_jax.start import start_adapters
from dpo_jax.state import Hyper, TrainState
from dpo_jax.stopping import Stopped, StopRequest
from dpo_jax.trees import named_leaves, parameter_count
from dpo_jax.types import PreferenceBatch
from dpo_jax.writers import make_writer


def run(
    config: Config, folder: str | os.PathLike[str], shared: Shared | None = None, *, profile: bool = False
) -> dict[str, float]:
    """Trains until the config's last step, continuing from the newest checkpoint where there is one.

    Args:
      config: the experiment.
      folder: workdir of this run; it may be in a bucket.
      shared: what it has in common with other runs of this process.
      profile: whether some steps are traced, into the folder ``profile`` of the workdir.

    Returns:
      The last numbers of every metric.

    Raises:
      ValueError: bad config or data, a workdir of another config, a checkpoint of another run.
      OSError: the workdir cannot be written, another process works in it, or no checkpoint in it is whole.
      FloatingPointError: more steps than allowed were not finite.
      Stopped: a signal asked to stop; all is saved.
    """
    if buckets.is_bucket(folder) and config.parallel.mode == "mesh" and jax.process_count() > 1:
        raise ValueError(
            f"the workdir {folder} is in a bucket, and the {jax.process_count()} processes of a mesh write each "
            "checkpoint together, into one folder: mount the bucket on all hosts (gcsfuse) and give its path there"
        )
    with buckets.mirrored(folder, jax.process_index()) as (place, keep):
        return _run(config, place, shared, keep, profile)


def _run(
    config: Config, folder: Path, shared: Shared | None, keep: Callable[[], None], traces: bool
) -> dict[str, float]:
    with contextlib.ExitStack() as stack:
        with processes.in_turn("workdir"):
            if processes.first():
                stack.enter_context(workdir.owned(folder, config))
        stop = stack.enter_context(StopRequest())
        summary = workdir.finished(folder)
        if summary is not None:
            logging.info("%s is finished; remove it, or choose another --workdir, to train anew.", folder)
            return summary
        begin = time.monotonic()
        keep()  # a bucket that cannot be written is found now
        trainer = Trainer(config, folder, shared)
        trainer.keep = keep
        if traces and processes.first():
            trainer.profile = stack.enter_context(contextlib.closing(Profile(folder / PROFILE_FOLDER)))
        summary = trainer.train(stop)
        processes.meet("trained")
        if processes.first():
            workdir.finish(folder, summary)
        logging.info("finished in %s; results in %s", duration(time.monotonic() - begin), folder)
        return summary


@dataclass(frozen=True)
class Seat:
    """Where the state of a run lies while it is trained: on all devices, or among the members of a population.

    Attributes:
      place: brings the first state there; what it returns has the attribute ``state``, on all devices.
      fetch: brings the metrics of a step to the host.
      stop: says when to stop.
      prepare: told the first state and batch while the start is evaluated, before the step is asked for.
      batches: gives a pipeline's batches from a step on.
      shows: whether the run shows its progress.
    """

    place: Callable[[Guarded], Any]
    fetch: Callable[[Any], Any]
    stop: StopRequest
    prepare: Callable[[Any, PreferenceBatch], None] = lambda carry, batch: None
    batches: Callable[[Pipeline, int], Iterator[PreferenceBatch]] = Pipeline.train_batches
    shows: bool = True


# A run asks for one step after the other: it yields its state and a batch, and gets (state, metrics).
Work = Generator[tuple[Any, PreferenceBatch], tuple[Any, Any], dict[str, float]]


class Trainer(OpenedRun):
    """A run being run.

    Attributes:
      keep: called, in the background, when a checkpoint lies in the workdir.
      profile: what traces steps; None traces none.
    """

    keep: Callable[[], None] = staticmethod(lambda: None)
    profile: Profile | None = None

    def __init__(self, config: Config, folder: Path, shared: Shared | None = None) -> None:
        super().__init__(config, folder, shared)
        self._reference_hash: str | None = None

    def train(self, stop: StopRequest) -> dict[str, float]:
        """Trains alone, each batch split over all devices. Returns the last numbers of every metric."""
        compiled = self.shared.get(
            ("train", self.program),
            lambda: self.parallel.train_step(guarded_step(self.config, self.parts, self.steps, self.parallel.axis)),
        )
        step = compiled if self.profile is None else self.profile.around(compiled)
        hyper = self.parallel.replicate(self.parts.hyper)

        def arguments(carry: Any, batch: PreferenceBatch) -> tuple[Any, Any, Any]:
            return carry, self.parallel.shard(batch, self.config.train.micro_batches), hyper

        prepare = lambda carry, batch: compiled.prepare(*arguments(carry, batch))  # noqa: E731
        seat = Seat(self.parallel.replicate, self.parallel.unreplicate, stop, prepare)
        with contextlib.closing(self.work(seat)) as work:
            try:
                asked = next(work)
                while True:
                    asked = work.send(step(*arguments(*asked)))
            except StopIteration as done:
                return done.value

    def work(self, seat: Seat) -> Work:
        """All of a run but its steps, which whoever drives it computes."""
        settings = self.config.checkpoint
        retention = Retention(settings.keep, settings.keep_every, settings.best if settings.keep_best else None)
        with Checkpoints(self.workdir, retention, writes=processes.first(), then=self.keep) as checkpoints:
            state, memory = self._restore_or_init(checkpoints)
            start = int(state.step)
            with make_writer(self.workdir, start or None, jax.process_index()) as writer, Compilations() as compiled:
                log = self._logbook(writer, checkpoints, seat, compiled)
                if memory is not None:
                    log.remember(memory)
                if start < self.steps:
                    self.attach_reference(seat.stop.agreed)
                    if seat.shows:
                        self._announce(state, start)
                    carry = seat.place(guarded(state, log.skipped))
                    del state  # what lies on the devices is enough
                    yield from self._loop(carry, start, log, checkpoints, seat)
            return log.latest

    def _loop(
        self, carry: Any, start: int, log: Logbook, checkpoints: Checkpoints, seat: Seat
    ) -> Generator[tuple[Any, PreferenceBatch], tuple[Any, Any], None]:
        batches = seat.batches(self.pipeline, start)
        evaluators = self.evaluators()
        hyper = self.parallel.replicate(self.parts.hyper)
        if start == 0:
            first = next(batches)
            self._evaluate(evaluators, log, carry, hyper, 0, meanwhile=partial(seat.prepare, carry, first))
            if not (self.config.checkpoint.keep_best or "").startswith("train/"):
                self._score(log)  # a name that nothing measures is found before anything is trained
            batches = itertools.chain([first], batches)
        shown_by = jax.process_index() if seat.shows else _NOBODY
        with Progress(self.steps, self.config.loss.name, start=start, process_index=shown_by) as progress:
            for step in range(start + 1, self.steps + 1):
                carry, metrics = yield carry, log.meter.begin(lambda: next(batches))
                self._look(step - 1, log.add(step, metrics), log, carry, progress)
                last, stopping = step == self.steps, seat.stop.agreed()
                evaluates = step % self.config.eval.every == 0 or last
                saves = step % self.config.checkpoint.every == 0 or last or stopping
                if evaluates or saves:
                    self._look(step, log.flush(), log, carry, progress)
                if evaluates:
                    self._evaluate(evaluators, log, carry, hyper, step)
                if saves:
                    self._save(checkpoints, step, carry, log)
                if stopping and not last:
                    checkpoints.wait()
                    logging.warning("Stopped after step %d of %d; the same command goes on.", step, self.steps)
                    raise Stopped()
        if seat.shows:
            log.report()
        checkpoints.wait()

    def _look(self, step: int, numbers: Mapping[str, float], log: Logbook, carry: Guarded, progress: Progress) -> None:
        """Shows the numbers of a step, and stops the run when too many steps were not finite."""
        if not numbers:
            return
        if not numbers[SKIPPED]:
            # A batch without a single unit that the loss looks at has no mean, and is none the worse.
            progress.update(1, **({"loss": numbers["loss"]} if np.isfinite(numbers["loss"]) else {}))
            return
        if log.skipped > self.config.train.max_skipped:
            raise self._not_finite(step, self.parallel.unreplicate(carry.state))
        progress.update()
        logging.warning("Step %d is not finite and was left out, the %d. of this run.", step, log.skipped)

    def _not_finite(self, step: int, state: TrainState) -> FloatingPointError:
        case = reproducer.Case(
            self.config,
            state,
            self.whole_batch(step),
            len(self.data.tokenizer),
            self.data.answers,
            self.steps,
        )
        finding = reproducer.examine(case) or "none when it is run again"
        where = reproducer.save(self.workdir, case) if processes.first() else "the first process's folder"
        allowed = self.config.train.max_skipped
        left_out = f" {allowed} steps before it were left out (config.train.max_skipped)." if allowed else ""
        return FloatingPointError(
            f"step {step} is not finite; the first tensor that is not: {finding}.{left_out} The state before it and "
            f"its batch are in {where}; run it again with\n  python -m dpo_jax.train --replay={where}\n"
            "Lower config.optim.learning_rate, set config.optim.clip_norm or mend the data, in a new --workdir"
        )

    def _evaluate(
        self,
        evaluators: Mapping[str, Evaluator],
        log: Logbook,
        carry: Guarded,
        hyper: Hyper,
        step: int,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        with log.paused():
            begun = {prefix: evaluator(carry.state, hyper, step) for prefix, evaluator in evaluators.items()}
            meanwhile()
            for prefix, numbers in begun.items():
                log.evaluate(prefix, step, numbers.result())

    def _save(self, checkpoints: Checkpoints, step: int, carry: Guarded, log: Logbook) -> None:
        state = self.parallel.once(carry.state)
        self._check_finite(state, checkpoints)
        self._check_reference(state, checkpoints)
        log.sync()
        meta = {
            "identity": self.identity,
            "start": self.start_hash,
            "reference": self._reference_hash,
            "memory": log.memory(),
        }
        checkpoints.save(step, without_base(self.parts, state), meta, self._score(log))

    def _score(self, log: Logbook) -> float | None:
        """What the best checkpoint is told by."""
        best = self.config.checkpoint.keep_best
        if best is not None and best not in log.latest:
            known = ", ".join(sorted(log.latest)) or "no numbers yet: config.eval is off"
            raise ValueError(
                f"config.checkpoint.keep_best is {best!r}, which this run does not measure; it has {known}"
            )
        return None if best is None else log.latest[best]

    @staticmethod
    def _check_finite(state: TrainState, checkpoints: Checkpoints) -> None:
        """Nothing is saved that could not be gone on from."""
        own = ((name, part) for name, leaf in named_leaves(state).items() for _, part in own_parts(leaf))
        wrong = [name for name, part in own if not finite(part).all()]
        if processes.any_of(bool(wrong)):
            name = wrong[0] if wrong else "an array of another process"
            raise FloatingPointError(
                f"{name} is not finite after step {int(state.step)}, though loss and gradient were: an update was too "
                f"large. Nothing was saved; the last checkpoint is of step {checkpoints.latest_step()}. Lower "
                "config.optim.learning_rate, in a new --workdir"
            )

    def _check_reference(self, state: TrainState, checkpoints: Checkpoints) -> None:
        """A reference that is not to move has not moved."""
        found = None if state.reference is None else hash_tree(state.reference)
        moves = self.config.reference.sync_every is not None
        if not moves and found != self._reference_hash:
            raise ValueError(
                f"the reference at step {int(state.step)} is not the one that the run began with: its hash is {found}, "
                f"expected {self._reference_hash}. Memory or code is at fault; nothing was saved, and the run goes on "
                f"from the checkpoint of step {checkpoints.latest_step()}"
            )

    def _restore_or_init(self, checkpoints: Checkpoints) -> tuple[TrainState, dict[str, Any] | None]:
        restored = self._restore(checkpoints)
        if restored is None:
            params = self.start_params()
            if not self.alone:
                # A copy: other runs start from the same ones, and the buffers are reused by every step.
                params = copied(params)
            adapters = start_adapters(self.config, self.parts.model) if is_adapted(self.parts) else None
            state = fresh_state(self.parts, params, adapters)
            self._reference_hash = None if state.reference is None else hash_tree(state.reference)
            return state, None
        state, meta = restored
        self.start_hash, self._reference_hash = meta["start"], meta["reference"]
        if is_adapted(self.parts):
            state = dataclasses.replace(state, reference=reference_of(self.parts, self.start_params()))
        self._check_reference(state, checkpoints)
        return state, meta["memory"]

    def _restore(self, checkpoints: Checkpoints) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest whole checkpoint."""
        return checkpoints.restore_newest(
            self.parallel.targets(without_base(self.parts, state_shapes(self.parts))),
            lambda meta: workdir.check_identity(meta["identity"], self.identity, checkpoints.folder),
            stop_at_damage=self.config.checkpoint.on_damage == "stop",
        )

    def _logbook(self, writer: Any, checkpoints: Checkpoints, seat: Seat, compiled: Compilations) -> Logbook:
        return Logbook(
            writer,
            seat.fetch,
            every=self.config.train.log_every,
            last=self.steps,
            # Adapters that come from elsewhere are no longer the reference at step 0.
            watch=Watch(
                self.parts.objective.needs_reference and self.config.lora.init is None, self.config.optim.warmup_steps
            ),
            meter=self._meter(),
            durations=lambda: {"checkpoint_blocked_seconds": checkpoints.blocked} | compiled.numbers(),
        )

    def _meter(self) -> Meter:
        peak, flops = peak_flops(self.parallel.devices), None
        if peak is not None:
            model, scores, full = self.parts.model, self.parts.scores_reference, not is_adapted(self.parts)
            flops = partial(useful_flops, model.config, param_shapes(model), reference=scores, full=full)
        return Meter(self.parts.shape.answers, processes=jax.process_count(), flops=flops, peak=peak or 0.0)

    def _announce(self, state: TrainState, start: int) -> None:
        logging.info(
            "%s: %.2f M parameters trained, %d examples, %d steps of %d %s on %d device(s)%s",
            self.config.loss.name,
            parameter_count(state.params) / 1e6,
            len(self.data.train),
            self.steps,
            self.config.data.batch_size,
            "rows" if self.config.data.layout == "packed" else "examples",
            len(self.parallel.devices),
            f"; continues after step {start}" if start else "",
        )


_NOBODY = -1  # no process has this index


if __name__ == "__main__":
    from dpo_jax.main import main

    main(
        "Trains one run: supervised fine-tuning or any preference loss.",
        run,
        "python -m dpo_jax.train --config=configs/imdb_dpo.py --workdir=runs/imdb/dpo",
        {
            "replay": (
                "runs a step again that was not finite: a folder such as WORKDIR/not_finite/step_000123",
                reproducer.replay,
            )
        },
        switches={"profile": "traces some steps for XProf and TensorBoard, into WORKDIR/profile"},
    )
