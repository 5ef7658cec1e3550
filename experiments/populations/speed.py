"""How much faster a population trains than its members one by one, in one run: data of ``make demo``, a tiny model.

python -m experiments.populations.speed --imdb=runs/imdb
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from ml_collections import ConfigDict

from configs import imdb_dpo
from dpo_jax import grid, sweep
from dpo_jax.main import command
from dpo_jax.shared import Shared
from experiments.imdb.sweeps import PAIRS


def main() -> None:
    """Trains the same runs three ways and prints seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imdb", type=Path, default=Path("runs/imdb"), help="folder of make demo")
    parser.add_argument("--members", type=int, default=8, help="values of β")
    parser.add_argument("--steps", type=int, default=60, help="updates of a run")
    parser.add_argument("--width", type=int, default=64, help="of the model, 2 layers")
    parser.add_argument("--batch", type=int, default=8, help="pairs in a batch")
    arguments = parser.parse_args()
    with command(), tempfile.TemporaryDirectory() as folder:
        base = _config(arguments.imdb, arguments.steps, arguments.width, arguments.batch)
        runs = grid.expand(base, {"loss.beta": [0.05 * (i + 1) for i in range(arguments.members)]})
        seconds = _measure(runs, Path(folder))
    alone = seconds["one by one, each compiled"]
    print("\n| | seconds | ratio |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.1f} | {alone / value:.1f} |")


def _measure(runs: list[grid.Run], folder: Path) -> dict[str, float]:
    def timed(name: str, train: object) -> float:
        begin = time.monotonic()
        failed = train(folder / name)  # type: ignore[operator]
        if failed:
            raise ValueError(f"{name}: {'; '.join(dict.fromkeys(failed.values()))}")
        return time.monotonic() - begin

    def compiled_each(place: Path) -> dict[str, str]:
        found: dict[str, str] = {}
        for run in runs:
            found |= sweep.run([run], place, together=1, shared=Shared())
        return found

    return {
        "one by one, each compiled": timed("each", compiled_each),
        "one by one, compiled once": timed("once", lambda place: sweep.run(runs, place, together=1)),
        "together": timed("together", lambda place: sweep.run(runs, place, together=len(runs))),
    }


def _config(imdb: Path, steps: int, width: int, batch: int) -> ConfigDict:
    if not (imdb / PAIRS).is_dir():
        raise ValueError(f"there are no pairs in {imdb / PAIRS}: make demo writes them, and --imdb names its folder")
    config = imdb_dpo.get_config("pairs")
    config.data.update(path=str(imdb / PAIRS), dir=str(imdb / "data"), batch_size=batch)
    config.init.run = None
    config.model.update(width=width, layers=2, heads=2, mlp_width=4 * width, unroll=2)
    config.train.update(epochs=None, steps=steps)
    config.eval.update(examples=0, prompts=0)
    config.checkpoint.every = steps
    config.parallel.devices = 1
    return config


if __name__ == "__main__":
    main()
