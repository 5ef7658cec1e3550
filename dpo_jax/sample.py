"""Answers of a run's policy and of what it started from, side by side.

python -m dpo_jax.sample --workdir=runs/imdb/dpo --prompt="The film" --completions=2
"""

from __future__ import annotations

import itertools
import json
import shutil
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax import buckets
from dpo_jax.answering import Answerer
from dpo_jax.data.encode import Encoder
from dpo_jax.data.tokenizer import decode, open_tokenizer
from dpo_jax.models import rolled
from dpo_jax.parallel import DataParallel
from dpo_jax.progress import Progress
from dpo_jax.sampling import row_draws
from dpo_jax.sources import encoding_of, tokenizer_folder
from dpo_jax.start import check_tokenizer, load_policy, make_start_model, start_params
from dpo_jax.types import Params
from dpo_jax.workdir import read_config
from dpo_jax.writers import split_lines

SIDES = ("policy", "reference")


@dataclass(frozen=True)
class Request:
    """How to sample.

    Attributes:
      completions: answers to each prompt, of each side.
      temperature: 0 takes the likeliest token.
      top_k: draws among this many of the likeliest tokens; None is all.
      top_p: draws among the likeliest tokens that add up to this; None is all.
      max_new_tokens: room for an answer; None is the run's answer_length.
      seed: of the draws; both sides draw with the same random numbers.
      rows: answers that are sampled at a time.
    """

    completions: int = 1
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None
    seed: int = 0
    rows: int = 16


@dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
      side: one of SIDES.
      prompt: number of the prompt.
      completion: number of the answer to it.
      text: without special tokens.
      tokens: sampled tokens, the end included.
      logp: of the answer under the side that gave it, nats.
      ended: whether it came to an end by itself.
    """

    side: str
    prompt: int
    completion: int
    text: str
    tokens: int
    logp: float
    ended: bool


@dataclass(frozen=True)
class Result:
    """All answers, and how fast they came: sampled tokens a second without compilation, all devices together."""

    completions: tuple[Completion, ...]
    tokens_per_second: float


def sample_run(workdir: Path, prompts: Sequence[str], request: Request) -> Result:
    """Samples from the newest policy of a run and from its reference.

    Args:
      workdir: the run's folder.
      prompts: texts; they become tokens as they did in training.
      request: how to sample.

    Raises:
      OSError: no run, no tokenizer, a damaged checkpoint.
      ValueError: no prompts, no checkpoint, a limit that is out of range.
    """
    if not prompts or request.completions < 1 or request.temperature < 0:
        raise ValueError("give at least one prompt, one completion, and a temperature of 0 or more")
    config = read_config(workdir)
    tokenizer = open_tokenizer(tokenizer_folder(config.data))
    encoder = Encoder(tokenizer, encoding_of(config.data))
    tokens = [encoder.prompt_tokens(prompt) for prompt in prompts]
    model = make_start_model(config, len(tokenizer))
    check_tokenizer(tokenizer, model)
    parallel = DataParallel(jax.local_devices()[:1])
    answer = Answerer(
        rolled(model),
        parallel,
        prompt_length=max(map(len, tokens)),
        rows=min(request.rows, len(prompts) * request.completions),
        max_new_tokens=config.data.answer_length if request.max_new_tokens is None else request.max_new_tokens,
        eos=tokenizer.eos_token_id,
        top_k=request.top_k,
        top_p=request.top_p,
    )
    found: list[Completion] = []
    clock = _Clock()
    for side, load in zip(
        SIDES, (lambda: load_policy(workdir, model), lambda: start_params(config, model)), strict=True
    ):
        params = parallel.replicate(load())
        found += _answers(side, answer, params, tokens, tokenizer, request, clock)
        del params  # only one side is in memory at a time
    return Result(tuple(found), clock.rate())


class _Clock:
    """Tokens a second over all batches but the first, which is compiled."""

    def __init__(self) -> None:
        self._seconds, self._tokens, self._batches = 0.0, 0, 0

    def add(self, seconds: float, tokens: int) -> None:
        if self._batches:
            self._seconds, self._tokens = self._seconds + seconds, self._tokens + tokens
        self._batches += 1

    def rate(self) -> float:
        return self._tokens / self._seconds if self._seconds else float("nan")


def _answers(
    side: str,
    answer: Answerer,
    params: Params,
    prompts: Sequence[np.ndarray],
    tokenizer: Any,
    request: Request,
    clock: _Clock,
) -> Iterator[Completion]:
    """Answers of one side. A row's draws depend on (seed, prompt, completion) alone, however rows are batched."""
    jobs = [(p, c) for p in range(len(prompts)) for c in range(request.completions)]
    asked, draws_R2 = [prompts[p] for p, _ in jobs], row_draws(request.seed, np.arange(len(jobs)))
    left = iter(jobs)
    with Progress(len(jobs), f"sampling {side}", unit="answer") as progress:
        for part in answer.parts(params, asked, draws_R2, request.temperature):
            begin = time.monotonic()
            out = part.result()
            clock.add(time.monotonic() - begin, int(out.length_R.sum()))
            for r, (p, c) in enumerate(itertools.islice(left, len(out.length_R))):
                n = int(out.length_R[r])
                text = decode(tokenizer, np.asarray(out.tokens_RT[r, :n]))
                yield Completion(side, p, c, text, n, float(out.logp_RT[r, :n].sum()), bool(out.ended_R[r]))
            progress.update(len(out.length_R))


def write_jsonl(path: Path, prompts: Sequence[str], result: Result) -> None:
    """One line an answer: the prompt's text and the completion's fields."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (
        json.dumps({**vars(c), "prompt": prompts[c.prompt], "prompt_number": c.prompt}, ensure_ascii=False) + "\n"
        for c in result.completions
    )
    path.write_text("".join(lines), encoding="utf-8")


def side_by_side(prompts: Sequence[str], result: Result, width: int) -> str:
    """Policy on the left, reference on the right, ``width`` characters in all."""
    column = max(20, (width - 3) // 2)
    by_key = {(c.side, c.prompt, c.completion): c for c in result.completions}
    lines = []
    for p, prompt in enumerate(prompts):
        lines += ["═" * width, *textwrap.wrap(prompt, width)]
        for number in sorted({c.completion for c in result.completions if c.prompt == p}):
            lines.append("─" * column + "─┬─" + "─" * column)
            cells = [_cell(by_key[side, p, number], column) for side in SIDES]
            for i in range(max(map(len, cells))):
                left, right = (cell[i] if i < len(cell) else "" for cell in cells)
                lines.append(f"{left:<{column}} │ {right}")
    lines += ["═" * width, f"{result.tokens_per_second:.0f} tokens/s"]
    return "\n".join(lines)


def _cell(completion: Completion, width: int) -> list[str]:
    end = "" if completion.ended else ", cut off"
    head = f"[{completion.side}: {completion.tokens} tokens, {completion.logp:.1f} nats{end}]"
    body = [piece for line in completion.text.splitlines() for piece in textwrap.wrap(line, width) or [""]]
    return [*textwrap.wrap(head, width), *body]


def read_prompts(path: Path) -> list[str]:
    """The field ``prompt`` of every line of a JSONL file, or the lines of a text file.

    Raises:
      OSError: it cannot be read.
      ValueError: a line without a prompt.
    """
    prompts = []
    for number, line in enumerate(split_lines(path.read_text(encoding="utf-8")), start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(line)
            continue
        try:
            prompts.append(str(json.loads(line)["prompt"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: expected an object with the field prompt ({error!r})") from error
    return prompts


def main(workdir: str, prompts: Sequence[str], out: str, request: Request) -> None:
    """Samples, prints and writes.

    Args:
      workdir: the run's folder.
      prompts: texts.
      out: JSONL file for the answers.
      request: how to sample.
    """
    result = sample_run(buckets.fetched(workdir), prompts, request)
    print(side_by_side(prompts, result, shutil.get_terminal_size((120, 24)).columns))
    write_jsonl(buckets.local(out, "--out"), prompts, result)
    print(f"written to {out}")


if __name__ == "__main__":
    from absl import app, flags

    from dpo_jax.main import command, parse_flags

    flags.DEFINE_string("workdir", None, "folder of the run", required=True)
    flags.DEFINE_multi_string("prompt", [], "a prompt; may be given several times")
    flags.DEFINE_string("prompts", None, "file of prompts: JSONL with the field prompt, or a line each")
    flags.DEFINE_integer("completions", 1, "answers to each prompt, of each side")
    flags.DEFINE_float("temperature", 1.0, "0 takes the likeliest token")
    flags.DEFINE_integer("top_k", None, "draw among so many of the likeliest tokens")
    flags.DEFINE_float("top_p", None, "draw among the likeliest tokens that add up to this")
    flags.DEFINE_integer("max_new_tokens", None, "room for an answer; the run's answer_length by default")
    flags.DEFINE_integer("seed", 0, "of the draws")
    flags.DEFINE_integer("rows", 16, "answers that are sampled at a time; the next begins where one has ended")
    flags.DEFINE_string("out", None, "JSONL file; <workdir>/samples/compared.jsonl by default")

    def _main(_: list[str]) -> None:
        f = flags.FLAGS
        with command():
            prompts = [*f.prompt, *(read_prompts(Path(f.prompts)) if f.prompts else [])]
            request = Request(f.completions, f.temperature, f.top_k, f.top_p, f.max_new_tokens, f.seed, f.rows)
            main(f.workdir, prompts, f.out or f"{f.workdir}/samples/compared.jsonl", request)

    app.run(_main, flags_parser=parse_flags)
