"""Configs: what is wrong is named with its key, what was got and what was expected."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import base, hf_dpo, hf_dpo_lora
from dpo_jax import config as config_lib
from dpo_jax.config import differences, from_config_dict, from_dict, to_json
from dpo_jax.losses import LOSSES
from dpo_jax.losses.hyper import SHARED, parameters_of

ROOT = Path(__file__).parent.parent


def base_config(**changes) -> ConfigDict:
    config = base.get_config()
    config.train.steps = 3
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


def test_base_with_a_length_is_a_config() -> None:
    built = from_config_dict(base_config(**{"loss.beta": 0.2}))
    assert built.loss.hyper == {"beta": 0.2}
    assert built.optim.learning_rate == base.get_config().optim.learning_rate


@pytest.mark.parametrize("experiment", [hf_dpo, hf_dpo_lora])
def test_a_model_is_asked_for_where_there_is_no_run_without_one(experiment) -> None:
    """Sizes of the base config are those of a toy: trained by mistake, it would look like a run."""
    config = experiment.get_config()
    with pytest.raises(ValueError, match=r"config\.init\.hf is empty: .*--config\.init\.hf=MODEL"):
        from_config_dict(config)
    config.init.hf = "org/model"
    built = from_config_dict(config)
    assert built.init.hf == built.data.tokenizer == "org/model"


def test_a_config_survives_its_file() -> None:
    built = from_config_dict(
        base_config(**{"loss.beta": 0.2, "loss.name": "dpo + 0.5*sft", "checkpoint.keep_every": 7})
    )
    assert from_dict(json.loads(to_json(built))) == built


def test_a_file_from_before_an_optional_key_is_read() -> None:
    built = from_config_dict(base_config())
    saved = json.loads(to_json(built))
    del saved["data"]["prompt_answers"], saved["reference"]["store"]
    assert from_dict(saved) == built
    del saved["data"]["layout"]
    with pytest.raises(ValueError, match=r"config.data has unknown keys \[\] and lacks \['layout'\]"):
        from_dict(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss.name": "dpoo"}, "dpoo.*dpo"),
        ({"loss.gamma": 1.0}, "does not take gamma"),
        ({"loss.beta": -1.0}, "out of range"),
        ({"loss.divergence": "js"}, "unknown divergence 'js'"),
        ({"loss.reduction": "max"}, "unknown reduction 'max'"),
        ({"model.family": "gpt3"}, "config.model.family is 'gpt3'; known: gpt2"),
        ({"model.dtype": "float16"}, "config.model.dtype is 'float16'; known: float32, bfloat16"),
        ({"model.param_dtype": "bfloat16"}, "parameters that are trained must be in float32"),
        ({"model.heads": 5}, "heads 5 must divide width"),
        ({"model.unroll": 3}, "unroll 3 must divide layers"),
        (
            {"model.context_length": 63},
            "sequences of up to 64 tokens .* config.model.context_length 63",
        ),
        ({"data.prompt_answers": 4}, "config.data.prompt_answers is 4, and rows of the layout 'concatenated' hold one"),
        ({"data.layout": "heap"}, "config.data.layout is 'heap'; known: concatenated, shared_prefix"),
        ({"data.batch_size": 0}, "config.data.batch_size is 0; expected more than 0"),
        ({"data.batch_size": 1.5}, r"config.data.batch_size is 1.5 \(float\); expected int"),
        ({"data.batch_size": True}, r"config.data.batch_size is True \(bool\); expected int"),
        ({"data.path": 3}, r"config.data.path is 3 \(int\); expected str or None"),
        ({"optim.schedule": "step"}, "config.optim.schedule is 'step'; known: constant, linear, cosine"),
        ({"optim.learning_rate": -1e-3}, "config.optim.learning_rate is -0.001; expected more than 0"),
        ({"optim.learning_rate": float("nan")}, "config.optim.learning_rate is nan; expected more than 0"),
        ({"optim.learning_rate": float("inf")}, "config.optim.learning_rate is inf"),
        ({"optim.b1": 1.0}, "config.optim.b1 is 1.0; expected 0 or more and below 1"),
        ({"optim.clip_norm": 0.0}, "config.optim.clip_norm is 0.0; expected more than 0"),
        ({"reference.sync_rate": 1.5}, "config.reference.sync_rate is 1.5; expected more than 0 and at most 1"),
        ({"seed": -1}, "config.seed is -1; expected 0 or more"),
        ({"train.epochs": 1.0}, "set exactly one of config.train.steps and config.train.epochs"),
        ({"train.steps": None}, "set exactly one of config.train.steps and config.train.epochs"),
        ({"train.max_skipped": -1}, "config.train.max_skipped is -1; expected 0 or more"),
        ({"checkpoint.best": "least"}, "config.checkpoint.best is 'least'; known: min, max"),
        ({"checkpoint.on_damage": "cry"}, "config.checkpoint.on_damage is 'cry'; known: fall_back, stop"),
        ({"eval.reward": "joy"}, "config.eval.reward is 'joy'; known: sentiment"),
    ],
)
def test_what_is_wrong_is_named(changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_config_dict(base_config_of_any_type(changes))


def base_config_of_any_type(changes) -> ConfigDict:
    config = base_config().to_dict()
    for path, value in changes.items():
        section, _, key = path.rpartition(".")
        (config[section] if section else config)[key] = value
    return ConfigDict(config)


def test_unknown_and_missing_keys_are_both_named() -> None:
    values = base_config().to_dict()
    values["optim"]["lerning_rate"] = values["optim"].pop("learning_rate")
    with pytest.raises(ValueError, match=r"unknown keys \['lerning_rate'\] and lacks \['learning_rate'\]"):
        from_config_dict(ConfigDict(values))


def test_the_keys_of_the_loss_are_all_that_any_loss_takes() -> None:
    expected = {name for loss in LOSSES.values() for name in parameters_of(loss)} | set(SHARED)
    assert set(base.get_config().loss) == expected | {"name", "reduction", "divergence", "wpo"}


def test_every_key_is_read_somewhere() -> None:
    """As an attribute in dpo_jax: ``config.data.path``; hyper-parameters are the losses' business."""
    read = {
        node.attr
        for path in (ROOT / "dpo_jax").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    sections = {name: value for name, value in base.get_config().items() if isinstance(value, ConfigDict)}
    # The fields of the model go to its family as they are.
    keys = {key for name, section in sections.items() if name not in ("loss", "model") for key in section}
    assert {*sections, "seed", "divergence", "wpo", "reduction", "family"} | keys <= read


def test_base_and_the_dataclasses_have_the_same_keys() -> None:
    values = base.get_config().to_dict()
    fields = {name: set(section) for name, section in values.items() if isinstance(section, dict)}
    hints = config_lib.typing.get_type_hints(config_lib.Config)
    for name, keys in fields.items():
        if name != "loss":
            assert keys == set(config_lib.typing.get_type_hints(hints[name]))


def test_differences_show_both_sides() -> None:
    got, expected = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "e": None}
    assert differences(got, expected) == ["config.a.c: 2 here, 5 there", "config.d: 3 here, None there"]


def test_an_optional_number_may_be_switched_off_in_a_config_file() -> None:
    config = base_config()
    config.checkpoint.keep = None
    config.optim.clip_norm = None
    built = from_config_dict(config)
    assert built.checkpoint.keep is None and built.optim.clip_norm is None
