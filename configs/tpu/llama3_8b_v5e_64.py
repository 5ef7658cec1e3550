"""DPO of Llama-3-8B on 64 chips of v5e.

    python -m dpo_jax.plan --config=configs/tpu/llama3_8b_v5e_64.py
    python -m dpo_jax.train --config=configs/tpu/llama3_8b_v5e_64.py --workdir=FOLDER --config.data.path=FILE

experiments/tpu/README.md has the plan.
"""

from ml_collections import ConfigDict

from configs.tpu.base import pod_config


def get_config() -> ConfigDict:
    config = pod_config("v5e:8x8", "meta-llama/Meta-Llama-3-8B", "llama3_8b")
    config.parallel.update(fsdp=64, tensor=1)
    config.train.micro_batches = 1
    return config
