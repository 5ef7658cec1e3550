"""Where the rewards of RLOO come from: a learned reward model, or the ground truth that judges the experiment.

Both are scaled to mean 0 and standard deviation 1 over training answers (arXiv 1909.08593, §2.1), so that a β means the
same for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpo_jax import sources
from dpo_jax.data.example import Answer
from dpo_jax.data.tokenizer import decode
from dpo_jax.opened import OpenedRun
from experiments.rlhf import reward_model
from experiments.rlhf.rloo import Judge

_SCALED_ON = 512  # training pairs


def learned(run: OpenedRun, folder: Path) -> Judge:
    """A reward model of the run's pairs, fitted when it does not lie in ``folder`` yet."""
    params, _ = reward_model.fit(run, folder)
    judge = reward_model.make_judge(run)
    return _scaled(run, lambda prompts, answers: judge(params, list(zip(prompts, answers, strict=True))))


def truth(run: OpenedRun) -> Judge:
    """The reward that evaluates the run."""
    reward = sources.imdb_reward(run.config.data, run.config.eval.reward)

    def judge(prompts: Sequence[np.ndarray], answers: Sequence[Answer]) -> np.ndarray:
        both = zip(prompts, answers, strict=True)
        return reward([decode(run.data.tokenizer, np.concatenate([p, a.tokens])) for p, a in both])

    return _scaled(run, judge)


def _scaled(run: OpenedRun, judge: Judge) -> Judge:
    examples = [run.data.train[i] for i in range(min(_SCALED_ON, len(run.data.train)))]
    pairs = [(example.prompt, answer) for example in examples for answer in example.answers]
    known = judge([prompt for prompt, _ in pairs], [answer for _, answer in pairs])
    mean, deviation = known.mean(), known.std()
    return lambda prompts, answers: (judge(prompts, answers) - mean) / deviation
