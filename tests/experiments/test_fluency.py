"""A language model as a judge of texts: what answers cost, and the tables that are made of it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from dpo_jax import grid, sweep, train
from dpo_jax.results import Result, Samples
from experiments import fluency
from experiments.smollm2 import perplexity
from tests import tiny_run


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> fluency.Judge:
    folder = tmp_path_factory.mktemp("judge")
    tiny_run.write_data(folder / "data")
    changes = {"train.steps": 1, "eval.every": 1, "eval.prompts": 0, "train.micro_batches": 1, "optim.warmup_steps": 0}
    config = tiny_run.make_config(folder / "data", **changes, **{"loss.name": "sft", "optim.learning_rate": 1e-9})
    train.run(config, folder / "run")
    return fluency.open_judge(folder / "run")


def test_an_untrained_model_takes_all_tokens_for_about_as_likely(judge: fluency.Judge) -> None:
    cost = judge(["so", "a film"], ["good a film", "bad"])
    assert cost.bytes == len("good a filmbad") and 0 < cost.tokens <= cost.bytes
    assert cost.nats / cost.tokens == pytest.approx(math.log(tiny_run.VOCAB), rel=0.01)
    assert cost.bits_a_byte == pytest.approx(cost.nats / math.log(2) / cost.bytes)


def test_the_answer_alone_is_charged_and_nothing_for_an_empty_one(judge: fluency.Judge) -> None:
    one, both = judge(["so"], ["good"]), judge(["so", "so"], ["good", ""])
    assert both == one
    assert judge(["so good", "a"], ["good", "bad"]).bytes == 7


def test_a_table_has_a_line_for_each_method(judge: fluency.Judge) -> None:
    def result(method: str, seed: str, answers: tuple[str, str]) -> Result:
        steps = [Samples(("so",), (a,), np.array([0.5]), np.array([2.0])) for a in answers]
        return Result("", method, (), (), seed, {}, [], dict(enumerate(steps)))

    runs = [
        result("dpo", "0", ("good", "bad")),
        result("dpo", "1", ("good", "bad")),
        result("ipo", "0", ("bad", "bad")),
    ]
    lines = list(fluency.table(runs, judge))
    first, last = (judge(["so"], [a]).bits_a_byte for a in ("good", "bad"))
    assert lines[2] == f"| dpo | 2 | 0.500 ± 0.000 | 2.000 ± 0.000 | {first:.3f} ± 0.000 → {last:.3f} ± 0.000 |"
    assert lines[3].startswith("| ipo | 1 | 0.500 | 2.000 | ") and len(lines) == 4


def test_perplexity_before_and_after(tmp_path: Path) -> None:
    tiny_run.write_data(tmp_path / "data")
    changes = {"train.steps": 6, "eval.every": 6, "eval.prompts": 0, "train.micro_batches": 1, "optim.warmup_steps": 0}
    runs = grid.expand(tiny_run.config_dict(tmp_path / "data", **changes), {"seed": [0]})
    grid.write(tmp_path / "sweep", runs)
    with pytest.raises(ValueError, match="no run of .* is finished"):
        list(perplexity.table(tmp_path / "sweep", ["good"]))
    assert sweep.run(runs, tmp_path / "sweep", together=1) == {}
    lines = list(perplexity.table(tmp_path / "sweep", ["so good a film", "bad"]))
    before, after = map(float, lines[2].split("|")[2].split("→"))
    assert before == pytest.approx(tiny_run.VOCAB, rel=0.05)  # of seven tokens under random parameters
    assert after != before
