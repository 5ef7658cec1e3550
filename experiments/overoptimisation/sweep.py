"""Does reward rise and fall with KL, and is it best before the first epoch ends? arXiv 2406.02900, on sentiment pairs.

    python -m dpo_jax.sweep --config=experiments/overoptimisation/sweep.py --workdir=runs/overoptimisation
    python -m dpo_jax.sweep --config=experiments/overoptimisation/sweep.py:quick --workdir=runs/overoptimisation-quick

starts from runs/imdb (``make demo``), or runs/small (configs/small.py).
"""

from ml_collections import ConfigDict

from experiments.imdb.sweeps import SHARED_AXES, get_base

# One rate a size: what varies is β, which buys KL.
RATE = {"full": 2e-4, "small": 1e-3, "quick": 4e-4}
BETAS = {"full": [0.01, 0.05, 0.1, 0.5], "small": [0.05, 0.5], "quick": [0.05]}


def get_config(size: str = "full") -> ConfigDict:
    config = get_base(size, every=44 if size == "small" else 24)
    config.optim.learning_rate = RATE[size]
    config.optim.schedule = "constant"  # a decay would hide how far a longer run goes
    if size != "quick":
        config.train.update(epochs=2.0, steps=None)
    return config


def get_axes(size: str = "full") -> dict:
    losses = {"dpo": {"loss.name": "dpo"}, "ipo": {"loss.name": "ipo"}, "slic": {"loss.name": "hinge"}}
    return {"method": losses, "loss.beta": BETAS[size], "seed": SHARED_AXES[size]["seed"]}
