"""What all families promise: windows by position, remat and dtypes that change what they should, names of all axes."""

from __future__ import annotations

from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sharding
from dpo_jax.data.layouts import LAYOUTS, Shape, concatenated, shared_prefix
from dpo_jax.flops import inner_programs
from dpo_jax.models import FAMILIES, as_read, init_params, make_model, param_shapes
from dpo_jax.models.config import REMAT
from dpo_jax.models.layers import keepable, product
from dpo_jax.models.rope import Rope
from dpo_jax.trees import named_leaves
from tests.tiny import VOCAB, jit_score, lay_out, random_examples, setup, tiny_params

SIZES = dict(vocab_size=VOCAB, context_length=32, width=16, layers=2, heads=4, mlp_width=24)
GROUPED = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"}
AXES = {*sharding.PARAMETERS, None}


def _tiny(family: str, **changes):
    grouped = {"kv_heads": 2} if family in GROUPED else {}
    return make_model(family, {**SIZES, **grouped, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_names_its_axes(family: str) -> None:
    model = _tiny(family)
    tokens = jnp.zeros((1, 1), jnp.int32)
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, tokens, jnp.ones((1, 1, 1), bool)))["params"]
    boxes = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    for box in boxes:
        assert isinstance(box, nn.LogicallyPartitioned)
        assert len(box.names) == box.value.ndim and set(box.names) <= AXES, box
    assert sum("layers" in box.names for box in boxes) >= 7
    matrices = [box.names for box in boxes if "layers" in box.names and box.value.ndim == 3]
    assert all(None not in names for names in matrices)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_windows_count_positions_and_not_places_in_the_row(family: str) -> None:
    """A rejected answer lies behind the chosen one in its row; its window must reach back as if it were alone."""
    changes = dict(windows=(3, None))
    if family == "gemma3_text":
        changes |= dict(ropes=(Rope(), Rope(1e6)), rope_of_layer=(0, 1))
    shape = Shape(2, 5, 6)
    examples = random_examples(6, shape)
    scores = {}
    for windows in ((3, None), None):
        model = _tiny(family, **{**changes, "windows": windows})
        params = tiny_params(model)
        scores[windows] = [
            np.asarray(jit_score(model, params, layout(examples, shape), (2, 1), 16).sum)
            for layout in (concatenated, shared_prefix)
        ]
    np.testing.assert_allclose(*scores[3, None], atol=1e-4)
    assert np.abs(scores[3, None][0] - scores[None][0]).max() > 1e-2, "the window must matter"


def _score_and_gradient(model, params, batch):
    def total(params):
        return jit_score.__wrapped__(model, params, batch, (2, 1), 16).sum.sum()

    return jax.jit(jax.value_and_grad(total))(params)


def test_remat_changes_memory_and_not_numbers() -> None:
    shape = Shape(2, 5, 6)
    batch = concatenated(random_examples(4, shape), shape)
    params = tiny_params(_tiny("llama"))
    found, text = {}, {}
    for remat in REMAT:
        model = _tiny("llama", remat=remat)
        found[remat] = _score_and_gradient(model, params, batch)
        lowered = jax.make_jaxpr(jax.grad(lambda p, m=model: m.apply({"params": p}, *_inputs()).sum()))(params)
        text[remat] = str(lowered)
    for remat in REMAT:
        for a, b in zip(jax.tree.leaves(found[remat]), jax.tree.leaves(found["none"]), strict=True):
            # The same sums in programs that are fused in other ways.
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    assert [remat for remat in REMAT if "remat" not in text[remat]] == ["none"]
    products = [text[remat].count("dot_general") for remat in REMAT]
    assert products[0] == products[1], "all products are kept"
    turns = [text[remat].count("concatenate[") for remat in REMAT]
    assert len(set(turns[:-1])) == 1 < turns[-1] / turns[0], "what attention reads is kept as it reads it"
    assert products[1:] == sorted(set(products[1:])), "each keeps less than the one before, and computes more again"


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_kept_as_bits(family: str) -> None:
    """Written among all layers' as it is, CPUs widen it and all those of other layers."""
    model = _tiny(family, dtype=jnp.bfloat16, remat="dots", layers=7)
    shapes = param_shapes(model)
    text = str(jax.make_jaxpr(jax.grad(lambda p: model.apply({"params": p}, *_inputs()).astype(float).sum()))(shapes))
    assert "u16[7," in text and "bf16[7," not in text


def test_what_is_kept_as_bits_has_the_gradient_of_what_is_not() -> None:
    x = jnp.linspace(-2, 2, 33, dtype=jnp.bfloat16)
    keep = jax.checkpoint_policies.save_only_these_names("x")
    plain = lambda x: jnp.sum(jnp.sin(jnp.sin(x).astype(float)))  # noqa: E731
    named = jax.checkpoint(lambda x: jnp.sum(jnp.sin(keepable(jnp.sin(x), "x").astype(float))), policy=keep)
    np.testing.assert_array_equal(jax.grad(named)(x), jax.grad(plain)(x))


@pytest.mark.parametrize("layout", ["concatenated", "packed"])
def test_a_kernel_in_the_layers_gives_the_numbers_of_dense_attention(layout: str) -> None:
    """With windows, soft caps, grouped heads, and a kernel whose results are kept while others are computed again."""
    shape = Shape(2, 5, 6, row_length=32)
    batch = LAYOUTS[layout](random_examples(4, shape), shape)
    params = tiny_params(_tiny("gemma2"))
    found = [
        _score_and_gradient(_tiny("gemma2", windows=(4, None), **kernel), params, batch)
        for kernel in ({}, {"attention": "interpreted", "remat": "gate"})
    ]
    # Sums in another order, in layers whose matrices are large.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), *found)


def _inputs():
    tokens = jnp.arange(4)[None]
    return tokens, tokens, jnp.ones((1, 4, 4), bool)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_dtypes_are_what_the_config_says(family: str) -> None:
    model = _tiny(family, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, output_dtype=jnp.float32)
    params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    assert {leaf.dtype for leaf in named_leaves(params).values()} == {np.dtype(jnp.bfloat16)}
    hidden = jax.jit(model.apply)({"params": params}, *_inputs())
    assert hidden.dtype == jnp.float32
    half = _tiny(family, dtype=jnp.bfloat16)
    params = jax.eval_shape(lambda: init_params(half, jax.random.key(0)))
    assert {leaf.dtype for leaf in named_leaves(params).values()} == {np.dtype(np.float32)}
    assert jax.eval_shape(half.apply, {"params": params}, *_inputs()).dtype == jnp.bfloat16
    assert half.empty_cache(1, 3).key[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("output", [None, jnp.float32])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_only_read_takes_half_of_the_memory_and_gives_the_same_bits(family: str, tied: bool, output) -> None:
    shape = Shape(2, 5, 6)
    batch = concatenated(random_examples(4, shape), shape)
    model = _tiny(family, dtype=jnp.bfloat16, output_dtype=output, tied_head=tied)
    params = tiny_params(model)
    read = as_read(model, params)
    rounded = {name for name, leaf in named_leaves(read).items() if leaf.dtype == np.uint16}
    tables = set() if family == "gpt2" or (tied and output) else {"token_embedding"}
    tables |= set() if tied or output else {"head"}
    assert rounded == {name for name in named_leaves(params) if name.endswith("/kernel")} | tables
    expected = jit_score(model, params, batch, (2, 1), 64)
    for form in (read, as_read(model, jax.tree.map(jnp.asarray, params))):
        jax.tree.map(np.testing.assert_array_equal, jit_score(model, form, batch, (2, 1), 64), expected)
    wide = _tiny(family)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (as_read(wide, params), params)), strict=True))


def test_bf16_begins_with_a_margin_of_exactly_0() -> None:
    model = _tiny("llama", dtype=jnp.bfloat16)
    run = setup("dpo", model=model)
    state = run.parallel.unreplicate(run.state)
    run.state = run.parallel.replicate(state.replace(reference=jax.tree.map(np.array, state.params)))
    shape = Shape(2, 5, 6)
    _, metrics = run.run([lay_out(random_examples(4, shape), shape)] * 2)
    assert metrics[0]["rewards/margins"] == 0.0
    assert metrics[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert metrics[1]["rewards/margins"] != 0.0


def test_half_precision_products_are_summed_in_fp32_in_both_directions() -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 64)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(64, 5)), jnp.float32)
    weigh = jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.bfloat16)
    rounded = np.asarray(kernel.astype(jnp.bfloat16), np.float64)
    exact = np.asarray(x, np.float64) @ rounded
    y, pull_back = jax.vjp(lambda x, k: product(x, k, jnp.bfloat16), x, kernel)
    dx, dk = pull_back(weigh)
    assert y.dtype == jnp.bfloat16 and dx.dtype == jnp.bfloat16 and dk.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8, atol=1e-6)
    w = np.asarray(weigh, np.float64)
    np.testing.assert_allclose(np.asarray(dx, np.float64), w @ rounded.T, rtol=2**-8, atol=1e-6)
    expected = np.einsum("abd,abf->df", np.asarray(x, np.float64), w)
    np.testing.assert_allclose(np.asarray(dk, np.float64), expected, rtol=1e-5, atol=1e-5)
    traced = jax.make_jaxpr(lambda *a: jax.vjp(lambda x, k: product(x, k, jnp.bfloat16), *a)[1](weigh))(x, kernel)
    either = [("cuda", "bfloat16"), ("others", "float32")]  # GPUs' libraries sum in fp32 whatever they return
    assert list(_sums(traced.jaxpr)) == [*either, *either, ("cpu", "float32"), ("others", "float32")], "y, dx, dk"


def _sums(jaxpr, platform: str = "all") -> Iterator[tuple[str, str]]:
    """Yields (for which platform, in which dtype it is summed) of each product of a traced program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield platform, str(equation.params["preferred_element_type"])
        elif platforms := equation.params.get("branches_platforms"):
            for names, branch in zip(platforms, equation.params["branches"], strict=True):
                yield from _sums(branch.jaxpr, "others" if names is None else ", ".join(names))
        else:
            for inner in inner_programs(equation):
                yield from _sums(inner, platform)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(kv_heads=3), "heads 4 is not a multiple of model.kv_heads 3"),
        (dict(windows=(3,)), "windows has 1 entries for 2 layers"),
        (dict(remat="some"), "remat is 'some'; known: none, dots, gate, attention, full"),
        (dict(width=18), "width 18 is not a multiple of model.heads 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _tiny("llama", **changes)
    with pytest.raises(ValueError, match="unsupported RoPE type 'longrope'"):
        Rope(scaling="longrope")
