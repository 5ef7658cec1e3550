"""One engine for all families: a table of names in, parameters out, and back.

Layers are separate tensors in a file and one stacked array here. Parameters are built one at a time from tensors that
are read one at a time, so that the host never holds more than the model and one tensor. Where parameters are split over
devices, each process reads only rows that it has a part of, and holds no more than its parts of one parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from dpo_jax.convert.tensors import Entry, write_tensors
from dpo_jax.trees import named_leaves
from dpo_jax.types import Params

LAYER = "{n}"


@dataclass(frozen=True)
class Rule:
    """A line of a table.

    Attributes:
      theirs: name of a tensor in the file; ``{n}`` is the number of the layer.
      ours: path of the parameter.
      transpose: whether the file has [out, in] where we have [in, out].
    """

    theirs: str
    ours: str
    transpose: bool = False


@dataclass(frozen=True)
class Slot:
    """A tensor of the file and its place in a parameter.

    Attributes:
      theirs: the tensor's name.
      ours: the parameter's path.
      layer: index in the parameter's first axis; None when it is the parameter.
      transpose: whether the two are transposed.
      shape: of the tensor in the file.
    """

    theirs: str
    ours: str
    layer: int | None
    transpose: bool
    shape: tuple[int, ...]

    def to_theirs(self, parameter: Any) -> np.ndarray:
        part = np.asarray(parameter if self.layer is None else parameter[self.layer])
        return part.T if self.transpose else part


def make_slots(rules: Iterable[Rule], params: Params) -> list[Slot]:
    """Every tensor that a model is made of.

    Args:
      rules: the family's table; lines for parameters that this model does not have are passed over.
      params: parameters or their shapes.

    Raises:
      ValueError: parameters that no line is for.
    """
    leaves = named_leaves(params)
    rules = [rule for rule in rules if rule.ours in leaves]
    uncovered = sorted(set(leaves) - {rule.ours for rule in rules})
    if uncovered:
        raise ValueError(f"parameters without a name in Hugging Face files: {', '.join(uncovered)}")
    return [slot for rule in rules for slot in _slots(rule, tuple(leaves[rule.ours].shape))]


def _slots(rule: Rule, shape: tuple[int, ...]) -> list[Slot]:
    stacked = LAYER in rule.theirs
    part = shape[1:] if stacked else shape
    part = part[::-1] if rule.transpose else part
    layers = range(shape[0]) if stacked else [None]
    return [Slot(rule.theirs.replace(LAYER, str(n)), rule.ours, n, rule.transpose, part) for n in layers]


def check_names(
    slots: Iterable[Slot],
    entries: Mapping[str, Entry],
    ignored: str,
    folder: Path,
    expected_by: str = "those of its config.json",
) -> None:
    """Raises ValueError unless file and model hold the same tensors in the same shapes; lists what each side lacks.

    Args:
      slots: what the model is made of.
      entries: what the files hold.
      ignored: regular expression of names that carry no weights.
      folder: for the message.
      expected_by: what says so, for the message.
    """
    expected = {slot.theirs: slot for slot in slots}
    unexpected = [name for name in entries if name not in expected and not re.fullmatch(ignored, name)]
    missing = [name for name in expected if name not in entries]
    if unexpected or missing:
        raise ValueError(
            f"the weights in {folder} are not {expected_by}:\n  "
            f"in the files, without a place in the model: {_listing(unexpected)}\n  "
            f"in the model, not in the files: {_listing(missing)}"
        )
    for name, slot in expected.items():
        entry = entries[name]
        if entry.shape != slot.shape:
            raise ValueError(
                f"{entry.path}: tensor {name} has shape {list(entry.shape)}; config.json asks for {list(slot.shape)}"
            )


def _listing(names: list[str]) -> str:
    return ", ".join(sorted(names)) if names else "nothing"


def read_params(
    slots: Iterable[Slot],
    entries: Mapping[str, Entry],
    like: Params,
) -> Params:
    """Builds the parameters.

    Args:
      slots: what the model is made of; checked against ``entries``.
      entries: what the files hold.
      like: parameters or their shapes; the result has their dtypes. A shape with a sharding is read straight onto its
        devices, everything else as a numpy array.

    Raises:
      OSError: a file that cannot be read.
      ValueError: numbers that are not finite, a dtype that weights do not have.
    """
    by_path: dict[str, list[Slot]] = {}
    for slot in slots:
        by_path.setdefault(slot.ours, []).append(slot)
    leaves = named_leaves(like)
    flat = {path: _read(by_path[path], entries, leaves[path]) for path in leaves}
    return traverse_util.unflatten_dict(flat, sep="/")


Bounds = tuple[tuple[int, int], ...]  # (start, stop) along each axis


def _read(slots: list[Slot], entries: Mapping[str, Entry], like: Any) -> Any:
    sharding = like.sharding if isinstance(like, jax.ShapeDtypeStruct) else None
    indices = [()] if sharding is None else sharding.addressable_devices_indices_map(like.shape).values()
    # Devices that hold the same part get it from one reading.
    found = {_bounds(index or (), like.shape) for index in indices}
    parts = {bounds: np.empty([stop - start for start, stop in bounds], like.dtype) for bounds in found}
    for slot in slots:
        _fill(parts, slot, entries[slot.theirs])
    if sharding is None:
        return parts[_bounds((), like.shape)]
    return jax.make_array_from_callback(like.shape, sharding, lambda index: parts[_bounds(index or (), like.shape)])


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    slices = (*index, *[slice(None)] * (len(shape) - len(index)))
    return tuple(part.indices(size)[:2] for part, size in zip(slices, shape, strict=True))


def _fill(parts: Mapping[Bounds, np.ndarray], slot: Slot, entry: Entry) -> None:
    """Writes what a tensor has of each part; only the rows from the first to the last of them are read."""
    targets: list[tuple[Bounds, np.ndarray]] = []  # in the order of the tensor's axes
    for bounds, part in parts.items():
        if slot.layer is not None:
            first, last = bounds[0]
            if not first <= slot.layer < last:
                continue
            bounds, part = bounds[1:], part[slot.layer - first]
        targets.append((bounds[::-1], part.T) if slot.transpose else (bounds, part))
    if not targets:
        return
    rows = [bounds[0] for bounds, _ in targets if bounds] or [(0, 1)]
    start, stop = min(low for low, _ in rows), max(high for _, high in rows)
    tensor = entry.read(start, stop)
    for bounds, target in targets:
        shifted = [(low - start, high - start) if axis == 0 else (low, high) for axis, (low, high) in enumerate(bounds)]
        target[...] = tensor[tuple(slice(*part) for part in shifted)]
    del tensor  # before the check below needs memory
    for _, target in targets:
        if not np.isfinite(target).all():
            raise ValueError(f"{entry.path}: tensor {slot.theirs} has numbers that are not finite in {target.dtype}")


def write_params(folder: Path, slots: Iterable[Slot], params: Params, dtype: Any, shard_bytes: int) -> None:
    """Writes parameters as safetensors under their Hugging Face names.

    Args:
      folder: where to.
      slots: what the model is made of.
      params: the parameters.
      dtype: of the files.
      shard_bytes: largest file, bytes.
    """
    leaves = named_leaves(params)
    by_name = {slot.theirs: slot for slot in slots}
    shapes = {name: slot.shape for name, slot in by_name.items()}
    write_tensors(folder, shapes, dtype, lambda n: by_name[n].to_theirs(leaves[by_name[n].ours]), shard_bytes)
