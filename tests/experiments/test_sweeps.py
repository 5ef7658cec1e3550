"""The sweeps of experiments/: every run can be, and a sweep on tiny data goes through to its report."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dpo_jax import grid, report, sweep
from dpo_jax.data.example import Answer, Example
from dpo_jax.data.prepared import PreparedExamples
from dpo_jax.data.tokenizer import tokenizer_fingerprint
from dpo_jax.types import CHOSEN, REJECTED
from experiments.kto import thin
from tests import tiny_run


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("noise", "full", 180),
        ("noise", "small", 36),
        ("noise", "quick", 8),
        ("betas", "full", 63),
        ("betas", "small", 21),
        ("betas", "quick", 7),
        ("kto", "full", 36),
        ("kto", "small", 12),
        ("kto", "quick", 4),
        ("overoptimisation", "full", 36),
        ("overoptimisation", "small", 18),
        ("overoptimisation", "quick", 3),
        ("orpo", "full", 24),
        ("orpo", "small", 24),
        ("orpo", "quick", 4),
        ("length", "full", 15),
        ("length", "small", 15),
        ("length", "quick", 5),
        ("skip_sft", "full", 18),
        ("skip_sft", "small", 18),
        ("skip_sft", "quick", 3),
    ],
)
def test_every_run_of_a_sweep_can_be(name: str, size: str, count: int) -> None:
    file = importlib.import_module(f"experiments.{name}.sweep")
    assert f"--config=experiments/{name}/sweep.py:quick" in (file.__doc__ or "")
    assert len(grid.expand(file.get_config(size), file.get_axes(size))) == count


def test_methods_under_noise_go_through_to_the_report(tmp_path: Path) -> None:
    tiny_run.write_data(tmp_path / "data")
    changes = {"train.steps": 2, "optim.warmup_steps": 0, "eval.every": 1, "train.micro_batches": 1}
    changes |= {"reference.store": str(tmp_path / "reference"), "eval.prompts": 6}
    axes = importlib.import_module("experiments.noise.sweep").get_axes("quick")
    runs = grid.expand(tiny_run.config_dict(tmp_path / "data", **changes), axes)
    groups = [[r.point["method"] for r in group] for group in sweep.groups(runs, 8)]
    assert groups == [["dpo", "dpo", "cdpo", "cdpo"], ["robust", "robust"], ["ipo", "ipo"]]
    assert sweep.run(runs, tmp_path / "sweep") == {}
    found = report.run(tmp_path / "sweep", tmp_path / "out")
    assert "robust" in found.read_text(encoding="utf-8")


def test_a_tenth_of_the_desirable_answers_stays_each_in_all_of_its_pairs() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(0, 1000, (400, 4, 3)).astype(np.int32)
    weights = np.ones(3, np.float32)
    pairs = [
        Example(0, np.array([p], np.int32), (Answer(four[a], weights, CHOSEN), Answer(four[b], weights, REJECTED)))
        for p, four in enumerate(words)
        for a, b in itertools.combinations(range(4), 2)
    ]
    pairs = [dataclasses.replace(pair, uid=i) for i, pair in enumerate(pairs)]

    def kept(share: float, role: int) -> Counter[tuple[int, bytes]]:
        found = (e for e in thin.answers(pairs, share) if e.answers[0].role == role)
        return Counter((int(e.prompt[0]), e.answers[0].tokens.tobytes()) for e in found)

    whole, tenth = kept(1.0, CHOSEN), kept(0.1, CHOSEN)
    assert {answer: whole[answer] for answer in tenth} == dict(tenth)
    assert 0.07 < len(tenth) / len(whole) < 0.13  # of 1,200, so 0.1 ± 0.03 is more than 3 standard deviations
    assert tenth.keys() < kept(0.3, CHOSEN).keys()
    assert kept(0.1, REJECTED) == kept(1.0, REJECTED)


def test_kto_trains_on_a_tenth_of_the_desirable_answers(tmp_path: Path) -> None:
    source = tiny_run.write_data(tmp_path / "data")
    thin.write(source, tmp_path / "tenth", 0.3)  # of 26 answers, a tenth may be none
    tokenizer = tokenizer_fingerprint(tmp_path / "data" / f"tokenizer-{tiny_run.VOCAB}")
    data = PreparedExamples(tmp_path / "tenth", "train", tokenizer)
    roles = data.roles().ravel().tolist()
    assert roles.count(REJECTED) == tiny_run.EXAMPLES and 0 < roles.count(CHOSEN) < tiny_run.EXAMPLES / 2
    assert len({data[i].uid for i in range(len(data))}) == len(data)
    changes = {"train.steps": 2, "eval.prompts": 0, "train.micro_batches": 1, "data.batch_size": 8}
    changes |= {"reference.store": str(tmp_path / "reference"), "loss.name": "kto", "loss.desirable_weight": 12.0}
    config = tiny_run.config_dict(tmp_path / "data", **changes, **{"data.path": str(tmp_path / "tenth")})
    runs = grid.expand(config, {"seed": [0]})
    assert sweep.run(runs, tmp_path / "sweep") == {}
