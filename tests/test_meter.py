"""Rates by a clock of the test's own, useful products by hand, what is compiled, and traces of whole runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import chips, flops, train
from dpo_jax.data.example import Example
from dpo_jax.data.layouts import Shape
from dpo_jax.meter import Compilations, Meter
from dpo_jax.profile import FOLDER
from dpo_jax.types import CHOSEN, REJECTED, PreferenceBatch
from tests import tiny_run
from tests.tiny import lay_out, make_answer, tiny_model, tiny_params

SHAPE = Shape(answers=2, prompt_length=3, answer_length=4)
# A prompt of 2 tokens; answers of 3 and 1 tokens. The last token of an answer is no input.
PAIR = [Example(0, np.array([5, 6], np.int32), (make_answer([7, 8, 2], CHOSEN), make_answer([2], REJECTED)))]


class Clock:
    """Seconds that pass when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now

    def take(self, seconds: float) -> None:
        self.now += seconds


def batch_of(layout: str = "concatenated") -> PreferenceBatch:
    return lay_out(PAIR, SHAPE, layout)


def step(meter: Meter, clock: Clock, wait: float, seconds: float) -> None:
    def make() -> PreferenceBatch:
        clock.take(wait)
        return batch_of()

    meter.begin(make)
    clock.take(seconds)
    meter.end(tokens=4.0)


def test_rates_leave_out_the_first_step_and_what_is_no_training() -> None:
    clock = Clock()
    meter = Meter(2, processes=2, flops=lambda batch: 30.0, peak=80.0, clock=clock)
    step(meter, clock, 0.0, 60.0)  # compiles
    assert meter.window() == {}
    step(meter, clock, 0.5, 1.5)
    clock.take(1000.0)  # evaluates
    meter.restart()
    step(meter, clock, 0.0, 1.0)
    # Two steps in 3 s: rows of 2+3-1 and 2+1-1 tokens, in 2 rows of 3+4-1 positions, in each of two processes.
    rates = {"tokens": 8 / 3, "useful_tokens": 2 * 2 * 6 / 3, "positions": 2 * 2 * 12 / 3, "examples": 2 * 2 / 3}
    expected = {f"{name}_per_second": rate for name, rate in rates.items()}
    expected |= {"step_seconds": 1.5, "data_wait_seconds": 0.25, "mfu": 2 * 2 * 30.0 / 3 / 80}
    assert meter.window() == pytest.approx(expected)
    step(meter, clock, 0.0, 9.0)
    assert meter.window()["step_seconds"] == 9.0
    assert meter.total()["step_seconds"] == 4.0


def test_without_a_known_peak_there_is_no_mfu() -> None:
    clock = Clock()
    meter = Meter(2, clock=clock)
    for _ in range(2):
        step(meter, clock, 0.0, 1.0)
    assert "mfu" not in meter.total()
    assert chips.peak_flops(jax.devices()) is None


def test_the_peak_of_a_pod_is_that_of_its_chips() -> None:
    kinds = lambda *names: [SimpleNamespace(device_kind=name) for name in names]  # noqa: E731
    assert chips.peak_flops(kinds("TPU v5 lite", "TPU v5 lite")) == 2 * 197e12
    assert chips.peak_flops(kinds("TPU v6 lite")) == 918e12
    assert chips.peak_flops(kinds("NVIDIA H200")) == 989e12
    assert chips.peak_flops(kinds("TPU v4", "TPU v99")) is None


@pytest.mark.parametrize(
    ("layout", "tokens", "keys"),
    # The rejected answer has one token, which the last token of the prompt predicts: shared, it adds no input.
    [("concatenated", 4 + 2, 10 + 3), ("shared_prefix", 4, 10)],
)
def test_useful_products_are_those_of_tokens(layout: str, tokens: int, keys: int) -> None:
    model = tiny_model()
    params = tiny_params(model)
    one = flops.forward(model.config, params, tokens=tokens, pairs=model.config.layers * keys, targets=4)
    body = one.base + one.head
    count = lambda **options: flops.useful_flops(model.config, params, batch_of(layout), **options)  # noqa: E731
    assert count(reference=True) == 4 * (body + one.attention)
    assert count(reference=False) == 3 * (body + one.attention)
    assert count(reference=True, full=False) == 3 * body + 4 * one.attention


def test_programs_are_counted_while_they_are_compiled() -> None:
    before = np.float32(np.random.default_rng().random())  # a constant that no cache has seen
    with Compilations() as compiled:
        assert compiled.numbers() == {"compilations": 0, "compile_seconds": 0.0}
        function = jax.jit(lambda x: x * before)
        for _ in range(3):
            function(jnp.float32(1))
    first = compiled.numbers()
    assert first["compilations"] >= 1 and first["compile_seconds"] > 0
    jax.jit(lambda x: x - before)(jnp.float32(1))
    assert compiled.numbers() == first


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("run")
    tiny_run.write_data(folder / "data")
    config = tiny_run.make_config(folder / "data", **{"eval.prompts": 0, "eval.examples": 0, "train.log_every": 5})
    train.run(config, folder / "run", profile=True)
    return folder / "run"


def test_timings_of_a_run(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "timings.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 10]
    last = rows[-1]
    assert last["positions_per_second"] > last["useful_tokens_per_second"] > last["tokens_per_second"] > 0
    assert 0 <= last["data_wait_seconds"] < last["step_seconds"]
    assert last["compilations"] > 0 and last["compile_seconds"] > 0
    assert "mfu" not in last and "hbm_bytes" not in last  # CPUs
    assert "seconds" not in (run / "metrics.jsonl").read_text()


def test_a_run_is_traced(run: Path) -> None:
    assert list((run / FOLDER).rglob("*.xplane.pb"))
