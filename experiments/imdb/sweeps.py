"""What the sweeps over the sentiment experiment have in common: base, learning rates and seeds, in three sizes.

full starts from runs/imdb (``make demo``) and wants an accelerator or a night; small starts from runs/small
(configs/small.py), for an hour at most on two cores; quick starts from runs/imdb and takes 24 steps.
"""

from ml_collections import ConfigDict

from configs import imdb_dpo, small

PAIRS = "preferences/examples"  # in the workdir of experiments.imdb.run

# Every method is tuned on the same rates, and compared over the same seeds.
SHARED_AXES = {
    "full": {"optim.learning_rate": [1e-4, 2e-4, 4e-4], "seed": [0, 1, 2]},
    "small": {"optim.learning_rate": [1e-3], "seed": [0, 1, 2]},
    "quick": {"optim.learning_rate": [4e-4], "seed": [0]},
}


def source_of(size: str) -> str:
    """The folder of the experiment that a size starts from."""
    return "runs/small" if size == "small" else "runs/imdb"


def get_base(size: str, every: int) -> ConfigDict:
    """DPO from an SFT model against its stored reference.

    Args:
      size: full, small or quick.
      every: steps between two evaluations; of quick, 8.

    Raises:
      ValueError: there is no such size.
    """
    if size not in SHARED_AXES:
        raise ValueError(f"unknown size {size!r}; known: {', '.join(SHARED_AXES)}")
    config = small.get_config("dpo") if size == "small" else imdb_dpo.get_config("pairs")
    folder = source_of(size)
    config.data.update(path=f"{folder}/{PAIRS}", dir=f"{folder}/data")
    config.init.run = f"{folder}/sft"
    config.reference.store = f"{folder}/references"
    config.eval.update(every=every, prompts=400)
    config.checkpoint.update(every=94, keep=1)
    if size == "quick":
        config.train.update(epochs=None, steps=24)
        config.optim.warmup_steps = 5
        config.eval.update(every=8, prompts=100, examples=64)
    return config
