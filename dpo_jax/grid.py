"""A sweep written down: a base config, named axes, and the runs that are their product.

A sweep file is a config file with ``get_axes()`` beside ``get_config()``::

    def get_axes():
        return {
            "loss.name": ["dpo", "ipo"],                            # a key of the config and its values
            "noise": {"clean": {}, "noisy": {"data.flip": 0.2}},    # or a name, and what each point of it changes
            "seed": [0, 1, 2],
        }

A value may be a function of the run's config, for what follows from other axes: ``lambda c: c.data.flip``.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dpo_jax.config import Config, from_config_dict
from dpo_jax.shared import compiled_seed

SWEEP_FILE, RUNS_FOLDER = "sweep.json", "runs"

Changes = Mapping[str, Any]  # dotted key → value
Axes = Mapping[str, Mapping[str, Changes] | Sequence[Any]]


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
      name: what differs from the other runs: ``name=dpo,seed=1``; also that of its folder.
      point: where it lies: axis → label.
      config: of the run.
    """

    name: str
    point: Mapping[str, str]
    config: Config


def expand(base: ConfigDict, axes: Axes, overrides: Sequence[str] = ()) -> list[Run]:
    """All runs of a sweep, each checked; the last axis runs fastest.

    Args:
      base: what all have in common.
      axes: named axes.
      overrides: keys that were set on the command line.

    Raises:
      ValueError: no axes, an axis without values, an unknown key, a bad value, a key on two axes or on an axis and the
        command line, or two runs of one name.
    """
    if not axes:
        raise ValueError("the sweep has no axes; get_axes() returns a dict of them")
    tables = {axis: _labelled(axis, values) for axis, values in axes.items()}
    _check_keys(tables, overrides, list(_flat_keys(base)))
    varying = [axis for axis, table in tables.items() if len(table) > 1]
    short = _short_names(varying)
    runs = []
    for labels in itertools.product(*tables.values()):
        point = dict(zip(tables, labels, strict=True))
        name = ",".join(f"{short[axis]}={point[axis]}" for axis in varying) or "run"
        changes = {key: value for axis, label in point.items() for key, value in tables[axis][label].items()}
        runs.append(Run(name, point, _config(base, changes, name)))
    return runs


def write(folder: Path, runs: Sequence[Run]) -> None:
    """Writes the runs' points down, for whoever reads the results."""
    axes = {axis: list(dict.fromkeys(run.point[axis] for run in runs)) for axis in runs[0].point}
    content = {"axes": axes, "runs": {run.name: dict(run.point) for run in runs}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SWEEP_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> tuple[dict[str, list[str]], dict[str, dict[str, str]]]:
    """(labels of each axis, point of each run), as ``write`` wrote them.

    Raises:
      OSError: there is no sweep.
    """
    path = folder / SWEEP_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["axes"], content["runs"]
    except (OSError, ValueError, KeyError) as error:
        raise OSError(f"{folder} is no folder of a sweep: {path} cannot be read ({error!r})") from error


def share(runs: Sequence[Run], index: int, count: int) -> list[Run]:
    """The part of process ``index`` of ``count``: neighbours, which most often train together, stay together.

    Raises:
      ValueError: an index outside of the count.
    """
    if not 0 <= index < count:
        raise ValueError(f"--index is {index} and --count {count}; expected an index from 0 to {count - 1}")
    first, last = (len(runs) * i // count for i in (index, index + 1))
    return list(runs[first:last])


def traced_apart(config: Config) -> Config:
    """The config without the numbers in which members of a population may differ."""
    return dataclasses.replace(
        config,
        seed=compiled_seed(config),
        data=dataclasses.replace(config.data, flip=0.0),
        loss=dataclasses.replace(config.loss, hyper={}),
        optim=dataclasses.replace(config.optim, learning_rate=1.0),
    )


def _labelled(axis: str, values: Mapping[str, Changes] | Sequence[Any]) -> dict[str, Changes]:
    if isinstance(values, str) or not isinstance(values, Mapping | Sequence) or not len(values):
        raise ValueError(f"axis {axis!r} is {values!r}; expected a list of values, or a dict of label: changes")
    if isinstance(values, Mapping):
        for label, changes in values.items():
            if not isinstance(changes, Mapping):
                raise ValueError(f"axis {axis!r}, {label!r}: expected a dict of config keys, got {changes!r}")
        table = {_safe(label): changes for label, changes in values.items()}
    else:
        table = {_safe(value): {axis: value} for value in values}
    if len(table) < len(values):
        raise ValueError(f"axis {axis!r} has values of one name: {list(values)}; name them by a dict")
    return table


def _safe(value: Any) -> str:
    """A label that any file system takes."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9.+*-]+", "_", text)


def _short_names(axes: Sequence[str]) -> dict[str, str]:
    last = [axis.rpartition(".")[2] for axis in axes]
    return {axis: _safe(name if last.count(name) == 1 else axis) for axis, name in zip(axes, last, strict=True)}


def _flat_keys(config: ConfigDict, path: str = "") -> Iterator[str]:
    for key in config:
        if isinstance(config[key], ConfigDict):
            yield from _flat_keys(config[key], f"{path}{key}.")
        else:
            yield path + key


def _check_keys(tables: Mapping[str, Mapping[str, Changes]], overrides: Sequence[str], known: Sequence[str]) -> None:
    owner = dict.fromkeys(overrides, "the command line")
    for axis, table in tables.items():
        keys = {key for changes in table.values() for key in changes}
        for key in sorted(keys):
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f" (did you mean {near[0]}?)" if near else "; configs/base.py has every key"
                raise ValueError(f"axis {axis!r} changes config.{key}, which is no key{hint}")
            if key in owner:
                raise ValueError(f"config.{key} is set by {owner[key]} and by axis {axis!r}; leave one of them out")
            owner[key] = f"axis {axis!r}"


def _config(base: ConfigDict, changes: Changes, name: str) -> Config:
    config = copy.deepcopy(base)
    try:
        config.update_from_flattened_dict({key: v for key, v in changes.items() if not callable(v)})
        derived = {key: value(config) for key, value in changes.items() if callable(value)}
        config.update_from_flattened_dict(derived)
        return from_config_dict(config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        text = error.args[0] if error.args else error
        raise ValueError(f"run {name!r} of the sweep cannot be: {text}") from error
