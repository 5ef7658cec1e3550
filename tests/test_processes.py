"""Several processes: flags that fit together, and a run of two that is stopped, killed and ends as one would have."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_jax import processes, train
from dpo_jax.checkpoint import steps_in
from dpo_jax.stopping import EXIT_CODE
from tests import tiny_run

CHANGES = {"train.steps": 60, "train.micro_batches": 1, "data.batch_size": 16, "checkpoint.every": 5}
CHANGES |= {"eval.every": 50, "eval.prompts": 2, "parallel.devices": None, "optim.epsilon": 1e-3}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("localhost:1", 2, None), "--process_id must be set too"),
        ((None, 2, None), "--coordinator and --process_id must be set too"),
        (("localhost:1", 2, 2), "--process_id is 2; with --num_processes 2 expected 0 to 1"),
    ],
)
def test_flags_that_do_not_fit_are_refused(given, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processes.start(*given)


def test_one_process_is_the_first_and_waits_for_none() -> None:
    processes.start(None, None, None)
    assert processes.first() and processes.told_by_first(lambda: 7) == 7
    with processes.in_turn("here"):
        processes.meet("there")


def test_two_processes_are_stopped_and_killed_and_one_ends_their_run(tmp_path: Path) -> None:
    """Stopped while trained by pmap over 2 × 4 devices, killed on a mesh over them, ended by one process on another."""
    tiny_run.write_data(tmp_path / "data")
    folder, whole = tmp_path / "stopped", tmp_path / "whole"
    pair = _start_two(tiny_run.write_config(tmp_path / "pmap.py", tmp_path / "data", **CHANGES), folder)
    expected = train.run(tiny_run.make_config(tmp_path / "data", **CHANGES), whole)
    _wait_for_checkpoint(folder, pair, after=0)
    pair[1].send_signal(signal.SIGTERM)  # one is told, both stop
    said = [process.communicate(timeout=240)[1] for process in pair]
    assert [process.returncode for process in pair] == [EXIT_CODE] * 2, said
    stopped = steps_in(folder / "checkpoints")[-1]
    assert 5 <= stopped < 40
    assert all(f"Stopped after step {stopped} of 60; the same command goes on." in text for text in said)
    assert ["SIGTERM: saving after this step" in text for text in said] == [False, True]

    mesh = tiny_run.write_config(tmp_path / "mesh.py", tmp_path / "data", **CHANGES, **_mesh(fsdp=2, tensor=2))
    pair = _start_two(mesh, folder)
    _wait_for_checkpoint(folder, pair, after=stopped)
    for process in pair:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert stopped < steps_in(folder / "checkpoints")[-1] < 60

    got = train.run(tiny_run.make_config(tmp_path / "data", **CHANGES, **_mesh(fsdp=4, tensor=2)), folder)
    # fp32 sums in another order, through sixty steps.
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True)
    lines = [_lines(run) for run in (folder, whole)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    losses = [[line["train/loss"] for line in run if "train/loss" in line] for run in lines]
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5)


def _mesh(**axes: int) -> dict[str, Any]:
    return {"parallel.mode": "mesh"} | {f"parallel.{name}": size for name, size in axes.items()}


def _wait_for_checkpoint(workdir: Path, pair: list[subprocess.Popen[str]], *, after: int) -> None:
    """Until a step after this one is saved."""
    deadline = time.monotonic() + 240
    while max(steps_in(workdir / "checkpoints"), default=0) <= after and time.monotonic() < deadline:
        assert all(process.poll() is None for process in pair), [process.communicate()[1] for process in pair]
        time.sleep(0.01)


def _start_two(config: Path, workdir: Path) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = f"--config={config}", f"--workdir={workdir}", f"--coordinator=localhost:{port}", "--num_processes=2"
    # Four devices each; with few threads, collectives of many devices can wait for ever.
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "NPROC": "32"}
    return [
        subprocess.Popen(
            tiny_run.command(*flags, f"--process_id={index}"),
            cwd=tiny_run.ROOT,
            env={**os.environ, **tiny_run.environment(), **devices},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


def _lines(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
