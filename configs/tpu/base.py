"""What DPO on TPU pods has in common: packed rows, each with room for a pair of the greatest length, over a mesh."""

from ml_collections import ConfigDict

from configs import base


def pod_config(topology: str, model: str, sizes: str) -> ConfigDict:
    """A run of all chips of a pod: 64 rows a step, each of a prompt and two answers of up to 1,024 tokens, or of more
    pairs that are shorter; bf16 products, fp32 parameters.

    Args:
      topology: the pod.
      model: id on the Hugging Face hub.
      sizes: folder beside this file with the model's published config.json, to plan without the hub.
    """
    config = base.get_config()
    config.data.update(source="files", dir="runs/tpu/data")
    config.data.tokenizer = config.init.get_oneway_ref("hf")
    config.data.update(layout="packed", prompt_length=1024, answer_length=1024, row_length=3072, batch_size=64)
    config.init.hf = model
    config.model.update(dtype="bfloat16", remat="gate", unroll=1)
    config.optim.update(learning_rate=5e-7, schedule="linear", warmup_steps=150, b2=0.999)
    config.train.update(epochs=1.0, log_every=10)
    config.eval.update(every=500, examples=256)
    config.checkpoint.update(every=500, keep=1)
    config.parallel.mode = "mesh"
    config.plan.update(topology=topology, sizes=f"configs/tpu/sizes/{sizes}")
    return config


def with_adapters(config: ConfigDict) -> ConfigDict:
    """The same run, which trains adapters on a frozen base in bf16."""
    config.model.param_dtype = "bfloat16"
    config.lora.update(rank=16, alpha=32.0)
    config.optim.learning_rate = 2e-4  # higher than for whole models, as is usual
    return config
