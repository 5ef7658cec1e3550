"""Checkpoints of a run: a save is there whole or not at all, damaged ones are set aside, old ones go."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from dpo_jax import checkpoint
from dpo_jax.checkpoint import Checkpoints, Retention
from dpo_jax.integrity import DamagedError
from tests.tiny_state import assert_equal, make_state, remove_a_file, restore, save


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with checkpoints of steps 5 and 10; to be copied."""
    folder = tmp_path_factory.mktemp("saved")
    save(folder, 5, 10)
    return folder


@pytest.fixture
def workdir(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved / "checkpoints", tmp_path / "checkpoints")
    return tmp_path


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_newest(make_state(0)) is None
        assert checkpoints.latest_step() is None


def test_the_state_may_change_while_it_is_saved(tmp_path: Path) -> None:
    state = make_state(1, width=2000)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        state.params["kernel"][:] = 0
        checkpoints.wait()
        restored, _ = checkpoints.restore(1, state)
    assert_equal(restored, make_state(1, width=2000))
    assert checkpoints.blocked > 0


def test_an_interrupted_save_is_never_read(workdir: Path) -> None:
    for name in (".incomplete-15", ".removed-3"):
        shutil.copytree(workdir / "checkpoints" / "10", workdir / "checkpoints" / name)
    assert restore(workdir)[0] == 10
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"5", "10"}


def test_a_run_may_be_told_to_stop_at_damage(workdir: Path) -> None:
    remove_a_file(workdir, 10)
    with pytest.raises(DamagedError, match=r"the checkpoint of step 10 is damaged: .* is missing.*on_damage=fall_back"):
        restore(workdir, stop_at_damage=True)
    assert (workdir / "checkpoints" / "10").is_dir()


def test_where_folders_cannot_be_renamed_a_run_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        """As gcsfuse in a bucket without a hierarchical namespace, even with --rename-dir-limit."""
        if any(path.is_dir() for path in source.glob("*")):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(source))
        rename(source, target)

    monkeypatch.setattr("os.rename", refuse)
    with pytest.raises(
        OSError, match="cannot rename folders in .*checkpoints, as .*Too many open files.*hierarchical name"
    ):
        Checkpoints(tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())
    Checkpoints(tmp_path, writes=False).close()


def test_with_all_damaged_nothing_is_begun_anew(workdir: Path) -> None:
    for step in (5, 10):
        remove_a_file(workdir, step)
    with pytest.raises(DamagedError, match=r"no checkpoint in .* is whole: steps \[5, 10\] are damaged"):
        restore(workdir)


def test_two_damaged_checkpoints_of_a_step_are_both_kept(workdir: Path) -> None:
    for _ in range(2):
        remove_a_file(workdir, 10)
        assert restore(workdir)[0] == 5
        save(workdir, 10)
    assert restore(workdir)[0] == 10
    names = {p.name for p in (workdir / "checkpoints").iterdir()}
    assert names == {"5", "10", "damaged-10", "damaged-10-1"}


# --- retention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retention", "expected"),
    [
        (Retention(), {1, 2, 3, 4, 5, 6}),
        (Retention(newest=2), {5, 6}),
        (Retention(newest=1, every=2), {2, 4, 6}),
        (Retention(newest=1, best="min"), {3, 6}),
        (Retention(newest=1, best="max"), {2, 6}),
        (Retention(newest=2, every=4, best="min"), {3, 4, 5, 6}),
    ],
)
def test_retention(retention: Retention, expected: set[int]) -> None:
    scores = {1: 0.5, 2: 0.9, 3: 0.1, 4: None, 5: float("nan"), 6: 0.3}
    assert retention.kept(scores) == expected


def test_old_checkpoints_go_and_scores_are_remembered(tmp_path: Path) -> None:
    retention = Retention(newest=1, best="min")
    for steps in ({1: 0.2, 2: 0.1, 3: 0.7}, {4: 0.5}):
        with Checkpoints(tmp_path, retention) as checkpoints:
            for step, score in steps.items():
                checkpoints.save(step, make_state(step), {}, score)
    assert checkpoint.steps_in(tmp_path / "checkpoints") == [2, 4]
