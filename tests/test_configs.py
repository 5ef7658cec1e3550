"""Every experiment in configs/ loads, and its train step can be built for a real vocabulary."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from dpo_jax import build as builders
from dpo_jax.config import from_config_dict
from dpo_jax.data.example import Example
from dpo_jax.state import Axis
from tests.tiny import make_answer
from tests.tiny_run import make_examples

ROOT = Path(__file__).parent.parent
ARGUMENTS = dict.fromkeys(("smoke", "small", "imdb"), ("sft", "preferences", "dpo"))
ASKS_FOR_A_MODEL = ("hf_dpo", "hf_dpo_lora")


def experiments() -> list[tuple[str, str]]:
    names = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "base"))
    return [(name, argument) for name in names for argument in ARGUMENTS.get(name, ("",))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder for experiments that ask for a model: its config.json is enough."""
    folder = tmp_path_factory.mktemp("model")
    sizes = dict(n_embd=16, n_layer=2, n_head=2, n_positions=256, vocab_size=4096)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    return str(folder)


def load(name: str, argument: str, model: str | None = None):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(argument) if argument else module.get_config()
    if name in ASKS_FOR_A_MODEL:
        config.init.hf = model
    return from_config_dict(config), module.__doc__


@pytest.mark.parametrize(("name", "argument"), experiments())
def test_an_experiment_loads_and_its_step_has_a_shape(name: str, argument: str, model: str) -> None:
    config, doc = load(name, argument, model)
    assert doc and "python -m" in doc, "its docstring gives the command"
    answers = 2 if config.objective()[0].needs_pairs else 1
    parts = builders.build(config, vocab_size=4096, answers=answers)
    step = builders.guarded_step(config, parts, 100, Axis())
    short = [Example(i, np.ones(1, np.int32), (make_answer([2]),) * answers) for i in range(config.data.batch_size * 8)]
    pipeline = builders.make_pipeline(config, parts, short)
    batch = jax.tree.map(lambda a: a[None], pipeline.batch(0))
    carry = jax.eval_shape(lambda s: builders.guarded(s, 0), builders.state_shapes(parts))
    after, metrics = jax.eval_shape(step, carry, batch, parts.hyper)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), carry)
    assert metrics["loss"].means[0].numerator.shape == ()


def test_examples_that_do_not_fit_are_named() -> None:
    config, _ = load("imdb_dpo", "")
    shape = builders.build(config, vocab_size=4096, answers=2).shape
    examples = make_examples(3, 2, 0)
    builders.check_examples(examples, shape, 4096)
    long = make_answer(np.ones(shape.answer_length + 1, np.int32))
    bad = [*examples, type(examples[0])(7, examples[0].prompt, (long, long))]
    with pytest.raises(ValueError, match=r"example 7 has a prompt of \d tokens"):
        builders.check_examples(bad, shape, 4096)
