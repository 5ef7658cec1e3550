"""Metric files hold each step once, in order, whatever interrupts the run."""

from __future__ import annotations

import errno
import json
import math
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from dpo_jax.writers import (
    METRICS_FILE,
    TENSORBOARD_DIR,
    TIMINGS_FILE,
    JsonlWriter,
    make_writer,
    read_metrics,
    split_lines,
)


def events(workdir: Path) -> list[Event]:
    """All events of a folder, file by file: an event is a length, a checksum of it, the data and a checksum of that."""
    found = []
    for path in sorted((workdir / TENSORBOARD_DIR).iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def scalars(workdir: Path) -> list[tuple[int, str, float]]:
    return [(event.step, value.tag, value.simple_value) for event in events(workdir) for value in event.summary.value]


def write_steps(workdir: Path, steps: range, resume_step: int | None = None) -> None:
    with make_writer(workdir, resume_step) as writer:
        for step in steps:
            writer.write(step, {"loss": step / 4})


def test_line_of_a_step(tmp_path):
    with make_writer(tmp_path / "new" / "run") as writer:
        writer.write(np.int64(3), {"loss": jnp.float32(0.5), "answers": 64, "accuracy": np.float64(0.25)})
        writer.write(3, {"reward": 0.75}, prefix="eval")
        writer.write(4, {"loss": 0.125})
    assert (tmp_path / "new" / "run" / METRICS_FILE).read_text() == (
        '{"step": 3, "accuracy": 0.25, "answers": 64, "eval/reward": 0.75, "loss": 0.5}\n{"step": 4, "loss": 0.125}\n'
    )


def test_tensorboard_events(tmp_path):
    with make_writer(tmp_path) as writer:
        writer.write(3, {"loss": 0.5})
        writer.write(3, {"reward": 0.75}, prefix="eval")
        writer.write_timings(3, {"tokens": 8.0})
    assert scalars(tmp_path) == [(3, "loss", 0.5), (3, "eval/reward", 0.75), (3, "timing/tokens", 8.0)]
    assert events(tmp_path)[0].file_version == "brain.Event:2"


def test_timings_stay_out_of_the_metrics(tmp_path):
    with make_writer(tmp_path) as writer:
        writer.write(1, {"loss": 0.5})
        writer.write_timings(1, {"seconds": 2.0})
    assert read_metrics(tmp_path / METRICS_FILE) == [{"step": 1, "loss": 0.5}]
    assert read_metrics(tmp_path / TIMINGS_FILE) == [{"step": 1, "seconds": 2.0}]


def test_numbers_that_are_not_finite(tmp_path):
    with make_writer(tmp_path) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": jnp.float32(-math.inf), "d": 1.0})
    text = (tmp_path / METRICS_FILE).read_text()
    assert text == '{"step": 1, "a": null, "b": null, "c": null, "d": 1.0}\n'
    (record,) = read_metrics(tmp_path / METRICS_FILE)
    assert [name for name, value in record.items() if math.isnan(value)] == ["a", "b", "c"]
    assert [value for _, _, value in scalars(tmp_path)][1:] == [math.inf, -math.inf, 1.0]


def test_flush_leaves_the_last_step_in_the_file(tmp_path):
    with make_writer(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        writer.flush()
        assert len(read_metrics(tmp_path / METRICS_FILE)) == 1
        assert len(scalars(tmp_path)) == 1
        writer.flush()
    assert len(read_metrics(tmp_path / METRICS_FILE)) == 1


def test_a_line_is_in_the_file_when_the_next_step_comes(tmp_path):
    with make_writer(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write(2, {"loss": 1.0})
        assert [record["step"] for record in read_metrics(tmp_path / METRICS_FILE)] == [1]


def test_resumed_file_equals_the_uninterrupted_one(tmp_path):
    write_steps(tmp_path / "whole", range(8))
    write_steps(tmp_path / "resumed", range(6))
    write_steps(tmp_path / "resumed", range(4, 8), resume_step=3)
    whole, resumed = ((tmp_path / name / METRICS_FILE).read_bytes() for name in ("whole", "resumed"))
    assert resumed == whole


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4, "loss": 1.0}', "\0\0\0\0", '{"step": 4}x\n', "[4]\n"])
def test_torn_last_line_is_dropped(tmp_path, torn):
    write_steps(tmp_path, range(1, 4))
    whole = (tmp_path / METRICS_FILE).read_text()
    (tmp_path / METRICS_FILE).write_text(whole + torn)
    assert [record["step"] for record in read_metrics(tmp_path / METRICS_FILE)] == [1, 2, 3]
    write_steps(tmp_path, range(4, 5), resume_step=3)
    assert (tmp_path / METRICS_FILE).read_text() == whole + '{"step": 4, "loss": 1.0}\n'


def test_every_cut_of_the_file_resumes(tmp_path):
    """Killed after any byte past the checkpoint of step 2: the file ends as if nothing had happened."""
    write_steps(tmp_path, range(5))
    path = tmp_path / METRICS_FILE
    whole = path.read_bytes()
    after_two = sum(len(line) for line in whole.splitlines(keepends=True)[:3])
    for size in range(after_two, len(whole) + 1):
        path.write_bytes(whole[:size])
        with JsonlWriter(path, resume_step=2) as writer:
            for step in (3, 4):
                writer.write(step, {"loss": step / 4})
        assert path.read_bytes() == whole


def test_new_start_empties_the_files(tmp_path):
    write_steps(tmp_path, range(3))
    (tmp_path / TIMINGS_FILE).write_text("damaged\nlines\n")
    write_steps(tmp_path, range(1), resume_step=None)
    assert read_metrics(tmp_path / METRICS_FILE) == [{"step": 0, "loss": 0.0}]
    assert (tmp_path / TIMINGS_FILE).read_text() == ""


@pytest.mark.parametrize(("resume_step", "first_step"), [(None, 0), (0, 1), (7, 8)])
def test_tensorboard_hides_what_comes_again(tmp_path, resume_step, first_step):
    write_steps(tmp_path, range(0), resume_step)
    starts = [event.step for event in events(tmp_path) if event.session_log.status == SessionLog.START]
    assert starts == [first_step]


def test_restart_within_a_second_keeps_earlier_events(tmp_path):
    for step in range(1, 4):
        write_steps(tmp_path, range(step, step + 1), resume_step=step - 1)
    assert [step for step, _, _ in scalars(tmp_path)] == [1, 2, 3]


def test_damage_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_text('{"step": 1}\n{"step": \0\0\0\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2: expected a JSON object with a step above 1"):
        read_metrics(path)
    with pytest.raises(ValueError, match="repair or remove the line"):
        make_writer(tmp_path, resume_step=3)
    assert len(path.read_text().splitlines()) == 3


def test_steps_out_of_order_in_a_file_are_an_error(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"step": 2}\n{"step": 2}\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2: expected a JSON object with a step above 2"):
        make_writer(tmp_path, resume_step=3)


def test_earlier_step_is_refused(tmp_path):
    with make_writer(tmp_path) as writer:
        writer.write(5, {"loss": 1.0})
        with pytest.raises(ValueError, match="got numbers of step 4, expected step 5 or later"):
            writer.write(4, {"loss": 1.0})


def test_flushed_step_is_refused(tmp_path):
    with make_writer(tmp_path) as writer:
        writer.write(5, {"loss": 1.0})
        writer.flush()
        with pytest.raises(ValueError, match=r"expected step 6 or later; .* all numbers of a step before flush"):
            writer.write(5, {"reward": 1.0})


def test_restored_step_is_refused(tmp_path):
    write_steps(tmp_path, range(6))
    with make_writer(tmp_path, resume_step=3) as writer, pytest.raises(ValueError, match="expected step 4 or later"):
        writer.write(3, {"loss": 1.0})


@pytest.mark.parametrize("name", ["loss", "step"])
def test_name_twice_is_refused(tmp_path, name):
    with make_writer(tmp_path) as writer:
        writer.write(5, {"loss": 1.0})
        with pytest.raises(ValueError, match=f"step 5 has {name} already"):
            writer.write(5, {name: 2.0})


def test_other_processes_write_nothing(tmp_path):
    with make_writer(tmp_path / "run", process_index=1) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write_timings(1, {"seconds": 1.0})
        writer.flush()
    assert list(tmp_path.iterdir()) == []


def test_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match=r"a file stands where a folder is needed.*--workdir.*run/metrics.jsonl"):
        make_writer(tmp_path / "run")


def test_no_permission(tmp_path, monkeypatch):
    # The tests may run as root, who may write anywhere.
    monkeypatch.setattr(
        Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(errno.EACCES, "Permission denied"))
    )
    with pytest.raises(
        PermissionError, match="cannot write the run's metrics: Permission denied; make it writable, or"
    ):
        make_writer(tmp_path / "run")


def test_full_disk():
    with pytest.raises(OSError, match="No space left on device; free some space there") as caught:  # noqa: SIM117, PT012
        with FullDiskWriter() as writer:
            writer.write(1, {"loss": 1.0})
            writer.flush()
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == "/dev/full"


def test_full_disk_does_not_hide_the_error_of_the_run():
    with pytest.raises(ZeroDivisionError), FullDiskWriter() as writer:  # noqa: PT012
        writer.write(1, {"loss": 1.0})
        raise ZeroDivisionError


def FullDiskWriter() -> JsonlWriter:
    return JsonlWriter(Path("/dev/full"))


def test_last_line_is_written_when_the_run_ends_with_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), make_writer(tmp_path) as writer:  # noqa: PT012
        writer.write(1, {"loss": math.nan})
        raise ZeroDivisionError
    assert json.loads((tmp_path / METRICS_FILE).read_text()) == {"step": 1, "loss": None}


def test_close_twice(tmp_path):
    writer = make_writer(tmp_path)
    writer.close()
    writer.close()


def test_lines_end_with_a_line_feed_alone():
    rows = [{"answer": "one\u0085two\u2028three\x1c"}, {"answer": "four"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert [json.loads(line) for line in split_lines(text)] == rows
    assert split_lines("") == [] and split_lines("a\n\nb") == ["a", "", "b"]
