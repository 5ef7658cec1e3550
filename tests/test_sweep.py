"""Sweeps: members of a population are the runs that they would have been alone, also after a kill."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dpo_jax import grid, population, sweep
from dpo_jax.shared import Shared
from dpo_jax.stopping import Stopped, StopRequest
from dpo_jax.writers import read_metrics
from tests import tiny_run

AXES = {"loss.beta": [0.05, 1.0], "seed": [0, 1]}
CHANGES = {"optim.learning_rate": 1e-3, "train.log_every": 1}
SHARED = Shared()  # all sweeps of this file run the same programs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    tiny_run.write_data(folder)
    return folder


@pytest.fixture(scope="module")
def runs(data: Path) -> list[grid.Run]:
    return grid.expand(tiny_run.config_dict(data, **CHANGES), AXES)


@pytest.fixture(scope="module")
def solo(runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("solo")
    assert sweep.run(runs, folder, together=1, shared=SHARED) == {}
    return folder


@pytest.fixture(scope="module")
def joint(runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joint")
    assert sweep.run(runs, folder, together=8, shared=SHARED) == {}
    return folder


def rows(folder: Path, name: str) -> list[dict[str, float]]:
    return read_metrics(folder / "runs" / name / "metrics.jsonl")


def assert_close(got: list[dict[str, float]], expected: list[dict[str, float]], prefix: str = "") -> None:
    assert [row["step"] for row in got] == [row["step"] for row in expected]
    for a, b in zip(got, expected, strict=True):
        for key in (key for key in b if key.startswith(prefix)):
            if key.endswith("correlation"):
                continue  # differences of sums of squares, of four pairs: fp32 keeps few of their digits
            if b["step"] <= 1 and key.endswith(("displacement", "accuracies")):
                continue  # the policy is its reference: rounding decides which is the greater
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-5, nan_ok=True), (b["step"], key)


def test_members_are_the_runs_that_they_would_be_alone(runs, solo: Path, joint: Path) -> None:
    for run in runs:
        assert_close(rows(joint, run.name), rows(solo, run.name))
        ours, theirs = (folder / "runs" / run.name for folder in (joint, solo))
        assert (ours / "config.json").read_bytes() == (theirs / "config.json").read_bytes()
        files = [{p.name for p in place.iterdir()} for place in (ours, theirs)]
        assert files[0] == files[1]
        assert tiny_run.results(ours).keys() == tiny_run.results(theirs).keys()
    assert rows(joint, runs[0].name)[-1] != rows(joint, runs[1].name)[-1]


def test_runs_of_a_process_compile_once(solo: Path, joint: Path) -> None:
    traces = [made.traces for made in SHARED._made.values() if hasattr(made, "traces")]
    counts = {name: n for trace in traces for name, n in trace.items()}
    assert counts == {"train_step": 1, "eval_step": 1, "sample": 1, "score_samples": 1, "own batches": 1}


def test_a_population_that_is_stopped_goes_on_to_the_bit(
    runs, joint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))
    monkeypatch.setattr(StopRequest, "agreed", lambda _: next(calls) == 6)
    with pytest.raises(Stopped):
        sweep.run(runs, tmp_path, together=8, shared=SHARED)
    assert [row["step"] for row in rows(tmp_path, runs[0].name)][-1] == 7
    # As after a kill between the saves of two members: one of them goes on from an earlier step.
    place = tmp_path / "runs" / runs[2].name / "checkpoints"
    assert sorted(p.name for p in place.iterdir()) == ["5", "7"]
    (place / "7").rename(tmp_path / "lost")
    sweep.run(runs, tmp_path, together=8, shared=SHARED)
    for run in runs:
        assert tiny_run.results(tmp_path / "runs" / run.name) == tiny_run.results(joint / "runs" / run.name)


def test_a_member_that_fails_leaves_the_others_alone(data: Path, joint: Path, tmp_path: Path) -> None:
    axes = {"optim.learning_rate": [1e-3, 1e15], "seed": [0, 1], "loss.beta": [0.05]}
    changes = {**CHANGES, "optim.warmup_steps": 2}
    runs = grid.expand(tiny_run.config_dict(data, **changes), axes)
    failed = sweep.run(runs, tmp_path, together=8, shared=SHARED)
    assert failed.keys() == {"learning_rate=1e+15,seed=0", "learning_rate=1e+15,seed=1"}
    assert all("is not finite" in message for message in failed.values())
    for seed in (0, 1):
        assert_close(rows(tmp_path, f"learning_rate=0.001,seed={seed}"), rows(joint, f"beta=0.05,seed={seed}"))
    shown = sweep.table(tmp_path, [run.name for run in runs], failed)
    assert shown.count("failed") == 2 and "2 of 4 runs finished" in shown


def test_members_are_spread_over_devices_and_share_batch_and_reference(data: Path, solo: Path, tmp_path: Path) -> None:
    """Three members on two devices: a seat stays over. All read the same batches, and one reference."""
    changes = {**CHANGES, "parallel.devices": 2, "eval.examples": 0, "eval.prompts": 0, "train.micro_batches": 1}
    shared = Shared()
    runs = grid.expand(tiny_run.config_dict(data, **changes), {"loss.beta": [0.05, 0.3, 1.0]})
    assert sweep.run(runs, tmp_path, together=8, shared=shared) == {}
    traces = [made.traces for made in shared._made.values() if isinstance(made, population.Population)]
    assert traces == [{"one batch": 1}]
    for beta in ("0.05", "1"):
        expected = [row for row in rows(solo, f"beta={beta},seed=0") if row["step"]]
        assert_close(rows(tmp_path, f"beta={beta}"), expected, "train/")
    # As after a kill between the saves of two members: the others wait for the one that is behind.
    calls = iter(range(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopRequest, "agreed", lambda _: next(calls) == 6)
        with pytest.raises(Stopped):
            sweep.run(runs, tmp_path / "again", together=8, shared=shared)
    (tmp_path / "again" / "runs" / "beta=0.3" / "checkpoints" / "7").rename(tmp_path / "lost")
    assert sweep.run(runs, tmp_path / "again", together=8, shared=shared) == {}
    assert traces == [{"one batch": 1}]
    for name in (run.name for run in runs):
        again = tiny_run.results(tmp_path / "again" / "runs" / name)
        assert again == tiny_run.results(tmp_path / "runs" / name)
    own, alone = (tiny_run.results(f / "runs" / n).keys() for f, n in ((tmp_path, "beta=1"), (solo, "beta=1,seed=0")))
    assert {key for key in own if key.startswith("10/")} == {key for key in alone if key.startswith("10/")}


def test_groups_say_why_a_run_trains_alone(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    runs = grid.expand(tiny_run.config_dict(data), {"loss.name": ["dpo", "ipo"], "seed": [0, 1, 2]})
    names = [[run.name for run in group] for group in sweep.groups(runs, 2)]
    assert names == [
        ["name=dpo,seed=0", "name=dpo,seed=1"],
        ["name=dpo,seed=2"],
        ["name=ipo,seed=0", "name=ipo,seed=1"],
        ["name=ipo,seed=2"],
    ]
    packed = tiny_run.config_dict(data, **{"data.layout": "packed", "data.row_length": 40, "loss.name": "kto"})
    with caplog.at_level(logging.INFO, logger="absl"):
        assert len(sweep.groups(grid.expand(packed, {"seed": [0, 1]}), 8)) == 2
    assert "seed=0 trains on its own: packed batches of mismatched answers differ in shape" in caplog.text


def test_the_command_line_runs_a_file_and_shows_where_it_stands(data: Path, joint: Path, tmp_path: Path) -> None:
    file = tiny_run.write_config(tmp_path / "sweep.py", data, **CHANGES)
    with pytest.raises(ValueError, match=r"sweep.py has no get_axes\(\); a sweep file says there what varies"):
        sweep.load_axes(str(file))
    file.write_text(file.read_text() + f"\n\ndef get_axes():\n    return {AXES!r}\n")
    done = tiny_run.call(f"--config={file}", f"--workdir={joint}", program="dpo_jax.sweep")
    assert done.returncode == 0 and "4 of 4 runs finished" in done.stderr, done.stderr


def test_runs_of_another_config_are_not_taken_for_those_of_the_sweep(data: Path, solo: Path) -> None:
    before = {path: path.read_bytes() for path in solo.rglob("*") if path.is_file()}
    others = grid.expand(tiny_run.config_dict(data, **CHANGES, **{"train.steps": 99}), {**AXES, "seed": [0, 1, 2]})
    with pytest.raises(ValueError, match=r"belongs to another config:\n  config.train.steps: 99 here, \d+ there"):
        sweep.run(others, solo, together=1, shared=SHARED)
    assert {path: path.read_bytes() for path in solo.rglob("*") if path.is_file()} == before


def test_runs_on_a_mesh_train_on_their_own(runs: list[grid.Run], data: Path, tmp_path: Path) -> None:
    mesh = grid.expand(tiny_run.config_dict(data, **{"parallel.mode": "mesh"}), AXES)
    assert [[r.name for r in group] for group in sweep.groups(mesh, 8)] == [[r.name] for r in runs]
    members = {r.name: (r.config, tmp_path / r.name) for r in mesh}
    with pytest.raises(ValueError, match=r"cannot train together with others: config.parallel.mode=mesh splits a run"):
        population.run(members, Shared(), (ValueError,))
