"""Whether a run fits a TPU pod, and how fast it can go: its train step is compiled for a pod that is not here.

What is printed comes from the compiler (memory, traffic between chips) and from counting (products). The time of a step
is a bound: it assumes that each chip's arithmetic, memory and links are used to the full, and all at once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from absl import logging

from dpo_jax.build import Parts, build, guarded, guarded_step, make_parallel, state_shapes
from dpo_jax.build import make_pipeline as make_batches
from dpo_jax.chips import CHIPS, Chip, describe_devices, parse
from dpo_jax.config import Config
from dpo_jax.data.example import Answer, Example
from dpo_jax.data.layouts import Shape
from dpo_jax.flops import Passes, Work, step_passes, step_work
from dpo_jax.hlo import Collective, collectives
from dpo_jax.models import param_shapes
from dpo_jax.models.config import REMAT
from dpo_jax.parallel import Parallel, check_divides
from dpo_jax.trees import parameter_count
from dpo_jax.types import CHOSEN, REJECTED, PreferenceBatch

GIB = 2**30
# What compilers say of a program that is too large: libtpu 0.0.52, which means all of its memory, and older ones.
_NEEDED = re.compile(r"(?:memory required for HLO temporaries \(|used )([\d.]+)([KMGT]?)", re.IGNORECASE)
SEARCHES = {"batch": "the largest batch", "topology": "the smallest pod"}


@dataclass(frozen=True)
class Memory:
    """Bytes of one chip.

    Attributes:
      parameters: of the policy.
      reference: its parameters.
      optimizer: moments.
      total: all that the step needs at its peak, the batch and what it computes on the way included.
      available: what a chip has.
    """

    parameters: int
    reference: int
    optimizer: int
    total: int
    available: int

    @property
    def activations(self) -> int:
        """What the step computes on the way: activations, gradients, gathered parameters."""
        return self.total - self.parameters - self.reference - self.optimizer

    @property
    def fits(self) -> bool:
        return self.total <= self.available


@dataclass(frozen=True)
class Plan:
    """What is known of a run on a pod.

    Attributes:
      topology: such as v5e:4x4.
      chips: how many.
      layout: mesh and batch, in words.
      parameters: scalars of the policy.
      attention: dense, or the name of the kernel.
      memory: of one chip.
      work: products of a step.
      traffic: between chips, for each step; empty when the step does not fit, None when it is not known.
      seconds: the least time of a step for compute, memory and links.
    """

    topology: str
    chips: int
    layout: str
    parameters: int
    attention: str
    memory: Memory
    work: Work
    traffic: list[Collective] | None
    seconds: Mapping[str, float]

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: useful products of what the chips could do in the step's least time."""
        chip, _ = parse(self.topology)
        return self.work.useful / (max(self.seconds.values()) * chip.flops * self.chips)


def run(config: Config, *, topology: str | None, search: str | None) -> None:
    """Prints the plan of a config.

    Args:
      config: the experiment.
      topology: such as v5e:16x16; None takes the config's.
      search: "batch" looks for the largest batch that fits, "topology" for the smallest pod; None for neither.

    Raises:
      ValueError: a topology that does not exist, a mesh that is not the pod's, an unknown search.
      OSError: there is no TPU compiler here.
    """
    topology = topology or config.plan.topology
    if topology is None:
        raise ValueError("set --topology, such as --topology=v5e:4x4, or config.plan.topology")
    if search is not None and search not in SEARCHES:
        raise ValueError(f"--search is {search!r}; known: {', '.join(SEARCHES)}")
    plans = [make_plan(config, topology)]
    print(show(plans[0], config), flush=True)
    if search is None:
        return
    if plans[0].memory.fits:
        for plan in {"batch": larger_batches, "topology": smaller_pods}[search](config, topology):
            print(show(plan, config), flush=True)
            plans.append(plan)
    found = [f"{plan.topology}, {plan.layout}" for plan in plans if plan.memory.fits] or [
        "none: begin smaller or larger"
    ]
    print(f"{SEARCHES[search]} found to fit: {found[-1]}", flush=True)


def make_plan(config: Config, topology: str) -> Plan:
    """Compiles the train step for a pod; a step that does not fit is a plan too.

    Raises:
      ValueError: a topology that does not exist, a mesh or a batch that does not divide over it.
      OSError: there is no TPU compiler here.
    """
    chip, _ = parse(topology)
    sizes = config.plan.sizes or config.init.hf
    config = dataclasses.replace(config, init=dataclasses.replace(config.init, hf=sizes))
    parts = build(config, vocab_size=1 if sizes else config.data.vocab_size, answers=2, platform="tpu")
    parallel = make_parallel(config.parallel, parts.model, describe_devices(topology))
    check_divides(config.data.batch_size, config.train.micro_batches, parallel.parts)
    batch = longest_batch(config, parts)
    state = jax.eval_shape(lambda s: guarded(s, 0), state_shapes(parts))
    step = parallel.train_step(guarded_step(config, parts, config.train.steps or 1000, parallel.axis))
    shapes = parallel.shapes(state, batch, parts.hyper, config.train.micro_batches)
    needed, text = _compile(step, shapes, chip)
    held = {name: _held(getattr(shapes[0].state, name), parallel) for name in ("params", "reference", "opt_state")}
    memory = Memory(held["params"], held["reference"], held["opt_state"], needed, chip.memory)
    params = param_shapes(parts.model)
    coupled = parts.objective.couples_batch and config.train.micro_batches > 1
    counted = {"reference": parts.scores_reference, "scored_twice": coupled}
    work = step_work(parts.model, params, batch, **counted)
    moved = _moved(config, held, [passes for _, passes in step_passes(batch, **counted)])
    traffic = None if text is None else collectives(text, len(parallel.devices)) if text else []
    seconds = _bounds(chip, len(parallel.devices), work, moved, traffic)
    layout = f"{_axes(config, parallel)}; {_batch_words(config, batch.answers)}"
    count, attention = parameter_count(params), parts.model.config.attention
    return Plan(topology, len(parallel.devices), layout, count, attention, memory, work, traffic, seconds)


def larger_batches(config: Config, topology: str) -> Iterator[Plan]:
    """Doubles the batch, with as many micro-batches as before, until it does not fit."""
    while True:
        data = dataclasses.replace(config.data, batch_size=2 * config.data.batch_size)
        config = dataclasses.replace(config, data=data)
        plan = make_plan(config, topology)
        yield plan
        if not plan.memory.fits:
            return


def smaller_pods(config: Config, topology: str) -> Iterator[Plan]:
    """Halves the pod, with more micro-batches a chip and fsdp over what is left, until it does not fit.

    The tensor axis stays: a pod with fewer chips than it has is not looked at.
    """
    chip, kind = parse(topology)
    for pod in reversed(chip.pods[: chip.pods.index(topology.partition(":")[2])]):
        chips = math.prod(int(n) for n in pod.split("x"))
        mesh = config.parallel
        if chips % mesh.tensor:
            return
        if mesh.mode == "mesh":
            mesh = dataclasses.replace(mesh, data=None, fsdp=min(mesh.fsdp, chips // mesh.tensor))
        parts = max(1, chips // mesh.tensor)
        micro = max(config.train.micro_batches, config.data.batch_size // parts)
        train = dataclasses.replace(config.train, micro_batches=micro)
        plan = make_plan(dataclasses.replace(config, parallel=mesh, train=train), f"{kind}:{pod}")
        yield plan
        if not plan.memory.fits:
            return


def show(plan: Plan, config: Config) -> str:
    """The plan in words; advice when it does not fit."""
    memory, verdict = plan.memory, "fits" if plan.memory.fits else "DOES NOT FIT"
    gib = {k: f"{getattr(memory, k) / GIB:.2f}" for k in ("parameters", "reference", "optimizer", "activations")}
    lines = [
        f"{plan.topology} ({plan.chips} chips), {plan.parameters / 1e9:.2f} B parameters: {verdict}",
        f"  layout     {plan.layout}",
        f"  memory     {memory.total / GIB:.2f} GiB a chip of {memory.available / GIB:.2f}: "
        + ", ".join(f"{name} {value}" for name, value in gib.items()),
        f"  products   {plan.work.useful / 1e15:.3g} PFLOP a step are useful, {plan.work.spent / 1e15:.3g} are spent "
        f"({plan.work.spent / plan.work.useful:.2f} times as many); attention is {plan.attention}",
    ]
    if not memory.fits:
        return "\n".join([*lines, f"  advice     {advice(plan, config)}"])
    sent = ", ".join(f"{t.kind} {t.sent / 1e9:.3g} GB in {t.count}" for t in plan.traffic or []) or "nothing"
    links = (
        "not known: the compiled program cannot be read"
        if plan.traffic is None
        else f"each chip sends in a step {sent}"
    )
    bounds = ", ".join(f"{name} {value:.3g}" for name, value in plan.seconds.items())
    slowest = max(plan.seconds, key=plan.seconds.__getitem__)
    return "\n".join(
        [
            *lines,
            f"  links      {links}",
            f"  time       at least {plan.seconds[slowest]:.3g} s a step, bound by {slowest} ({bounds}); "
            f"MFU at most {plan.mfu:.0%}",
        ]
    )


def advice(plan: Plan, config: Config) -> str:
    """Which key to change so that a step fits."""
    memory = plan.memory
    held = memory.parameters + memory.reference + memory.optimizer
    if held > memory.available // 2:
        if config.parallel.mode == "pmap":
            return "every chip holds all parameters: set config.parallel.mode=mesh and config.parallel.fsdp"
        more = "raise config.parallel.fsdp or tensor" if _undivided(config, plan) else "take a larger --topology"
        return f"parameters and optimizer alone take {held / GIB:.1f} GiB a chip: {more}, or set config.reference.store"
    order = list(REMAT)
    less = order[order.index(config.model.remat) + 1 :]
    if less:
        return f"layers keep what they compute: set config.model.remat={', or '.join(less)}"
    rows = config.data.batch_size // config.train.micro_batches
    if rows > plan.chips // config.parallel.tensor:
        return f"raise config.train.micro_batches (now {config.train.micro_batches}): fewer rows at a time"
    return (
        "a chip already works on one example at a time: raise config.parallel.tensor, lower config.train.head_chunk "
        f"({config.train.head_chunk}) or the lengths of config.data"
    )


def _compile(step: Any, shapes: Any, chip: Chip) -> tuple[int, str | None]:
    """(bytes that a chip needs, text of the program; empty when it does not fit, None when it cannot be read)."""
    try:
        compiled = step.lower(*shapes).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return needed_bytes(str(error)) or chip.memory + 1, ""
    needed = int(compiled.memory_analysis().peak_memory_in_bytes)
    try:
        return needed, compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        # The compiler for some pods writes programs that its own reader does not take back.
        logging.warning("the program's traffic cannot be read: %s", str(error).splitlines()[0])
        return needed, None


def needed_bytes(message: str) -> int | None:
    """How much memory a program needs, from the compiler's refusal; None when it does not say."""
    found = _NEEDED.search(message)
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " ")) if found else None


class _Longest:
    """Examples that are as long as a config allows."""

    def __init__(self, shape: Shape, count: int) -> None:
        self._answers = tuple(_longest_answer(shape, role) for role in (CHOSEN, REJECTED))
        self._prompt_length, self._count = shape.prompt_length, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        return Example(index, np.full(self._prompt_length, index, np.int32), self._answers)  # no two prompts are equal


def _longest_answer(shape: Shape, role: int) -> Answer:
    """Of as many tokens as a shape has room for; of what a store would give, zeros."""
    length = shape.answer_length
    reference = np.zeros(length, np.float32) if shape.with_reference else None
    return Answer(np.full(length, role, np.int32), np.ones(length, np.float32), role, reference=reference)


def longest_batch(config: Config, parts: Parts) -> PreferenceBatch:
    """A batch of examples that are as long as a config allows, of all processes."""
    return make_batches(config, parts, _Longest(parts.shape, config.data.batch_size)).batch(0)


def _held(tree: Any, parallel: Parallel) -> int:
    """Bytes of a tree that one chip holds."""
    return sum(math.prod(parallel.part_shape(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _moved(config: Config, held: Mapping[str, int], passes: Sequence[Passes]) -> float:
    """Bytes that a chip's memory moves in a step, of its parameters and its state.

    Each pass over a micro-batch reads the matrices, those of adapters and of their base; the update reads and writes
    the state, and reads the gradient.

    Args:
      config: the experiment.
      held: bytes that a chip holds between steps, by part of the state.
      passes: of answers, and of mismatched ones.
    """
    width = np.dtype(jax.numpy.dtype(config.model.dtype)).itemsize / np.dtype(config.model.param_dtype).itemsize
    trained = held["params"] * width
    base = held["reference"] if config.lora.rank is not None else 0
    policy = sum(p.trained * (2 + (config.model.remat != "none")) + p.policy for p in passes)
    read = policy * (trained + base) + sum(p.reference for p in passes) * (base or trained)
    gathered = config.parallel.fsdp if config.parallel.mode == "mesh" else 1
    return config.train.micro_batches * gathered * read + 3 * held["params"] + 2 * held["opt_state"]


def _bounds(chip: Chip, chips: int, work: Work, moved: float, traffic: list[Collective] | None) -> dict[str, float]:
    """Seconds that a step takes at the least, by what bounds it."""
    bounds = {"compute": work.spent / (chips * chip.flops), "memory": moved / chip.hbm}
    return bounds if traffic is None else {**bounds, "links": sum(t.sent for t in traffic) / chip.ici}


def _axes(config: Config, parallel: Parallel) -> str:
    mesh = config.parallel
    if mesh.mode == "pmap":
        return f"pmap over {len(parallel.devices)}"
    data = len(parallel.devices) // (mesh.fsdp * mesh.tensor)
    return f"data {data} × fsdp {mesh.fsdp} × tensor {mesh.tensor}"


def _batch_words(config: Config, tokens: Any) -> str:
    rows, length = tokens.tokens_RL.shape
    micro = config.train.micro_batches
    return f"{config.data.batch_size} examples = {rows} rows of {length} tokens in {micro} micro-batches"


def _undivided(config: Config, plan: Plan) -> bool:
    return config.parallel.fsdp * config.parallel.tensor < plan.chips


if __name__ == "__main__":
    from dpo_jax.main import main

    main(
        "Plans a run on a TPU pod: whether it fits, how much it computes and sends, how fast it can be.",
        run,
        "python -m dpo_jax.plan --config=configs/tpu/llama3_8b_v5e_64.py --topology=v5e:8x8",
        options={
            "topology": f"the pod, such as v5e:4x4; kinds: {', '.join(CHIPS)}; default: config.plan.topology",
            "search": "also look for the largest batch (batch) or the smallest pod (topology) that fits",
        },
    )
