"""Whole runs: continued to the bit, compiled once, refused in plain words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from configs import base
from dpo_jax import __version__, reproducer, train, workdir
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.data.prepared_writer import write_examples
from dpo_jax.data.tokenizer import tokenizer_fingerprint
from dpo_jax.shared import Shared
from dpo_jax.state import TrainState
from dpo_jax.stopping import Stopped
from dpo_jax.writers import read_metrics
from tests import tiny_run

VARIANTS = {
    "sft": {"loss.name": "sft"},
    "dpo": {"loss.name": "dpo"},
    "tr_dpo": {"loss.name": "dpo", "reference.sync_every": 3},
    "beta_dpo": {"loss.name": "beta_dpo"},  # remembers a running mean
    "kto": {"loss.name": "kto"},
    "bf16": {"loss.name": "dpo", "model.dtype": "bfloat16"},  # whose reference is kept in half precision
}


@pytest.fixture(scope="module")
def shared() -> Shared:
    """What runs of equal configs compile, once for all tests whose point is another."""
    return Shared()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    tiny_run.write_data(folder)
    return folder


@pytest.fixture(scope="module")
def singles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("singles")
    tiny_run.write_data(folder, answers=1)
    return folder


class Crash(Exception):
    """What no run expects."""


class StopAfter:
    """Asks a run to stop after a step; or crashes there."""

    def __init__(self, step: int, crash: bool = False) -> None:
        self._left, self._crash = step, crash

    def agreed(self) -> bool:
        self._left -= 1
        if self._left == 0 and self._crash:
            raise Crash
        return self._left == 0


def never() -> StopAfter:
    return StopAfter(10**9)


def interrupted(config, folder: Path, step: int, shared: Shared | None = None, crash: bool = True) -> None:
    with (
        workdir.owned(folder, config),
        pytest.raises(Crash if crash else Stopped),
    ):
        train.Trainer(config, folder, shared).train(StopAfter(step, crash))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_is_continued_is_the_uninterrupted_one(variant: str, pairs, singles, shared, tmp_path: Path) -> None:
    """Lines come every 3 steps, evaluations every 4, checkpoints every 5, epochs end after 6.5: nothing lines up."""
    data = singles if variant in ("sft", "kto") else pairs
    config = tiny_run.make_config(data, **VARIANTS[variant])
    train.run(config, tmp_path / "whole", shared)
    interrupted(config, tmp_path / "parts", 8, shared)
    assert not (tmp_path / "parts" / "summary.json").exists()
    train.run(config, tmp_path / "parts", shared)
    expected = tiny_run.results(tmp_path / "whole")
    assert {"metrics.jsonl", "summary.json", "samples/step_000010.jsonl", "10/step"} <= expected.keys()
    assert tiny_run.results(tmp_path / "parts") == expected
    steps = [row["step"] for row in read_metrics(tmp_path / "parts" / "metrics.jsonl")]
    assert steps == [0, 3, 4, 6, 8, 9, 10]


def test_a_run_that_is_stopped_again_and_again_loses_nothing(pairs, shared, tmp_path: Path) -> None:
    """Saves come at steps where no line of metrics is due."""
    config = tiny_run.make_config(pairs, **{"eval.prompts": 0})
    train.run(config, tmp_path / "whole", shared)
    for step in (1, 3, 1, 2):  # after 1, 4, 5 and 7
        interrupted(config, tmp_path / "parts", step, shared, crash=False)
    assert Checkpoint.steps(tmp_path / "parts") == [1, 4, 5, 7]
    train.run(config, tmp_path / "parts", shared)
    assert tiny_run.results(tmp_path / "parts") == tiny_run.results(tmp_path / "whole")


class Checkpoint:
    """Looks into a workdir."""

    @staticmethod
    def steps(folder: Path) -> list[int]:
        return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


def test_a_run_killed_before_its_summary_is_finished_without_training(pairs, shared, tmp_path: Path) -> None:
    config = tiny_run.make_config(pairs, **{"eval.prompts": 0})
    first = train.run(config, tmp_path, shared)
    summary = (tmp_path / "summary.json").read_bytes()
    (tmp_path / "summary.json").unlink()
    trainer = train.Trainer(config, tmp_path, shared)
    traces = dict(trainer.parallel.traces)
    assert trainer.train(never()) == pytest.approx(first, nan_ok=True, abs=0, rel=0)
    assert trainer.parallel.traces == traces
    train.run(config, tmp_path, shared)
    assert (tmp_path / "summary.json").read_bytes() == summary


def test_a_finished_run_says_so_and_does_not_train_again(pairs, shared, tmp_path: Path, caplog) -> None:
    config = tiny_run.make_config(pairs, **{"eval.prompts": 0, "eval.examples": 0})
    first = train.run(config, tmp_path, shared)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != workdir.LOCK_FILE}
    logging.set_verbosity(logging.INFO)
    logging.get_absl_logger().propagate = True
    with caplog.at_level("INFO"):
        assert train.run(config, tmp_path, shared) == pytest.approx(first, nan_ok=True, abs=0, rel=0)
    assert f"{tmp_path} is finished" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_everything_is_compiled_once(pairs, tmp_path: Path) -> None:
    config = tiny_run.make_config(pairs)
    trainer = train.Trainer(config, tmp_path)
    trainer.train(never())
    assert trainer.parallel.traces == {"train_step": 1, "eval_step": 1, "sample": 1, "score_samples": 1}


def test_devices_and_micro_batches_train_alike(pairs, tmp_path: Path) -> None:
    runs = {}
    mesh = {"parallel.mode": "mesh", "parallel.fsdp": 2}
    for devices, micro, extra in ((1, 1, {}), (2, 2, mesh)):
        changes = {"parallel.devices": devices, "train.micro_batches": micro, "optim.epsilon": 1e-3, **extra}
        runs[devices] = train.run(tiny_run.make_config(pairs, **changes), tmp_path / str(devices))
    # fp32 sums in another order, through ten steps.
    assert runs[2] == pytest.approx(runs[1], rel=1e-4, nan_ok=True)


# --- refused, in plain words -----------------------------------------------------------------------------------------


def test_a_workdir_of_another_config_is_refused(pairs, shared, tmp_path: Path) -> None:
    train.run(tiny_run.make_config(pairs, **{"eval.prompts": 0}), tmp_path, shared)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    other = tiny_run.make_config(pairs, **{"eval.prompts": 0, "loss.beta": 0.5, "optim.schedule": "linear"})
    with pytest.raises(ValueError, match="belongs to another config") as error:
        train.run(other, tmp_path, shared)
    assert "config.loss.hyper.beta: 0.5 here, None there" in str(error.value)
    assert "config.optim.schedule: 'linear' here, 'cosine' there" in str(error.value)
    assert "choose another --workdir" in str(error.value)
    assert {path: path.read_bytes() for path in before} == before


def test_a_start_that_fails_leaves_the_workdir_to_another_config(pairs, shared, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="does not exist"):
        train.run(tiny_run.make_config(pairs, **{"data.path": "/nowhere"}), tmp_path, shared)
    config = tiny_run.make_config(pairs, **{"eval.prompts": 0})
    assert train.run(config, tmp_path, shared)
    assert workdir.read_config(tmp_path) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.batch_size": 6, "parallel.devices": 4}, "data.batch_size 6 does not divide over 4 devices"),
        ({"parallel.devices": 99}, "config.parallel.devices is 99, this machine has"),
        ({"parallel.mode": "mesh", "parallel.fsdp": 3, "parallel.devices": 4}, "fsdp × tensor can be 1×1, 1×2"),
        ({"parallel.mode": "mesh", "parallel.tensor": 4, "parallel.devices": 4}, "model's 2 key heads: 1, 2"),
        ({"parallel.mode": "mash"}, "config.parallel.mode is 'mash'; known: pmap, mesh"),
        ({"parallel.fsdp": 2}, "set config.parallel.mode=mesh"),
        (
            {"data.answer_length": 7},
            r"example \d+ has a prompt of \d tokens and answers of .*data.answer_length",
        ),
        ({"data.path": "/nowhere"}, "/nowhere does not exist"),
        ({"data.source": "nothing"}, "unknown data source 'nothing'; known: imdb_openings"),
        ({"init.run": "/nowhere"}, "no complete checkpoint in /nowhere/checkpoints: train that run first"),
    ],
)
def test_what_cannot_be_trained_is_named(changes, message: str, pairs, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        train.run(tiny_run.make_config(pairs, **changes), tmp_path / "run")


def test_tokens_of_another_tokenizer_are_named(pairs, tmp_path: Path) -> None:
    examples = tiny_run.make_examples(6, 2, 0)
    examples[2].prompt[0] = 5000
    tokenizer = tokenizer_fingerprint(pairs / f"tokenizer-{tiny_run.VOCAB}")
    write_examples({"train": examples, "eval": examples}, tmp_path / "data", name="tiny", tokenizer=tokenizer)
    with pytest.raises(
        ValueError, match=r"example 2 has tokens from \d+ to 5000; the model has rows for those below 2"
    ):
        train.run(tiny_run.make_config(pairs, **{"data.path": str(tmp_path / "data")}), tmp_path / "run")


def test_unpaired_data_is_refused_by_a_loss_of_pairs(singles, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compares a chosen with a rejected answer"):
        train.run(tiny_run.make_config(singles), tmp_path / "run")


def test_a_workdir_that_cannot_be_written_is_named(pairs, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to the workdir .*make it writable or choose another"):
        train.run(tiny_run.make_config(pairs), tmp_path / "file" / "run")


def test_two_runs_in_one_workdir_are_refused(pairs, tmp_path: Path) -> None:
    config = tiny_run.make_config(pairs)
    with workdir.owned(tmp_path, config), pytest.raises(OSError, match=r"process \d+ on .* is at work in the workdir"):
        train.run(config, tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    with workdir.owned(tmp_path, config):
        pass  # free again


def test_a_damaged_config_of_a_workdir_is_named(pairs, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(OSError, match=r"config.json cannot be read"):
        train.run(tiny_run.make_config(pairs), tmp_path)


# --- checkpoints of another run --------------------------------------------------------------------------------------

QUICK = {"eval.prompts": 0, "eval.examples": 0}


def test_other_data_under_the_same_path_is_refused(tmp_path: Path) -> None:
    tiny_run.write_data(tmp_path / "data")
    config = tiny_run.make_config(tmp_path / "data", **QUICK)
    interrupted(config, tmp_path / "run", 7)
    tiny_run.write_data(tmp_path / "data", seed=5)
    with pytest.raises(ValueError, match="made by another run") as error:
        train.run(config, tmp_path / "run")
    assert "run.data.train: '" in str(error.value)
    assert "run.tokenizer" not in str(error.value)


def test_another_version_of_the_code_is_refused(pairs, shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run.make_config(pairs, **QUICK)
    interrupted(config, tmp_path, 7, shared)
    monkeypatch.setattr(workdir, "__version__", "99.0")
    with pytest.raises(ValueError, match=rf"run.version: '99.0' here, '{__version__}' there"):
        train.run(config, tmp_path, shared)


def test_another_start_under_the_same_path_is_refused(pairs, shared, tmp_path: Path) -> None:
    for seed in (1, 2):
        train.run(tiny_run.make_config(pairs, seed=seed, **QUICK), tmp_path / f"start{seed}", shared)
    (tmp_path / "start").symlink_to(tmp_path / "start1")
    config = tiny_run.make_config(pairs, **{"init.run": str(tmp_path / "start"), "eval.examples": 0})
    interrupted(config, tmp_path / "run", 7)
    (tmp_path / "start").unlink()
    (tmp_path / "start").symlink_to(tmp_path / "start2")
    with pytest.raises(ValueError, match="holds other parameters than when this run began"):
        train.run(config, tmp_path / "run")


def test_a_reference_that_drifts_stops_the_run(pairs, shared, tmp_path: Path) -> None:
    trainer = train.Trainer(tiny_run.make_config(pairs, **QUICK), tmp_path, shared)

    class Drift(StopAfter):
        def agreed(self) -> bool:
            if super().agreed():  # as if a bit of the reference had flipped
                trainer._reference_hash = "0" * 64
            return False

    with pytest.raises(ValueError, match="the reference at step 10 is not the one that the run began with"):
        trainer.train(Drift(7))
    assert Checkpoint.steps(tmp_path) == [5]


def test_a_damaged_checkpoint_is_set_aside_and_nothing_is_lost(pairs, shared, tmp_path: Path) -> None:
    config = tiny_run.make_config(pairs, **QUICK, **{"checkpoint.every": 2})
    train.run(config, tmp_path / "whole", shared)
    interrupted(config, tmp_path / "run", 7, shared)
    target = max((tmp_path / "run" / "checkpoints" / "6" / "state").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(target.read_bytes())
    content[len(content) // 2] ^= 1
    target.write_bytes(content)
    stop = tiny_run.make_config(pairs, **QUICK, **{"checkpoint.every": 2, "checkpoint.on_damage": "stop"})
    (tmp_path / "run" / "config.json").write_text(workdir.to_json(stop))
    with pytest.raises(OSError, match="the checkpoint of step 6 is damaged"):
        train.run(stop, tmp_path / "run", shared)
    (tmp_path / "run" / "config.json").write_text(workdir.to_json(config))
    train.run(config, tmp_path / "run", shared)
    assert (tmp_path / "run" / "checkpoints" / "damaged-6").is_dir()
    assert tiny_run.results(tmp_path / "run") == tiny_run.results(tmp_path / "whole")


# --- numbers that are not finite -------------------------------------------------------------------------------------


# The first update makes parameters of 1e15: finite, but nothing that the second step computes from them is.
HOT = {"optim.learning_rate": 1e15, "optim.schedule": "constant", "optim.warmup_steps": 0}


def test_a_step_that_is_not_finite_stops_the_run_and_can_be_run_again(pairs, shared, tmp_path: Path) -> None:
    changes = {
        "optim.learning_rate": 1e15,
        "optim.schedule": "constant",
        "optim.warmup_steps": 0,
        "checkpoint.every": 1,
    }
    with pytest.raises(FloatingPointError, match="step 2 is not finite; the first tensor that is not: ") as error:
        train.run(tiny_run.make_config(pairs, **QUICK, **changes), tmp_path, shared)
    message = str(error.value)
    assert "log-probabilities of the policy, in row(s) 0, 1, 2" in message
    folder = tmp_path / "not_finite" / "step_000002"
    assert f"--replay={folder}" in message
    assert Checkpoint.steps(tmp_path) == [1]
    finding = reproducer.replay(folder)
    assert str(finding) in message
    case = reproducer.load(folder)
    assert int(case.state.step) == 1
    batch = train.Trainer(case.config, tmp_path, shared).pipeline.batch(1)
    jax.tree.map(np.testing.assert_array_equal, case.batch, batch)


def test_steps_are_left_out_as_many_as_allowed(pairs, shared, tmp_path: Path) -> None:
    config = tiny_run.make_config(pairs, **QUICK, **HOT, **{"train.max_skipped": 3})
    with pytest.raises(FloatingPointError, match="step 5 is not finite") as error:
        train.run(config, tmp_path, shared)
    assert "3 steps before it were left out (config.train.max_skipped)" in str(error.value)
    assert [row["train/skipped_steps"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2]


def test_a_batch_without_chosen_answers_is_no_step_left_out(singles, shared, tmp_path: Path, caplog) -> None:
    """Half of the answers are undesirable; in batches of one, sft has nothing to look at every other step."""
    config = tiny_run.make_config(
        singles, **QUICK, **{"loss.name": "sft", "data.batch_size": 1, "train.micro_batches": 1}
    )
    summary = train.run(config, tmp_path, shared)
    assert summary["train/skipped_steps"] == 0
    assert "left out" not in caplog.text


def test_steps_left_out_are_remembered_over_a_restart(pairs, shared, tmp_path: Path) -> None:
    config = tiny_run.make_config(pairs, **QUICK, **HOT, **{"train.max_skipped": 3})
    interrupted(config, tmp_path, 3, shared, crash=False)
    with pytest.raises(FloatingPointError, match="step 5 is not finite"):
        train.run(config, tmp_path, shared)


WRONG = np.array([1, np.inf], np.float32)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("params/w", {"params": {"w": WRONG}}),
        ("reference/w", {"reference": {"w": WRONG.astype(jnp.bfloat16).view(np.uint16)}}),  # bits, as it is read
    ],
)
def test_what_is_not_finite_is_not_saved(name: str, changes, tmp_path: Path) -> None:
    state = dataclasses.replace(TrainState(np.int32(4), {}, None, (), {}), **changes)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(FloatingPointError, match=f"{name} is not finite after"):
        train.Trainer._check_finite(state, checkpoints)


def test_keeping_the_best_of_an_unknown_metric_is_refused(pairs, shared, tmp_path: Path) -> None:
    for name, known in (("eval/los", "eval/loss"), ("train/los", "train/loss")):
        config = tiny_run.make_config(pairs, **{"eval.prompts": 0, "checkpoint.keep_best": name})
        with pytest.raises(ValueError, match=f"keep_best is '{name}', which this run does not measure; .*{known}"):
            train.run(config, tmp_path / known, shared)
    assert [row["step"] for row in read_metrics(tmp_path / "eval/loss" / "metrics.jsonl")] == [0]


def test_the_best_checkpoint_stays(pairs, shared, tmp_path: Path) -> None:
    changes = {
        "checkpoint.every": 2,
        "checkpoint.keep": 1,
        "checkpoint.keep_best": "train/loss",
        "checkpoint.best": "max",
    }
    train.run(tiny_run.make_config(pairs, **QUICK, **changes, **{"train.log_every": 2}), tmp_path, shared)
    losses = {row["step"]: row["train/loss"] for row in read_metrics(tmp_path / "metrics.jsonl")}
    assert Checkpoint.steps(tmp_path) == sorted({max(losses, key=losses.__getitem__), 10})


def test_time_blocked_by_saves_is_reported(pairs, shared, tmp_path: Path) -> None:
    train.run(tiny_run.make_config(pairs, **QUICK), tmp_path, shared)
    rows = [json.loads(line) for line in (tmp_path / "timings.jsonl").read_text().splitlines()]
    blocked = [row["checkpoint_blocked_seconds"] for row in rows]
    assert blocked == sorted(blocked)
    assert blocked[-1] > 0


def test_base_is_what_tiny_runs_change() -> None:
    """The keys of this file's configs are those of users."""
    assert tiny_run.config_dict(Path("x")).keys() == base.get_config().keys()
