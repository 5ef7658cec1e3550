"""Adapters in PEFT's format: its numbers, its names, and what is not ours is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dpo_jax import lora
from dpo_jax.convert import peft
from dpo_jax.convert.tensors import read_header
from tests.convert import cases, peft_cases
from tests.convert.compare_peft import base_of, logits, write_golden

GOLDENS = json.loads((Path(__file__).parent / "peft_goldens.json").read_text(encoding="utf-8"))["cases"]


@pytest.mark.parametrize("name", peft_cases.CASES)
def test_adapters_are_those_of_peft_in_both_directions(name: str, tmp_path: Path) -> None:
    golden, back = GOLDENS[name], tmp_path / "back"
    back.mkdir()
    model, base = base_of(tmp_path, name, golden["seed"])
    write_golden(tmp_path, golden)
    adapters = peft.read_adapters(tmp_path, model)
    # As for whole models: fp32 sums in another order. Merged into the base, the same again.
    np.testing.assert_allclose(logits(model, lora.join(base, adapters), golden["seed"]), golden["logits"], atol=1e-4)
    plain = lora.with_adapter(model, None)
    merged = lora.merge(base, adapters, peft_cases.ALPHA / peft_cases.RANK)
    np.testing.assert_allclose(logits(plain, merged, golden["seed"]), golden["logits"], atol=1e-4)
    assert np.abs(logits(plain, base, golden["seed"]) - golden["logits"]).max() > 0.1
    peft.write_adapters(back, model, adapters, None)
    first, second = (read_header(folder / peft.WEIGHTS) for folder in (tmp_path, back))
    assert {n: e.read().tobytes() for n, e in first.items()} == {n: e.read().tobytes() for n, e in second.items()}
    written = json.loads((back / peft.CONFIG).read_text())
    assert written == {key: golden["config"][key] for key in written}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_rslora": True}, "use_rslora True is not supported; supported: False"),
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported; supported: 'none'"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported; supported: 'LORA'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported"),
        ({"rank_pattern": {"c_attn": 4}}, "rank_pattern {'c_attn': 4} is not supported"),
        ({"r": 8}, "r is 8, config.lora.rank is 3; set it to the former"),
        ({"lora_alpha": 32}, "lora_alpha is 32, config.lora.alpha is 6.0; set it to the former"),
    ],
)
def test_settings_that_mean_other_numbers_are_refused(changes, message: str, tmp_path: Path) -> None:
    model, _ = base_of(tmp_path, "gpt2", 0)
    write_golden(tmp_path, GOLDENS["gpt2"], **changes)
    with pytest.raises(ValueError, match=message):
        peft.read_adapters(tmp_path, model)


def test_adapters_of_other_layers_are_listed_for_both_sides(tmp_path: Path) -> None:
    model, _ = base_of(tmp_path, "gpt2", 0)
    write_golden(tmp_path, GOLDENS["gpt2"])
    other = lora.with_adapter(model, lora.Adapter("qkv|mlp_in", peft_cases.RANK, peft_cases.ALPHA))
    with pytest.raises(ValueError, match="are not what config.lora.layers and config.lora.rank ask for") as error:
        peft.read_adapters(tmp_path, other)
    lines = str(error.value).splitlines()
    assert "without a place in the model: base_model.model.transformer.h.0.mlp.c_proj.lora_A.weight" in lines[1]
    assert "not in the files: base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight" in lines[2]
    (tmp_path / peft.WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors is missing; expected a folder that PEFT's"):
        peft.read_adapters(tmp_path, model)


def test_every_layer_of_every_family_has_a_name() -> None:
    """No two layers of a family share the end by which PEFT finds them."""
    for table in peft.TABLES.values():
        rules = peft._rules(table)
        kernels = [rule for rule in table.rules if rule.ours.endswith("/kernel")]
        assert len(rules) == 2 * len(kernels) > 0
        modules = [peft._module(rule) for rule in rules[::2]]
        assert not any(a != b and a.endswith(f".{b}") for a in modules for b in modules)
        assert len(set(modules)) == len(modules)
    assert cases.CASES.keys() >= peft_cases.CASES.keys()
