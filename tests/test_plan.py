"""Plans: products counted by hand, traffic read from a program's text, pods that exist, and a real compilation."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from dpo_jax import plan
from dpo_jax.build import build
from dpo_jax.chips import parse
from dpo_jax.config import from_config_dict
from dpo_jax.convert.pretrained import open_pretrained
from dpo_jax.data.example import Example
from dpo_jax.data.layouts import Shape
from dpo_jax.flops import Work, forward, step_work
from dpo_jax.hlo import Collective, collectives
from dpo_jax.lora import Adapter, with_adapter
from dpo_jax.models import init_params, logical_axes, make_model
from dpo_jax.parallel import check_divides
from dpo_jax.sharding import Placement, mesh_shape
from dpo_jax.trees import parameter_count
from dpo_jax.types import PreferenceBatch
from tests import tiny_run
from tests.tiny import lay_out, make_answer, random_examples

SIZES = dict(vocab_size=50, context_length=32, width=8, layers=3, heads=4, kv_heads=2, mlp_width=12)


def test_products_of_a_forward_pass_are_those_of_a_sheet_of_paper() -> None:
    model = make_model("llama", SIZES)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    one = forward(model.config, params, tokens=10, pairs=3 * 55, targets=6)
    # Queries and output 8×8, keys and values 8×4, three matrices of 8×12; each weight is a product and a sum a token.
    assert one.base == 2 * 10 * 3 * (2 * 64 + 2 * 32 + 3 * 96) and one.adapters == 0
    assert one.attention == 3 * 2 * (2 * 55 * 8)
    assert one.head == 2 * 6 * 50 * 8


LAYER = 2 * 64 + 2 * 32 + 3 * 96  # weights of a layer: queries and output, keys and values, the MLP


def _work(batch, *, mismatched=None, reference: bool = True, adapter: Adapter | None = None, **sizes) -> Work:
    model = with_adapter(make_model("llama", {**SIZES, **sizes}), adapter)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return step_work(model, params, PreferenceBatch(batch, mismatched), reference=reference, scored_twice=False)


@pytest.fixture(scope="module")
def full_batch():
    """Two pairs without padding: four rows of 4 + 5 − 1 positions and 5 targets."""
    shape = Shape(2, 4, 5)
    answer = lambda: make_answer(np.ones(5))  # noqa: E731
    return lay_out([Example(i, np.ones(4, np.int32), (answer(), answer())) for i in range(2)], shape).answers


def test_a_step_is_three_passes_of_the_policy_and_one_of_the_reference(full_batch) -> None:
    tokens, pairs, head = 4 * 8, 4 * 8 * 9 // 2, 2 * 4 * 5 * 50 * 8
    body, attention = 2 * tokens * 3 * LAYER, 3 * 4 * pairs * 8
    assert _work(full_batch).useful == 4 * (body + attention + head)
    assert _work(full_batch, reference=False).useful == 3 * (body + attention + head)
    assert _work(full_batch, windows=(3, None, None)).useful == 4 * (body + attention + head) - 4 * 4 * 8 * 4 * 15


@pytest.mark.parametrize(
    ("remat", "weights", "scores"),
    [
        ("none", 0, 1),  # scores, which the pass back reads
        ("dots", 0, 1),
        ("gate", 64 + 96, 1),  # output, the MLP's other matrix of the first two
        ("attention", 64 + 2 * 96, 1),
        ("full", LAYER - 96, 3),  # all but what nobody reads: the MLP's last product
    ],
)
def test_what_is_spent_beside_is_masked_scores_and_what_is_computed_again(full_batch, remat, weights, scores) -> None:
    tokens, head, square = 4 * 8, 2 * 4 * 5 * 50 * 8, 3 * 4 * 4 * 8 * 8 * 8
    again = 2 * tokens * 3 * weights + scores * square / 2 + head
    assert _work(full_batch, remat=remat).spent == 4 * (2 * tokens * 3 * LAYER + square + head) + again


def test_a_frozen_matrix_has_no_gradient(full_batch) -> None:
    tokens, head, pairs = 4 * 8, 2 * 4 * 5 * 50 * 8, 4 * 8 * 9 // 2
    adapter = Adapter("query", 2, 4.0)
    low = 2 * tokens * 3 * 2 * (8 + 8)
    useful = 3 * (2 * tokens * 3 * LAYER + head) + 4 * 3 * 4 * pairs * 8 + 3 * low
    work, alone = (_work(full_batch, adapter=adapter, reference=reference) for reference in (True, False))
    assert work.useful == useful
    square = 3 * 4 * 4 * 8 * 8 * 8
    assert work.spent - alone.spent == 2 * tokens * 3 * LAYER + square + head, "the reference has no adapters"


@pytest.mark.parametrize("adapter", [None, Adapter("query", 2, 4.0)])
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("kernel", [{}, {"attention": "splash", "remat": "dots"}])
def test_mismatched_answers_are_scored_without_a_gradient(full_batch, kernel, reference: bool, adapter) -> None:
    alone, beside = (
        _work(full_batch, mismatched=mismatched, reference=reference, adapter=adapter, **kernel)
        for mismatched in (None, full_batch)
    )
    tokens, pairs, head = 4 * 8, 4 * 8 * 9 // 2, 2 * 4 * 5 * 50 * 8
    body, low = 2 * tokens * 3 * LAYER, 2 * tokens * 3 * 2 * (8 + 8) if adapter else 0
    passes = 1 + reference
    assert beside.useful - alone.useful == passes * (body + 3 * 4 * pairs * 8 + head) + low
    square = 128 if kernel else 8  # the kernel's one block for 8 tokens
    spent = passes * (body + 3 * 4 * 4 * square**2 * 8 + head) + low
    assert beside.spent - alone.spent == spent


def test_padding_is_not_useful_and_is_spent() -> None:
    shape = Shape(2, 4, 5)
    batch = lay_out(random_examples(2, shape), shape).answers
    work, tokens = _work(batch, reference=False), int((batch.group_RL != 0).sum())
    assert work.useful < 3 * 2 * tokens * 3 * LAYER + 3 * 4 * 2 * 5 * 50 * 8 * 2
    assert work.spent > 3 * 2 * batch.tokens_RL.size * 3 * LAYER > work.useful / 2


def test_a_kernel_computes_scores_of_whole_blocks(full_batch) -> None:
    spent = {kernel: _work(full_batch, attention=kernel, remat="full").spent for kernel in ("dense", "splash")}
    square = 3 * 4 * 4 * 8  # layers × operations of a pair, over all heads, × rows
    # Dense: two passes, one again, and five products back. The kernel: a block of 128 for 8 tokens, seven products
    # back, and one of each result with its gradient.
    own = 3 * 4 * 2 * 128 * 8
    assert spent["splash"] - spent["dense"] == square * ((3 + 3.5) * 128**2 - (3 + 2.5) * 8**2) + own


HLO = """HloModule step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%body.1 (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %all-gather.1 = f32[8,4]{1,0} all-gather(%part), replica_groups=[2,4]<=[8], dimensions={0}
  %all-reduce.2 = (f32[4]{0}, bf16[2]{0}) all-reduce(%a, %b), replica_groups={{0,1},{2,3}}, to_apply=%add
}

%cond.1 (p: (s32[], f32[8,4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%limit.2 (p: (s32[])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(7)
  ROOT %less.2 = pred[] compare(%i, %constant.9), direction=LT
}

%piece.1 (p: f32[2,4]) -> f32[8,4] {
  ROOT %all-gather.8 = f32[8,4]{1,0} all-gather(%p), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}
}

%piece.2 (p: f32[2,4]) -> f32[8,4] {
  ROOT %all-gather.9 = f32[8,4]{1,0:T(8,128)} all-gather(%p), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}
}

%all-reduce-scatter.clone (g: f32[8,4]) -> f32[2,4] {
  %all-reduce.7 = f32[8,4]{1,0} all-reduce(%g), channel_id=4, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %own = f32[2,4] dynamic-slice(%all-reduce.7, %i)
}

%body.2 (p: (s32[])) -> (s32[]) {
  %first = f32[8,4] fusion(%p), kind=kCustom, calls=%piece.1
  %second = f32[8,4] fusion(%p), kind=kCustom, calls=%piece.2
  %third = f32[2,4] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.clone
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %while.1 = (s32[], f32[8,4]) while(%t), condition=%cond.1, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
  %while.2 = (s32[]) while(%t), condition=%limit.2, body=%body.2
  %all-gather-start.1 = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%a), replica_groups={{0,1,2,3}}, dimensions={0}
  %all-gather-done.1 = f32[8,4]{1,0} all-gather-done(%all-gather-start.1)
  %reduce-scatter.1 = f32[2,4]{1,0} reduce-scatter(%g), replica_groups=mesh['x'=2,'y'=4] {'y'}, to_apply=%add
}
"""


def test_traffic_in_loops_counts_as_often_as_they_run() -> None:
    gathered = 8 * 4 * 4 * 3 / 4  # bytes of a ring of four
    assert collectives(HLO, 8) == [
        Collective("all-gather", 5 + 7 + 1, (5 + 7 + 1) * gathered),
        Collective("all-reduce", 5, 5 * (4 * 4 + 2 * 2) * 2 / 2),
        Collective("reduce-scatter", 7 + 1, (7 + 1) * gathered),
    ]


@pytest.mark.parametrize(
    ("topology", "message"),
    [("v9:2x2", "a kind of v4, v5e, v5p, v6e"), ("v5e:3x7", "of v5e there are v5e:1x1, v5e:2x2"), ("v5e", "v5e:16x16")],
)
def test_a_pod_that_does_not_exist_is_refused_with_those_that_do(topology: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(topology)


def test_a_refusal_says_how_much_is_needed() -> None:
    now = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (16.96G) exceeds available HBM (15.75G). HLO module: jit_guarded."
    )
    before = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.50M of 100.00M hbm."
    assert plan.needed_bytes(now) == int(16.96 * 2**30)
    assert plan.needed_bytes(before) == int(512.5 * 2**20)
    assert plan.needed_bytes("RESOURCE_EXHAUSTED: no room") is None


@pytest.mark.parametrize(
    ("held", "changes", "message"),
    [
        (15, {}, "set config.parallel.mode=mesh"),
        (15, {"parallel.mode": "mesh", "parallel.fsdp": 2}, "raise config.parallel.fsdp or tensor"),
        (15, {"parallel.mode": "mesh", "parallel.fsdp": 4}, "take a larger --topology"),
        (1, {}, "set config.model.remat=dots, or gate"),
        (1, {"model.remat": "full", "data.batch_size": 16}, "raise config.train.micro_batches"),
        (1, {"model.remat": "full"}, "raise config.parallel.tensor"),
    ],
)
def test_advice_names_the_key_to_change(held: int, changes, message: str, tmp_path: Path) -> None:
    config = tiny_run.make_config(tmp_path, **{"train.micro_batches": 1, **changes})
    memory = plan.Memory(held * plan.GIB, 0, 0, 20 * plan.GIB, 16 * plan.GIB)
    pod = plan.Plan("v5e:2x2", 4, "", 1, "dense", memory, Work(1.0, 1.0), [], {"compute": 1.0})
    assert message in plan.advice(pod, config)
    assert "DOES NOT FIT" in plan.show(pod, config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"parallel.mode": "mesh", "parallel.fsdp": 3},
            r"fsdp 3 × tensor 1 does not make 4 devices; .* can be 1×1, 1×2",
        ),
        ({"parallel.mode": "mesh", "parallel.fsdp": 2, "parallel.data": 4}, "with these, parallel.data must be 2"),
        ({"data.batch_size": 6}, "batch_size 6 does not divide over 4 devices .* the nearest that do are 4 or 8"),
        ({"model.attention": "cudnn"}, "attention is 'cudnn', but the devices are of the kind tpu"),
        ({"model.attention": "splash"}, "but rows have .* positions, and the kernel is for 512 to 32768"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_compiled(changes, message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(plan, "describe_devices", lambda topology: jax.devices()[:4])
    monkeypatch.setattr(plan, "_compile", None)
    changes = {"parallel.devices": None, "train.micro_batches": 1, **changes}
    with pytest.raises(ValueError, match=message):
        plan.make_plan(tiny_run.make_config(tmp_path, **changes), "v5e:2x2")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for four devices of this machine, whose steps are traced for counting alone."""
    monkeypatch.setattr(plan, "describe_devices", lambda topology: jax.devices()[:4])
    monkeypatch.setattr(plan, "_compile", lambda step, shapes, chip: (1, None))


def _plan(folder: Path, **changes) -> plan.Plan:
    changes = {"parallel.devices": None, "train.micro_batches": 1, **changes}
    return plan.make_plan(tiny_run.make_config(folder, **changes), "v5e:2x2")


@pytest.mark.parametrize("layout", [{}, {"data.layout": "packed", "data.row_length": 30}])
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_batch_carries_the_log_probabilities_that_a_config_stores(
    loss: str, layout, tmp_path: Path, uncompiled
) -> None:
    changes = {"loss.name": loss, **layout}
    stores = {**changes, "reference.store": str(tmp_path / "store")}
    config = tiny_run.make_config(tmp_path, **stores)
    batch = plan.longest_batch(config, build(config, vocab_size=tiny_run.VOCAB, answers=2))
    for rows in filter(None, (batch.answers, batch.mismatched)):
        np.testing.assert_array_equal(rows.reference_RM, np.zeros_like(rows.weight_RM))
    assert (batch.mismatched is not None) == (loss == "kto")
    stored, scored = _plan(tmp_path, **stores), _plan(tmp_path, **changes)
    assert stored.memory.reference == 0 < scored.memory.reference


STORE, ADAPTERS = {"reference.store": "store"}, {"lora.rank": 2}


def test_a_plan_counts_the_passes_that_a_step_takes(tmp_path: Path, uncompiled) -> None:
    """In those of the reference: a policy is two of them more in its pass back."""
    useful = lambda **changes: _plan(tmp_path, **changes).work.useful  # noqa: E731
    dpo, adapters = useful(), useful(**ADAPTERS)
    one = dpo / 4
    assert useful(**STORE) == useful(**{"loss.name": "simpo"}) == 3 * one
    assert useful(**{"loss.name": "kto"}) == 6 * one, "mismatched answers are as long as others"
    assert useful(**{"loss.name": "kto"}, **STORE) == 4 * one
    assert useful(**ADAPTERS, **STORE) == useful(**ADAPTERS, **{"loss.name": "simpo"}) == adapters - one
    kto = useful(**ADAPTERS, **{"loss.name": "kto"})
    assert 2 * one < kto - adapters < 2.1 * one, "once with adapters, once without"


@pytest.mark.parametrize(
    ("changes", "own", "base"),
    [
        ({}, 3, 0),
        (STORE, 2, 0),
        ({"model.remat": "dots"}, 4, 0),
        ({"loss.name": "kto"}, 5, 0),
        (
            {"loss.name": "aot", "train.micro_batches": 2, "data.batch_size": 8},
            2 * 4,
            0,
        ),  # scored before it is pulled back
        (ADAPTERS, 2, 3),
        ({**ADAPTERS, **STORE}, 2, 2),
        ({**ADAPTERS, "loss.name": "simpo"}, 2, 2),
        ({**ADAPTERS, "loss.name": "kto"}, 3, 5),
        ({**ADAPTERS, "parallel.mode": "mesh", "parallel.fsdp": 2}, 2 * 2, 2 * 3),  # the parts of two chips
    ],
)
def test_each_pass_reads_what_it_goes_through(changes, own: int, base: int, tmp_path: Path, uncompiled) -> None:
    """``own`` times the trained parameters, ``base`` times what adapters stand on, and both ways for the update."""
    found = _plan(tmp_path, **changes)
    memory, (chip, _) = found.memory, parse("v5e:2x2")
    moved = (own + 3) * memory.parameters + base * memory.reference + 2 * memory.optimizer
    assert found.seconds["memory"] * chip.hbm == pytest.approx(moved)


def test_searches_double_the_batch_and_halve_the_pod_until_it_does_not_fit(tmp_path: Path, monkeypatch) -> None:
    tried = []

    def make_plan(config, topology):
        tried.append((topology, config.data.batch_size, config.parallel.fsdp, config.train.micro_batches))
        memory = plan.Memory(0, 0, 0, 0 if len(tried) < most else 2, 1)
        return plan.Plan(topology, 1, "", 1, "dense", memory, Work(1.0, 1.0), [], {})

    monkeypatch.setattr(plan, "make_plan", make_plan)
    mesh = {"parallel.mode": "mesh", "parallel.fsdp": 4, "parallel.tensor": 2, "parallel.devices": None}
    config = tiny_run.make_config(tmp_path, **{**mesh, "data.batch_size": 8, "train.micro_batches": 1})
    most = 3
    assert len(list(plan.larger_batches(config, "v5e:2x4"))) == 3
    assert tried == [("v5e:2x4", 8 * 2**i, 4, 1) for i in (1, 2, 3)]
    tried.clear()
    list(plan.smaller_pods(config, "v5e:2x4"))
    assert tried == [("v5e:2x2", 8, 2, 4)], "one chip cannot hold a tensor axis of 2"
    tried.clear()
    most = 1
    list(plan.smaller_pods(config, "v5e:4x4"))
    assert tried == [("v5e:2x4", 8, 4, 2)]


# Parameters, as the models' authors count them.
PODS = {
    "pythia_2_8b_v5e_16": 2_775_208_960,
    "llama3_8b_v5e_64": 8_030_261_248,
    "llama3_8b_v5p_16": 8_030_261_248,
    "mistral_7b_v4_32": 7_241_732_096,
    "llama3_70b_v5p_256": 70_553_706_496,
    "llama3_70b_v5e_256": 70_553_706_496,
    "llama3_70b_v5p_256_lora": 70_553_706_496,
    "llama3_70b_v5e_256_lora": 70_553_706_496,
}


@pytest.mark.parametrize("name", PODS)
def test_a_config_for_a_pod_divides_over_it(name: str) -> None:
    found = importlib.import_module(f"configs.tpu.{name}")
    config = from_config_dict(found.get_config())
    assert f"--config=configs/tpu/{name}.py" in (found.__doc__ or "")
    assert config.data.batch_size >= 64 and config.data.prompt_length + config.data.answer_length == 2048
    parse(config.plan.topology)
    chips = math.prod(int(n) for n in config.plan.topology.partition(":")[2].split("x"))
    mesh = mesh_shape(chips, data=config.parallel.data, fsdp=config.parallel.fsdp, tensor=config.parallel.tensor)
    check_divides(config.data.batch_size, config.train.micro_batches, mesh["data"] * mesh["fsdp"])
    model = open_pretrained(config.plan.sizes).model()
    assert model.config.key_heads % config.parallel.tensor == 0
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    assert parameter_count(params) == PODS[name]
    placement = Placement(logical_axes(model), mesh)
    assert all("norm" in name or name.endswith("bias") for name in placement.whole(params))


def test_every_config_for_a_pod_is_tested() -> None:
    assert {path.stem for path in (tiny_run.ROOT / "configs" / "tpu").glob("*.py")} == {*PODS, "base"}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs pip install -r requirements-tpu.txt")
def test_a_step_is_compiled_for_chips_that_are_not_here(tmp_path: Path) -> None:
    mesh = {"parallel.mode": "mesh", "parallel.fsdp": 2, "parallel.tensor": 2, "parallel.devices": None}
    config = tiny_run.make_config(tmp_path, **{**mesh, "train.micro_batches": 1})
    found = plan.make_plan(config, "v5e:2x2")
    assert found.chips == 4 and found.memory.fits and found.memory.activations > 0
    whole = 4 * found.parameters
    # fp32 in quarters; norms, odd vocabularies and the optimizer's count are whole.
    assert whole / 4 <= found.memory.parameters < whole / 2
    assert found.memory.reference == found.memory.parameters
    assert 2 * found.memory.parameters == pytest.approx(found.memory.optimizer, abs=8)
    assert {t.kind for t in found.traffic} >= {"all-gather", "all-reduce"} and 0 < found.mfu < 1
    large = dataclasses.replace(config.model, context_length=4096, width=16384, mlp_width=65536, layers=8, heads=128)
    plan_of_large = plan.make_plan(dataclasses.replace(config, model=large), "v5e:2x2")
    assert not plan_of_large.memory.fits and "larger --topology" in plan.show(plan_of_large, config)
    assert plan_of_large.memory.activations > 0, "the compiler's own figure is read"
    assert np.isfinite(plan_of_large.mfu)
