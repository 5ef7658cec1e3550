"""A whole run in seconds: prepared pairs, a tokenizer and a judge in a folder, a small model, and its config."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from configs import base
from dpo_jax.config import Config, from_config_dict
from dpo_jax.data.example import Answer, Example
from dpo_jax.data.imdb import Review
from dpo_jax.data.prepared_writer import write_examples
from dpo_jax.data.tokenizer import save_tokenizer, tokenizer_fingerprint, train_tokenizer
from dpo_jax.rewards import train_reward
from dpo_jax.types import CHOSEN, REJECTED
from tests import compiled

ROOT = Path(__file__).parent.parent
VOCAB = 270  # the bytes, the special tokens and a few merges
BATCH, EXAMPLES = 4, 26  # an epoch of 6.5 steps: epochs end in the middle of a batch


def write_data(folder: Path, *, answers: int = 2, seed: int = 0, longest: int = 8, name: str = "examples") -> Path:
    """Writes a data folder: tokenizer, judge and prepared examples; returns that of the examples."""
    tokenizer = folder / f"tokenizer-{VOCAB}"
    if not tokenizer.is_dir():
        save_tokenizer(train_tokenizer(["so good a film", "so bad a film"] * 3, VOCAB), tokenizer)
        words = ("good", "bad")
        reviews = [Review(i, f"a {words[1 - i % 2]} film {i}", i % 2) for i in range(12)]
        train_reward("sentiment", reviews).save(folder / "reward-sentiment")
    splits = {"train": make_examples(EXAMPLES, answers, seed, longest), "eval": make_examples(6, answers, seed + 1, 8)}
    write_examples(splits, folder / name, name="tiny", tokenizer=tokenizer_fingerprint(tokenizer))
    return folder / name


def make_examples(count: int, answers: int, seed: int, longest: int = 8) -> list[Example]:
    """Chosen answers are of high tokens, rejected ones of low: there is something to be learned."""
    rng = np.random.default_rng(seed)

    def answer(good: bool) -> Answer:
        low, high = (140, VOCAB) if good else (4, 140)
        tokens = rng.integers(low, high, rng.integers(2, longest + 1)).astype(np.int32)
        return Answer(tokens, np.ones(len(tokens), np.float32), CHOSEN if good else REJECTED, float(good))

    prompts = [rng.integers(4, VOCAB, rng.integers(1, 4)).astype(np.int32) for _ in range(count)]
    kinds = [(True, False) if answers == 2 else (i % 2 == 0,) for i in range(count)]
    return [Example(i, p, tuple(map(answer, k))) for i, (p, k) in enumerate(zip(prompts, kinds, strict=True))]


def config_dict(data: Path, **changes: Any) -> ConfigDict:
    """The config of a run of 10 steps on what ``write_data`` wrote into ``data``; keys with dots as keywords' keys."""
    config = base.get_config()
    config.data.update(path=str(data / "examples"), dir=str(data), vocab_size=VOCAB, batch_size=BATCH)
    config.data.update(prompt_length=3, answer_length=8)
    config.model.update(context_length=12, width=16, layers=2, heads=2, mlp_width=32, unroll=1)
    config.optim.update(learning_rate=1e-2, warmup_steps=2)
    config.train.update(steps=10, log_every=3, micro_batches=2, head_chunk=64)
    config.eval.update(every=4, examples=5, prompts=4)
    config.checkpoint.update(every=5, keep=None)
    config.parallel.devices = 1
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


def make_config(data: Path, **changes: Any) -> Config:
    return from_config_dict(config_dict(data, **changes))


def results(workdir: Path) -> dict[str, bytes]:
    """What must be the same of two runs, byte by byte: numbers, samples, and the hashes of the last state."""
    files = [workdir / "metrics.jsonl", workdir / "summary.json", *sorted((workdir / "samples").glob("*"))]
    content = {str(path.relative_to(workdir)): path.read_bytes() for path in files if path.is_file()}
    last = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    meta = json.loads((workdir / "checkpoints" / str(last) / "meta.json").read_text())
    return content | {f"{last}/{name}": value.encode() for name, value in meta["hashes"].items()}


def environment() -> dict[str, str]:
    """Of programs that tests start: one device."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": compiled.FLAGS}


def command(*arguments: str, program: str = "dpo_jax.train") -> list[str]:
    return [sys.executable, "-m", program, *arguments]


def call(*arguments: str, program: str = "dpo_jax.train") -> subprocess.CompletedProcess[str]:
    """Runs a program to its end."""
    return subprocess.run(
        command(*arguments, program=program), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900
    )


def write_config(path: Path, data: Path, **changes: Any) -> Path:
    """A config file for the command line, whose run is ``config_dict``'s."""
    path.write_text(
        "import pathlib\nfrom tests import tiny_run\n\n\ndef get_config():\n"
        f"    return tiny_run.config_dict(pathlib.Path({str(data)!r}), **{changes!r})\n"
    )
    return path
