"""Adapters that are exported alone name the model that they were trained on, and no other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dpo_jax import export, lora, train
from dpo_jax.convert.peft import read_adapters
from dpo_jax.convert.pretrained import open_pretrained, save_pretrained
from dpo_jax.models import make_model
from dpo_jax.start import load_policy
from dpo_jax.trees import named_leaves
from tests import tiny_run
from tests.tiny import tiny_params

SIZES = dict(vocab_size=tiny_run.VOCAB, context_length=12, width=16, layers=2, heads=2, mlp_width=32)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model ``hf``, a run ``sft`` from it, and runs of adapters: ``dpo`` from ``sft``, ``direct``."""
    folder = tmp_path_factory.mktemp("chain")
    tiny_run.write_data(folder)
    (folder / "hf").mkdir()
    model = make_model("gpt2", SIZES)
    save_pretrained(folder / "hf", model, tiny_params(model))
    common = {"init.hf": str(folder / "hf"), "train.steps": 2, "eval.prompts": 0, "eval.examples": 0}
    train.run(tiny_run.make_config(folder, **common, **{"loss.name": "sft"}), folder / "sft")
    adapters = common | {"lora.rank": 2}
    train.run(tiny_run.make_config(folder, **adapters, **{"init.run": str(folder / "sft")}), folder / "dpo")
    train.run(tiny_run.make_config(folder, **adapters), folder / "direct")
    return folder


def _base(adapter: Path) -> str:
    return json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_adapters_on_a_model_name_it(chain: Path, tmp_path: Path) -> None:
    export.export_adapter(chain / "direct", tmp_path / "adapter")
    assert _base(tmp_path / "adapter") == str(chain / "hf")


def test_adapters_on_a_run_name_its_export_alone(chain: Path, tmp_path: Path) -> None:
    """The base is given, and it must be what they were trained on; together they are the policy."""
    out, base = tmp_path / "adapter", tmp_path / "base"
    with pytest.raises(ValueError, match=rf"--workdir={chain / 'sft'} --out=FOLDER, and give --base=FOLDER"):
        export.export_adapter(chain / "dpo", out)
    with pytest.raises(ValueError, match=rf"--base={chain / 'hf'} is not what .*dpo were trained on \(hash .*float32"):
        export.export_adapter(chain / "dpo", out, base=str(chain / "hf"))
    assert not out.exists()
    export.export(chain / "sft", base)
    export.export_adapter(chain / "dpo", out, base=str(base))
    assert _base(out) == str(base)
    model = lora.with_adapter(make_model("gpt2", SIZES), lora.Adapter(".*", 2, 16.0))
    merged = lora.merge(open_pretrained(str(base)).params(make_model("gpt2", SIZES)), read_adapters(out, model), 8.0)
    policy = named_leaves(load_policy(chain / "dpo", make_model("gpt2", SIZES)))
    for name, leaf in named_leaves(merged).items():
        np.testing.assert_array_equal(leaf, policy[name], err_msg=name)


@pytest.mark.parametrize(("run", "base"), [("dpo", "sft"), ("sft", "hf"), ("direct", "hf")])
def test_the_card_names_what_the_run_started_from(chain: Path, run: str, base: str, tmp_path: Path) -> None:
    export.export(chain / run, tmp_path / "out")
    assert f"Started from {chain / base};" in (tmp_path / "out" / "README.md").read_text()
