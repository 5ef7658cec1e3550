"""Our families are those of transformers: logits, log-probabilities and greedy continuations, under either padding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.convert import cases, ours

GOLDENS = json.loads((Path(__file__).parent / "goldens.json").read_text(encoding="utf-8"))["cases"]


@pytest.mark.parametrize("name", cases.CASES)
def test_numbers_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    golden = GOLDENS[name]
    pretrained = ours.write_folder(tmp_path, name, golden["seed"])
    ours.check(ours.measure(pretrained, golden["seed"]), golden)


def test_the_comparison_notices_small_differences() -> None:
    golden = GOLDENS["gpt2"]
    same = {key: np.array(value) for key, value in golden.items()}
    ours.check(same, golden)
    for key, change in (("logits_left", 3e-4), ("logps_right", 2e-3), ("generated", 1)):
        other = dict(same)
        other[key] = same[key] + change
        with pytest.raises(AssertionError):
            ours.check(other, golden)
