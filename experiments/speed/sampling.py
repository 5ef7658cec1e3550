"""How fast answers are sampled, beside transformers' generate: the same prompts and weights, batch by batch in turns.

python -m experiments.speed.sampling --model=runs/smollm2/hf --data=harmless-base-test.jsonl.gz --out=runs/sampling
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from dpo_jax.convert.pretrained import open_pretrained
from dpo_jax.parallel import DataParallel
from dpo_jax.sampling import make_sampler, row_draws
from experiments.speed import work
from experiments.speed.run import Process, trl_environment

NOBODY = -1  # no token: answers end when there is no more room


def read_prompts(data: str, tokenizer: str, count: int) -> list[list[int]]:
    """The first prompts of a file that have at most 128 tokens."""
    batches = work.read_batches(data, tokenizer, positions=1024, steps=count)
    short = (e.prompt.tolist() for batch in batches for e in batch if len(e.prompt) <= 128)
    return list(itertools.islice(short, count))


def our_sampler(model_folder: str, prompts: Sequence[Sequence[int]], new_tokens: int, dtype: str) -> Callable[[], int]:
    """A function that samples one batch and returns its number of tokens."""
    pretrained = open_pretrained(model_folder)
    model = pretrained.model(dtype=jnp.dtype(dtype), unroll=1)
    parallel = DataParallel(jax.local_devices()[:1])
    draw = parallel.row_function(make_sampler(model, max_new_tokens=new_tokens, eos=NOBODY), "sample")
    params = parallel.replicate(pretrained.params(model))
    lengths_R = np.array(list(map(len, prompts)), np.int32)
    tokens_RP = np.zeros((len(prompts), lengths_R.max()), np.int32)
    for row, prompt in zip(tokens_RP, prompts, strict=True):
        row[: len(prompt)] = prompt
    warmth_R, numbers = np.ones(len(prompts), np.float32), itertools.count()

    def sample() -> int:
        out = draw(params, tokens_RP, lengths_R, row_draws(next(numbers), np.arange(len(prompts))), warmth_R).result()
        return int(out.length_R.sum())

    return sample


def measure(sample: Callable[[], int], peer: Process, batches: int) -> dict[str, Any]:
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
    peer = Process("transformers", [python, script, json.dumps(settings)], {}, out / "workers.log")
    sample = our_sampler(options.model, prompts, options.new_tokens, options.dtype)
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
