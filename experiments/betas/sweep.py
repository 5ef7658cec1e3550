"""Does β trace out one frontier of reward and KL? DPO Fig. 2 left (arXiv 2305.18290) on the sentiment pairs.

    python -m dpo_jax.sweep --config=experiments/betas/sweep.py --workdir=runs/betas
    python -m dpo_jax.sweep --config=experiments/betas/sweep.py:quick --workdir=runs/betas-quick

starts from runs/imdb (``make demo``).
"""

from ml_collections import ConfigDict

from experiments.imdb.sweeps import SHARED_AXES, get_base


def get_config(size: str = "full") -> ConfigDict:
    return get_base(size, every=24)


def get_axes(size: str = "full") -> dict:
    methods = {f"dpo-{beta:g}": {"loss.beta": beta} for beta in (0.05, 0.1, 1.0, 5.0)}
    methods["preferred-ft"] = {"loss.name": "sft", "reference.store": None}
    return {
        "method": methods,
        **SHARED_AXES[size],
    }
