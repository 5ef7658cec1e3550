"""How likely the samples of a sweep are under another language model: bits a byte, a judge that no method optimises.

    python -m experiments.fluency --workdir=runs/skip_sft --judge=runs/imdb/sft

The judge reads prompt and answer as text, with a tokenizer of its own; the bytes of the answer alone count. The first
samples of a run are those of its reference.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpo_jax import results
from dpo_jax.data.example import Answer
from dpo_jax.data.tokenizer import open_tokenizer
from dpo_jax.evaluate import Completer
from dpo_jax.main import command
from dpo_jax.opened import shared_devices
from dpo_jax.results import Result
from dpo_jax.shared import Shared
from dpo_jax.sources import tokenizer_folder
from dpo_jax.start import load_policy, make_start_model, start_params
from dpo_jax.types import CHOSEN
from dpo_jax.workdir import read_config
from experiments.changes import mean_and_error

ROOM = 256  # tokens of prompt and answer that are read


@dataclass(frozen=True)
class Cost:
    """Of texts under a language model: −log-probability in nats, and their bytes and tokens."""

    nats: float
    bytes: int
    tokens: int

    @property
    def bits_a_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


# (prompts, answers) → what the answers cost after their prompts.
Judge = Callable[[Sequence[str], Sequence[str]], Cost]


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="folder of a sweep")
    parser.add_argument("--judge", type=Path, required=True, help="workdir of a language model's run")
    parser.add_argument("--compare", help="axis of the methods; the first with several values by default")
    arguments = parser.parse_args(argv)
    with command():
        _, runs, missing = results.load(arguments.workdir, arguments.compare)
        print("\n".join(table(runs, open_judge(arguments.judge))))
        print(f"\n{len(runs)} runs, {len(missing)} not finished")


def table(runs: Sequence[Result], judge: Judge) -> Iterator[str]:
    """One line for each method, condition and setting: the mean over seeds and its standard error.

    Args:
      runs: of a sweep.
      judge: of texts.
    """
    yield "| method | seeds | reward, last | KL, nats | bits a byte: first → last |"
    yield "|---|---|---|---|---|"
    groups: dict[tuple[str, ...], list[Result]] = {}
    for run in runs:
        groups.setdefault((run.method, *run.condition, *run.setting), []).append(run)
    for labels, own in groups.items():
        first, last = ([list(run.samples.values())[i] for run in own] for i in (0, -1))
        before, after = ([judge(s.prompts, s.answers).bits_a_byte for s in part] for part in (first, last))
        cells = [[s.rewards.mean() for s in last], [s.kl.mean() for s in last]]
        reward, kl = (mean_and_error(np.array(values)) for values in cells)
        bits = f"{mean_and_error(np.array(before))} → {mean_and_error(np.array(after))}"
        yield f"| {' '.join(labels)} | {len(own)} | {reward} | {kl} | {bits} |"


def open_judge(workdir: Path, *, start: bool = False) -> Judge:
    """A judge from a run's policy.

    Args:
      workdir: of the run.
      start: whether it is what the run started from instead.

    Raises:
      OSError: no run, or one that cannot be read.
    """
    config = read_config(workdir)
    tokenizer = open_tokenizer(tokenizer_folder(config.data))
    model = make_start_model(config, len(tokenizer))
    parallel = shared_devices(Shared(), config, model)
    room = min(ROOM, model.config.context_length)
    completer = Completer(
        model,
        tokenizer,
        parallel,
        prompt_length=room // 2,
        answer_length=room,
        rows=20,
        head_chunk=config.train.head_chunk,
    )
    params = parallel.replicate(start_params(config, model) if start else load_policy(workdir, model))

    def encode(text: str, most: int) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)[:most]

    def judge(prompts: Sequence[str], answers: Sequence[str]) -> Cost:
        befores, afters, size = [], [], 0
        for prompt, answer in zip(prompts, answers, strict=True):
            before = [tokenizer.bos_token_id, *encode(prompt, room // 2 - 1)]
            tokens = encode(answer, room - len(before))
            if tokens:  # an answer of its end alone has no bytes
                befores.append(np.array(before, np.int32))
                afters.append(Answer(np.array(tokens, np.int32), np.ones(len(tokens), np.float32), CHOSEN))
                size += len(tokenizer.decode(tokens).encode())
        nats = -float(completer.logps(params, befores, afters).result().sum(dtype=np.float64))
        return Cost(nats, size, sum(len(answer.tokens) for answer in afters))

    return judge


if __name__ == "__main__":
    main()
