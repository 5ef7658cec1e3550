"""Which losses survive flipped labels? Four methods, shares of noise, learning rates and seeds, on the sentiment pairs.

    python -m dpo_jax.sweep --config=experiments/noise/sweep.py --workdir=runs/noise
    python -m dpo_jax.sweep --config=experiments/noise/sweep.py:quick --workdir=runs/noise-quick

starts from runs/imdb (``make demo``).
"""

from ml_collections import ConfigDict

from configs import imdb_dpo


def get_config(size: str = "full") -> ConfigDict:
    config = imdb_dpo.get_config()
    config.reference.store = "runs/imdb/references"
    config.eval.update(every=47, prompts=400)
    config.checkpoint.update(every=94, keep=1)
    if size == "quick":
        config.train.update(epochs=None, steps=24)
        config.optim.warmup_steps = 5
        config.eval.update(every=8, prompts=100, examples=64)
    return config


def get_axes(size: str = "full") -> dict:
    told = {"loss.label_smoothing": lambda c: c.data.flip}  # cdpo and robust are told the true share, as in the paper
    methods = {
        "dpo": {"loss.name": "dpo"},
        "cdpo": {"loss.name": "dpo", **told},
        "robust": {"loss.name": "robust", **told},
        "ipo": {"loss.name": "ipo"},
    }
    quick = size == "quick"
    return {
        "method": methods,
        "data.flip": [0.0, 0.4] if quick else [0.0, 0.1, 0.2, 0.3, 0.4],
        "optim.learning_rate": [4e-4] if quick else [1e-4, 2e-4, 4e-4],
        "seed": [0] if quick else [0, 1, 2],
    }
