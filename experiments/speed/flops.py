"""What a traced step does: FLOPs of its matrix products, and its largest array."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any


def dot_flops(jaxpr: Any, trips: int) -> int:
    """FLOPs of all matrix products, 2 for each multiplication.

    Args:
      jaxpr: as from ``jax.make_jaxpr(step)(…).jaxpr``.
      trips: of each loop whose length depends on the data.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((left, _), _) = equation.params["dimension_numbers"]
            contracted = math.prod(equation.invars[0].aval.shape[axis] for axis in left)
            total += 2 * contracted * math.prod(equation.outvars[0].aval.shape)
        times = {"scan": equation.params.get("length"), "while": trips}.get(equation.primitive.name, 1)
        total += times * sum(dot_flops(inner, trips) for inner in _inner(equation))
    return total


def largest_array(jaxpr: Any) -> int:
    """Elements of the largest array that the program names."""
    sizes = [math.prod(v.aval.shape) for e in jaxpr.eqns for v in e.outvars if hasattr(v.aval, "shape")]
    return max([*sizes, *(largest_array(inner) for e in jaxpr.eqns for inner in _inner(e)), 0])


def _inner(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item
