"""What a loss costs: the step of every loss, in turns on the same pairs, against the step of dpo.

python -m experiments.speed.losses --batches=runs/speed/small/batches.json --model=runs/speed/small/model
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import app, flags, logging

from dpo_jax.losses import LOSSES
from dpo_jax.main import command, parse_flags
from experiments.speed.ours import Settings, Worker

BASE = "dpo"


def measure(workers: Mapping[str, Worker], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step of every worker, in turns, each round from another one on; a first round is not counted."""
    names = list(workers)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            begin = time.perf_counter()
            workers[name].take(number % len(workers[name].batches))
            seconds[name].append(time.perf_counter() - begin)
        logging.info("round %d of %d", number, rounds)
    return {name: values[1:] for name, values in seconds.items()}


def table(seconds: Mapping[str, Sequence[float]]) -> str:
    """A row a loss: the median over rounds of its time over that of dpo in the same round, and their quartiles."""
    lines = ["| loss | × dpo, median | quartiles |", "|---|---|---|"]
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds[BASE], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        lines.append(f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines)


@command()
def main(_: Sequence[str]) -> None:
    """Measures and prints."""
    options = flags.FLAGS
    names = options.losses or list(LOSSES)
    settings = {"model": options.model, "batches": options.batches, "row_length": options.row_length}
    workers = {}
    for name in dict.fromkeys([BASE, *names]):
        workers[name] = Worker(Settings(**settings, loss=name))
        logging.info("%s is ready", name)
    found = table(measure(workers, options.rounds))
    path = Path(options.batches).with_name("losses.md")
    path.write_text(found + "\n", encoding="utf-8")
    print(f"{found}\n\n{options.rounds} rounds; load {os.getloadavg()[0]:.1f}. The table is in {path}.")


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "Hugging Face folder of a Llama", required=True)
    flags.DEFINE_string("batches", None, "file of token ids that run.py has written", required=True)
    flags.DEFINE_integer("row_length", 768, "positions of a packed row")
    flags.DEFINE_list("losses", None, "losses to measure; all, where it is not given")
    flags.DEFINE_integer("rounds", 8, "steps of each loss that count")
    app.run(main, flags_parser=parse_flags)
