"""SIGTERM and Ctrl-C: saved and stopped with a code of their own; twice, at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dpo_jax.stopping import EXIT_CODE, Stopped, StopRequest
from tests import tiny_run

QUICK = {"eval.prompts": 0, "eval.examples": 0}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heard_and_handlers_come_back(number: signal.Signals, capfd) -> None:
    before = signal.getsignal(number)
    with StopRequest() as request:
        assert not request.agreed()
        os.kill(os.getpid(), number)
        assert request.agreed()
    assert signal.getsignal(number) == before
    said = f"{number.name}: saving after this step or the next, then stopping; once more to stop at once"
    assert said in capfd.readouterr().err


def test_another_thread_may_train() -> None:
    heard: list[bool] = []

    def train() -> None:
        with StopRequest() as request:
            heard.append(request.agreed())

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert heard == [False]


def test_stopping_ends_a_program_with_its_own_code() -> None:
    with pytest.raises(SystemExit) as exit_:
        raise Stopped()
    assert exit_.value.code == EXIT_CODE == 75


def test_a_second_signal_ends_the_program_at_once() -> None:
    code = """if True:
        import os, signal, time
        from dpo_jax.stopping import StopRequest
        with StopRequest():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
            print("still here", flush=True)
    """
    done = subprocess.run([sys.executable, "-c", code], env=tiny_run.environment(), capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM
    assert "still here" not in done.stdout
    assert "SIGTERM again: stopping at once" in done.stderr


def test_a_training_that_is_asked_to_stop_saves_and_goes_on_to_the_same_end(tmp_path: Path) -> None:
    tiny_run.write_data(tmp_path / "data")
    changes = {**QUICK, "train.steps": 2000, "checkpoint.every": 1500, "train.log_every": 7}
    config = tiny_run.write_config(tmp_path / "config.py", tmp_path / "data", **changes)
    command = tiny_run.command(f"--config={config}", f"--workdir={tmp_path / 'run'}")
    process = subprocess.Popen(
        command, cwd=tiny_run.ROOT, env=tiny_run.environment(), stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=240)
    assert process.returncode == EXIT_CODE, err
    assert "SIGTERM: saving after this step" in err and "the same command goes on" in err
    assert "Traceback" not in err
    saved = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert len(saved) == 1 and 0 < saved[0] < 2000
