"""The chain of the sentiment experiment with a model of 0.17 M parameters and twice the prompts, for large sweeps.

    python -m experiments.imdb.run --configs=configs/small.py:{stage} --workdir=runs/small

The stage is one of sft, preferences and dpo. It takes some three minutes on two cores.
"""

import importlib

from ml_collections import ConfigDict

STAGES = ("sft", "preferences", "dpo")


def get_config(stage: str = "dpo") -> ConfigDict:
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; known: {', '.join(STAGES)}")
    argument = ["pairs"] if stage == "dpo" else []
    config = importlib.import_module(f"configs.imdb_{stage}").get_config(*argument)
    config.data.vocab_size = 1024
    config.data.answer_length = 32 - config.data.prompt_length
    config.model.update(context_length=32, width=64, layers=2, heads=2, mlp_width=256, unroll=2)
    config.parallel.devices = 1
    config.prefer.update(prompts=2000, eval_prompts=400)
    if stage == "sft":
        config.train.steps = 2400
        config.optim.learning_rate = 4e-3
        config.eval.every = 800
        config.checkpoint.every = 800
    if stage == "dpo":
        config.optim.learning_rate = 1e-3
        config.train.update(epochs=None, steps=120)
        config.eval.update(every=40, examples=256, prompts=400)
    return config
