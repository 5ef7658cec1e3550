"""Examples are looked at before a run begins, without reading those that are known; attention is what devices have."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from dpo_jax import build as builders
from dpo_jax.build import check_examples, with_attention
from dpo_jax.data.layouts import Shape
from dpo_jax.data.prepared import PreparedExamples
from dpo_jax.models import make_model
from dpo_jax.trees import named_leaves
from dpo_jax.types import CHOSEN, REJECTED
from tests import tiny_run

ROOM = Shape(2, 3, 8)  # answers, and the longest prompt and answer that make_examples gives


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> PreparedExamples:
    folder = tmp_path_factory.mktemp("data")
    return PreparedExamples(tiny_run.write_data(folder), "train")


def test_prepared_examples_are_not_read(source: PreparedExamples, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreparedExamples, "__getitem__", lambda *_: pytest.fail("an example was read"))
    assert check_examples(source, ROOM, tiny_run.VOCAB) == {CHOSEN: tiny_run.EXAMPLES, REJECTED: tiny_run.EXAMPLES}


@pytest.mark.parametrize(
    ("shape", "vocab_size", "message"),
    [
        (Shape(2, 2, 8), tiny_run.VOCAB, r"a prompt of 3 tokens .* room for 2 \(config.data.prompt_length\)"),
        (Shape(2, 3, 7), tiny_run.VOCAB, r"a prompt of .* and answers of .* and 7 \(config.data.answer_length\)"),
        (ROOM, tiny_run.VOCAB - 1, r"tokens from \d+ to 269; the model has rows for those below 269"),
    ],
)
def test_the_first_that_does_not_fit_is_named(source, shape: Shape, vocab_size: int, message: str) -> None:
    for examples in (source, [source[i] for i in range(len(source))]):
        with pytest.raises(ValueError, match=r"example \d+ has " + message):
            check_examples(examples, shape, vocab_size)


LONG = {"data.prompt_length": 500, "data.answer_length": 500, "model.context_length": 1000}
HALF = {"dtype": "bfloat16"}
WIDE = {**HALF, "head_size": 16}


@pytest.mark.parametrize(
    ("platform", "changes", "model", "expected"),
    [
        ("cpu", LONG, HALF, "dense"),
        ("tpu", LONG, {}, "splash"),
        ("tpu", {}, {}, "dense"),  # short rows
        ("gpu", LONG, HALF, "cudnn"),
        ("gpu", LONG, {}, "dense"),  # fp32
        ("gpu", LONG, {**HALF, "attention_cap": 50.0}, "dense"),  # heads of 8
        ("gpu", LONG, {**WIDE, "attention_cap": 50.0}, "triton"),
        ("gpu", LONG, {**WIDE, "windows": (100, None)}, "triton"),
        ("gpu", LONG, {**HALF, "windows": (1000, None)}, "cudnn"),
        ("gpu", {**LONG, "data.layout": "shared_prefix"}, WIDE, "triton"),
        ("gpu", {**LONG, "data.layout": "shared_prefix"}, {**WIDE, "dtype": "float32"}, "dense"),
        ("gpu", {**LONG, "data.layout": "shared_prefix", "model.attention": "triton"}, HALF, "heads of 16, .* not 8"),
        ("cpu", {**LONG, "model.attention": "triton"}, WIDE, "the devices are of the kind cpu"),
        ("gpu", {**LONG, "model.attention": "dense"}, HALF, "dense"),
        ("gpu", {**LONG, "model.attention": "splash"}, HALF, "the devices are of the kind gpu"),
        ("tpu", {**LONG, "data.row_length": 40000}, {}, "dense"),
    ],
)
def test_attention_is_by_a_kernel_where_there_is_one(platform, changes, model, expected, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(builders, "_compute_capability", lambda: 9.0)
    config = tiny_run.make_config(tmp_path, **changes)
    sizes = dict(vocab_size=50, context_length=1000, width=16, layers=2, heads=2, mlp_width=8)
    module = make_model("llama", {**sizes, **model})
    if " " in expected:
        with pytest.raises(ValueError, match=expected):
            with_attention(module, config, platform)
    else:
        assert with_attention(module, config, platform).config.attention == expected


@pytest.mark.parametrize(("sync_every", "dtype"), [(None, np.uint16), (3, np.float32)])
def test_only_a_reference_that_stands_still_is_kept_in_half_precision(sync_every, dtype, tmp_path) -> None:
    config = tiny_run.make_config(tmp_path, **{"model.dtype": "bfloat16", "reference.sync_every": sync_every})
    state = builders.state_shapes(builders.build(config, vocab_size=50, answers=2))
    kernels = [leaf.dtype for name, leaf in named_leaves(state.reference).items() if name.endswith("kernel")]
    assert kernels and set(kernels) == {np.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
