"""The sweeps over ORPO and over length: pairs with a bias, and tiny runs that go through to the table."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from dpo_jax import grid, sweep
from dpo_jax.data.example import Example
from dpo_jax.data.prepared import PreparedExamples
from dpo_jax.data.tokenizer import tokenizer_fingerprint
from dpo_jax.types import CHOSEN, REJECTED
from dpo_jax.writers import METRICS_FILE
from experiments import changes
from experiments.length import pairs
from tests import tiny_run
from tests.tiny import make_answer


def test_orpo_goes_through_to_its_table(tmp_path: Path) -> None:
    tiny_run.write_data(tmp_path / "data")
    quick = {"train.steps": 4, "optim.warmup_steps": 0, "eval.every": 4, "eval.prompts": 0, "train.micro_batches": 1}
    axes = {**importlib.import_module("experiments.orpo.sweep").get_axes("quick"), "seed": [0, 1]}
    del axes["start"]
    runs = grid.expand(tiny_run.config_dict(tmp_path / "data", **quick), axes)
    assert sweep.run(runs, tmp_path / "sweep", together=1) == {}
    metric = "eval/logps/rejected_per_token"
    lines = list(changes.table(tmp_path / "sweep", [metric]))
    assert lines[0] == f"| method | seeds | {metric}: first → last |"
    folders = [tmp_path / "sweep" / "runs" / run.name for run in runs if run.point["method"] == "sft"]
    first, last = np.array([changes.ends(folder, metric) for folder in folders]).T
    halves = [abs(values[0] - values[1]) / 2 for values in (first, last)]  # the standard error of two values
    cells = f"{first.mean():.3f} ± {halves[0]:.3f} → {last.mean():.3f} ± {halves[1]:.3f}"
    assert f"| sft | 2 | {cells} |" in lines
    chosen = np.array(changes.ends(folders[0], "eval/logps/chosen_per_token"))
    gap = changes.ends(folders[0], f"eval/logps/chosen_per_token - {metric}")
    assert gap == tuple(chosen - changes.ends(folders[0], metric))
    with pytest.raises(ValueError, match="has no metric 'eval/los'; it has eval/"):
        list(changes.table(tmp_path / "sweep", ["eval/los"]))


def test_runs_are_compared_where_they_reach_the_same_kl(tmp_path: Path) -> None:
    rows = [
        {"step": 0, "samples/kl": 0.0, "samples/length": 40.0, "eval/loss": 0.0},
        {"step": 1, "samples/kl": 1.0, "samples/length": 44.0, "eval/loss": 1.0},
        {"step": 2, "samples/kl": 3.0, "samples/length": 50.0},
    ]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert changes.ends(tmp_path, "samples/length", 2.0) == (40.0, 47.0)
    assert changes.ends(tmp_path, "samples/length - samples/kl", 2.0) == (40.0, 45.0)
    assert changes.ends(tmp_path, "eval/loss", 0.5) == (0.0, 0.5)
    assert np.isnan(changes.ends(tmp_path, "samples/length", 3.5)[1])


def test_pairs_are_kept_where_the_longer_answer_won(tmp_path: Path) -> None:
    source = tiny_run.write_data(tmp_path / "data")
    pairs.write(source, tmp_path / "biased")
    tokenizer = tokenizer_fingerprint(tmp_path / "data" / f"tokenizer-{tiny_run.VOCAB}")
    before, after = (PreparedExamples(folder, "train", tokenizer) for folder in (source, tmp_path / "biased"))
    signs = [[pairs.sign(example) for example in pairs.examples(part)] for part in (before, after)]
    assert signs[1].count(1) == signs[0].count(1) > 0
    assert signs[1].count(0) == 0
    assert signs[1].count(-1) < signs[0].count(-1)


def test_the_sign_does_not_ask_which_answer_stands_first() -> None:
    long, short = [5, 6, 7], [5]
    answers = (make_answer(short, REJECTED), make_answer(long, CHOSEN))
    assert pairs.sign(Example(0, np.array([4], np.int32), answers)) == 1
    assert pairs.sign(Example(0, np.array([4], np.int32), (make_answer(long, REJECTED), make_answer(short)))) == -1
    shorter = (make_answer(short), make_answer(long, REJECTED))
    kept = [pairs.keeps(Example(i, np.array([4], np.int32), shorter)) for i in range(400)]
    assert np.mean(kept) == pytest.approx(pairs.SHORTER, abs=0.07)  # three standard errors
