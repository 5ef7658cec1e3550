"""Progress as plain lines, as a bar on a real pseudo-terminal, and not at all."""

from __future__ import annotations

import contextlib
import fcntl
import io
import logging
import os
import pty
import struct
import termios
from collections.abc import Iterator
from typing import TextIO

import pytest

from dpo_jax.progress import Progress, duration, stage, track


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal:
    """A pseudo-terminal of a given size, and what a program has written to it."""

    def __init__(self, stream: TextIO, reader: int):
        self.stream = stream
        self._reader = reader

    def text(self) -> str:
        """Closes the terminal and reads all of it: the kernel hands over in pieces, later than they were written."""
        self.stream.close()
        pieces = []
        with contextlib.suppress(OSError):  # what Linux raises at the end
            while piece := os.read(self._reader, 1 << 16):
                pieces.append(piece)
        return b"".join(pieces).decode()


@contextlib.contextmanager
def terminal(rows: int = 24, columns: int = 100) -> Iterator[Terminal]:
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    with open(writer, "w", encoding="utf-8") as stream:
        yield Terminal(stream, reader)
    os.close(reader)


def test_plain_lines():
    stream, clock = io.StringIO(), Clock()
    with Progress(100, "sft", start=10, stream=stream, interval=10, clock=clock) as progress:
        clock.now += 8  # compilation
        progress.update(loss=3.0)
        for _ in range(40):
            clock.now += 0.5
            progress.update(loss=2.25, answers=64)
    # The first line comes after 10 s: 4 updates in 2 s after the first one, so 85 more take 42.5 s.
    assert stream.getvalue().splitlines() == [
        "sft: 10/100 steps (10 %)",
        "sft: 15/100 steps (15 %), 2 steps/s, 42 s left, loss 2.25, answers 64",
        "sft: 35/100 steps (35 %), 2 steps/s, 32 s left, loss 2.25, answers 64",
        "sft: 51/100 steps (51 %), took 28 s, loss 2.25, answers 64",
    ]


def test_plain_lines_without_a_total():
    stream, clock = io.StringIO(), Clock()
    with Progress(None, "reading", unit="row", stream=stream, interval=1, clock=clock) as progress:
        for _ in range(2):
            clock.now += 1
            progress.update(5)
    assert stream.getvalue().splitlines() == [
        "reading: 0 rows",
        "reading: 5 rows",
        "reading: 10 rows, 5 rows/s",
        "reading: 10 rows, took 2.0 s",
    ]


def test_numbers_stay_until_they_change():
    stream, clock = io.StringIO(), Clock()
    with Progress(2, "dpo", stream=stream, clock=clock) as progress:
        progress.update(loss=0.6931471, reward=0.5)
        progress.update(loss=0.25)
    assert stream.getvalue().splitlines()[-1] == "dpo: 2/2 steps (100 %), took 0.0 s, loss 0.25, reward 0.5"


def test_close_twice_says_it_once():
    stream = io.StringIO()
    progress = Progress(1, "dpo", stream=stream)
    progress.close()
    progress.close()
    assert len(stream.getvalue().splitlines()) == 2


def test_nothing_to_do():
    stream = io.StringIO()
    assert list(track([], "empty", stream=stream)) == []
    assert stream.getvalue().splitlines()[0] == "empty: 0/0 steps"


def test_track_counts_items():
    stream, clock = io.StringIO(), Clock()
    assert list(track("abc", "letters", unit="letter", stream=stream, clock=clock)) == ["a", "b", "c"]
    assert stream.getvalue().splitlines() == [
        "letters: 0/3 letters (0 %)",
        "letters: 3/3 letters (100 %), took 0.0 s",
    ]


def test_track_an_iterator():
    stream = io.StringIO()
    assert list(track(iter("abc"), "letters", total=4, stream=stream)) == ["a", "b", "c"]
    assert "letters: 3/4 steps (75 %)" in stream.getvalue()


def test_other_processes_show_nothing():
    stream = io.StringIO()
    with stage("Training", 10, process_index=1, stream=stream):
        assert list(track(range(3), "rows", process_index=1, stream=stream)) == [0, 1, 2]
    assert stream.getvalue() == ""


def test_bar_on_a_terminal():
    with terminal() as tty:
        with Progress(4, "dpo", unit="pair", stream=tty.stream) as progress:
            progress.update(4, loss=0.5)
        text = tty.text()
    assert "dpo: 100%" in text
    assert "4/4" in text
    assert "pair/s" in text
    assert "loss=0.5" in text


def test_bar_goes_on_where_an_earlier_run_stopped():
    with terminal() as tty:
        with Progress(4, "dpo", start=2, stream=tty.stream) as progress:
            progress.update()
        assert "dpo:  75%" in tty.text()


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (0, 80)])
def test_terminal_without_a_size_gets_lines(rows, columns):
    with terminal(rows, columns) as tty:
        with Progress(4, "dpo", stream=tty.stream):
            pass
        assert "dpo: 0/4 steps (0 %)" in tty.text()


def test_log_lines_do_not_tear_the_bar():
    before = list(logging.root.handlers)
    with terminal() as tty:
        handler = logging.StreamHandler(tty.stream)
        logging.root.addHandler(handler)
        try:
            with Progress(4, "dpo", stream=tty.stream) as progress:
                progress.update()
                logging.warning("a warning")
            assert handler in logging.root.handlers
        finally:
            logging.root.removeHandler(handler)
        text = tty.text()
    assert logging.root.handlers == before
    # The bar is wiped out with blanks, the line stands alone, and the bar is drawn again below it.
    head, _, rest = text.partition("a warning\r\n")
    assert head.endswith(" \r")
    assert rest.lstrip("\r").startswith("dpo:")


def test_stage():
    stream, clock = io.StringIO(), Clock()
    with stage("Training the reward model", 100, stream=stream, clock=clock):
        clock.now += 185
    with stage("Reading", stream=stream, clock=clock):
        clock.now += 0.25
    assert stream.getvalue().splitlines() == [
        "Training the reward model (about 2 min) …",
        "Training the reward model: done in 3 min 05 s",
        "Reading …",
        "Reading: done in 0.2 s",
    ]


def test_stage_that_fails():
    stream, clock = io.StringIO(), Clock()
    with pytest.raises(ZeroDivisionError), stage("Reading", 0.1, stream=stream, clock=clock):
        raise ZeroDivisionError
    assert stream.getvalue().splitlines() == ["Reading (about 1 s) …", "Reading: stopped after 0.0 s"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7620, "2 h 07 min"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
