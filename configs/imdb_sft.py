"""Supervised fine-tuning of a tiny GPT-2 on openings of IMDb reviews: the first stage of the sentiment experiment.

python -m dpo_jax.train --config=configs/imdb_sft.py --workdir=runs/imdb/sft
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.data.source = "imdb_openings"
    config.data.prompt_length = 1  # the BOS
    config.data.answer_length = 63
    config.loss.name = "sft"
    config.optim.learning_rate = 2e-3
    config.optim.weight_decay = 0.1
    config.train.epochs = 1.0
    config.eval.every = 50
    config.checkpoint.every = 100
    return config
