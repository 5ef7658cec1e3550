"""Models and tokenizers are found in folders, in buckets and on the hub, and what is not there is named by its key."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from configs import hf_dpo
from configs.tpu import llama3_8b_v5e_64
from dpo_jax import buckets, hub, sources
from dpo_jax.config import from_config_dict
from dpo_jax.convert.pretrained import open_pretrained, save_pretrained
from dpo_jax.data.tokenizer import save_tokenizer, train_tokenizer
from dpo_jax.models import make_model
from dpo_jax.start import make_start_model
from tests import tiny_run
from tests.tiny import tiny_params

NAME = "meta-llama/Meta-Llama-3-8B"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What the hub was asked for; it has one model, with its tokenizer."""
    folder, calls = tmp_path / "snapshot", []
    save_tokenizer(train_tokenizer(["so good a film"], 270), folder)
    sizes = dict(vocab_size=270, context_length=32, width=8, layers=1, heads=2, kv_heads=1, mlp_width=8)
    model = make_model("llama", sizes)
    save_pretrained(folder, model, tiny_params(model))

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        if name != NAME:
            raise RuntimeError("401 Client Error")
        calls.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    return calls


def test_weights_and_tokenizer_of_a_config_come_from_the_hub(asked, tmp_path: Path) -> None:
    """The command of a pod, as it is documented."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(f'{{"prompt": "a{i}", "chosen": "good", "rejected": "bad"}}\n' for i in range(40)))
    config = llama3_8b_v5e_64.get_config()
    config.data.update(path=str(pairs), dir=str(tmp_path / "data"))
    data = sources.open_dataset(from_config_dict(config).data)
    assert len(data.tokenizer) == 270 and len(data.train) > 0
    assert asked and {name for name, _ in asked} == {NAME}
    assert not any("*.safetensors" in patterns for _, patterns in asked)  # none of 16 GB for a tokenizer
    pretrained = open_pretrained(NAME)
    pretrained.params(pretrained.model())
    assert "*.safetensors" in asked[-1][1]


def test_a_folder_goes_before_the_hub(asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / NAME).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    data = dataclasses.replace(tiny_run.make_config(tmp_path).data, tokenizer=NAME)
    assert sources.tokenizer_folder(data) == Path(NAME) and not asked


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/wrong/path", "there is no such folder, and it is no id of a model on the hub"),
        ("org/other", "there is no such folder, and the hub does not give a model of that name: 401 .*hf auth login"),
        ("gs://bucket/none", "cannot read gs://bucket/none"),
    ],
)
def test_what_is_missing_is_named_with_its_key(
    asked, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets.epath, "Path", lambda path: tmp_path / "empty" / path)
    config = tiny_run.make_config(tmp_path, **{"init.hf": name})
    with pytest.raises(OSError, match=rf"^config\.init\.hf is '{name}': .*{message}"):
        make_start_model(config, 270)
    config = hf_dpo.get_config()
    config.init.hf = name
    config.data.path = "pairs.jsonl"
    with pytest.raises(OSError, match=rf"^config\.data\.tokenizer \(config\.init\.hf, .*\) is '{name}': .*{message}"):
        sources.open_dataset(from_config_dict(config).data)
    data = dataclasses.replace(tiny_run.make_config(tmp_path).data, tokenizer=name)
    with pytest.raises(OSError, match=rf"config\.data\.tokenizer .*is '{name}': .*{message}"):
        sources.imdb_tokenizer(data)  # a folder that is named is not one to be made


def test_a_folder_without_a_tokenizer_says_which_key_takes_another(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"exists, without tokenizer\.json\. .*config\.data\.tokenizer"):
        sources.open_tokenizer(tmp_path)
