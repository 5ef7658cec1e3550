"""DPO of Llama-3-8B on v5p-16: 8 chips.

    python -m dpo_jax.plan --config=configs/tpu/llama3_8b_v5p_16.py
    python -m dpo_jax.train --config=configs/tpu/llama3_8b_v5p_16.py --workdir=FOLDER --config.data.path=FILE

experiments/tpu/README.md has the plan.
"""

from ml_collections import ConfigDict

from configs.tpu.base import pod_config


def get_config() -> ConfigDict:
    config = pod_config("v5p:2x2x2", "meta-llama/Meta-Llama-3-8B", "llama3_8b")
    config.parallel.update(fsdp=8, tensor=1)
    config.model.remat = "dots"
    config.train.micro_batches = 4
    return config
