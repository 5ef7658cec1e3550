"""Hugging Face folders as models, and the other way round. Safetensors and JSON only: no code of others is run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
import transformers

from dpo_jax import hub
from dpo_jax.convert.engine import check_names, make_slots, read_params, write_params
from dpo_jax.convert.gemma import GEMMA2, GEMMA3
from dpo_jax.convert.gpt2 import GPT2
from dpo_jax.convert.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from dpo_jax.convert.neox import NEOX
from dpo_jax.convert.table import Table
from dpo_jax.convert.tensors import Entry, read_entries, same_numbers
from dpo_jax.models import FAMILIES, make_model, param_shapes
from dpo_jax.types import Params, Targets, on_host

# A family's name here is its model_type there.
TABLES: dict[str, Table] = {
    "gpt2": GPT2,
    "gpt_neox": NEOX,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
}

CONFIG = "config.json"


@dataclass(frozen=True)
class Pretrained:
    """A model in a Hugging Face folder, not read yet.

    Attributes:
      folder: where it is.
      family: a name in FAMILIES.
      fields: what its config.json says, as fields of the family's config.
    """

    folder: Path
    family: str
    fields: Mapping[str, Any]

    def model(self, **settings: Any) -> nn.Module:
        """The module.

        Args:
          **settings: further fields of the family's config: dtype, param_dtype, output_dtype, unroll, remat.
        """
        return make_model(self.family, {**self.fields, **settings})

    def params(self, model: nn.Module, targets: Targets = on_host) -> Params:
        """Its weights in the model's ``param_dtype``, read tensor by tensor.

        Args:
          model: what ``model()`` has made.
          targets: says where the parameters are to lie, such as split over devices.

        Raises:
          OSError: files that are missing, damaged or cut short.
          ValueError: tensors that do not fit the config; both sides are listed.
        """
        table = TABLES[self.family]
        shapes = param_shapes(model)
        slots = make_slots(table.rules, shapes)
        entries = _with_prefix(read_entries(self.folder), table.prefix)
        if "head" not in shapes:
            entries = _without_head(entries, table, self.folder)
        check_names(slots, entries, table.ignored, self.folder)
        return read_params(slots, entries, targets(shapes))


def open_pretrained(name: str, revision: str | None = None, key: str = "the model") -> Pretrained:
    """Finds a model and reads its config.

    Args:
      name: a folder, also in a bucket, or the id of a model on the Hugging Face hub, such as ``org/model``.
      revision: branch, tag or commit on the hub.
      key: of the config, which holds the name; for messages.

    Raises:
      OSError: no such folder or model, a damaged config.json.
      ValueError: an architecture, an activation or a RoPE type that is not supported.
    """
    folder = hub.find(name, key, hub.MODEL, revision)
    path = folder / CONFIG
    raw = read_json(path)
    kind = raw.get("model_type")
    if kind not in TABLES:
        raise ValueError(f"{path}: model_type {kind!r} is not supported; supported: {', '.join(TABLES)}")
    others = [a for a in raw.get("architectures") or [] if a != TABLES[kind].architecture]
    if others:
        raise ValueError(f"{path}: architecture {others[0]} is not supported; supported: {TABLES[kind].architecture}")
    if "quantization_config" in raw:
        raise ValueError(f"{path}: quantized weights are not supported; use the unquantized model")
    try:
        hf = transformers.CONFIG_MAPPING[kind].from_dict(raw)
        return Pretrained(folder, kind, TABLES[kind].read(hf))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error


def save_pretrained(
    folder: Path,
    model: nn.Module,
    params: Params,
    *,
    dtype: Any = np.float32,
    shard_bytes: int = 5_000_000_000,
    token_ids: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json, generation_config.json and the weights as safetensors.

    Args:
      folder: an existing folder.
      model: a family's module.
      params: its parameters.
      dtype: of the files.
      shard_bytes: largest file, bytes; more weights than that are sharded and indexed.
      token_ids: bos_token_id, eos_token_id and pad_token_id of the tokenizer.

    Raises:
      ValueError: a model without a Hugging Face form.
    """
    kind = family_of(model)
    table, config = TABLES[kind], model.config
    slots = make_slots(table.rules, params)
    ids = dict(token_ids or {})
    fields = table.write(config) | dict(architectures=[table.architecture], dtype=np.dtype(dtype).name) | ids
    transformers.CONFIG_MAPPING[kind](**fields).save_pretrained(folder)
    transformers.GenerationConfig(**ids).save_pretrained(folder)
    write_params(folder, slots, params, dtype, shard_bytes)


def family_of(model: nn.Module) -> str:
    """The name of a module's family.

    Raises:
      ValueError: none of them.
    """
    for family, (module, _) in FAMILIES.items():
        if type(model) is module:
            return family
    raise ValueError(f"{type(model).__name__} is no model family; known: {', '.join(FAMILIES)}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises OSError where there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected a folder that save_pretrained wrote")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{path} is damaged: {error}; fetch it again") from error
    if not isinstance(raw, dict):
        raise OSError(f"{path} is damaged: it holds no JSON object; fetch it again")
    return raw


def _with_prefix(entries: Mapping[str, Entry], prefix: str) -> dict[str, Entry]:
    """Gives the names of a bare body, saved without its head, the prefix they have in the whole model."""
    if any(name.startswith(prefix) for name in entries):
        return dict(entries)
    return {f"{prefix}{name}": entry for name, entry in entries.items()}


def _without_head(entries: Mapping[str, Entry], table: Table, folder: Path) -> dict[str, Entry]:
    """Leaves out the head of a model whose embedding is its head: some files have it twice.

    Raises:
      ValueError: the two are not the same. transformers does not tie them then, whatever config.json says.
    """
    names = {rule.ours: rule.theirs for rule in table.rules}
    head, embedding = names["head"], names["token_embedding"]
    if head in entries and embedding in entries and not same_numbers(entries[head], entries[embedding]):
        raise ValueError(
            f"{entries[head].path}: tensor {head} is not the embedding ({embedding}), and by {folder / CONFIG} the two "
            "are one: set tie_word_embeddings to false there for a model with a head of its own, or remove the tensor"
        )
    return {name: entry for name, entry in entries.items() if name != head}
