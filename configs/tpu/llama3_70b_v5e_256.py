"""DPO of Llama-3-70B on 256 chips of v5e.

    python -m dpo_jax.plan --config=configs/tpu/llama3_70b_v5e_256.py
    python -m dpo_jax.train --config=configs/tpu/llama3_70b_v5e_256.py --workdir=FOLDER --config.data.path=FILE

experiments/tpu/README.md has the plan.
"""

from ml_collections import ConfigDict

from configs.tpu.base import pod_config


def get_config() -> ConfigDict:
    config = pod_config("v5e:16x16", "meta-llama/Meta-Llama-3-70B", "llama3_70b")
    config.parallel.update(fsdp=32, tensor=8)
    config.train.micro_batches = 2
    return config
