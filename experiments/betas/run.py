"""DPO Fig. 2 left, whole: preference losses, RLHF and best-of-N from one SFT model and the same pairs.

    python -m experiments.betas.run --size=small --workdir=runs/betas

The same command continues what was interrupted; it ends with the report of dpo_jax/report.py and the best-of-N curve.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, logging

from dpo_jax import grid, report, sources, sweep, workdir
from dpo_jax.data.tokenizer import decode
from dpo_jax.evaluate import Completer
from dpo_jax.grid import RUNS_FOLDER, Axes, Run
from dpo_jax.main import command
from dpo_jax.opened import OpenedRun, unique_prompts
from dpo_jax.shared import Shared
from experiments.betas.sweep import RLHF, get_axes, get_config, get_rlhf_axes
from experiments.rlhf import judges
from experiments.rlhf.rloo import Rloo, Settings

BEST_FILE, MODELS_FOLDER = "best_of_n.json", "reward_models"
_ANSWERS = 4  # of RLOO to a prompt, as many as the pairs come from


def main() -> None:
    """Runs everything that is not finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the sweep: made when new")
    parser.add_argument("--size", choices=("full", "small", "quick"), default="full", help="experiments/imdb/sweeps.py")
    parser.add_argument("--steps", type=int, help="updates of a run; the size's by default")
    parser.add_argument("--seeds", type=int, help="how many seeds; the size's by default")
    arguments = parser.parse_args()

    def start(_: list[str]) -> None:
        with command():
            base, axes = get_config(arguments.size), (get_axes(arguments.size), get_rlhf_axes(arguments.size))
            if arguments.steps is not None:
                base.train.update(epochs=None, steps=arguments.steps)
            for table in axes:
                table["seed"] = table["seed"][: arguments.seeds]
            run(base, *axes, arguments.workdir)

    app.run(start, argv=sys.argv[:1])


def run(base: Any, axes: Axes, rlhf_axes: Axes, folder: Path, most: int = 32, shared: Shared | None = None) -> Path:
    """The whole experiment.

    Args:
      base: config of all runs.
      axes: of the runs with preference losses.
      rlhf_axes: of those with RLOO; labels of ``method`` are names in RLHF.
      folder: its workdir.
      most: largest N of best-of-N.
      shared: what the runs have in common with others of this process.

    Returns:
      The page of the report.

    Raises:
      ValueError: a run has failed.
    """
    preference, rlhf = grid.expand(base, axes), grid.expand(base, rlhf_axes)
    shared, path = shared or Shared(), folder / BEST_FILE
    # A seed at a time: whoever stops early has all methods, on fewer seeds.
    for seed in dict.fromkeys(one.config.seed for one in preference):
        failed = sweep.run([one for one in preference if one.config.seed == seed], folder, shared=shared)
        grid.write(folder, [*preference, *rlhf])
        if failed:
            raise ValueError(f"{len(failed)} runs have failed: {failed}")
        own = [one for one in rlhf if one.config.seed == seed]
        for one in own:
            train_rloo(one, folder, shared)
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        if seed not in [one["seed"] for one in known]:
            found = best_of_n(own[0], folder, shared, most)
            workdir.write_atomically(path, json.dumps([*known, found], indent=1) + "\n")
    return report.run(folder, folder / "report")


def train_rloo(one: Run, folder: Path, shared: Shared) -> None:
    """One run of RLOO, into the place that the sweep has for it."""
    place, (reward, beta) = folder / RUNS_FOLDER / one.name, RLHF[one.point["method"]]
    with workdir.owned(place, one.config):
        if workdir.finished(place) is not None:
            return
        logging.info("now %s", one.name)
        settings = Settings(reward, beta, _ANSWERS, max(1, 2 * one.config.data.batch_size // _ANSWERS))
        judge = shared.get(("rlhf judge", reward, one.config.seed), lambda: _judge(one, reward, folder, shared))
        workdir.finish(place, Rloo(one.config, place, settings, judge, shared).train())


def _judge(one: Run, reward: str, folder: Path, shared: Shared) -> judges.Judge:
    opened = OpenedRun(one.config, folder, shared)
    if reward == "truth":
        return judges.truth(opened)
    return judges.learned(opened, folder / MODELS_FOLDER / f"seed={one.config.seed}")


def best_of_n(one: Run, folder: Path, shared: Shared, most: int) -> dict[str, Any]:
    """Mean reward of the best of N answers of the reference, for N = 1, 2, 4, … up to ``most``.

    The best is chosen by the truth, and by the learned reward model. KL(best-of-N ‖ reference) = log N − (N − 1)/N nats
    for answers without ties.
    """
    run = OpenedRun(one.config, folder, shared)
    prompts = unique_prompts(run.data.held_out, run.config.eval.prompts)
    data = run.config.data
    completer = Completer(
        run.parts.model,
        run.data.tokenizer,
        run.parallel,
        prompt_length=data.prompt_length,
        answer_length=data.answer_length,
        rows=len(prompts),
        head_chunk=run.config.train.head_chunk,
    )
    params = run.parallel.replicate(run.start_params())
    reward = sources.imdb_reward(data, run.config.eval.reward)
    learned = shared.get(("rlhf judge", "learned", one.config.seed), lambda: _judge(one, "learned", folder, shared))
    truths, guesses = [], []
    for n in range(most):
        answers, _ = completer.sample(params, prompts, run.config.seed + 1, 1.0, first_row=n * len(prompts)).result()
        both = zip(prompts, answers, strict=True)
        texts = [decode(run.data.tokenizer, np.concatenate([p, a.tokens])) for p, a in both]
        truths.append(reward(texts))
        guesses.append(learned(prompts, answers))
    truth_XN, guess_XN = np.stack(truths, 1), np.stack(guesses, 1)
    rows = []
    for n in [2**i for i in range(most.bit_length()) if 2**i <= most]:
        picked = np.take_along_axis(truth_XN[:, :n], guess_XN[:, :n].argmax(1)[:, None], 1)
        kl = float(np.log(n) - (n - 1) / n)
        rows.append({"n": n, "kl": kl, "truth": float(truth_XN[:, :n].max(1).mean()), "learned": float(picked.mean())})
    return {"seed": one.config.seed, "rows": rows}


if __name__ == "__main__":
    main()
