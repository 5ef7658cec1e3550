"""What the sweeps over the sentiment experiment have in common: base, learning rates and seeds, full and quick."""

from ml_collections import ConfigDict

from configs import imdb_dpo

# Every method is tuned on the same rates, and compared over the same seeds.
SHARED_AXES = {
    "full": {"optim.learning_rate": [1e-4, 2e-4, 4e-4], "seed": [0, 1, 2]},
    "quick": {"optim.learning_rate": [4e-4], "seed": [0]},
}


def get_base(size: str, every: int) -> ConfigDict:
    """DPO from the SFT model of runs/imdb against its stored reference.

    Args:
      size: full; or quick, which takes 24 steps.
      every: steps between two evaluations of a full run.
    """
    config = imdb_dpo.get_config()
    config.reference.store = "runs/imdb/references"
    config.eval.update(every=every, prompts=400)
    config.checkpoint.update(every=94, keep=1)
    if size == "quick":
        config.train.update(epochs=None, steps=24)
        config.optim.warmup_steps = 5
        config.eval.update(every=8, prompts=100, examples=64)
    return config
