"""The chain of the sentiment experiment at a tenth of its size and with twice its prompts, for sweeps of many runs.

    python -m experiments.imdb.run --configs=configs/small.py:{stage} --workdir=runs/small

The stage is one of sft, preferences and dpo.
"""

import importlib

from ml_collections import ConfigDict


def get_config(stage: str = "dpo") -> ConfigDict:
    config = importlib.import_module(f"configs.imdb_{stage}").get_config()
    config.data.vocab_size = 2048
    config.data.answer_length = 32 - config.data.prompt_length
    config.model.update(context_length=32, width=96, layers=2, heads=3, mlp_width=384, unroll=2)
    config.parallel.devices = 1
    config.prefer.update(prompts=2000, eval_prompts=400)
    if stage == "sft":
        config.train.steps = 2400
        config.optim.learning_rate = 3e-3
        config.eval.every = 600
        config.checkpoint.every = 600
    if stage == "dpo":
        config.data.batch_size = 64
        config.optim.learning_rate = 1e-3
        config.eval.update(every=47, examples=512, prompts=400)
    return config
