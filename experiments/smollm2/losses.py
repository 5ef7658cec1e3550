"""DPO, IPO and KTO on a real model: 200 steps of SmolLM2-135M-Instruct on the same pairs, one or two a step.

python -m dpo_jax.sweep --config=experiments/smollm2/losses.py --workdir=runs/smollm2/losses --config.data.path=X
python -m experiments.smollm2.perplexity --workdir=runs/smollm2/losses
"""

from ml_collections import ConfigDict

from experiments.smollm2 import config as smollm2


def get_config() -> ConfigDict:
    config = smollm2.get_config()
    # One row a step: a pair as long as can be, or two shorter ones.
    config.data.update(prompt_length=48, answer_length=40, layout="packed", row_length=128, batch_size=1)
    config.data.on_error = "skip"
    config.model.remat = "none"
    config.reference.store = "runs/smollm2/references"
    config.optim.update(learning_rate=1e-5, warmup_steps=20)
    config.train.update(epochs=None, steps=200, micro_batches=1, log_every=10)
    config.eval.update(every=100, examples=80)
    config.checkpoint.update(every=100, keep=1)
    return config


def get_axes() -> dict:
    return {"loss.name": ["dpo", "ipo", "kto"], "seed": [0, 1, 2]}
