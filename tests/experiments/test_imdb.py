"""The whole chain of the sentiment experiment, small: from reviews to a policy that the ground truth likes better."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from dpo_jax.data.prepared import read_metadata
from dpo_jax.writers import read_metrics
from experiments.imdb import run

CONFIGS = "configs/smoke.py:{stage}"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imdb")
    run.run(folder, CONFIGS, seed=0)
    return folder


def test_the_reward_goes_up(workdir: Path) -> None:
    rows = [row for row in read_metrics(workdir / "dpo" / "metrics.jsonl") if "samples/reward" in row]
    first, last = rows[0], rows[-1]
    # The sampler's log-probabilities less the scorer's of the same parameters: fp32 rounding of sums of some 100 nats.
    assert abs(first["samples/kl"]) < 1e-5 and last["samples/kl"] > 0.1
    # The same draws before and after: a rise of two standard errors is no accident.
    assert last["samples/reward"] > first["samples/reward"] + 2 * last["samples/reward_se"]
    assert last["eval/rewards/accuracies"] > 0.5
    assert first["eval/loss"] == pytest.approx(0.6931472, abs=1e-6)  # log 2: the policy is the reference


def test_sft_learns_the_language(workdir: Path) -> None:
    losses = [row["eval/loss"] for row in read_metrics(workdir / "sft" / "metrics.jsonl") if "eval/loss" in row]
    assert losses[-1] < losses[0] - 1.5


def test_all_that_the_end_names_is_there(workdir: Path) -> None:
    for name in ("config.json", "metrics.jsonl", "summary.json", "tensorboard", "checkpoints", "samples"):
        assert (workdir / "dpo" / name).exists(), name
    assert "reward of samples" in (workdir / "report.md").read_text()
    with Image.open(workdir / "reward_kl.png") as picture:
        assert min(picture.size) > 300
    samples = (workdir / "dpo" / "samples" / "step_000000.jsonl").read_text().splitlines()
    assert {"prompt", "answer", "reward", "log_ratio", "tokens"} <= json.loads(samples[0]).keys()


def test_pairs_come_from_the_better_and_the_worse_answer(workdir: Path) -> None:
    metadata = read_metadata(workdir / "preferences" / "examples")
    prompts = json.loads((workdir / "preferences" / "config.json").read_text())["prefer"]["prompts"]
    assert 0.8 * 6 * prompts <= metadata.counts["train"] <= 6 * prompts


def test_a_finished_experiment_is_not_run_again(workdir: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = {p: p.stat().st_mtime_ns for p in (workdir / "dpo" / "checkpoints").rglob("*")}
    with caplog.at_level(logging.INFO, logger="absl"):
        run.run(workdir, CONFIGS, seed=0)
    assert caplog.text.count("is finished") == 3
    assert before == {p: p.stat().st_mtime_ns for p in (workdir / "dpo" / "checkpoints").rglob("*")}


def test_another_seed_in_the_same_folder_is_refused(workdir: Path) -> None:
    with pytest.raises(ValueError, match="config.seed"):
        run.run(workdir, CONFIGS, seed=1)
