"""Does β trace out one frontier of reward and KL? DPO Fig. 2 left (arXiv 2305.18290) on the sentiment pairs.

    python -m dpo_jax.sweep --config=experiments/betas/sweep.py --workdir=runs/betas
    python -m dpo_jax.sweep --config=experiments/betas/sweep.py:quick --workdir=runs/betas-quick

starts from runs/imdb (``make demo``).
"""

from ml_collections import ConfigDict

from configs import imdb_dpo


def get_config(size: str = "full") -> ConfigDict:
    config = imdb_dpo.get_config()
    config.reference.store = "runs/imdb/references"
    config.eval.update(every=24, prompts=400)
    config.checkpoint.update(every=94, keep=1)
    if size == "quick":
        config.train.update(epochs=None, steps=24)
        config.optim.warmup_steps = 5
        config.eval.update(every=8, prompts=100, examples=64)
    return config


def get_axes(size: str = "full") -> dict:
    methods = {f"dpo-{beta:g}": {"loss.beta": beta} for beta in (0.05, 0.1, 1.0, 5.0)}
    methods["preferred-ft"] = {"loss.name": "sft", "reference.store": None}
    quick = size == "quick"
    return {
        "method": methods,
        "optim.learning_rate": [4e-4] if quick else [1e-4, 2e-4, 4e-4],
        "seed": [0] if quick else [0, 1, 2],
    }
