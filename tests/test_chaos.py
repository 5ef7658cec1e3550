"""The short version of ``python -m tests.chaos``: a real training, killed again and again."""

from __future__ import annotations

from tests import chaos, tiny_run


def test_a_training_that_is_killed_again_and_again_loses_nothing() -> None:
    done = tiny_run.call("--kills=3", "--variants=tr_dpo", "--seed=1", program="tests.chaos")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills, " in done.stdout and "losses: 0" in done.stdout


def test_what_is_lost_is_found(capsys) -> None:
    good = {"metrics.jsonl": b'{"step": 0}\n{"step": 3}\n', "10/params/kernel": b"aa"}
    assert chaos._differences("dpo", good, dict(good)) == 0
    assert chaos._differences("dpo", good, {**good, "10/params/kernel": b"ab"}) == 1
    twice = {**good, "metrics.jsonl": b'{"step": 3}\n{"step": 3}\n'}
    assert chaos._differences("dpo", twice, twice) == 1
    assert "LOST in dpo: 10/params/kernel" in capsys.readouterr().out
