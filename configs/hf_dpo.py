"""DPO of a Hugging Face model on a file of preferences (JSONL, JSON, Parquet or CSV); sft by --config.loss.name=sft.

    python -m dpo_jax.train --config=configs/hf_dpo.py --workdir=runs/mine \\
        --config.init.hf=MODEL --config.data.path=FILE

MODEL is a folder with config.json, safetensors and a tokenizer, or the id of such a model on the hub.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.data.update(source="files", dir="runs/data")
    config.init.hf = ""  # must be given
    config.data.tokenizer = config.init.get_oneway_ref("hf")  # the model's own
    config.data.update(prompt_length=128, answer_length=128, batch_size=4)
    config.model.update(context_length=256, remat="full", unroll=1)  # sizes are those of init.hf
    config.optim.update(learning_rate=1e-5, warmup_steps=10, b2=0.999)
    config.train.update(epochs=1.0, head_chunk=128, log_every=1)
    config.eval.update(every=100, examples=32)
    config.checkpoint.update(every=100, keep=1)
    return config
