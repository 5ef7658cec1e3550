"""Adapters: they start at the base, train alone, merge to one rounding, and continue to the bit."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import build as builders
from dpo_jax import lora, opened, sample, start, train
from dpo_jax.checkpoint import open_newest
from dpo_jax.data.layouts import Shape
from dpo_jax.models import as_read, init_params, param_shapes
from dpo_jax.models.layers import project
from dpo_jax.parallel import DataParallel
from dpo_jax.start import load_adapters, make_start_model, start_params
from dpo_jax.trees import named_leaves
from dpo_jax.writers import read_metrics
from tests import tiny_run
from tests.tiny import random_examples, tiny_model

RANK, ALPHA = 3, 6.0
LORA = {"lora.rank": RANK, "lora.alpha": ALPHA, "lora.layers": "qkv|mlp", "optim.weight_decay": 0.01}
RUN = LORA | {"lora.dropout": 0.25}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tiny_run.write_data(folder)
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of adapters on random parameters, with dropout."""
    workdir = tmp_path_factory.mktemp("lora") / "run"
    train.run(tiny_run.make_config(data, **RUN), workdir)
    return workdir


def random_like(shapes):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: (rng.standard_normal(a.shape) * 0.3).astype(a.dtype), shapes)


# --- trees and layers ------------------------------------------------------------------------------------------------


def test_trees_come_apart_and_together() -> None:
    tree = {"x": {"kernel": np.ones(1), "lora_a": np.ones(2), "lora_b": np.ones(3)}, "y": {"bias": np.ones(4)}}
    base, adapters = lora.split(tree)
    assert (list(named_leaves(base)), list(named_leaves(adapters))) == (
        ["x/kernel", "y/bias"],
        ["x/lora_a", "x/lora_b"],
    )
    joined = lora.join(base, adapters)
    assert joined["x"]["kernel"] is tree["x"]["kernel"] and joined["x"]["lora_b"] is tree["x"]["lora_b"]
    assert jax.tree.structure(joined) == jax.tree.structure(tree)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_merging_rounds_once(dtype) -> None:
    """By hand: W = 1, A B = 1·2 + 3·(−1) = −1, scale ½: exactly ½. And at random against float64."""
    one = {"x": {"kernel": np.ones((1, 1), dtype)}}
    low = {"x": {"lora_a": np.array([[1.0, 3.0]], np.float32), "lora_b": np.array([[2.0], [-1.0]], np.float32)}}
    assert lora.merge(one, low, 0.5)["x"]["kernel"].item() == 0.5
    rng = np.random.default_rng(0)
    w, a, b = (rng.standard_normal(s).astype(np.float32) for s in ((2, 5, 4), (2, 5, 3), (2, 3, 4)))
    w = w.astype(dtype)
    merged = lora.merge({"x": {"kernel": w, "bias": w[0]}}, {"x": {"lora_a": a, "lora_b": b}}, 1.7)
    exact = w.astype(np.float64) + 1.7 * np.einsum("nir,nro->nio", a.astype(np.float64), b.astype(np.float64))
    np.testing.assert_array_equal(merged["x"]["kernel"], exact.astype(dtype))
    assert merged["x"]["bias"].base is w and merged["x"]["kernel"].dtype == dtype


def test_a_layer_adds_scale_times_a_b_where_the_pattern_says() -> None:
    """Merged into one matrix, the same hidden states; dropout leaves out shares of its input alone."""
    model = lora.with_adapter(tiny_model(), lora.Adapter("qkv|mlp_out", RANK, ALPHA, 0.5))
    base, adapters = lora.split(random_like(jax.eval_shape(lambda: init_params(model, jax.random.key(0)))))
    assert sorted(named_leaves(adapters)) == [f"blocks/{n}/lora_{m}" for n in ("mlp_out", "qkv") for m in "ab"]
    assert adapters["blocks"]["qkv"]["lora_a"].shape == (2, 16, RANK)
    merged = lora.merge(base, adapters, ALPHA / RANK)
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    mask = np.tril(np.ones((2, 6, 6), bool))

    @jax.jit
    def logits(joined, merged, key):
        def one(module, params, **rngs):
            hidden = module.apply({"params": params}, tokens, tokens, mask, **rngs)
            return project(hidden, module.apply({"params": params}, method="head"), None)

        plain = lora.with_adapter(model, None)
        with_dropout = one(model, joined, rngs={"dropout": key})
        return one(model, joined), one(plain, merged), with_dropout, one(plain, base)

    joined, whole, dropped, plain = logits(lora.join(base, adapters), merged, jax.random.key(0))
    # fp32 sums in another order, of logits of size 1.
    np.testing.assert_allclose(joined, whole, rtol=1e-5, atol=1e-5)
    assert min(np.abs(joined - plain).max(), np.abs(joined - dropped).max()) > 0.3


def test_fresh_adapters_add_nothing_and_depend_on_their_names() -> None:
    model = lora.with_adapter(tiny_model(), lora.Adapter(".*", RANK, ALPHA))
    shapes = lora.split(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))[1]
    leaves = named_leaves(lora.fresh(shapes, 5))
    assert all(np.array_equal(v, np.zeros_like(v)) for k, v in leaves.items() if k.endswith("lora_b"))
    a = {name: leaf for name, leaf in leaves.items() if name.endswith("lora_a")}
    assert len(a) == 4 and len({leaf.tobytes()[:64] for leaf in a.values()}) == 4
    for leaf in a.values():
        assert 0.9 / leaf.shape[1] ** 0.5 < np.abs(leaf).max() <= 1 / leaf.shape[1] ** 0.5
    again = named_leaves(lora.fresh(lora.split(shapes)[1], 5))
    assert all(np.array_equal(again[name], leaf) for name, leaf in leaves.items())


def test_a_pattern_without_a_layer_lists_the_layers() -> None:
    config = tiny_run.make_config(Path("x"), **{"lora.rank": 2, "lora.layers": "query|gate"})
    with pytest.raises(
        ValueError, match="'query|gate' is found in no linear layer's name: blocks/attention_out"
    ) as error:
        builders.build(config, vocab_size=270, answers=2)
    assert "blocks/mlp_in, blocks/mlp_out, blocks/qkv" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora.rank": 2, "reference.sync_every": 3},
            "sync_every moves the reference, .*the policy would move with it",
        ),
        ({"lora.init": "folder"}, "config.lora.init is set and config.lora.rank is not"),
        ({"lora.rank": 2, "lora.layers": "(query"}, r"config.lora.layers '\(query' is no regular expression"),
        ({"lora.rank": 0}, "config.lora.rank is 0; expected more than 0"),
        ({"lora.rank": 2, "lora.dropout": 1.0}, "config.lora.dropout is 1.0; expected 0 or more and below 1"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_run.make_config(Path("x"), **changes)


# --- steps -----------------------------------------------------------------------------------------------------------


def steps_of(data: Path, loss: str, devices: int, micro: int, **changes):
    """(metrics of two steps on one batch, the state after them, its first base) of fresh adapters on random parameters.

    A large ε of Adam: see tiny.py.
    """
    changes = {"loss.name": loss, "optim.epsilon": 1e-3, "lora.layers": ".*", **changes}
    config = tiny_run.make_config(data, **{**LORA, **changes})
    parts = builders.build(config, vocab_size=tiny_run.VOCAB, answers=2)
    shapes = builders.state_shapes(parts)
    base = random_like(lora.split(param_shapes(parts.model))[0])
    parallel = DataParallel(jax.devices()[:devices])
    step = parallel.train_step(builders.guarded_step(config, parts, 10, parallel.axis))
    batch = builders.make_pipeline(config, parts, random_examples(8, Shape(2, 3, 8))).batch(0)
    state = builders.fresh_state(parts, base, lora.fresh(shapes.params, 0))
    carry, hyper, seen = parallel.replicate(builders.guarded(state, 0)), parallel.replicate(parts.hyper), []
    for _ in range(2):
        carry, metrics = step(carry, parallel.shard(batch, micro), hyper)
        seen.append({k: m.compute() for k, m in parallel.unreplicate(metrics).items()})
    return seen, parallel.unreplicate(carry.state), as_read(parts.model, base)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_starts_at_the_base_and_leaves_it_alone(dtype: str, data: Path) -> None:
    (first, second), state, base = steps_of(data, "dpo", 1, 1, **{"model.dtype": dtype})
    # Policy and base are different programs, whose fp32 sums XLA may order differently.
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert second["rewards/margins"] != 0.0 and first["grad_norm"] > 0
    jax.tree.map(np.testing.assert_array_equal, state.reference, base)
    moments = {name for name in named_leaves(state.opt_state) if "blocks" in name}
    assert moments and all(map(lora.is_adapter, moments | named_leaves(state.params).keys()))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}


def test_devices_and_micro_batches_change_nothing(data: Path) -> None:
    """Of a loss that sees the whole batch, and answers to other prompts."""
    (_, metrics), state, _ = steps_of(data, "aot + 0.5*kto", 1, 1)
    (_, split_metrics), split_state, _ = steps_of(data, "aot + 0.5*kto", 2, 2)
    assert split_metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    # fp32 sums in another order, through two steps.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), split_state.params, state.params)


def test_dropout_draws_anew_for_each_step(data: Path) -> None:
    """Without it, two steps on one batch with a learning rate of nothing have one gradient. No reference is scored."""
    still = {"optim.schedule": "constant", "optim.warmup_steps": 0, "optim.learning_rate": 1e-30}
    (first, second), state, _ = steps_of(data, "orpo", 1, 2, **still, **{"lora.dropout": 0.8})
    assert second["grad_norm"] != pytest.approx(first["grad_norm"], rel=1e-2)
    assert state.reference is not None


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_goes_on_to_the_bit(data: Path, run: Path, tmp_path: Path) -> None:
    config, workdir = tiny_run.write_config(tmp_path / "config.py", data, **RUN), tmp_path / "run"
    process = subprocess.Popen(
        tiny_run.command(f"--config={config}", f"--workdir={workdir}"),
        cwd=tiny_run.ROOT,
        env=tiny_run.environment(),
        stderr=subprocess.DEVNULL,
    )
    while not (workdir / "checkpoints" / "5").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (workdir / "summary.json").exists()
    train.run(tiny_run.make_config(data, **RUN), workdir)
    assert tiny_run.results(workdir) == tiny_run.results(run)
    first = read_metrics(run / "metrics.jsonl")[0]
    assert first["eval/loss"] == pytest.approx(math.log(2), abs=1e-7) and first["eval/rewards/margins"] == 0.0
    # The sampler's log-probabilities less the scorer's of the same parameters: fp32 rounding of sums of some 10 nats.
    assert abs(first["samples/kl"]) < 1e-5


def test_only_adapters_are_saved(run: Path) -> None:
    saved = open_newest(run)
    others = [name for name in saved.meta["state"] if not name.startswith(("params", "opt_state"))]
    assert others == ["step"] and all(map(lora.is_adapter, saved.names()))


def test_others_see_the_policy_of_a_run_whole(run: Path, data: Path) -> None:
    """As ``init.run``, in samples and exports."""
    config = tiny_run.make_config(data, **RUN, **{"init.run": str(run)})
    model = make_start_model(config, tiny_run.VOCAB)
    fresh = tiny_run.make_config(data, **RUN)
    policy, base = (named_leaves(start_params(c, model)) for c in (config, fresh))
    moved = {name for name in base if not np.array_equal(base[name], policy[name])}
    assert moved == {"blocks/qkv/kernel", "blocks/mlp_in/kernel", "blocks/mlp_out/kernel"}
    low = named_leaves(load_adapters(run, model)[1])
    added = 2.0 * low["blocks/qkv/lora_a"][1] @ low["blocks/qkv/lora_b"][1]
    np.testing.assert_allclose(policy["blocks/qkv/kernel"][1], base["blocks/qkv/kernel"][1] + added, rtol=0, atol=1e-7)
    result = sample.sample_run(run, ["so good"], sample.Request(max_new_tokens=4, temperature=0))
    assert {c.side for c in result.completions} == set(sample.SIDES)


def test_a_changed_base_is_refused(run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run.make_config(data, **RUN)
    model = make_start_model(config, tiny_run.VOCAB)
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    for module in (start, opened):
        monkeypatch.setattr(module, "start_params", lambda config, model, *_: init_params(model, jax.random.key(1)))
    with pytest.raises(ValueError, match="holds other parameters than when adapters were trained on it"):
        start.load_policy(tmp_path / "run", model)
    with pytest.raises(ValueError, match="holds other parameters than when this run began"):
        train.run(config, tmp_path / "run")
