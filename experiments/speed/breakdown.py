"""Where a step's time goes: operations of a traced step, by what they are for.

    python -m experiments.speed.breakdown --model=runs/smollm2/hf --batches=runs/speed/smollm2/batches.json

On one core: on several, XLA runs products beside other operations, and one's time cannot be told from the other's.
"""

from __future__ import annotations

import collections
import gzip
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
from absl import app, flags, logging

from dpo_jax.hlo import computations
from experiments.speed.ours import Settings, Worker, matmul_rate
from experiments.speed.work import load, needed_flops

PASSES = ("reference", "forward", "backward")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"calls=%?([\w.\-]+)")
_MATRIX = re.compile(r"/attention/(?:query|key|value|out)/")
_CONTROL = re.compile(r"\b(?:while|conditional|call)\(")


def purposes(text: str) -> dict[str, tuple[str, str]]:
    """(part of the step, pass) of every operation of a compiled program that does work, by its name.

    Args:
      text: ``compiled.as_text()``.
    """
    bodies, found = computations(text), {}
    for body in bodies.values():
        around = [name for name in map(_name, body.lines) if "attention/while" in name][:1]
        for line in body.lines:
            instruction = _INSTRUCTION.match(line)
            if instruction and not _CONTROL.search(line):
                called = _CALLED.search(line)
                found[instruction[1]] = _purpose([line, *(bodies[called[1]].lines if called else [])], around)
    return found


def _name(line: str) -> str:
    match = _NAME.search(line)
    return match[1] if match else ""


def _purpose(lines: Sequence[str], around: Sequence[str]) -> tuple[str, str]:
    names = [name for name in map(_name, lines) if name] or [*around, ""]  # some products in loops have none
    product = any(" dot(" in line for line in lines)
    path = next((name for name in names if "/blocks/" in name or "/while/body" in name), names[0])
    if "/cond/" in path or "/branch" in path:
        return "optimizer", ""
    which = "backward" if "transpose(" in path else "forward" if "jvp(" in path else "reference"
    layer = "/blocks/" in path
    if layer and "/attention/" in path and not _MATRIX.search(path):
        return "attention, without its matrices", which
    if layer:
        return ("layers: products" if product else "layers: all else"), which
    if "/while/body" in path:
        return ("head: products" if product else "head: all else"), which
    return "all else", ""


def seconds(events: Iterable[Mapping], purpose: Mapping[str, tuple[str, str]]) -> dict[tuple[str, str], float]:
    """Time of a trace's operations, summed by purpose."""
    total: dict[tuple[str, str], float] = collections.defaultdict(float)
    for event in events:
        if event.get("ph") == "X" and event["name"] in purpose:
            total[purpose[event["name"]]] += event["dur"] / 1e6
    return total


def traced(worker: Worker, step: int) -> Iterator[Mapping]:
    """The events of one step."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            worker.take(step)
        (path,) = Path(folder).rglob("*.trace.json.gz")
        yield from json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def table(total: Mapping[tuple[str, str], float]) -> str:
    """A row a part: its seconds in each pass, and its share of the step."""
    whole = sum(total.values())
    lines = ["| | reference, s | forward, s | backward, s | all, s | share |", "|---|---|---|---|---|---|"]
    parts = sorted({part for part, _ in total}, key=lambda p: -sum(s for (q, _), s in total.items() if q == p))
    for part in parts:
        own = sum(value for (name, _), value in total.items() if name == part)
        by_pass = " | ".join(f"{total[part, p]:.2f}" if (part, p) in total else "–" for p in PASSES)
        lines.append(f"| {part} | {by_pass} | {own:.2f} | {own / whole:.0%} |")
    return "\n".join(lines)


def main(_: Sequence[str]) -> None:
    """Measures and prints."""
    options = flags.FLAGS
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    settings = Settings(options.model, options.batches, row_length=options.row_length, remat="dots", head_chunk=512)
    worker = Worker(settings)
    logging.info("compiling, and two steps that are not counted")
    for step in (0, 0):
        worker.take(step)
    text = worker.step.lower(*worker.arguments(0)).compile().as_text()
    print(table(seconds(traced(worker, 0), purposes(text))))
    needed = needed_flops(worker.model.config, load(Path(options.batches))[0], passes=4)
    rate = matmul_rate(settings.dtype)
    print(f"\nproducts that useful tokens need: {needed / rate:.2f} s at the fastest product, {rate / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "Hugging Face folder of a Llama", required=True)
    flags.DEFINE_string("batches", None, "file of token ids that run.py has written", required=True)
    flags.DEFINE_integer("row_length", 768, "positions of a packed row")
    app.run(main)
