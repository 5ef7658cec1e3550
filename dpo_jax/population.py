"""Runs that differ only in traced numbers, trained together: one program steps all of them side by side.

Each member is a run as any other (``train.Trainer.work``): it reads its own batches, writes its own folder, is
evaluated and saved on its own. Only its step is computed together with those of the others, by one vmapped program on
each device. Members may stand at different steps, as they do after a kill: those with the same batches wait for those
behind, so that the program stays the same. One that fails leaves the others alone.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from dpo_jax import workdir
from dpo_jax.build import guarded_step
from dpo_jax.config import Config
from dpo_jax.data.pipeline import Pipeline
from dpo_jax.guards import Guarded
from dpo_jax.parallel import Population
from dpo_jax.progress import Progress
from dpo_jax.shared import Shared
from dpo_jax.state import Axis, Hyper, TrainState
from dpo_jax.stopping import Stopped, StopRequest
from dpo_jax.train import Seat, Trainer, Work
from dpo_jax.types import Params, PreferenceBatch


def obstacle(config: Config) -> str | None:
    """Why a run cannot be a member of a population; None when it can."""
    if config.data.layout == "packed" and config.objective()[0].needs_mismatched:
        return "packed batches of mismatched answers differ in shape from member to member"
    if config.parallel.mode != "pmap":
        return "config.parallel.mode=mesh splits a run over the devices; a population gives each device runs of its own"
    return None


def run(
    members: Mapping[str, tuple[Config, Path]], shared: Shared, mistakes: tuple[type[Exception], ...]
) -> dict[str, Exception]:
    """Trains runs together, each into its own workdir; those that are finished are left alone.

    Args:
      members: (config, workdir) by name. Configs differ in ``grid.traced_apart``'s numbers only.
      shared: what they have in common with other runs of this process.
      mistakes: what ends one member and not the others.

    Returns:
      What ended members before their last step, by name.

    Raises:
      ValueError: a run that cannot be a member.
      Stopped: a signal asked to stop; all is saved.
    """
    for name, (config, _) in members.items():
        reason = obstacle(config)
        if reason is not None:
            raise ValueError(f"{name} cannot train together with others: {reason}")
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        trainers: dict[str, Trainer] = {}
        failed: dict[str, Exception] = {}
        for name, (config, folder) in members.items():
            try:
                stack.enter_context(workdir.owned(folder, config))
                if workdir.finished(folder) is None:
                    trainers[name] = Trainer(config, folder, shared)
            except mistakes as error:
                failed[name] = error
        return failed | _Together(trainers, stop, mistakes).train()


class _Together:
    """The members that train, in lockstep."""

    def __init__(
        self, trainers: Mapping[str, Trainer], stop: StopRequest, mistakes: tuple[type[Exception], ...]
    ) -> None:
        self._trainers, self._stop, self._mistakes = dict(trainers), stop, mistakes
        self._latch = _Latch()
        self._readers = _Readers()
        self._failed: dict[str, Exception] = {}
        self._stopped = False
        self._requests: dict[str, tuple[_Place, PreferenceBatch]] = {}

    def train(self) -> dict[str, Exception]:
        with contextlib.ExitStack() as stack:
            works: dict[str, Work] = {}
            for name, trainer in self._trainers.items():
                seat = Seat(
                    functools.partial(_Place, trainer),
                    _Numbers.fetch,
                    self._latch,
                    batches=self._readers.batches,
                    shows=False,
                )
                works[name] = stack.enter_context(contextlib.closing(trainer.work(seat)))
                self._advance(name, works[name], None)
            self._readers.begun()
            if self._requests:
                self._loop(works)
        if self._stopped:
            raise Stopped()
        return self._failed

    def _loop(self, works: Mapping[str, Work]) -> None:
        table = _Table(self._trainers, {name: place for name, (place, _) in self._requests.items()})
        with Progress(None, f"{len(self._requests)} runs", unit="step") as progress:
            while self._requests:
                moving = table.moving(self._requests)
                numbers = table.step({name: self._requests[name][1] for name in moving}, self._requests.keys() - moving)
                self._latch.value = self._stop.agreed()
                for name in moving:
                    place, _ = self._requests.pop(name)
                    self._advance(name, works[name], (place, numbers[name]))
                progress.update()

    def _advance(self, name: str, work: Work, reply: Any) -> None:
        """Lets a member go on until it asks for its next step, or ends."""
        try:
            self._requests[name] = work.send(reply)
        except StopIteration as done:
            workdir.finish(self._trainers[name].workdir, done.value)
        except Stopped:
            self._stopped = True
        except self._mistakes as error:
            self._failed[name] = error
            logging.error("%s failed: %s", name, error)


class _Table:
    """The members at their seats, and the program that steps them together.

    Seats do not change: who ends before the others leaves his empty.

    Args:
      trainers: of the members, by name.
      places: where the state of each lies, by name; in the order of their seats.
    """

    def __init__(self, trainers: Mapping[str, Trainer], places: Mapping[str, _Place]) -> None:
        names, first = list(places), trainers[next(iter(places))]
        self._seats, self._places = {name: seat for seat, name in enumerate(names)}, places
        self._common = _common_reference(first.config, [place.on_host for place in places.values()])
        key = (first.program, len(names), first.config.parallel)
        self._together = first.shared.get(("population", *key), lambda: Population(len(names), first.parallel.devices))
        self._step = first.shared.get(
            ("population step", *key),
            lambda: self._together.train_step(
                _member_step(guarded_step(first.config, first.parts, first.steps, Axis()))
            ),
        )
        self._micro_batches = first.config.train.micro_batches
        # Decided by all who began: whoever goes on alone, after a restart, goes on in the program that he began in.
        self._same = len({json.dumps(trainers[name].pipeline.fingerprint()) for name in names}) == 1
        self._taken = {name: int(place.on_host.state.step) for name, place in places.items()}
        self._waited: set[str] = set()
        self._carry = self._together.stack([_own(place.on_host, self._common) for place in places.values()])
        self._hyper = self._together.stack([trainers[name].parts.hyper for name in names])
        self._reference = self._together.replicate(self._common)
        for name, place in places.items():
            place.look = functools.partial(_look, self._together, self._seats[name], self._common)
        logging.info(
            "%d runs train together on %d device(s), %s",
            len(names),
            len(self._together.devices),
            "each against a reference of its own" if self._common is None else "all against one reference",
        )

    def moving(self, asking: Collection[str]) -> list[str]:
        """Who takes the next step: all who ask; of members with the same batches, those that are behind."""
        behind = min(self._taken[name] for name in asking)
        return [name for name in self._seats if name in asking and (not self._same or self._taken[name] == behind)]

    def step(self, batches: Mapping[str, PreferenceBatch], waiting: Collection[str]) -> dict[str, tuple[_Numbers, int]]:
        """Steps the members whose batches are given, while others wait for them.

        Returns:
          What ``_Numbers.fetch`` finds the metrics of each by.
        """
        if self._waited & batches.keys():
            self._carry = self._together.stack([self._own_state(name) for name in self._seats])
        self._waited = set(waiting)
        some = next(iter(batches.values()))
        read = [some] if self._same else [batches.get(name, some) for name in self._seats]
        rows = self._together.batches(read, self._micro_batches)
        self._carry, metrics = self._step(self._carry, self._reference, rows, self._hyper, self._same)
        for name in batches:
            self._places[name].carry = self._carry
            self._taken[name] += 1
        numbers = _Numbers(self._together, metrics)
        return {name: (numbers, self._seats[name]) for name in batches}

    def _own_state(self, name: str) -> Guarded:
        """Of one who has waited, what he began with: others' steps have gone through his seat."""
        if name in self._waited:
            return _own(self._places[name].on_host, self._common)
        return self._together.member(self._carry, self._seats[name])


class _Latch(StopRequest):
    """One answer for all members of a step, whenever the signal comes."""

    value = False

    def agreed(self) -> bool:
        return self.value


class _Place:
    """The state of a member: on the host before the first step, among the others' after it."""

    def __init__(self, trainer: Trainer, state: Guarded) -> None:
        self._trainer, self.on_host = trainer, state
        self.carry: Any = None  # of all members; looked at only when the member asks
        self.look: Callable[[Any], Guarded]

    @property
    def state(self) -> TrainState:
        """On all devices, as that of a run on its own."""
        if self.carry is not None:
            self.on_host, self.carry = self.look(self.carry), None
        return self._trainer.parallel.replicate(self.on_host.state)


def _look(together: Population, seat: int, common: Params | None, carry: Any) -> Guarded:
    found = together.member(carry, seat)
    return found if common is None else _dressed(found, common)


class _Numbers:
    """Metrics of all members at a step, brought to the host once."""

    def __init__(self, together: Population, metrics: Any) -> None:
        self._together, self._metrics = together, metrics

    @functools.cached_property
    def _rows(self) -> Any:
        return self._together.fetch(self._metrics)

    @staticmethod
    def fetch(own: tuple[_Numbers, int]) -> Any:
        """The metrics of one member."""
        numbers, seat = own
        return jax.tree.map(lambda a: a[seat], numbers._rows)


class _Readers:
    """Batches that several members read: made once for those with the same data in the same order."""

    def __init__(self) -> None:
        self._heads: dict[str, Iterator[PreferenceBatch]] = {}

    def batches(self, pipeline: Pipeline, first_step: int) -> Iterator[PreferenceBatch]:
        key = json.dumps([pipeline.fingerprint(), first_step])
        if key not in self._heads:
            self._heads[key] = itertools.tee(pipeline.train_batches(first_step), 1)[0]
        return copy.copy(self._heads[key])

    def begun(self) -> None:
        """All members have their batches: what they have read need not be kept any more."""
        self._heads.clear()


def _common_reference(config: Config, states: list[Guarded]) -> Params | None:
    """The reference that all members have; None when they have none, when theirs differ, or when it moves."""
    first = states[0].state.reference
    if config.reference.sync_every is not None:
        return None
    return first if all(_equal(first, other.state.reference) for other in states[1:]) else None


def _equal(a: Params | None, b: Params | None) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _own(carry: Guarded, common: Params | None) -> Guarded:
    """What a member has of its own: all but a reference that it has in common with others."""
    return carry if common is None else _bare(carry)


def _bare(carry: Guarded) -> Guarded:
    return dataclasses.replace(carry, state=dataclasses.replace(carry.state, reference=None))


def _dressed(carry: Guarded, reference: Params) -> Guarded:
    return dataclasses.replace(carry, state=dataclasses.replace(carry.state, reference=reference))


def _member_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step of a run, with a reference that it has in common with others where there is one."""

    def member_step(carry: Guarded, common: Params | None, batch: PreferenceBatch, hyper: Hyper) -> Any:
        if common is None:
            return step(carry, batch, hyper)
        after, metrics = step(_dressed(carry, common), batch, hyper)
        return _bare(after), metrics

    return member_step
