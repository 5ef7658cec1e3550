"""DPO of SmolLM2-135M-Instruct on a file of preferences, through its own chat template; sft by --config.loss.name=sft.

    python -m dpo_jax.train --config=experiments/smollm2/config.py --workdir=runs/smollm2/dpo --config.data.path=X.jsonl
    python -m dpo_jax.sample --workdir=runs/smollm2/dpo --prompt="Why is the sky blue?"
    python -m dpo_jax.export --workdir=runs/smollm2/dpo --out=runs/smollm2/dpo-hf

Two pairs of 256 tokens take 10 to 20 seconds a step on two CPU cores, and 4 GB of memory.
"""

from ml_collections import ConfigDict

from configs import base

MODEL = "runs/smollm2/hf"


def get_config() -> ConfigDict:
    config = base.get_config()
    config.init.hf = MODEL
    config.data.update(source="files", dir="runs/smollm2/data", tokenizer=MODEL, template="chat")
    config.data.update(prompt_length=128, answer_length=128, batch_size=4)
    config.model.update(remat="full", unroll=1)
    config.optim.update(learning_rate=1e-5, warmup_steps=10, b2=0.999)
    config.train.update(epochs=1.0, head_chunk=128, micro_batches=2, log_every=1)
    config.eval.update(every=100, examples=32)
    config.checkpoint.update(every=100, keep=1)
    config.parallel.devices = 1
    return config
