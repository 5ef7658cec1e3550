"""DPO of Pythia-2.8B on 16 chips of v5e.

    python -m dpo_jax.plan --config=configs/tpu/pythia_2_8b_v5e_16.py
    python -m dpo_jax.train --config=configs/tpu/pythia_2_8b_v5e_16.py --workdir=FOLDER --config.data.path=FILE

experiments/tpu/README.md has the plan.
"""

from ml_collections import ConfigDict

from configs.tpu.base import pod_config


def get_config() -> ConfigDict:
    config = pod_config("v5e:4x4", "EleutherAI/pythia-2.8b", "pythia_2_8b")
    config.parallel.update(fsdp=16, tensor=1)
    config.model.remat = "dots"
    config.train.micro_batches = 4
    return config
