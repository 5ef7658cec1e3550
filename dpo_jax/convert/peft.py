"""Adapters from and to PEFT's folders: adapter_config.json and adapter_model.safetensors.

PEFT names an adapter after the layer that it is for, and keeps both matrices as [out, in]:
``base_model.model.transformer.h.0.attn.c_attn.lora_A.weight`` [r, in], ``…lora_B.weight`` [out, r].
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from dpo_jax import lora
from dpo_jax.convert.engine import LAYER, Rule, check_names, make_slots, read_params
from dpo_jax.convert.pretrained import TABLES, family_of, read_json
from dpo_jax.convert.table import Table
from dpo_jax.convert.tensors import read_header, write_file
from dpo_jax.models import param_shapes
from dpo_jax.trees import named_leaves
from dpo_jax.types import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What would make other numbers of the same matrices, and the values that do not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (False,),
    "use_dora": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "modules_to_save": ([],),
    "layer_replication": ([],),
    "alora_invocation_tokens": ([],),
    "use_bdlora": (False,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "arrow_config": (None,),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # others change the base
}


def read_adapters(folder: Path, model: nn.Module) -> Params:
    """Adapters of a PEFT folder.

    Args:
      folder: where they are.
      model: a family's module with adapters.

    Raises:
      OSError: files that are missing, damaged or cut short.
      ValueError: another kind of adapter, or another rank, scale or choice of layers than the module's.
    """
    adapter = lora.adapter_of(model)
    assert adapter is not None
    _check_config(read_json(folder / CONFIG), folder / CONFIG, adapter)
    shapes = lora.split(param_shapes(model))[1]
    slots = make_slots(_rules(TABLES[family_of(model)]), shapes)
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder / WEIGHTS} is missing; expected a folder that PEFT's save_pretrained wrote")
    entries = read_header(folder / WEIGHTS)
    check_names(slots, entries, "", folder, "what config.lora.layers and config.lora.rank ask for")
    return read_params(slots, entries, shapes)


def write_adapters(folder: Path, model: nn.Module, adapters: Params, base: str | None, dtype: Any = np.float32) -> None:
    """Writes a PEFT folder.

    Args:
      folder: an existing folder.
      model: a family's module with adapters.
      adapters: its adapters.
      base: folder or hub id of the model that they stand on; None where it has none.
      dtype: of the file.
    """
    adapter, kind = lora.adapter_of(model), family_of(model)
    assert adapter is not None
    rules, leaves = _rules(TABLES[kind]), named_leaves(adapters)
    slots = {slot.theirs: slot for slot in make_slots(rules, adapters)}
    modules = sorted({_module(rule) for rule in rules if rule.ours in leaves})
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": modules,
        "fan_in_fan_out": kind == "gpt2",  # its layers keep [in, out]
        "bias": "none",
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    shapes = {name: slot.shape for name, slot in slots.items()}
    make = lambda name: slots[name].to_theirs(leaves[slots[name].ours])  # noqa: E731
    write_file(folder / WEIGHTS, shapes, np.dtype(dtype), make)


def _rules(table: Table) -> list[Rule]:
    """A line for each matrix of an adapter, after those of the layers that can have one."""
    return [
        Rule(f"{_PREFIX}{rule.theirs.removesuffix('.weight')}.{theirs}.weight", f"{layer}/{ours}", transpose=True)
        for rule in table.rules
        if rule.ours.endswith("/kernel")
        for layer in [rule.ours.removesuffix("/kernel")]
        for theirs, ours in (("lora_A", lora.A), ("lora_B", lora.B))
    ]


def _module(rule: Rule) -> str:
    """The end of a layer's name that all of its copies share: ``attn.c_proj``, as ``c_proj`` has two meanings."""
    return rule.theirs.partition(f"{LAYER}.")[2].rpartition(".lora_")[0]


def _check_config(config: dict[str, Any], path: Path, adapter: lora.Adapter) -> None:
    for name, plain in _PLAIN.items():
        value = config.get(name)
        if value is not None and value not in plain:
            raise ValueError(f"{path}: {name} {value!r} is not supported; supported: {' or '.join(map(repr, plain))}")
    for key, ours, theirs in (("rank", adapter.rank, "r"), ("alpha", adapter.alpha, "lora_alpha")):
        if config.get(theirs) != ours:
            raise ValueError(
                f"{path}: {theirs} is {config.get(theirs)}, config.lora.{key} is {ours}; set it to the former"
            )
