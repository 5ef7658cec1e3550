"""DPO of Mistral-7B on v4-32: 16 chips.

    python -m dpo_jax.plan --config=configs/tpu/mistral_7b_v4_32.py
    python -m dpo_jax.train --config=configs/tpu/mistral_7b_v4_32.py --workdir=FOLDER --config.data.path=FILE

experiments/tpu/README.md has the plan.
"""

from ml_collections import ConfigDict

from configs.tpu.base import pod_config


def get_config() -> ConfigDict:
    config = pod_config("v4:2x2x4", "mistralai/Mistral-7B-v0.1", "mistral_7b")
    config.parallel.update(fsdp=16, tensor=1)
    config.model.remat = "dots"
    config.train.micro_batches = 4
    return config
