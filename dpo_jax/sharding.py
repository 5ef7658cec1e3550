"""Which mesh axis each dimension of an array lies over: logical names → axes, by two tables.

Parameters carry logical names (``nn.with_logical_partitioning``); the model names its activations with
:func:`constrain`. Both are without effect unless the program is traced for a mesh with these axes.

====  ==========================================================================================================
data    each group of devices has its own rows and a whole copy of what follows
fsdp    rows are split here too; parameters, gradients and optimizer state are split by the model's width
tensor  heads, MLP and vocabulary are split, and each device computes its part of every row
====  ==========================================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from dpo_jax.trees import named_leaves
from dpo_jax.types import Array

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that the rows of a batch are split over

Names = tuple[str | None, ...]
Rules = Mapping[str, tuple[str, ...]]

PARAMETERS: Rules = {
    "layers": (),
    "norm": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}
ACTIVATIONS: Rules = {**PARAMETERS, "rows": ROWS, "embed": ()}


def partition(names: Names, shape: Sequence[int], mesh: Mapping[str, int], rules: Rules = PARAMETERS) -> PartitionSpec:
    """Where the dimensions of an array lie.

    Args:
      names: a logical name for each dimension; None stays whole.
      shape: its dimensions. One that does not divide by its axes stays whole.
      mesh: devices along each axis.
      rules: logical name → mesh axes.

    Returns:
      One entry for each dimension.

    Raises:
      ValueError: a name that no rule knows, or not one name for each dimension.

    >>> partition(("embed", "mlp"), (64, 90), {"data": 1, "fsdp": 4, "tensor": 4})
    PartitionSpec('fsdp', None)
    """
    unknown = [name for name in names if name is not None and name not in rules]
    if unknown:
        raise ValueError(f"unknown logical axis {unknown[0]!r} in {names}; known: {', '.join(rules)}")
    if len(names) != len(shape):
        raise ValueError(f"{names} names {len(names)} dimensions of an array of shape {tuple(shape)}")
    return PartitionSpec(*(_axes(rules.get(n or "", ()), size, mesh) for n, size in zip(names, shape, strict=True)))


def constrain(x: Array, *names: str | None, rules: Rules = ACTIVATIONS) -> Array:
    """Tells the compiler where an array lies, and its gradient too; x itself where no mesh is in use."""
    mesh = jax.sharding.get_abstract_mesh()
    if not set(AXES) <= set(mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, partition(names, x.shape, dict(mesh.shape), rules))


def by_device(fn: Callable[..., Array], names: Sequence[Names], out: Names) -> Callable[..., Array]:
    """``fn`` of the parts that each device holds: for programs that the compiler cannot split, such as kernels.

    Args:
      fn: of arrays; each part of its result depends on the like parts of its arguments alone.
      names: logical names of the dimensions of each argument, as of :func:`constrain`, and of each array of one that
        has several; none for a scalar or None.
      out: of the result, which has the dimensions of the first argument.

    Returns:
      A function of the whole arrays; ``fn`` itself where no mesh is in use.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(AXES) <= set(mesh.axis_names):
        return fn

    def split(*args: Any) -> Array:
        shape = dict(mesh.shape)
        specs = tuple(
            partition(n, jax.tree.leaves(a)[0].shape, shape, ACTIVATIONS) if n else PartitionSpec()
            for n, a in zip(names, args, strict=True)
        )
        out_spec = partition(out, args[0].shape, shape, ACTIVATIONS)
        return jax.shard_map(fn, in_specs=specs, out_specs=out_spec, check_vma=False)(*args)

    return split


class Placement:
    """Where each array of a training state lies: parameters by their names, and whatever mirrors them likewise.

    Args:
      axes: logical names of the model's parameters, by path.
      mesh: devices along each axis.
    """

    def __init__(self, axes: Mapping[str, Names], mesh: Mapping[str, int]) -> None:
        self._axes, self._mesh = axes, mesh

    def of(self, tree: Any) -> Any:
        """A PartitionSpec for each array; those that belong to no parameter stay whole.

        The optimizer's moments, a reference and the state of a run have the paths of parameters as the ends of theirs.
        """
        specs = [self._spec(name, leaf) for name, leaf in named_leaves(tree).items()]
        return jax.tree.unflatten(jax.tree.structure(tree), specs)

    def whole(self, tree: Any) -> list[str]:
        """Paths of the parameters of which every device holds all, though there is an axis to split them over."""
        if self._mesh["fsdp"] * self._mesh["tensor"] == 1:
            return []
        found = named_leaves(tree)
        return [name for name, leaf in found.items() if leaf.ndim and not any(self._spec(name, leaf))]

    def _spec(self, name: str, leaf: Any) -> PartitionSpec:
        parts = name.split("/")
        known = (self._axes.get("/".join(parts[i:])) for i in range(len(parts)))
        axes = next((axes for axes in known if axes is not None and len(axes) == len(leaf.shape)), None)
        return PartitionSpec() if axes is None else partition(axes, leaf.shape, self._mesh)


def mesh_shape(devices: int, *, data: int | None, fsdp: int, tensor: int) -> dict[str, int]:
    """Devices along each axis.

    Args:
      devices: how many there are.
      data: None is what fsdp and tensor leave.
      fsdp: at least 1.
      tensor: at least 1.

    Raises:
      ValueError: they do not multiply to ``devices``.
    """
    rest = fsdp * tensor
    fitting = devices // rest if devices % rest == 0 else None
    if fitting is None or data not in (None, fitting):
        got = f"data {data} × fsdp {fsdp} × tensor {tensor}" if data else f"fsdp {fsdp} × tensor {tensor}"
        known = [(f, t) for f in _divisors(devices) for t in _divisors(devices // f)]
        mend = f"with these, parallel.data must be {fitting}" if fitting else f"fsdp × tensor can be {_products(known)}"
        raise ValueError(f"config.parallel: {got} does not make {devices} devices; {mend}")
    return {"data": fitting, "fsdp": fsdp, "tensor": tensor}


def _axes(axes: tuple[str, ...], size: int, mesh: Mapping[str, int]) -> str | tuple[str, ...] | None:
    split = math.prod(mesh[axis] for axis in axes)
    if not axes or size % split:
        return None
    return axes if len(axes) > 1 else axes[0]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _products(pairs: Sequence[tuple[int, int]], most: int = 12) -> str:
    shown = ", ".join(f"{f}×{t}" for f, t in pairs[:most])
    return shown + (f" and {len(pairs) - most} more" if len(pairs) > most else "")
