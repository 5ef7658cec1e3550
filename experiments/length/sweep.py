"""Where longer answers win more often, which losses lengthen the policy's own answers?

    python -m experiments.length.pairs                                # pairs with a bias, in runs/imdb
    python -m dpo_jax.sweep --config=experiments/length/sweep.py --workdir=runs/length/sweep
    python -m dpo_jax.sweep --config=experiments/length/sweep.py:quick --workdir=runs/length/quick

starts from runs/imdb (``make demo``), or runs/small (configs/small.py; ``--source=runs/small``).
"""

from ml_collections import ConfigDict

from experiments.imdb.sweeps import get_base, source_of

# At 4e-4 answers of the full size fill their room of 55 tokens in 24 steps.
RATE = {"full": 1e-4, "small": 1e-3, "quick": 1e-4}


def get_config(size: str = "full") -> ConfigDict:
    config = get_base(size, every=20)
    config.data.path = f"{source_of(size)}/length_biased"
    config.optim.learning_rate = RATE[size]
    if size == "full":
        config.train.update(epochs=None, steps=80)
        config.checkpoint.every = 80
    return config


def get_axes(size: str = "full") -> dict:
    methods = {
        "dpo": {"loss.name": "dpo"},
        "r_dpo": {"loss.name": "r_dpo", "loss.length_penalty": 0.05},
        "ld_dpo": {"loss.name": "dpo", "loss.reduction": "desensitized", "loss.length_alpha": 0.5},
        "sigmoid_norm": {"loss.name": "sigmoid_norm", "loss.beta": 2.0},
        "simpo": {"loss.name": "simpo", "reference.store": None},  # it reads no reference
    }
    return {"method": methods, "seed": [0] if size == "quick" else [0, 1, 2]}
