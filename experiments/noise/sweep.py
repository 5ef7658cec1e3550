"""Which losses survive flipped labels? Four methods, shares of noise, learning rates and seeds, on the sentiment pairs.

    python -m dpo_jax.sweep --config=experiments/noise/sweep.py --workdir=runs/noise
    python -m dpo_jax.sweep --config=experiments/noise/sweep.py:quick --workdir=runs/noise-quick

starts from runs/imdb (``make demo``), or runs/small (configs/small.py).
"""

from ml_collections import ConfigDict

from experiments.imdb.sweeps import SHARED_AXES, get_base

# Shares of the training labels.
FLIPS = {"full": [0.0, 0.1, 0.2, 0.3, 0.4], "small": [0.0, 0.2, 0.4], "quick": [0.0, 0.4]}


def get_config(size: str = "full") -> ConfigDict:
    return get_base(size, every=60 if size == "small" else 47)


def get_axes(size: str = "full") -> dict:
    told = {"loss.label_smoothing": lambda c: c.data.flip}  # cdpo and robust are told the true share, as in the paper
    methods = {
        "dpo": {"loss.name": "dpo"},
        "cdpo": {"loss.name": "dpo", **told},
        "robust": {"loss.name": "robust", **told},
        "ipo": {"loss.name": "ipo"},
    }
    return {
        "method": methods,
        "data.flip": FLIPS[size],
        **SHARED_AXES[size],
    }
