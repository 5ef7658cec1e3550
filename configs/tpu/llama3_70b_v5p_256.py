"""DPO of Llama-3-70B on v5p-256: 128 chips.

    python -m dpo_jax.plan --config=configs/tpu/llama3_70b_v5p_256.py
    python -m dpo_jax.train --config=configs/tpu/llama3_70b_v5p_256.py --workdir=FOLDER --config.data.path=FILE

experiments/tpu/README.md has the plan.
"""

from ml_collections import ConfigDict

from configs.tpu.base import pod_config


def get_config() -> ConfigDict:
    config = pod_config("v5p:4x4x8", "meta-llama/Meta-Llama-3-70B", "llama3_70b")
    config.parallel.update(fsdp=64, tensor=2)
    config.model.remat = "dots"
    config.train.micro_batches = 1
    return config
