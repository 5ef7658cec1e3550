"""Where the time of a training step or of a batch of samples goes: traced operations, by what they are for.

    python -m experiments.speed.breakdown --model=runs/smollm2/hf --batches=runs/speed/smollm2/batches.json
    python -m experiments.speed.breakdown --model=runs/smollm2/hf --prompts=runs/speed/sampling/prompts.json

On one core: on several, XLA runs products beside other operations, and one's time cannot be told from the other's.
"""

from __future__ import annotations

import collections
import gzip
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from dpo_jax.hlo import computations
from dpo_jax.main import command, parse_flags
from experiments.speed import sampling
from experiments.speed.ours import Settings, Worker, matmul_rate
from experiments.speed.work import load, needed_flops, sampling_flops

PASSES = ("reference", "forward", "backward")
READINGS = ("prompts", "new tokens")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"calls=%?([\w.\-]+)")
_MATRIX = re.compile(r"/attention/(?:query|key|value|out)/")
_CONTROL = re.compile(r"\b(?:while|conditional|call)\(")

# From an operation's path in the program, and whether it is a matrix product, to (what it is of, the table's column).
Purpose = Callable[[str, bool], tuple[str, str]]


def purposes(text: str, purpose: Purpose) -> dict[str, tuple[str, str]]:
    """The purpose of every operation of a compiled program that does work, by its name.

    Args:
      text: ``compiled.as_text()``.
      purpose: of an operation.
    """
    bodies, found = computations(text), {}
    for body in bodies.values():
        around = [name for name in map(_name, body.lines) if "attention/while" in name][:1]
        for line in body.lines:
            instruction = _INSTRUCTION.match(line)
            if instruction and not _CONTROL.search(line):
                called = _CALLED.search(line)
                lines = [line, *(bodies[called[1]].lines if called else [])]
                found[instruction[1]] = purpose(_path(lines, around), any(" dot(" in part for part in lines))
    return found


def _name(line: str) -> str:
    match = _NAME.search(line)
    return match[1] if match else ""


def _path(lines: Sequence[str], around: Sequence[str]) -> str:
    names = [name for name in map(_name, lines) if name] or [*around, ""]  # some products in loops have none
    return next((name for name in names if "/blocks/" in name or "/while/body" in name), names[0])


def of_a_step(path: str, product: bool) -> tuple[str, str]:
    """The purpose of an operation of a training step."""
    which = "backward" if "transpose(" in path else "forward" if "jvp(" in path else "reference"
    if "/blocks/" in path or "._read/while/" in path:  # the loop over layers cuts out and keeps what is theirs
        return _of_a_layer(path, product), which
    if "/while/body" in path:
        return ("head: products" if product else "head: all else"), which
    return ("optimizer" if "/cond/" in path or "/branch" in path else "all else"), ""


def of_samples(path: str, product: bool) -> tuple[str, str]:
    """The purpose of an operation of the sampler."""
    which = "prompts" if ".read/" in path else "new tokens"
    if "/blocks/" in path:
        return _of_a_layer(path, product), which
    if "/while/body" in path and which == "new tokens":
        return ("head: products" if product else "drawing"), which
    return "all else", ""


def _of_a_layer(path: str, product: bool) -> str:
    if "/attention/" in path and not _MATRIX.search(path):
        return "attention, without its matrices"
    return "layers: products" if product else "layers: all else"


def seconds(events: Iterable[Mapping], purpose: Mapping[str, tuple[str, str]]) -> dict[tuple[str, str], float]:
    """Time of a trace's operations, summed by purpose."""
    total: dict[tuple[str, str], float] = collections.defaultdict(float)
    for event in events:
        if event.get("ph") == "X" and event["name"] in purpose:
            total[purpose[event["name"]]] += event["dur"] / 1e6
    return total


def traced(work: Callable[[], Any]) -> Iterator[Mapping]:
    """The events of what is done."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            work()
        (path,) = Path(folder).rglob("*.trace.json.gz")
        yield from json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def table(total: Mapping[tuple[str, str], float], columns: Sequence[str]) -> str:
    """A row a part: its seconds in each column, and its share of all."""
    whole = sum(total.values())
    lines = [
        f"| | {''.join(f'{column}, s | ' for column in columns)}all, s | share |",
        "|---" * (len(columns) + 3) + "|",
    ]
    parts = sorted({part for part, _ in total}, key=lambda p: -sum(s for (q, _), s in total.items() if q == p))
    for part in parts:
        own = sum(value for (name, _), value in total.items() if name == part)
        cells = " | ".join(f"{total[part, c]:.2f}" if (part, c) in total else "–" for c in columns)
        lines.append(f"| {part} | {cells} | {own:.2f} | {own / whole:.0%} |")
    return "\n".join(lines)


def report(
    work: Callable[[], Any], text: str, purpose: Purpose, columns: Sequence[str], needed: float, dtype: str
) -> str:
    """The table of what is done twice to warm up and once to be traced, and what its useful products need at least."""
    logging.info("two rounds that are not counted, and one that is")
    for _ in range(2):
        work()
    rate = matmul_rate(dtype)
    least = f"products that useful tokens need: {needed / rate:.2f} s at the fastest product, {rate / 1e9:.0f} GFLOP/s"
    return table(seconds(traced(work), purposes(text, purpose)), columns) + f"\n\n{least}"


def of_training(model: str, batches: str, row_length: int, dtype: str) -> str:
    """The report of a training step."""
    worker = Worker(Settings(model, batches, dtype=dtype, row_length=row_length, remat="dots", head_chunk=512))
    needed = needed_flops(worker.model.config, load(Path(batches))[0], passes=4)
    text = worker.step.lower(*worker.arguments(0)).compile().as_text()
    return report(lambda: worker.take(0), text, of_a_step, PASSES, needed, dtype)


def of_sampling(model: str, prompts: str, new_tokens: int, dtype: str) -> str:
    """The report of a batch of samples."""
    rows = json.loads(Path(prompts).read_text(encoding="utf-8"))
    sample = sampling.OurSampler(sampling.Settings(model, len(rows), new_tokens, (), dtype), rows)
    needed = sampling_flops(sample.config, list(map(len, rows)), new_tokens)
    return report(sample, sample.program.as_text(), of_samples, READINGS, needed, dtype)


@command()
def main(_: Sequence[str]) -> None:
    """Measures and prints."""
    options = flags.FLAGS
    if (options.batches is None) == (options.prompts is None):
        raise app.UsageError("give --batches, for a training step, or --prompts, for a batch of samples")
    jax.config.update("jax_enable_compilation_cache", False)  # a kept program has the names of the code it was made by
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if options.batches is not None:
        print(of_training(options.model, options.batches, options.row_length, options.dtype))
    else:
        print(of_sampling(options.model, options.prompts, options.new_tokens, options.dtype))


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "Hugging Face folder of a Llama", required=True)
    flags.DEFINE_string("batches", None, "file of token ids that run.py has written: its first step is taken")
    flags.DEFINE_integer("row_length", 768, "positions of a packed row of a training step")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of activations and products")
    flags.DEFINE_string("prompts", None, "file of token ids that sampling.py has written: its prompts are answered")
    flags.DEFINE_integer("new_tokens", 64, "tokens sampled for each prompt")
    app.run(main, flags_parser=parse_flags)
