"""The flag --config: any key can be changed on the command line, None included, and mistakes are told in one line."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict

from configs import base
from dpo_jax import config_flag
from dpo_jax.config import Config, from_config_dict

FILE = "configs/base.py"


def read(monkeypatch: pytest.MonkeyPatch, file: str, *overrides: str) -> ConfigDict:
    """The config of a command line."""
    values, argv = flags.FlagValues(), ["program", f"--config={file}", *overrides]
    monkeypatch.setattr("sys.argv", argv)
    found = config_flag.define("a file", values)
    values(argv)
    return found.value


def optional_keys(kind: type, path: str = "") -> Iterator[str]:
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from optional_keys(typing.cast(type, hint), f"{path}{name}.")
        elif isinstance(hint, types.UnionType):
            yield f"{path}{name}"


OPTIONAL = [*optional_keys(Config), "loss.beta", "loss.gamma"]


@pytest.mark.parametrize("key", OPTIONAL)
def test_what_may_be_unset_is_unset_by_none_and_set_again(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    group, name = key.split(".")
    kind = base.get_config()[group].get_type(name)
    assert read(monkeypatch, FILE, f"--config.{key}=None")[group][name] is None
    value = kind("3")
    assert read(monkeypatch, FILE, f"--config.{key}=None", f"--config.{key}=3")[group][name] == value


def test_a_key_that_a_file_unsets_can_be_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert {"optim.clip_norm", "checkpoint.keep"} <= set(OPTIONAL)
    file = tmp_path / "config.py"
    file.write_text(
        "from configs import base\n\n\ndef get_config():\n    config = base.get_config()\n"
        "    config.optim.clip_norm = config.checkpoint.keep = None\n    return config\n"
    )
    config = read(monkeypatch, str(file), "--config.optim.clip_norm=0.5", "--config.checkpoint.keep=3")
    assert (config.optim.clip_norm, config.checkpoint.keep) == (0.5, 3)


def test_a_key_that_is_needed_cannot_be_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"config.seed is None \(NoneType\); expected int"):
        from_config_dict(read(monkeypatch, FILE, "--config.seed=None"))


def test_passes_give_way_to_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = "--config.train.steps=10"
    with pytest.raises(ValueError, match="--config.train.epochs=None"):
        from_config_dict(read(monkeypatch, "configs/imdb_dpo.py", steps))
    config = from_config_dict(read(monkeypatch, "configs/imdb_dpo.py", steps, "--config.train.epochs=None"))
    assert (config.train.steps, config.train.epochs) == (10, None)


SIZES = "known: full, small, quick"


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("configs/nope.py", "no config file configs/nope.py"),
        ("configs", "no config file configs"),
        ("configs/imdb_dpo.py:foo", "--config=configs/imdb_dpo.py:foo: unknown order 'foo'; known: prompts, pairs"),
        ("configs/small.py:foo", "--config=configs/small.py:foo: unknown stage 'foo'; known: sft, preferences, dpo"),
        ("configs/smoke.py:foo", "--config=configs/smoke.py:foo: unknown stage 'foo'; known: sft, preferences, dpo"),
        (
            "configs/hf_dpo.py:foo",
            "--config=configs/hf_dpo.py:foo: get_config() takes 0 positional arguments but 1 was given",
        ),
        *(
            (
                f"experiments/{name}/sweep.py:smal",
                f"--config=experiments/{name}/sweep.py:smal: unknown size 'smal'; {SIZES}",
            )
            for name in ("noise", "betas", "kto", "overoptimisation", "orpo", "length", "skip_sft")
        ),
    ],
)
def test_a_file_that_there_is_not_and_a_misspelt_argument_are_told(
    file: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for overrides in ([], ["--config.seed=1"]):
        with pytest.raises(flags.Error) as error:
            read(monkeypatch, file, *overrides)
        assert str(error.value) == told


def test_a_mistake_in_a_file_is_told_with_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    file.write_text("def get_config():\n    return len(1)\n")
    with pytest.raises(flags.Error) as error:
        read(monkeypatch, str(file))
    assert str(error.value) == f"--config={file}: object of type 'int' has no len() ({file}, line 2)"
