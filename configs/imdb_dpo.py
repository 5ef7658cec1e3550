"""DPO on the pairs of the sentiment experiment (arXiv 2305.18290, §6.1), from the SFT model.

Any other preference loss by --config.loss.name.

python -m dpo_jax.train --config=configs/imdb_dpo.py --workdir=runs/imdb/dpo
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.data.path = "runs/imdb/preferences/examples"
    config.data.batch_size = 32
    config.init.run = "runs/imdb/sft"
    config.optim.update(learning_rate=4e-4, warmup_steps=40, b2=0.98)
    config.train.epochs = 1.0
    config.eval.every = 45
    config.eval.prompts = 200
    config.checkpoint.every = 90
    return config
