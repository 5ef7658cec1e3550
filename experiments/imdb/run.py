"""The main job: from raw IMDb reviews to a DPO-trained policy, in one command.

    python -m experiments.imdb.run --workdir=runs/imdb

The controlled-sentiment experiment of the DPO paper (arXiv 2305.18290, §6.1, Fig. 2 left) with a tiny model: supervised
fine-tuning, preference pairs from its own samples ranked by a ground-truth reward, DPO, and the path of reward against
KL. A stage that is finished is not run again; one that was interrupted continues.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
import time
from pathlib import Path

from absl import app, logging

from dpo_jax import prefer, sources, train
from dpo_jax.config import Config, from_config_dict
from dpo_jax.main import command
from dpo_jax.progress import duration, stage
from dpo_jax.shared import Shared
from experiments.imdb import report


def main() -> None:
    """Runs the stages one after the other and ends with the table, the samples and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workdir",
        type=Path,
        default=Path("runs/imdb"),
        help="folder of the experiment: made when new, continued when not",
    )
    parser.add_argument(
        "--configs",
        default="configs/imdb_{stage}.py",
        help="config of each stage; {stage} becomes sft, preferences and dpo (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of first parameters, data order and draws, in all stages")
    arguments = parser.parse_args()

    def start(_: list[str]) -> None:
        with command():
            run(arguments.workdir, arguments.configs, arguments.seed)

    app.run(start, argv=sys.argv[:1])


def run(workdir: Path, configs: str, seed: int) -> dict[str, float]:
    """The whole experiment.

    Args:
      workdir: its folder.
      configs: path of the stages' configs, with ``{stage}`` in it.
      seed: of all stages.

    Returns:
      The last numbers of the DPO run.
    """
    begin, shared = time.monotonic(), Shared()
    sft, preferences, dpo = (_config(configs, name, workdir, seed) for name in ("sft", "preferences", "dpo"))
    with stage("1/5 data: reviews in four disjoint parts, and a tokenizer", 20):
        tokenizer = sources.imdb_tokenizer(sft.data)
        logging.info("tokenizer of %d tokens", len(tokenizer))
    with stage("2/5 ground truth: a classifier of sentiment, on its own part of the reviews", 20):
        sources.imdb_reward(sft.data, dpo.eval.reward)
    with stage("3/5 supervised fine-tuning from scratch", 150):
        train.run(sft, workdir / "sft", shared)
    with stage("4/5 preferences: sampling and ranking answers", 40):
        prefer.run(preferences, workdir / "preferences", shared)
    with stage("5/5 DPO: chosen and rejected through policy and reference", 140):
        summary = train.run(dpo, workdir / "dpo", shared)
    report.write(workdir)
    logging.info("all stages took %s", duration(time.monotonic() - begin))
    return summary


def _config(configs: str, name: str, workdir: Path, seed: int) -> Config:
    """A stage's config, with the folders and the seed of this experiment."""
    path, _, argument = configs.format(stage=name).partition(":")
    spec = importlib.util.spec_from_file_location(f"config_{name}", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise ValueError(f"no config {path}; --configs is a path of a Python file with {{stage}} in it")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = from_config_dict(module.get_config(argument) if argument else module.get_config())
    data = dataclasses.replace(config.data, dir=str(workdir / "data"))
    if data.path is not None:
        data = dataclasses.replace(data, path=str(workdir / "preferences" / prefer.EXAMPLES_FOLDER))
    init = dataclasses.replace(config.init, run=str(workdir / "sft") if config.init.run is not None else None)
    return dataclasses.replace(config, data=data, init=init, seed=seed)


if __name__ == "__main__":
    main()
