"""The worker that takes steps of dpo_jax. It is started by run.py, says when it is ready, and takes a step a line."""

from __future__ import annotations

import dataclasses
import functools
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import lora
from dpo_jax.chips import peak_flops
from dpo_jax.convert.pretrained import open_pretrained
from dpo_jax.data import packing
from dpo_jax.data.example import Example
from dpo_jax.data.layouts import LAYOUTS, Shape, pad_rows, split_targets
from dpo_jax.data.mismatched import mismatch, mismatched_shape
from dpo_jax.logprobs import target_scores
from dpo_jax.losses.objective import make_objective
from dpo_jax.models import as_read, param_shapes
from dpo_jax.optim import AdamW
from dpo_jax.parallel import DataParallel
from dpo_jax.state import Hyper, StepConfig, TrainState
from dpo_jax.steps import make_train_step
from dpo_jax.types import Params, PreferenceBatch, TokenBatch
from experiments.speed import work


@dataclasses.dataclass(frozen=True)
class Settings:
    """What run.py asks of a worker.

    Attributes:
      model: a Hugging Face folder.
      batches: file of token ids.
      layout: a name in LAYOUTS.
      dtype: of activations and products.
      reference: step (scored in every step), store (scored once, before the first), or lora (the frozen base).
      row_length: positions of a packed row.
      remat: what layers keep for the backward pass.
      head_chunk: targets whose logits exist at a time.
      attention: of whole rows.
      unroll: layers compiled side by side.
      cache: folder of compiled programs; None compiles anew.
      loss: a loss of the family.
    """

    model: str
    batches: str
    layout: str = "packed"
    dtype: str = "float32"
    reference: str = "step"
    row_length: int = 768
    remat: str = "none"
    head_chunk: int = 128
    attention: str = "dense"
    unroll: int = 1
    cache: str | None = None
    loss: str = "dpo"


class Worker:
    """A training step with its state and batches."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        pretrained = open_pretrained(settings.model)
        model = pretrained.model(
            dtype=jnp.dtype(settings.dtype), remat=settings.remat, unroll=settings.unroll, attention=settings.attention
        )
        self.parallel = DataParallel(jax.local_devices()[:1])
        examples = work.load(Path(settings.batches))
        objective, numbers = make_objective(settings.loss, {"beta": 0.1} if settings.loss == "dpo" else {})
        self.objective = objective
        shape = work.shape_of(examples, row_length=settings.row_length)
        self.shape = dataclasses.replace(
            shape, with_prompt=objective.needs_prompt, with_reference=settings.reference == "store"
        )
        self.reference_seconds = 0.0
        if settings.reference == "store":
            examples = self._with_stored_reference(model, pretrained.params(model), examples)
        optimizer = AdamW(b1=0.9, b2=0.999, epsilon=1e-8, weight_decay=0.0, clip_norm=1.0)
        read = functools.partial(pretrained.params, model)
        model, self.state = _state(self.parallel, objective, optimizer, model, read, settings.reference)
        config = StepConfig(self.shape.answers, "constant", 0, len(examples), settings.head_chunk)
        self.function = make_train_step(model, objective, optimizer, config, self.parallel.axis)
        self.model = model
        self.step = self.parallel.train_step(self.function)
        hyper = Hyper({k: np.float32(v) for k, v in numbers.items()}, np.float32(1e-5))
        self.hyper = self.parallel.replicate(hyper)
        self.batches = self._batches(examples)

    def arguments(self, step: int) -> tuple[Any, Any, Any]:
        """What the step reads."""
        return self.state, self.parallel.shard(self.batches[step], 1), self.hyper

    def take(self, step: int) -> float:
        """Takes a step; returns its loss."""
        self.state, metrics = self.step(*self.arguments(step))
        return self.parallel.unreplicate(metrics["loss"]).compute()

    def _batches(self, examples: work.Batches) -> list[PreferenceBatch]:
        answers = self._lay_out(examples, self.shape)
        if not self.objective.needs_mismatched:
            return list(map(PreferenceBatch, answers))
        shape = mismatched_shape(self.shape)
        others = self._lay_out([_packed(mismatch(batch), shape) for batch in examples], shape)
        return list(map(PreferenceBatch, answers, others))

    def _lay_out(self, examples: work.Batches, shape: Shape) -> list[TokenBatch]:
        """In rows, as many for each batch."""
        batches = [LAYOUTS[self.settings.layout](batch, shape) for batch in examples]
        rows = max(len(batch.tokens_RL) for batch in batches)
        return [pad_rows(batch, rows) for batch in batches]

    def _with_stored_reference(self, model: Any, params: Params, batches: work.Batches) -> work.Batches:
        """The same pairs with the reference's log-probabilities of their tokens, as a store gives them."""
        plain = dataclasses.replace(self.shape, with_reference=False)
        chunk = self.settings.head_chunk
        score = self.parallel.row_function(lambda p, b: target_scores(model, p, b, chunk).logp, "reference")
        on_device = self.parallel.replicate(params)
        found = []
        for examples, batch in zip(batches, self._lay_out(batches, plain), strict=True):
            if not found:
                score(on_device, batch).result()  # compiles
            begin = time.perf_counter()
            values = split_targets(score(on_device, batch).result(), batch, examples)
            self.reference_seconds += time.perf_counter() - begin
            found.append([_with_values(e, v) for e, v in zip(examples, values, strict=True)])
        return found


def _packed(examples: list[Example], shape: Shape) -> list[Example]:
    """In the order in which they lie in rows."""
    assert shape.row_length is not None
    plan = packing.plan_examples(examples, row_length=shape.row_length, row_examples=shape.row_examples)
    return [examples[i] for i in plan.members]


def _with_values(example: Example, values: tuple[np.ndarray, ...]) -> Example:
    pairs = zip(example.answers, values, strict=True)
    return dataclasses.replace(example, answers=tuple(dataclasses.replace(a, reference=v) for a, v in pairs))


def _state(
    parallel: DataParallel, objective: Any, optimizer: Any, model: Any, read: Callable[[], Params], reference: str
) -> tuple[Any, TrainState]:
    """The model that is trained, and its first state on the device."""
    params = read()
    trained, frozen = params, as_read(model, params) if reference != "store" else None
    if reference == "lora":
        model = lora.with_adapter(model, lora.Adapter(".*", rank=8, alpha=16.0))
        shapes = lora.split(param_shapes(model))[1]
        trained = lora.fresh(shapes, seed=0)
    placed, frozen = parallel.replicate((trained, frozen))
    moments = optimizer.init(trained)
    del params, trained  # the moments lie where these lay
    state = TrainState(
        step=parallel.replicate(jnp.int32(0)),
        params=placed,
        reference=frozen,
        opt_state=parallel.replicate(moments),
        loss_state=parallel.replicate(objective.initial_state()),
    )
    return model, state


# Of matrix products whose rate counts as a device's: as a model has them, and large enough for it.
RATE_SIZES = {
    "cpu": ((768, 576, 1536), (1024, 1024, 1024), (512, 576, 8192)),
    "gpu": ((8192, 2048, 8192), (8192, 8192, 8192), (16384, 8192, 16384)),
}


_product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))


def matmul_rate(dtype: str) -> float:
    """FLOP/s of this machine's best matrix product of random numbers, with fp32 results."""
    best = 0.0
    for m, k, n in RATE_SIZES[jax.default_backend()]:
        a, b = (jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate(((m, k), (k, n))))
        jax.block_until_ready(_product(a, b))
        for _ in range(8):
            begin = time.perf_counter()
            jax.block_until_ready(_product(a, b))
            best = max(best, 2 * m * k * n / (time.perf_counter() - begin))
    return best


def peak_bytes() -> int:
    """Most memory of its device that this process has held; where that is the processor, all of its memory."""
    if stats := jax.local_devices()[0].memory_stats():
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(settings: Settings) -> None:
    """Takes step after step, one for each line that comes in; ends when there are no more lines."""
    if settings.cache:
        jax.config.update("jax_compilation_cache_dir", settings.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    begin = time.perf_counter()
    worker = Worker(settings)
    positions = [int(np.size(batch.answers.tokens_RL)) for batch in worker.batches]
    load_seconds = time.perf_counter() - begin
    _say(
        load_seconds=load_seconds,
        positions=positions,
        reference_seconds=worker.reference_seconds,
        device=jax.local_devices()[0].device_kind,
        device_flops=peak_flops(jax.local_devices()[:1]),
    )
    for line in sys.stdin:
        if line.startswith("rate"):
            _say(rate=matmul_rate(settings.dtype))
            continue
        begin, cpu = time.perf_counter(), time.process_time()
        loss = worker.take(int(line))
        _say(
            seconds=time.perf_counter() - begin,
            cpu_seconds=time.process_time() - cpu,
            loss=loss,
            peak_bytes=peak_bytes(),
        )


def _say(**numbers: Any) -> None:
    print("@" + json.dumps(numbers), flush=True)


if __name__ == "__main__":
    serve(Settings(**json.loads(sys.argv[1])))
