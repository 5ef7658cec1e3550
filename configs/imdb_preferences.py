"""Preference pairs of the sentiment experiment: four answers of the SFT model to each prompt, ranked by the truth.

python -m dpo_jax.prefer --config=configs/imdb_preferences.py --workdir=runs/imdb/preferences
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.init.run = "runs/imdb/sft"
    config.prefer.batch_size = 200  # rows that the evaluation of DPO samples too: one program for both
    config.train.steps = 1  # nothing is trained
    return config
