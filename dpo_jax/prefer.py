"""Preference pairs as in the DPO paper's sentiment experiment (arXiv 2305.18290, §6.1).

Prompts are the first tokens of reviews that nothing else has seen; the policy of ``init.run`` answers each several
times; the ground-truth reward ranks the answers; all pairs of a prompt are kept. The result is a prepared dataset.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from dpo_jax import buckets, sources
from dpo_jax.config import Config, to_json
from dpo_jax.data.example import Answer, Example
from dpo_jax.data.imdb import load_reviews
from dpo_jax.data.pairs import pairs_of
from dpo_jax.data.prepared import is_prepared
from dpo_jax.data.prepared_writer import write_examples
from dpo_jax.data.tokenizer import tokenizer_fingerprint
from dpo_jax.data.windows import prompt_tokens, review_windows
from dpo_jax.opened import shared_completer, shared_devices, shared_reward
from dpo_jax.progress import Progress, duration
from dpo_jax.rewards import Reward
from dpo_jax.shared import Shared
from dpo_jax.start import check_tokenizer, load_policy, make_start_model
from dpo_jax.workdir import owned

EXAMPLES_FOLDER = "examples"
PARTS = {"train": "prompts", "eval": "eval"}  # split of the pairs → part of the reviews


def run(config: Config, workdir: str | os.PathLike[str], shared: Shared | None = None) -> Path:
    """Samples, ranks and writes the pairs, once.

    Args:
      config: the experiment; ``config.prefer`` and ``config.init.run`` matter.
      workdir: its folder; the pairs go to ``examples`` in it, and appear there when all are written.
      shared: what it has in common with the runs of this process.

    Returns:
      The folder of the pairs, for ``config.data.path``.

    Raises:
      ValueError: no policy to sample from, or a workdir of another config.
      OSError: the workdir cannot be written.
    """
    with buckets.mirrored(workdir) as (folder, _), owned(folder, config):
        return _run(config, folder, shared or Shared())


def _run(config: Config, workdir: Path, shared: Shared) -> Path:
    folder = workdir / EXAMPLES_FOLDER
    if is_prepared(folder):
        logging.info("%s is finished; remove it, or choose another --workdir, to sample anew.", folder)
        return folder
    if config.init.run is None:
        raise ValueError("config.init.run is not set: give the workdir of the run whose policy answers the prompts")
    maker = _PairMaker(config, shared)
    counts = {"train": config.prefer.prompts, "eval": config.prefer.eval_prompts}
    metadata = write_examples(
        {split: maker.pairs(split, count) for split, count in counts.items()},
        folder,
        name="imdb_preferences",
        tokenizer=tokenizer_fingerprint(sources.tokenizer_folder(config.data)),
        to_text=maker.completer.text,
        details={"config": json.loads(to_json(config)), "reward": maker.reward.fingerprint()},
    )
    maker.report(metadata.counts)
    logging.info("preference pairs in %s", folder)
    return folder


class _PairMaker:
    """Samples answers in batches and pairs them; counts what it does."""

    def __init__(self, config: Config, shared: Shared) -> None:
        self.config = config
        self.tokenizer = sources.imdb_tokenizer(config.data)
        self.reward: Reward = shared_reward(shared, config.data, config.prefer.reward)
        model = make_start_model(config, len(self.tokenizer))
        check_tokenizer(self.tokenizer, model)
        parallel = shared_devices(shared, config, model)
        self.params = parallel.replicate(load_policy(buckets.fetched(config.init.run or ""), model))
        self.completer = shared_completer(shared, config, model, self.tokenizer, parallel, config.prefer.batch_size)
        self.tokens = self.seconds = 0.0
        self.prompts = self.duplicates = self.ties = 0
        self.gaps: list[float] = []

    def pairs(self, split: str, count: int) -> Iterator[Example]:
        """All pairs of the first ``count`` prompts of a split."""
        prompts = self._prompts(PARTS[split], count)
        answers = self.config.prefer.answers
        per_batch = max(1, self.completer.rows // answers)
        seed = self.config.seed + (split == "eval")
        with Progress(len(prompts), f"sampling {split}", unit="prompt") as progress:
            for start in range(0, len(prompts), per_batch):
                part = prompts[start : start + per_batch]
                repeated = [prompt for _, prompt in part for _ in range(answers)]
                sampled = self._sample(repeated, seed, start * answers)
                for i, (uid, prompt) in enumerate(part):
                    yield from self._rank(uid, prompt, sampled[i * answers : (i + 1) * answers])
                progress.update(len(part))

    def _prompts(self, part: str, count: int) -> list[tuple[int, np.ndarray]]:
        config = self.config
        reviews = load_reviews(part, config.data.dir, config.data.reviews)
        if count > len(reviews):
            raise ValueError(
                f"{count} prompts are asked of part {part!r}, which has {len(reviews)} reviews; ask for fewer"
            )
        window = config.data.prompt_length + config.data.answer_length
        openings = review_windows(reviews[:count], self.tokenizer, window)
        bounds = config.prefer.min_prompt, config.prefer.max_prompt
        return [(uid, prompt_tokens(opening, config.seed, uid, *bounds)) for uid, opening in openings]

    def _sample(self, prompts: Sequence[np.ndarray], seed: int, first: int) -> list[tuple[Answer, float]]:
        begin = time.monotonic()
        heat = self.config.prefer.temperature
        answers, _ = self.completer.sample(self.params, prompts, seed, heat, first_row=first).result()
        if self.tokens:  # the first batch compiles
            self.seconds += time.monotonic() - begin
        self.tokens += sum(len(a.tokens) for a in answers) if self.seconds else 1e-9
        texts = [self.completer.text(np.concatenate([p, a.tokens])) for p, a in zip(prompts, answers, strict=True)]
        return list(zip(answers, map(float, self.reward(texts)), strict=True))

    def _rank(self, uid: int, prompt: np.ndarray, answers: Sequence[tuple[Answer, float]]) -> Sequence[Example]:
        pairs = pairs_of(prompt, [(answer.tokens, score) for answer, score in answers], uid)
        self.prompts += 1
        self.duplicates, self.ties = self.duplicates + pairs.duplicates, self.ties + pairs.ties
        self.gaps += [e.answers[0].score - e.answers[1].score for e in pairs.examples]
        return pairs.examples

    def report(self, counts: dict[str, int]) -> None:
        """Says what was made and what was left out."""
        logging.info(
            "%s pairs from %d prompts; left out: %d repeated answers, %d ties; median reward gap %.2f",
            " + ".join(f"{count} {split}" for split, count in counts.items()),
            self.prompts,
            self.duplicates,
            self.ties,
            float(np.median(self.gaps)),
        )
        if self.seconds:
            logging.info("sampled %.0f tokens/s over %s", self.tokens / self.seconds, duration(self.seconds))


if __name__ == "__main__":
    from dpo_jax.main import main

    main(
        "Samples answers from a policy, ranks them by a reward and writes the preference pairs.",
        run,
        "python -m dpo_jax.prefer --config=configs/imdb_preferences.py --workdir=runs/imdb/preferences",
    )
