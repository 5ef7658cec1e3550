"""Does KTO do with a tenth of the desirable answers? arXiv 2402.01306, §4.3, on the sentiment pairs.

    python -m experiments.kto.thin
    python -m dpo_jax.sweep --config=experiments/kto/sweep.py --workdir=runs/kto/sweep
    python -m dpo_jax.sweep --config=experiments/kto/sweep.py:quick --workdir=runs/kto/quick

starts from runs/imdb (``make demo``), or runs/small (configs/small.py; ``--source=runs/small``).
"""

from ml_collections import ConfigDict

from experiments.imdb.sweeps import SHARED_AXES, get_base, source_of


def get_config(size: str = "full") -> ConfigDict:
    return get_base(size, every=60 if size == "small" else 47)


def get_axes(size: str = "full") -> dict:
    def kto(folder: str, desirable_weight: float) -> dict:
        # As many answers in a batch as DPO has.
        unpaired = {"data.path": f"{source_of(size)}/answers/{folder}", "data.batch_size": 64, "train.epochs": None}
        steps = {"train.steps": lambda c: c.train.steps or 187}
        return {"loss.name": "kto", "loss.desirable_weight": desirable_weight, **unpaired, **steps}

    methods = {
        "dpo": {},
        "kto": kto("all", 1.0),
        "kto-tenth": kto("tenth", 12.0),
        "kto-tenth-unweighted": kto("tenth", 1.0),
    }
    return {"method": methods, **SHARED_AXES[size]}
