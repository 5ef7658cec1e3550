"""DPO on the pairs of the sentiment experiment (arXiv 2305.18290, §6.1), from the SFT model.

Any other preference loss by --config.loss.name. The pairs of a prompt lie side by side, where each of its four answers
is read once for all six; configs/imdb_dpo.py:pairs shuffles all pairs, and reads each answer three times an epoch.

python -m dpo_jax.train --config=configs/imdb_dpo.py --workdir=runs/imdb/dpo
"""

from ml_collections import ConfigDict

from configs import base


def get_config(together: str = "prompts") -> ConfigDict:
    """``together``: what lies side by side: prompts (all pairs of one) or pairs (both answers of one)."""
    if together not in ("prompts", "pairs"):
        raise ValueError(f"unknown order {together!r}; known: prompts, pairs")
    config = base.get_config()
    config.data.path = "runs/imdb/preferences/examples"
    config.init.run = "runs/imdb/sft"
    config.optim.update(learning_rate=4e-4, warmup_steps=40, b2=0.98)
    config.eval.update(every=47, prompts=200)
    config.checkpoint.every = 94
    if together == "pairs":
        config.data.batch_size = 32
        config.train.epochs = 1.0
        return config
    # Some eight prompts a step.
    config.data.update(layout="packed", prompt_answers=4, row_length=384, row_examples=24, batch_size=4)
    config.parallel.devices = 1  # four rows are too few to share
    config.train.epochs = 1.5
    return config
