"""DPO of low-rank adapters on Llama-3-70B, on the pod of llama3_70b_v5e_256.

    python -m dpo_jax.plan --config=configs/tpu/llama3_70b_v5e_256_lora.py
    python -m dpo_jax.train --config=configs/tpu/llama3_70b_v5e_256_lora.py --workdir=FOLDER --config.data.path=FILE

experiments/tpu/README.md has the plan.
"""

from ml_collections import ConfigDict

from configs.tpu import llama3_70b_v5e_256
from configs.tpu.base import with_adapters


def get_config() -> ConfigDict:
    config = with_adapters(llama3_70b_v5e_256.get_config())
    config.model.remat = "dots"  # there is room: no second copy of the model, no moments
    return config
