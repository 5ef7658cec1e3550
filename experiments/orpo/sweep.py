"""Does supervised fine-tuning teach the rejected answers too, and does ORPO's odds ratio prevent it?

    python -m dpo_jax.sweep --config=experiments/orpo/sweep.py --workdir=runs/orpo
    python -m dpo_jax.sweep --config=experiments/orpo/sweep.py:quick --workdir=runs/orpo-quick

starts from runs/imdb (``make demo``).
"""

from ml_collections import ConfigDict

from experiments.imdb.sweeps import get_base


def get_config(size: str = "full") -> ConfigDict:
    config = get_base(size, every=20)
    config.reference.store = None  # neither loss reads a reference
    config.eval.prompts = 0
    if size == "full":
        config.train.update(epochs=None, steps=100)
        config.checkpoint.every = 100
    return config


def get_axes(size: str = "full") -> dict:
    weights = [0.1] if size == "quick" else [0.1, 0.5, 1.0]
    orpo = {f"orpo {weight}": {"loss.name": "orpo", "loss.beta": weight} for weight in weights}
    return {
        "method": {"sft": {"loss.name": "sft"}, **orpo},
        "start": {"fine-tuned": {}, "scratch": {"init.run": None}},
        "seed": [0] if size == "quick" else [0, 1, 2],
    }
