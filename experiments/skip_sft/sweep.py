"""What does DPO do without supervised fine-tuning before it? Three starts, two learning rates, on the sentiment pairs.

    python -m dpo_jax.train --config=configs/imdb_sft.py --config.train.steps=120 --workdir=runs/imdb/sft-brief
    python -m dpo_jax.sweep --config=experiments/skip_sft/sweep.py --workdir=runs/skip_sft
    python -m dpo_jax.sweep --config=experiments/skip_sft/sweep.py:quick --workdir=runs/skip_sft-quick

starts from runs/imdb (``make demo``), or runs/small (configs/small.py).
"""

from ml_collections import ConfigDict

from experiments.imdb.sweeps import SHARED_AXES, get_base, source_of

RATES = {"full": [2e-4, 4e-4], "small": [1e-3, 3e-3], "quick": [4e-4]}


def get_config(size: str = "full") -> ConfigDict:
    config = get_base(size, every=60 if size == "small" else 47)
    config.reference.store = None  # each start is a reference of its own
    return config


def get_axes(size: str = "full") -> dict:
    starts = {
        "fine-tuned": {},
        "briefly": {"init.run": f"{source_of(size)}/sft-brief"},  # a tenth of the steps
        "not": {"init.run": None},  # random parameters
    }
    return {"start": starts, "optim.learning_rate": RATES[size], "seed": SHARED_AXES[size]["seed"]}
