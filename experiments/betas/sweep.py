"""Does β trace out one frontier of reward and KL? DPO Fig. 2 left (arXiv 2305.18290) on the sentiment pairs.

    python -m experiments.betas.run --size=small --workdir=runs/betas                               # with RLHF
    python -m dpo_jax.sweep --config=experiments/betas/sweep.py --workdir=runs/betas                # without
    python -m dpo_jax.sweep --config=experiments/betas/sweep.py:quick --workdir=runs/betas-quick

starts from runs/imdb (``make demo``), or runs/small (configs/small.py).
"""

from ml_collections import ConfigDict

from experiments.imdb.sweeps import SHARED_AXES, get_base

# Where the rewards of RLOO come from, and its β: standard deviations of the reward a nat.
RLHF = {f"rloo-{reward}": (reward, 0.05) for reward in ("learned", "truth")}


def get_config(size: str = "full") -> ConfigDict:
    return get_base(size, every=20 if size == "small" else 24)


def get_axes(size: str = "full") -> dict:
    methods = {f"dpo-{beta:g}": {"loss.beta": beta} for beta in (0.05, 0.1, 1.0, 5.0)}
    methods["preferred-ft"] = {"loss.name": "sft", "reference.store": None}
    for alpha in (0.1, 1.0):
        changes = {"loss.name": "unlikelihood", "loss.unlikelihood_weight": alpha, "reference.store": None}
        methods[f"unlikelihood-{alpha:g}"] = changes
    return {"method": methods, **SHARED_AXES[size]}


def get_rlhf_axes(size: str = "full") -> dict:
    """The same for RLOO, which scores the reference's answers itself: they are new at every step."""
    return {"method": {name: {"reference.store": None} for name in RLHF}, **SHARED_AXES[size]}
