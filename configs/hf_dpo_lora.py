"""DPO of low-rank adapters on a Hugging Face model: how far does it get when a few percent of the numbers move?

    python -m dpo_jax.train --config=configs/hf_dpo_lora.py --workdir=runs/mine-lora \\
        --config.init.hf=MODEL --config.data.path=FILE
    python -m dpo_jax.export --workdir=runs/mine-lora --out=runs/mine-adapter --adapter   # for PEFT; merged without

The model is frozen and is its own reference, so that there is one copy of it, and no optimizer's state of its size; a
checkpoint holds the adapters alone. Which linear layers have one: config.lora.layers, such as query|value.
"""

from ml_collections import ConfigDict

from configs import hf_dpo


def get_config() -> ConfigDict:
    config = hf_dpo.get_config()
    config.lora.update(rank=16, alpha=32.0, dropout=0.05)
    config.optim.learning_rate = 2e-4  # higher than for whole models, as is usual
    return config
