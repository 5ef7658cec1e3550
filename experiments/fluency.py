"""How likely the samples of a sweep are under another language model: bits a byte, a judge that no method optimises.

    python -m experiments.fluency --workdir=runs/skip_sft --judge=runs/imdb/sft

The judge reads prompt and answer as text, with a tokenizer of its own; the bytes of the answer alone count. The first
samples of a run are those of its reference.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from dpo_jax import results, sources
from dpo_jax.data.example import Answer
from dpo_jax.evaluate import Completer
from dpo_jax.main import user_errors
from dpo_jax.opened import shared_devices
from dpo_jax.results import Result, Samples
from dpo_jax.shared import Shared
from dpo_jax.start import load_policy, make_start_model
from dpo_jax.types import CHOSEN
from dpo_jax.workdir import read_config
from experiments.changes import mean_and_error

# (bits that all answers cost, their bytes) of an evaluation's samples.
Judge = Callable[[Samples], tuple[float, int]]


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="folder of a sweep")
    parser.add_argument("--judge", type=Path, required=True, help="workdir of a language model's run")
    parser.add_argument("--compare", help="axis of the methods; the first with several values by default")
    arguments = parser.parse_args(argv)
    with user_errors():
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
        before, after = ([bits / size for bits, size in map(judge, part)] for part in (first, last))
        cells = [[s.rewards.mean() for s in last], [s.kl.mean() for s in last]]
        reward, kl = (mean_and_error(np.array(values)) for values in cells)
        bits = f"{mean_and_error(np.array(before))} → {mean_and_error(np.array(after))}"
        yield f"| {' '.join(labels)} | {len(own)} | {reward} | {kl} | {bits} |"


def open_judge(workdir: Path) -> Judge:
    """A judge from a run's policy.

    Args:
      workdir: of the run.

    Raises:
      OSError: no run, or one that cannot be read.
    """
    config = read_config(workdir)
    tokenizer = sources.imdb_tokenizer(config.data)
    model = make_start_model(config, len(tokenizer))
    parallel = shared_devices(Shared(), config, model)
    length = config.model.context_length
    completer = Completer(
        model,
        tokenizer,
        parallel,
        prompt_length=length // 2 + 1,
        answer_length=length,
        rows=100,
        head_chunk=config.train.head_chunk,
    )
    params = parallel.replicate(load_policy(workdir, model))

    def encode(text: str, room: int) -> np.ndarray:
        return np.array(tokenizer.encode(text, add_special_tokens=False)[:room], np.int32)

    def judge(samples: Samples) -> tuple[float, int]:
        prompts, answers, size = [], [], 0
        for prompt, answer in zip(samples.prompts, samples.answers, strict=True):
            before = np.concatenate([[tokenizer.bos_token_id], encode(prompt, length // 2)]).astype(np.int32)
            tokens = encode(answer, length - len(before))
            if len(tokens):  # an answer of its end alone has no bytes
                prompts.append(before)
                answers.append(Answer(tokens, np.ones(len(tokens), np.float32), CHOSEN))
                size += len(tokenizer.decode(tokens).encode())
        return float(-completer.logps(params, prompts, answers).sum() / math.log(2)), size

    return judge


if __name__ == "__main__":
    main()
