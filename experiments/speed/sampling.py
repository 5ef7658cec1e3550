"""How fast answers are sampled, beside transformers' generate: the same prompts and weights, batch by batch in turns.

python -m experiments.speed.sampling --model=runs/smollm2/hf --data=harmless-base-test.jsonl.gz --out=runs/sampling
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from dpo_jax.allocator import keep_freed_pages
from dpo_jax.convert.pretrained import open_pretrained
from dpo_jax.sampling import make_sampler, row_draws
from experiments.speed import work
from experiments.speed.run import DEVICES, Process, trl_environment

NOBODY = -1  # no token: answers end when there is no more room


def read_prompts(data: str, tokenizer: str, count: int) -> list[list[int]]:
    """The first prompts of a file that have at most 128 tokens."""
    short = (pair.prompt.tolist() for pair in work.read_pairs(data, tokenizer) if len(pair.prompt) <= 128)
    return list(itertools.islice(short, count))


class OurSampler:
    """Samples the same batch again and again, each time with other random numbers.

    Args:
      model_folder: a Hugging Face folder.
      prompts: tokens of each.
      new_tokens: how many are sampled for each.
      dtype: of weights and products.

    Attributes:
      config: of the model.
      program: the compiled sampler.
    """

    def __init__(self, model_folder: str, prompts: Sequence[Sequence[int]], new_tokens: int, dtype: str) -> None:
        keep_freed_pages()  # as all that runs on the product's devices does
        pretrained = open_pretrained(model_folder)
        model = pretrained.model(dtype=jnp.dtype(dtype), unroll=1)
        self.config = model.config
        self._params = jax.tree.map(jnp.asarray, pretrained.params(model))
        self._lengths_R = np.array(list(map(len, prompts)), np.int32)
        self._tokens_RP = np.zeros((len(prompts), self._lengths_R.max()), np.int32)
        for row, prompt in zip(self._tokens_RP, prompts, strict=True):
            row[: len(prompt)] = prompt
        self._numbers = itertools.count()
        sampler = make_sampler(model, max_new_tokens=new_tokens, eos=NOBODY)
        self.program = jax.jit(sampler).lower(*self._arguments(0)).compile()

    def _arguments(self, number: int) -> tuple[Any, ...]:
        rows = len(self._lengths_R)
        draws_R2, warmth_R = row_draws(number, np.arange(rows)), np.ones(rows, np.float32)
        return self._params, self._tokens_RP, self._lengths_R, draws_R2, warmth_R

    def __call__(self) -> int:
        """Samples a batch; its number of tokens."""
        return int(np.sum(self.program(*self._arguments(next(self._numbers))).length_R))


def measure(sample: OurSampler, peer: Process, batches: int) -> dict[str, Any]:
    """Tokens a second of both, in turns; the first batch of each is not counted."""
    ours, theirs = [], []
    for number in range(batches + 1):
        begin = time.perf_counter()
        tokens = sample()
        ours.append(tokens / (time.perf_counter() - begin))
        answer = peer.ask("sample")
        theirs.append(answer["tokens"] / answer["seconds"])
        logging.info("batch %d: ours %.1f tokens/s, transformers %.1f", number, ours[-1], theirs[-1])
    return {"ours": ours[1:], "transformers": theirs[1:], "load": os.getloadavg()[0]}


def main(_: Sequence[str]) -> None:
    """Measures and prints."""
    options = flags.FLAGS
    out = Path(options.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    prompts = read_prompts(options.data, options.model, options.prompts)
    (out / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    python = options.trl_python or trl_environment(out / "trl_environment")
    script = str(Path(__file__).with_name("generate_worker.py"))
    settings = {"model": options.model, "prompts": str(out / "prompts.json")}
    settings |= {"new_tokens": options.new_tokens, "dtype": options.dtype}
    command = [python, script, json.dumps(settings)]
    peer = Process("transformers", command, DEVICES["cpu"].environment, out / "workers.log")
    sample = OurSampler(options.model, prompts, options.new_tokens, options.dtype)
    result = measure(sample, peer, options.batches)
    peer.end()
    (out / "sampling.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    ours, theirs = (float(np.mean(result[side])) for side in ("ours", "transformers"))
    print(
        f"{len(prompts)} prompts of up to {max(map(len, prompts))} tokens, {options.new_tokens} new tokens each, "
        f"{options.dtype}: ours {ours:.0f} tokens/s, transformers {theirs:.0f}, × {ours / theirs:.2f}; "
        f"load {result['load']:.1f}. Numbers are in {out / 'sampling.json'}."
    )


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "Hugging Face folder of a Llama", required=True)
    flags.DEFINE_string("data", None, "preference pairs, whose prompts are continued", required=True)
    flags.DEFINE_string("out", None, "where results and scratch files go", required=True)
    flags.DEFINE_string("trl_python", None, "interpreter with transformers and torch; None makes an environment")
    flags.DEFINE_integer("prompts", 64, "prompts at a time")
    flags.DEFINE_integer("new_tokens", 64, "tokens sampled for each")
    flags.DEFINE_integer("batches", 3, "batches that count, after the first")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of weights and products of both")
    app.run(main)
