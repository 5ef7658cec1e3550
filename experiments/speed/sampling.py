"""How fast answers are sampled, beside transformers' generate: the same prompts and weights, in turns.

python -m experiments.speed.sampling --model=runs/smollm2/hf --data=harmless-base-test.jsonl.gz --out=runs/sampling

With --ends="<|im_end|>,Human,Assistant" --new_tokens=256 --prompts=512, answers end where the model ends them or begins
another turn: then generate goes on until the longest of 64 has ended, and ours answers the next prompt.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from dpo_jax.allocator import keep_freed_pages
from dpo_jax.convert.pretrained import open_pretrained
from dpo_jax.data.tokenizer import open_tokenizer
from dpo_jax.main import command, parse_flags
from dpo_jax.sampling import make_sampler, row_draws
from experiments.speed import work
from experiments.speed.run import DEVICES, Process, trl_environment

NOBODY = -1  # no token: answers end when there is no more room


@dataclass(frozen=True)
class Settings:
    """Of sampling, on both sides.

    Attributes:
      model: a Hugging Face folder.
      rows: prompts that are answered at a time.
      new_tokens: most tokens of an answer.
      ends: tokens any of which ends an answer; without any, all answers are as long as they may be.
      dtype: of weights and products.
    """

    model: str
    rows: int
    new_tokens: int
    ends: tuple[int, ...]
    dtype: str


def read_prompts(data: str, tokenizer: str, count: int) -> list[list[int]]:
    """The first prompts of a file that have at most 128 tokens."""
    short = (pair.prompt.tolist() for pair in work.read_pairs(data, tokenizer) if len(pair.prompt) <= 128)
    return list(itertools.islice(short, count))


def first_tokens(tokenizer: str, words: Sequence[str]) -> tuple[int, ...]:
    """The token that each word is, or begins with; in a text, special tokens may be written like others."""
    opened = open_tokenizer(tokenizer)
    known = opened.get_vocab()
    return tuple(known[w] if w in known else opened.encode(w, add_special_tokens=False)[0] for w in words)


class OurSampler:
    """Answers the same prompts again and again, each time with other random numbers.

    Args:
      settings: of sampling.
      prompts: tokens of each.

    Attributes:
      config: of the model.
      program: the compiled sampler.
    """

    def __init__(self, settings: Settings, prompts: Sequence[Sequence[int]]) -> None:
        keep_freed_pages()  # as all that runs on the product's devices does
        pretrained = open_pretrained(settings.model)
        model = pretrained.model(dtype=jnp.dtype(settings.dtype), unroll=1)
        self.config = model.config
        self._params = jax.tree.map(jnp.asarray, pretrained.params(model))
        self._lengths_R = np.array(list(map(len, prompts)), np.int32)
        self._tokens_RP = np.zeros((len(prompts), self._lengths_R.max()), np.int32)
        for row, prompt in zip(self._tokens_RP, prompts, strict=True):
            row[: len(prompt)] = prompt
        self._numbers = itertools.count()
        limits = {"max_new_tokens": settings.new_tokens, "eos": settings.ends or NOBODY}
        sampler = make_sampler(model, seats=settings.rows, **limits)
        self.program = jax.jit(sampler).lower(*self._arguments(0)).compile()

    def _arguments(self, number: int) -> tuple[Any, ...]:
        rows = len(self._lengths_R)
        draws_R2, warmth_R = row_draws(number, np.arange(rows)), np.ones(rows, np.float32)
        return self._params, self._tokens_RP, self._lengths_R, draws_R2, warmth_R

    def __call__(self) -> int:
        """Answers all prompts; the number of tokens."""
        return int(np.sum(self.program(*self._arguments(next(self._numbers))).length_R))


def measure(sample: OurSampler, peer: Process, warm: int, batches: int) -> dict[str, Any]:
    """Tokens of all answers, and the seconds that they took, of both in turns; the ``warm`` first are left out."""
    found: dict[str, Any] = {"ours": [], "transformers": []}
    for number in range(warm + batches):
        begin = time.perf_counter()
        tokens = sample()
        found["ours"].append({"tokens": tokens, "seconds": time.perf_counter() - begin})
        found["transformers"].append(peer.ask("sample"))
        rates = ", ".join(f"{side} {last['tokens'] / last['seconds']:.1f}" for side, (*_, last) in found.items())
        logging.info("batch %d: tokens/s of %s", number, rates)
    return {side: counts[warm:] for side, counts in found.items()} | {"load": os.getloadavg()[0]}


def report(settings: Settings, prompts: Sequence[Sequence[int]], result: Mapping[str, Any]) -> str:
    """What was measured, in words."""
    total = {
        side: {name: sum(batch[name] for batch in result[side]) for name in ("tokens", "seconds")}
        for side in ("ours", "transformers")
    }
    ours, theirs = (side["tokens"] / side["seconds"] for side in total.values())
    count = len(prompts) * len(result["ours"])
    lengths = " and ".join(f"{side['tokens'] / count:.1f}" for side in total.values())
    return (
        f"{len(prompts)} prompts of up to {max(map(len, prompts))} tokens, {settings.rows} at a time, at most "
        f"{settings.new_tokens} new tokens each ({lengths} on average), {settings.dtype}: ours {ours:.0f} tokens/s, "
        f"transformers {theirs:.0f}, × {ours / theirs:.2f}; load {result['load']:.1f}."
    )


@command()
def main(_: Sequence[str]) -> None:
    """Measures and prints."""
    options = flags.FLAGS
    out = Path(options.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    ends = first_tokens(options.model, options.ends)
    settings = Settings(options.model, options.rows, options.new_tokens, ends, options.dtype)
    prompts = read_prompts(options.data, options.model, options.prompts)
    (out / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    python = options.trl_python or trl_environment(out / "trl_environment")
    script = str(Path(__file__).with_name("generate_worker.py"))
    command = [python, script, json.dumps({"prompts": str(out / "prompts.json"), **asdict(settings)})]
    peer = Process("transformers", command, DEVICES["cpu"].environment, out / "workers.log")
    result = measure(OurSampler(settings, prompts), peer, options.warm, options.batches)
    peer.end()
    (out / "sampling.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(report(settings, prompts, result), f"Numbers are in {out / 'sampling.json'}.")


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "Hugging Face folder of a Llama", required=True)
    flags.DEFINE_string("data", None, "preference pairs, whose prompts are continued", required=True)
    flags.DEFINE_string("out", None, "where results and scratch files go", required=True)
    flags.DEFINE_string("trl_python", None, "interpreter with transformers and torch; None makes an environment")
    flags.DEFINE_integer("prompts", 64, "prompts that are answered, each time that is measured")
    flags.DEFINE_integer("rows", 64, "prompts that are answered at a time")
    flags.DEFINE_integer("new_tokens", 64, "most tokens of an answer")
    flags.DEFINE_list("ends", [], "words whose first tokens end an answer; without any, all are as long as may be")
    flags.DEFINE_integer("warm", 1, "times that all prompts are answered before it counts")
    flags.DEFINE_integer("batches", 3, "times that all prompts are answered and that count")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of weights and products of both")
    app.run(main, flags_parser=parse_flags)
