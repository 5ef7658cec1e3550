"""Several processes: flags that fit together, errors, and a run of two that is stopped, killed and ends as one has."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dpo_jax import processes, refstore, train
from dpo_jax.checkpoint import steps_in
from dpo_jax.convert.pretrained import save_pretrained
from dpo_jax.models import init_params
from dpo_jax.start import make_start_model
from dpo_jax.stopping import EXIT_CODE
from tests import compiled, tiny_run

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


TOGETHER = """if True:
    import os, signal, sys, time
    import jax, jax.numpy as jnp
    from dpo_jax import processes, reference
    from dpo_jax.stopping import StopRequest
    from tests.test_processes import EXAMPLE, IDENTITY
    index, port, root = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    processes.start(f"localhost:{port}", 2, index)
    work = jax.jit(lambda a: jax.lax.fori_loop(0, 400, lambda _, x: jnp.tanh(x @ a), a))
    jax.block_until_ready(work(jnp.ones((600, 600))))
    poll = processes.Poll()
    heard = [poll(index == 1)]
    processes.meet("asked")
    busy = work(jnp.ones((600, 600)))
    heard.append(poll(False))
    print(heard, "ready" if busy.is_ready() else "at work")
    with StopRequest() as request:
        for step in range(100):
            if index == 1 and step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01 * index)
            if request.agreed():
                print("stopped at", step)
                break
    try:
        with processes.failing_together(OSError):
            if index == 0:
                raise OSError("broken here")
    except OSError as error:
        print(error)
    lack = reference.Need("other data", lambda: iter([EXAMPLE]))
    for needs in ([], [lack]):
        try:
            store = reference.open_store(root, IDENTITY, needs, None)
            print([logps.tolist() for logps in store.logps(EXAMPLE)])
        except ValueError as error:
            print("only a single process" in str(error))
"""
EXAMPLE = tiny_run.make_examples(1, 2, seed=0)[0]
IDENTITY = dict.fromkeys(refstore.IDENTITY, "")


def test_two_processes_agree(tmp_path: Path) -> None:
    """On when to stop, without a wait for their devices; on what has failed, and on the reference's stored numbers."""
    logps = tuple(np.arange(len(answer.tokens), dtype=np.float32) for answer in EXAMPLE.answers)
    refstore.write_store(tmp_path, IDENTITY, [(EXAMPLE, logps)])
    port = str(_free_port())
    pair = [_start([sys.executable, "-c", TOGETHER, str(i), port, str(tmp_path)], subprocess.PIPE) for i in range(2)]
    answers = [process.communicate(timeout=240) for process in pair]
    reasons = ["broken here", "another process of this run found it so; its log says more"]
    stored = str([values.tolist() for values in logps])
    said = [out.splitlines()[-5:] for out, _ in answers]
    assert said == [["[False, True] at work", "stopped at 4", reason, stored, "True"] for reason in reasons], answers


FAILING = """if True:
    import sys
    from contextlib import closing
    from dpo_jax import processes
    from dpo_jax.main import command
    from tests.test_processes import Farewell
    index, port, failing = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    with command(), closing(Farewell()):
        processes.start(f"localhost:{port}", 2, index)
        processes.meet("here")
        if str(index) in failing:
            raise ValueError("only here") if failing == "1" else KeyError("ours")
        processes.meet("there")
"""


class Farewell:
    """What a run has to close."""

    def close(self) -> None:
        print("closed")


def test_a_process_that_fails_does_not_wait_for_the_others() -> None:
    """Nor do they for it: each tells what it knows, closes what it has open, and ends with 1 and no stack of C++."""
    started = [*_start_failing("1"), *_start_failing("01")]
    said = [_ended(process) for process in started]
    assert [process.returncode for process in started] == [1] * 4, said
    assert [out.splitlines()[-1] for out, _ in said] == ["closed"] * 4
    assert said[1][1].splitlines()[-1] == "error: only here"
    assert "Traceback" not in said[1][1]
    assert all("Traceback" in text and text.splitlines()[-1] == "KeyError: 'ours'" for _, text in said[2:]), said


def _start_failing(failing: str) -> list[subprocess.Popen[str]]:
    port = str(_free_port())
    commands = [[sys.executable, "-c", FAILING, str(index), port, failing] for index in range(2)]
    # One device each: of several, some can wait for those that have noticed, until JAX misses the process.
    return [_start(command, subprocess.PIPE, devices=1) for command in commands]


def _ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What a process has said when it ends; one that waits for ever is killed."""
    try:
        return process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()


def test_two_processes_are_stopped_and_killed_and_one_ends_their_run(tmp_path: Path) -> None:
    """Stopped while trained by pmap over 2 × 4 devices, killed twice on a mesh over them, ended by one process alone.

    What it starts from is read whole by the first, and by each process in parts by the others.
    """
    tiny_run.write_data(tmp_path / "data")
    changes = {**CHANGES, "init.hf": str(_write_start(tmp_path))}
    folder, whole = tmp_path / "stopped", tmp_path / "whole"
    pair = _start_two(tiny_run.write_config(tmp_path / "pmap.py", tmp_path / "data", **changes), folder)
    expected = train.run(tiny_run.make_config(tmp_path / "data", **changes), whole)
    _wait_for_checkpoint(folder, pair, after=0)
    pair[1].send_signal(signal.SIGTERM)  # one is told, both stop
    said = [process.communicate(timeout=600)[1] for process in pair]
    assert [process.returncode for process in pair] == [EXIT_CODE] * 2, said
    stopped = steps_in(folder / "checkpoints")[-1]
    assert 5 <= stopped < 40
    assert all(f"Stopped after step {stopped} of 60; the same command goes on." in text for text in said)
    assert ["SIGTERM: saving after this step" in text for text in said] == [False, True]

    mesh = tiny_run.write_config(tmp_path / "mesh.py", tmp_path / "data", **changes, **_mesh(fsdp=2, tensor=2))
    for _ in range(2):  # the second time, there could be kept programs
        before = steps_in(folder / "checkpoints")[-1]
        pair = _start_two(mesh, folder)
        _wait_for_checkpoint(folder, pair, after=before)
        for process in pair:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert before < steps_in(folder / "checkpoints")[-1] < 60

    got = train.run(tiny_run.make_config(tmp_path / "data", **changes, **_mesh(fsdp=4, tensor=2)), folder)
    # fp32 sums in another order, through sixty steps.
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True)
    lines = [_lines(run) for run in (folder, whole)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    losses = [[line["train/loss"] for line in run if "train/loss" in line] for run in lines]
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5)


def _write_start(folder: Path) -> Path:
    """A Hugging Face folder with the model of the run's config."""
    model = make_start_model(tiny_run.make_config(folder / "data"), tiny_run.VOCAB)
    place = folder / "hf"
    place.mkdir()
    save_pretrained(place, model, init_params(model, jax.random.key(0)))
    return place


def _mesh(**axes: int) -> dict[str, Any]:
    return {"parallel.mode": "mesh"} | {f"parallel.{name}": size for name, size in axes.items()}


def _wait_for_checkpoint(workdir: Path, pair: list[subprocess.Popen[str]], *, after: int) -> None:
    """Until a step after this one is saved."""
    deadline = time.monotonic() + 600
    while max(steps_in(workdir / "checkpoints"), default=0) <= after and time.monotonic() < deadline:
        assert all(process.poll() is None for process in pair), [process.communicate()[1] for process in pair]
        time.sleep(0.01)


def _start_two(config: Path, workdir: Path) -> list[subprocess.Popen[str]]:
    flags = f"--config={config}", f"--workdir={workdir}", f"--coordinator=localhost:{_free_port()}", "--num_processes=2"
    return [_start(tiny_run.command(*flags, f"--process_id={index}")) for index in range(2)]


def _start(command: list[str], stdout: int = subprocess.DEVNULL, devices: int = 4) -> subprocess.Popen[str]:
    # With few threads, collectives of many devices can wait for ever.
    flags = {"XLA_FLAGS": f"{compiled.FLAGS} --xla_force_host_platform_device_count={devices}", "NPROC": "32"}
    environment = {**os.environ, **tiny_run.environment(), **flags}
    return subprocess.Popen(
        command, cwd=tiny_run.ROOT, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def _lines(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
