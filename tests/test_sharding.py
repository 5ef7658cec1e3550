"""Logical names → mesh axes: the rules, what stays whole, meshes that do not fit, names that no rule knows."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dpo_jax.models import init_params, logical_axes
from dpo_jax.optim import AdamW
from dpo_jax.sharding import ACTIVATIONS, PARAMETERS, Placement, constrain, mesh_shape, partition
from dpo_jax.state import TrainState
from dpo_jax.trees import named_leaves
from tests.tiny import tiny_model

MESH = {"data": 2, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("names", "shape", "rules", "expected"),
    [
        (("layers", "embed", "mlp"), (3, 8, 6), PARAMETERS, P(None, "fsdp", "tensor")),
        (("heads", "embed"), (6, 8), PARAMETERS, P("tensor", "fsdp")),
        (("vocab", "embed"), (37, 8), PARAMETERS, P(None, "fsdp")),  # 37 does not divide by 2
        (("norm",), (8,), PARAMETERS, P(None)),
        (("rows", None, "embed"), (16, 5, 8), ACTIVATIONS, P(("data", "fsdp"), None, None)),
        (("rows", None, "vocab"), (4, 5, 8), ACTIVATIONS, P(None, None, "tensor")),  # nor 4 by 8
        ((), (), PARAMETERS, P()),
    ],
)
def test_names_become_axes(names, shape, rules, expected) -> None:
    assert partition(names, shape, MESH, rules) == expected


def test_a_name_that_no_rule_knows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown logical axis 'embd' .* known: layers, norm, embed"):
        partition(("embd", "mlp"), (8, 6), MESH)
    with pytest.raises(ValueError, match="names 2 dimensions of an array of shape"):
        partition(("embed", "mlp"), (8,), MESH)


def test_without_a_mesh_nothing_is_constrained() -> None:
    x = np.zeros((4, 2))
    assert constrain(x, "rows", "no such name") is x


def test_what_mirrors_the_parameters_lies_as_they_do() -> None:
    model = tiny_model()
    axes = logical_axes(model)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    assert axes.keys() == named_leaves(params).keys()
    optimizer = AdamW(b1=0.9, b2=0.9, epsilon=1e-8, weight_decay=0.0, clip_norm=1.0)
    step = jax.ShapeDtypeStruct((), np.int32)
    state = TrainState(step, params, params, jax.eval_shape(optimizer.init, params), ())
    placement = Placement(axes, MESH)
    specs = named_leaves(placement.of(state))
    kernel = "blocks/mlp_in/kernel"
    like = [name for name in specs if name.endswith(kernel)]
    assert len(like) == 4  # policy, reference and two moments
    assert {specs[name] for name in like} == {P(None, "fsdp", "tensor")}
    assert specs["step"] == P() and specs["opt_state/count"] == P()
    whole = placement.whole(params)
    assert "blocks/attention_norm/norm/scale" in whole and kernel not in whole
    assert Placement(axes, {"data": 8, "fsdp": 1, "tensor": 1}).whole(params) == []


@pytest.mark.parametrize(
    ("devices", "axes", "expected"),
    [(8, (None, 4, 2), (1, 4, 2)), (8, (None, 1, 1), (8, 1, 1)), (8, (2, 2, 2), (2, 2, 2)), (1, (1, 1, 1), (1, 1, 1))],
)
def test_the_data_axis_takes_what_is_left(devices, axes, expected) -> None:
    data, fsdp, tensor = axes
    assert tuple(mesh_shape(devices, data=data, fsdp=fsdp, tensor=tensor).values()) == expected


def test_a_mesh_that_does_not_multiply_to_the_devices_is_told_what_would() -> None:
    with pytest.raises(ValueError, match=r"data 3 × fsdp 2 × tensor 2 does not make 8 devices; .*data must be 2"):
        mesh_shape(8, data=3, fsdp=2, tensor=2)
    with pytest.raises(ValueError, match=r"fsdp 3 × tensor 1 .* 4 devices; fsdp × tensor can be 1×1, 1×2, 1×4, 2×1"):
        mesh_shape(4, data=None, fsdp=3, tensor=1)
