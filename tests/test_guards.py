"""The guarded step, the search for the first tensor that is not finite, and warnings in words."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.data.layouts import Shape
from dpo_jax.guards import Finding, Guarded, Watch, first_not_finite, guard
from dpo_jax.logbook import Logbook
from dpo_jax.meter import Meter
from dpo_jax.metrics import Correlation, Ratio, Sum, Total
from dpo_jax.models import as_read
from dpo_jax.optim import AdamW
from dpo_jax.state import Hyper, StepConfig, TrainState
from dpo_jax.steps import SKIPPED, with_update
from dpo_jax.writers import Writer
from tests.tiny import lay_out, random_examples, tiny_model

NAN = float("nan")


def fake_gradient(state: TrainState, batch, hyper):
    """The batch is (loss, gradient); statistics count."""
    loss, gradient = batch
    return {"w": gradient}, {"loss": Sum((Ratio(loss, jnp.float32(1)),))}, {"n": state.loss_state["n"] + 1}


STEP = with_update(fake_gradient, AdamW(0.0, 0.0, 0.0, 0.0, None), StepConfig(2, "constant", 0, 10, 1))


def drive(limit: int, batches):
    params = {"w": jnp.float32(1)}
    state = TrainState(jnp.int32(0), params, None, AdamW(0.0, 0.0, 0.0, 0.0, None).init(params), {"n": jnp.int32(0)})
    carry, step, seen = Guarded(state, jnp.int32(0)), jax.jit(guard(STEP, limit)), []
    for loss, gradient, rate in batches:
        hyper = Hyper({}, jnp.float32(rate))
        carry, metrics = step(carry, (jnp.float32(loss), jnp.float32(gradient)), hyper)
        seen.append((int(carry.state.step), float(carry.state.params["w"]), int(carry.skipped)))
        assert float(metrics[SKIPPED].value) == (0 if np.isfinite(metrics["loss"].compute()) else 1)
    return carry, seen


# (loss, gradient, learning rate); without memory, Adam moves by the rate against the gradient's sign.
GOOD = (1.0, -1.0, 2.0)
BAD = [(NAN, 1.0, 2.0), (1.0, np.inf, 2.0), (1.0, 1.0, NAN), (1.0, 1.0, np.inf), (-np.inf, NAN, NAN)]


@pytest.mark.parametrize("bad", BAD)
def test_the_state_stays_as_it_was_before_the_step(bad) -> None:
    """And it stays so, whatever comes after it: the host looks late."""
    carry, seen = drive(0, [GOOD, bad, GOOD, GOOD])
    assert seen == [(1, 3.0, 0), (1, 3.0, 1), (1, 3.0, 1), (1, 3.0, 1)]
    assert int(carry.state.opt_state.count) == int(carry.state.loss_state["n"]) == 1
    assert float(carry.state.opt_state.mean["w"]) == -1.0


@pytest.mark.parametrize("bad", BAD)
def test_allowed_steps_are_left_out_and_their_numbers_used_up(bad) -> None:
    carry, seen = drive(2, [GOOD, bad, GOOD, bad, bad, GOOD])
    assert seen == [(1, 3.0, 0), (2, 3.0, 1), (3, 5.0, 1), (4, 5.0, 2), (4, 5.0, 3), (4, 5.0, 3)]
    assert int(carry.state.opt_state.count) == int(carry.state.loss_state["n"]) == 2


def tensors(**changes):
    names = (
        "params",
        "reference",
        "opt_state",
        "log-probabilities of the policy",
        "log-probabilities of the reference",
    )
    found = {name: {"a": np.zeros(2)} for name in names[:3]} | {name: np.zeros((1, 1, 3, 2, 1)) for name in names[3:]}
    return {**found, "loss": np.float32(1), "gradient": {"b": np.zeros(3), "c": np.zeros(3)}, **changes}


def test_the_first_tensor_of_the_step_is_found() -> None:
    assert first_not_finite(tensors(), 1) is None
    gradient = {"b": np.zeros(3), "c": np.array([0, np.inf, 0])}
    assert first_not_finite(tensors(gradient=gradient), 1) == Finding("gradient/c")
    assert first_not_finite(tensors(gradient=gradient, loss=np.float32(NAN)), 1) == Finding("loss")
    logps = np.zeros((1, 1, 3, 2, 1))
    logps[0, 0, 1, 1], logps[0, 0, 2, 0] = NAN, -np.inf
    name = "log-probabilities of the policy"
    for slots, rows in ((1, (3, 4)), (2, (1, 2))):
        found = first_not_finite(tensors(**{name: logps, "loss": np.float32(NAN)}), slots)
        assert found == Finding(name, rows)
    assert str(found) == "log-probabilities of the policy, in row(s) 1, 2 of the batch"
    assert str(Finding("x", tuple(range(20)))).endswith("0, 1, 2, 3, 4, 5, 6, 7 and 12 more of the batch")


@pytest.mark.parametrize("value", [NAN, np.inf, -np.inf, 3.4e38])  # bf16 rounds the last to infinity
def test_a_reference_that_lies_as_bits_is_looked_at(value: float) -> None:
    model = tiny_model(dtype=jnp.bfloat16)
    read = lambda *values: as_read(model, {"kernel": np.array(values, np.float32)})  # noqa: E731
    healthy, broken = read(-1.0, 3e38, 1e-40), read(1.0, value)
    assert healthy["kernel"].dtype == np.uint16
    assert first_not_finite(tensors(reference=healthy), 1) is None
    assert first_not_finite(tensors(reference=broken), 1) == Finding("reference/kernel")


# --- warnings --------------------------------------------------------------------------------------------------------

HEALTHY = {"loss": 0.6, "log_ratio/mean": 0.1, "rewards/margins": 0.2, "entropy": 3.0}


def warnings(watch: Watch, *lines) -> list[tuple[int, str]]:
    return [(step, text) for step, line in enumerate(lines, 1) for text in watch.look(step, {**HEALTHY, **line})]


def test_a_healthy_run_is_not_warned_about() -> None:
    watch = Watch(needs_reference=True)
    assert list(watch.first_step({"rewards/margins": 0.0})) == []
    assert warnings(watch, {}, {"loss": np.log(2)}, {}, {"entropy": 0.5}, {"loss": NAN, "entropy": NAN}) == []


def test_margins_at_the_start_are_warned_about() -> None:
    (text,) = Watch(True).first_step({"rewards/margins": 0.02})
    assert "margins are 0.02 at step 0, where the policy is its reference" in text
    assert list(Watch(False).first_step({"rewards/margins": 0.02})) == []


def test_a_loss_stuck_at_log_2_is_warned_about_once() -> None:
    stuck = {"loss": float(np.log(2)) + 5e-5}
    ((step, text),) = warnings(Watch(True), *[stuck] * 9)
    assert step == 3 and "the loss is still log 2 = 0.6931 at step 3" in text
    assert warnings(Watch(True), stuck, stuck, {}, stuck, stuck) == []
    assert warnings(Watch(False), *[stuck] * 9) == []
    assert [step for step, _ in warnings(Watch(True, after=4), *[stuck] * 9)] == [7]


def test_a_policy_that_is_its_reference_is_warned_about() -> None:
    equal = {"loss": float(np.log(2)), "log_ratio/mean": 0.0, "rewards/margins": 0.0}
    found = warnings(Watch(True), *[equal] * 5)
    assert found[0][0] == 3 and "still equals its reference to the last bit" in found[0][1]


def test_collapsing_entropy_is_warned_about_once() -> None:
    ((step, text),) = warnings(Watch(True), {}, {"entropy": 0.31}, {"entropy": 0.29}, {"entropy": 0.1})
    assert step == 3 and "the entropy of the policy is 0.29 nats a token, below a tenth of the 3 at the start" in text


def test_a_watch_that_is_continued_warns_as_the_uninterrupted_one() -> None:
    stuck = {"loss": math.log(2), "log_ratio/mean": 0.1, "entropy": 3.0}
    whole, first, second = Watch(True), Watch(True), Watch(True)
    lines = [stuck, stuck, stuck, {"entropy": 0.2}, {"entropy": 0.1}]
    expected = [list(whole.look(step, numbers)) for step, numbers in enumerate(lines, start=1)]
    assert [len(words) for words in expected] == [0, 0, 1, 1, 0]
    got = [list(first.look(step, numbers)) for step, numbers in enumerate(lines[:2], start=1)]
    second.remember(json.loads(json.dumps(first.memory())))
    got += [list(second.look(step, numbers)) for step, numbers in enumerate(lines[2:4], start=3)]
    third = Watch(True)
    third.remember(second.memory())
    assert [*got, list(third.look(5, lines[4]))] == expected


# --- the logbook's memory --------------------------------------------------------------------------------------------


class Lines(Writer):
    def __init__(self) -> None:
        self.lines: dict[int, dict[str, float]] = {}

    def write(self, step, values, prefix="") -> None:
        self.lines.setdefault(step, {}).update({f"{prefix}/{k}": v for k, v in values.items()})


def logbook(writer: Writer) -> Logbook:
    return Logbook(writer, lambda metrics: metrics, every=5, last=12, watch=Watch(False), meter=Meter(4))


def add(log: Logbook, step: int) -> None:
    shape = Shape(answers=2, prompt_length=1, answer_length=1)
    log.meter.begin(lambda: lay_out(random_examples(1, shape), shape))
    log.add(step, metrics_of(step))


def metrics_of(step: int):
    x = np.float32(1) / np.float32(step)
    return {
        "loss": Sum((Ratio(x, np.float32(3)), Ratio(x * x, np.float32(7)))),
        "tokens": Total(np.float32(step)),
        "corr": Correlation(*(np.float32(step) ** k * x for k in range(6))),
        "odd": Ratio(np.float32(NAN), x),
        SKIPPED: Total(np.float32(step == 2)),
    }


@pytest.mark.parametrize("stop", range(1, 12))
def test_a_logbook_that_is_continued_writes_the_same_lines(stop: int) -> None:

    whole, parts = Lines(), Lines()
    log = logbook(whole)
    for step in range(1, 13):
        add(log, step)
    log.flush()
    first = logbook(parts)
    for step in range(1, stop + 1):
        add(first, step)
    first.flush()
    second = logbook(parts)
    second.remember(json.loads(json.dumps(first.memory())))
    for step in range(stop + 1, 13):
        add(second, step)
    second.flush()
    assert str(parts.lines) == str(whole.lines)  # nan is not equal to nan
    assert list(whole.lines) == [5, 10, 12]
    assert whole.lines[12]["train/tokens"] == 78 and whole.lines[12]["train/skipped_steps"] == 1
    assert str(second.latest) == str(log.latest)
