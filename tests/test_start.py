"""Runs start from models that are a little smaller than their tokenizer, and say what they start from."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from dpo_jax import export, train
from dpo_jax.config import Config
from dpo_jax.convert.pretrained import save_pretrained
from dpo_jax.data.tokenizer import train_tokenizer
from dpo_jax.models import make_model
from dpo_jax.opened import OpenedRun
from dpo_jax.shared import Shared
from tests import tiny_run
from tests.tiny import tiny_params

ROWS = 270
SHORT = {"train.steps": 1, "eval.prompts": 2, "eval.examples": 0, "checkpoint.every": 1, "train.micro_batches": 1}


def write_model(folder: Path, **special: str) -> Path:
    """A model of ROWS rows whose tokenizer has one token more, <extra>, which may be one of its special tokens."""
    tokenizer = train_tokenizer(["so good a film", "so bad a film"] * 3, ROWS)
    tokenizer.add_tokens(["<extra>"])
    assert len(tokenizer) == ROWS + 1
    for name, token in special.items():
        setattr(tokenizer, name, token)
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    sizes = dict(vocab_size=ROWS, context_length=12, width=16, layers=1, heads=2, mlp_width=16)
    model = make_model("gpt2", sizes)
    save_pretrained(folder, model, tiny_params(model))
    return folder


def make_config(folder: Path, model: Path, answer: str = "good", **changes) -> Config:
    pairs = [{"prompt": f"{i}", "chosen": answer, "rejected": "bad"} for i in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tiny_run.write_data(folder)  # the judge
    source = {"data.source": "files", "data.path": str(folder / "pairs.jsonl"), "data.tokenizer": str(model)}
    return tiny_run.make_config(folder, **SHORT, **source, **{"init.hf": str(model)}, **changes)


def test_a_run_says_first_what_it_starts_from(tmp_path: Path, caplog) -> None:
    """From a model, from a run and its policy, and from nothing: each with its size."""
    data = tmp_path / "data"
    tiny_run.write_data(data)
    sizes = dict(vocab_size=tiny_run.VOCAB, context_length=12, width=16, layers=1, heads=2, mlp_width=16)
    model = make_model("gpt2", sizes)
    (tmp_path / "hf").mkdir()
    save_pretrained(tmp_path / "hf", model, tiny_params(model))
    hf = {"init.hf": str(tmp_path / "hf")}
    chain = {
        "random": ({}, r"from random parameters \(seed 0\), 0.01 M"),
        "first": (hf, rf"from {tmp_path / 'hf'} \(config.init.hf\), 0.01 M parameters"),
        "second": (
            hf | {"init.run": str(tmp_path / "first")},
            rf"from the run {tmp_path / 'first'} \(config.init.run\)",
        ),
        "adapters": (hf | {"lora.rank": 1}, rf"from {tmp_path / 'hf'} \(config.init.hf\), 0.01 M parameters"),
    }
    for name, (changes, expected) in chain.items():
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="absl"):
            train.run(tiny_run.make_config(data, **(SHORT | {"eval.prompts": 0}), **changes), tmp_path / name)
        lines = [record.getMessage() for record in caplog.records]
        said = [i for i, line in enumerate(lines) if re.search(f"^starts {expected}", line)]
        trained = [i for i, line in enumerate(lines) if "parameters trained" in line]
        assert len(said) == len(trained) == 1 and said < trained, lines


def test_members_of_a_sweep_say_it_once(tmp_path: Path, caplog) -> None:
    tiny_run.write_data(tmp_path)
    shared = Shared()
    with caplog.at_level(logging.INFO, logger="absl"):
        for rate in (1e-3, 1e-2):
            OpenedRun(tiny_run.make_config(tmp_path, **{"optim.learning_rate": rate}), tmp_path / "run", shared)
    assert caplog.text.count("starts from random parameters") == 1


def test_a_token_without_a_row_that_no_text_has_is_left_alone(tmp_path: Path, caplog) -> None:
    """As <image_soft_token> of Gemma 3, and a <pad> that was added to a Llama 2: padding is told by no token."""
    config = make_config(tmp_path, write_model(tmp_path / "model", pad_token="<extra>"))
    with caplog.at_level(logging.INFO, logger="absl"):
        train.run(config, tmp_path / "run")
    assert "1 of the tokenizer's 271 tokens have no row in the model, which has 270" in caplog.text
    export.export(tmp_path / "run", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["vocab_size"] == ROWS and written["pad_token_id"] is None


def test_an_example_with_a_token_without_a_row_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path, write_model(tmp_path / "model"), "good<extra>")
    with pytest.raises(ValueError, match=r"example \d+ has tokens from \d+ to 270; the model has rows for those below"):
        train.run(config, tmp_path / "run")


@pytest.mark.parametrize("name", ["bos", "eos"])
def test_a_tokenizer_whose_sequences_begin_or_end_without_a_row_is_refused(name: str, tmp_path: Path) -> None:
    config = make_config(tmp_path, write_model(tmp_path / "model", **{f"{name}_token": "<extra>"}))
    with pytest.raises(ValueError, match=rf"{name.upper()} token is 270, and the model has rows for those below 270"):
        train.run(config, tmp_path / "run")
