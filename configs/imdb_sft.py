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
    # Whole openings side by side in rows without padding; small batches, since the number of updates is what is short.
    config.data.update(layout="packed", row_length=128, batch_size=4)
    config.parallel.devices = 1  # four rows are too few to share
    config.loss.name = "sft"
    config.optim.update(learning_rate=1e-3, b2=0.98, weight_decay=0.1, warmup_steps=60)
    config.train.steps = 1000
    config.eval.every = 250
    config.checkpoint.every = 250
    return config
