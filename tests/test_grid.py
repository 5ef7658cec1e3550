"""A grid over keys of the config: what it names, checks and refuses before any run starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs import base
from dpo_jax import grid


def config():
    c = base.get_config()
    c.train.steps = 10
    return c


def test_runs_are_the_product_and_names_hold_what_differs() -> None:
    axes = {
        "loss.name": ["dpo", "ipo"],
        "noise": {"clean": {}, "20 %": {"data.flip": 0.2}},
        "seed": [3],
        "optim.learning_rate": [1e-4, 3e-4],
    }
    runs = grid.expand(config(), axes)
    assert len(runs) == 8
    assert runs[0].name == "name=dpo,noise=clean,learning_rate=0.0001"
    assert runs[7].name == "name=ipo,noise=20_,learning_rate=0.0003"
    assert runs[7].point == {"loss.name": "ipo", "noise": "20_", "seed": "3", "optim.learning_rate": "0.0003"}
    c = runs[7].config
    assert (c.loss.name, c.data.flip, c.seed, c.optim.learning_rate) == ("ipo", 0.2, 3, 3e-4)


def test_keys_whose_last_part_is_the_same_are_named_whole() -> None:
    runs = grid.expand(config(), {"train.log_every": [1, 2], "checkpoint.every": [5, 6], "eval.every": [7, 8]})
    assert runs[0].name == "log_every=1,checkpoint.every=5,eval.every=7"


def test_a_value_may_follow_from_other_axes() -> None:
    axes = {
        "method": {"dpo": {}, "robust": {"loss.name": "robust", "loss.label_smoothing": lambda c: c.data.flip}},
        "data.flip": [0.0, 0.3],
    }
    smoothing = [run.config.loss.hyper.get("label_smoothing") for run in grid.expand(config(), axes)]
    assert smoothing == [None, None, 0.0, 0.3]


def test_a_single_point_is_a_run() -> None:
    assert [run.name for run in grid.expand(config(), {"seed": [0]})] == ["run"]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({}, "has no axes"),
        ({"seed": []}, "axis 'seed' is"),
        ({"seed": 3}, "axis 'seed' is 3; expected a list"),
        ({"loss.bet": [0.1]}, r"axis 'loss.bet' changes config.loss.bet, which is no key \(did you mean loss.beta"),
        ({"method": {"a": {"loos.name": "ipo"}}}, "axis 'method' changes config.loos.name, which is no key"),
        ({"loss.beta": [0.1, -1.0]}, "run 'beta=-1' .* out of range"),
        ({"loss.beta": [0.1, "high"]}, "run 'beta=high' of the sweep cannot be"),
        ({"loss.name": ["dpo", "dpoo"]}, "run 'name=dpoo' of the sweep cannot be"),
        ({"data.flip": [1.5]}, "config.data.flip is 1.5; expected 0 or more and at most 1"),
        ({"seed": [1, 1]}, "values of one name"),
        ({"a": {"x": {"seed": 1}}, "seed": [2]}, "config.seed is set by axis 'a' and by axis 'seed'"),
        ({"a": {"x": 1}}, "axis 'a', 'x': expected a dict of config keys, got 1"),
    ],
)
def test_mistakes_are_told_before_any_run(axes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid.expand(config(), axes)


def test_a_key_of_an_axis_cannot_be_overridden() -> None:
    with pytest.raises(ValueError, match="config.seed is set by the command line and by axis 'seed'"):
        grid.expand(config(), {"seed": [0, 1]}, ["seed"])


def test_processes_share_the_runs_without_loss() -> None:
    runs = grid.expand(config(), {"seed": list(range(7))})
    shares = [grid.share(runs, index, 3) for index in range(3)]
    assert [run for part in shares for run in part] == runs
    assert sorted(map(len, shares)) == [2, 2, 3]
    with pytest.raises(ValueError, match="--index is 3 and --count 3; expected an index from 0 to 2"):
        grid.share(runs, 3, 3)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    runs = grid.expand(config(), {"seed": [0, 1], "loss.beta": [0.1]})
    grid.write(tmp_path / "sweep", runs)
    axes, points = grid.read(tmp_path / "sweep")
    assert axes == {"seed": ["0", "1"], "loss.beta": ["0.1"]}
    assert points == {"seed=0": {"seed": "0", "loss.beta": "0.1"}, "seed=1": {"seed": "1", "loss.beta": "0.1"}}
    with pytest.raises(OSError, match="is no folder of a sweep"):
        grid.read(tmp_path)
