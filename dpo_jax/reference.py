"""The stored reference of a run: opens its store (dpo_jax/refstore.py), after scoring the answers that it lacks.

All that a run's batches hold is scored before its first step, each answer once. What has been scored is written every
few minutes: a run that is killed meanwhile goes on from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from dpo_jax import __version__, lora
from dpo_jax.build import Parts
from dpo_jax.config import Config
from dpo_jax.data import packing
from dpo_jax.data.example import Example
from dpo_jax.data.layouts import LAYOUTS, Shape, pad_rows, split_targets
from dpo_jax.data.pipeline import Pipeline
from dpo_jax.logprobs import target_scores
from dpo_jax.models import rolled
from dpo_jax.parallel import Parallel
from dpo_jax.progress import Progress, stage
from dpo_jax.refstore import ReferenceStore, answer_key, locked, store_folder, write_store
from dpo_jax.stopping import Stopped
from dpo_jax.types import Array, Params, TokenBatch

Scored = tuple[Example, tuple[np.ndarray, ...]]

_BUFFER = 4096  # examples that are packed into rows together
_WRITE_EVERY = 300.0  # seconds


@dataclass(frozen=True)
class Need:
    """Data whose answers a run wants scored.

    Attributes:
      fingerprint: of all of it.
      examples: makes it anew; some of it may come more than once.
    """

    fingerprint: str
    examples: Callable[[], Iterator[Example]]


def need_of(batches: Pipeline, steps: int | None) -> Need:
    """What the batches of so many training steps hold, or those of an evaluation (None)."""
    known = batches.fingerprint()
    # Which answers meet which prompts is a matter of the order, and so is what a part of an epoch reads; else the data
    # are all that counts.
    order = [known["pipeline"], steps] if batches.mismatched or batches.within_epoch(steps) else None
    return Need(hashlib.sha256(json.dumps([known["data"], order]).encode()).hexdigest(), lambda: batches.scored(steps))


def identity_of(config: Config, parts: Parts, tokenizer: Any, weights: str) -> dict[str, str]:
    """All that the log-probabilities of a reference depend on, for :func:`dpo_jax.refstore.identity_hash`.

    Args:
      config: of the run.
      parts: built from it.
      tokenizer: of the run's data.
      weights: hash of the reference's parameters.
    """
    data, model = config.data, parts.model
    sizes = {field.name: getattr(model.config, field.name) for field in dataclasses.fields(model.config)}
    for name in (
        "attention",
        "remat",
        "unroll",
        "adapter",
    ):  # how it is computed, not what; and what the policy alone has
        sizes.pop(name, None)
    precision = jax.config.values["jax_default_matmul_precision"]
    template = tokenizer.chat_template if data.template == "chat" else None
    return {
        "code": __version__,
        "model": f"{type(model).__name__} {sizes}",
        "weights": weights,
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "template": f"{data.template} {template}",
        "truncation": f"{data.truncate} {data.prompt_length} {data.answer_length}",
        "dtype": f"{sizes['dtype']} {sizes['param_dtype']} {sizes['output_dtype']}",
        "platform": f"{jax.default_backend()} {precision}",
    }


def open_store(
    root: str | Path,
    identity: Mapping[str, str],
    needs: Sequence[Need],
    score: Callable[[Iterable[Example]], Iterator[Scored]],
    stopping: Callable[[], bool] = lambda: False,
) -> ReferenceStore:
    """Opens the store of a reference, completed where it lacks something.

    Args:
      root: folder of stores.
      identity: of the reference.
      needs: data whose answers the store must hold.
      score: gives examples, in their order, with the log-probabilities of their answers' tokens, nats.
      stopping: whether the run was asked to stop: what has been scored is written then.

    Raises:
      Stopped: it was.
      ValueError: something is missing, and several processes are at work.
      OSError: the store is damaged or cannot be written.
    """
    with locked(root, identity):
        store = _existing(root, identity)
        lacking = [need for need in needs if store is None or need.fingerprint not in store.covers]
        if lacking:
            if jax.process_count() > 1:
                raise ValueError(
                    f"{store_folder(root, identity)} lacks log-probabilities of this run, and only a single process "
                    "can add them: run the same config once with one process, until its first step, then start again"
                )
            _add(root, identity, store, lacking, score, stopping)
            store = ReferenceStore(root, identity)
    assert store is not None
    logging.info("%d answers with the reference's log-probabilities are in %s.", len(store), store.folder)
    return store


def _existing(root: str | Path, identity: Mapping[str, str]) -> ReferenceStore | None:
    try:
        return ReferenceStore(root, identity)
    except FileNotFoundError:
        return None


def _add(
    root: str | Path,
    identity: Mapping[str, str],
    store: ReferenceStore | None,
    needs: Sequence[Need],
    score: Callable[[Iterable[Example]], Iterator[Scored]],
    stopping: Callable[[], bool],
) -> None:
    with stage("Looking for answers whose reference log-probabilities are not stored"):
        found = list(map(_size, missing(store, needs)))
    examples, answers, tokens = len(found), sum(a for a, _ in found), sum(t for _, t in found)
    logging.info(
        "The reference scores %d answers (%d tokens) of %d examples once; %d are in %s.",
        *(answers, tokens, examples, 0 if store is None else len(store), root),
    )

    def shown(items: Iterator[Example], progress: Progress) -> Iterator[Scored]:
        for example, logps in score(items):
            yield example, logps
            progress.update(_size(example)[1])

    with Progress(tokens, "reference", unit="token") as progress:
        for portion in _portions(shown(missing(store, needs), progress), stopping) if found else ():
            write_store(root, identity, portion, extends=store)
            store = ReferenceStore(root, identity)
            if stopping():
                logging.warning("Stopped; %d answers are scored, and the same command goes on.", len(store))
                raise Stopped()
    write_store(root, identity, (), covers=[need.fingerprint for need in needs], extends=store)


def _portions(items: Iterator[Scored], stopping: Callable[[], bool]) -> Iterator[Iterator[Scored]]:
    """Cuts items into iterators, each of which ends when a few minutes have passed; they are to be read in turn."""
    for first in items:
        yield _for_a_while(first, items, stopping)


def _for_a_while(first: Scored, items: Iterator[Scored], stopping: Callable[[], bool]) -> Iterator[Scored]:
    begin = time.monotonic()
    yield first
    while not stopping() and time.monotonic() - begin < _WRITE_EVERY and (item := next(items, None)) is not None:
        yield item


def missing(store: ReferenceStore | None, needs: Sequence[Need]) -> Iterator[Example]:
    """Examples with an answer that neither the store holds nor one of them before it has."""
    seen: set[bytes] = set()
    for need in needs:
        for example in need.examples():
            keys = {answer_key(example.prompt, answer.tokens) for answer in example.answers}
            if not (keys <= seen or (store is not None and example in store)):
                seen |= keys
                yield example


def _size(example: Example) -> tuple[int, int]:
    """(answers, tokens of them)."""
    return len(example.answers), sum(len(answer.tokens) for answer in example.answers)


class ReferencePass:
    """Scores examples by the reference, in rows like those of the run, so that one program is compiled.

    Args:
      config: of the run.
      parts: built from it.
      parallel: the devices.
      params: makes the reference's parameters, on the host; called when there is something to score.
    """

    def __init__(self, config: Config, parts: Parts, parallel: Parallel, params: Callable[[], Params]) -> None:
        self._parallel, self._params = parallel, params
        self._layout = config.data.layout
        # A micro-batch: what is known to fit.
        self._rows = config.data.batch_size // config.train.micro_batches
        self._shape = replace(parts.shape, with_prompt=False, with_reference=False)

        model = rolled(lora.with_adapter(parts.model, None))

        def logps(params: Params, batch: TokenBatch) -> Array:
            return target_scores(model, params, batch, config.train.head_chunk).logp

        self._logps = parallel.row_function(logps, "reference")

    def __call__(self, examples: Iterable[Example]) -> Iterator[Scored]:
        params = self._parallel.replicate(self._params())
        for part in _parts(examples, self._shape, self._rows, self._layout):
            batch = LAYOUTS[self._layout](part, self._shape)
            rows = self._rows if self._layout == "packed" else batch.tokens_RL.shape[0] // len(part) * self._rows
            values_RM = self._logps(params, pad_rows(batch, rows)).result()
            yield from zip(part, split_targets(values_RM[: len(batch.role_RS)], batch, part), strict=True)


def _parts(examples: Iterable[Example], shape: Shape, rows: int, layout: str) -> Iterator[list[Example]]:
    """Cuts examples into what fits into a batch."""
    examples = iter(examples)
    size = _BUFFER if layout == "packed" else rows
    while part := list(itertools.islice(examples, size)):
        if layout != "packed":
            yield part
            continue
        assert shape.row_length is not None
        plan = packing.plan_examples(part, row_length=shape.row_length, row_examples=shape.row_examples)
        for start in range(0, len(plan), rows):
            stop = min(start + rows, len(plan))
            yield [part[i] for i in plan.members[plan.starts[start] : plan.starts[stop]]]
