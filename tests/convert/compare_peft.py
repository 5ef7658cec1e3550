"""Compares our adapters with goldens that PEFT made a moment ago, and exports every case for PEFT to read back.

python -m tests.convert.compare_peft GOLDENS.json FOLDER
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from dpo_jax import lora
from dpo_jax.convert import peft
from dpo_jax.convert.tensors import write_file
from dpo_jax.models.layers import project
from dpo_jax.types import Params
from tests.convert import cases, ours, peft_cases


def main() -> None:
    goldens, folder = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["cases"], Path(sys.argv[2])
    for name, golden in goldens.items():
        with tempfile.TemporaryDirectory() as there:
            model, base = base_of(Path(there), name, golden["seed"])
            write_golden(Path(there), golden)
            adapters = peft.read_adapters(Path(there), model)
        off = np.abs(np.array(golden["logits"]) - logits(model, lora.join(base, adapters), golden["seed"])).max()
        out = folder / name
        out.mkdir(parents=True)
        peft.write_adapters(out, model, adapters, None)
        print(f"{name}: logits within {off:.1e} of PEFT's")
        assert off < 1e-4


def base_of(folder: Path, name: str, seed: int) -> tuple[nn.Module, Params]:
    """The model of a case with its adapters, and the parameters that they stand on."""
    pretrained = ours.write_folder(folder, name, seed)
    plain = pretrained.model()
    adapter = lora.Adapter(peft_cases.CASES[name].layers, peft_cases.RANK, peft_cases.ALPHA)
    return lora.with_adapter(plain, adapter), pretrained.params(plain)


def write_golden(folder: Path, golden: dict[str, Any], **changes: Any) -> None:
    """The folder that PEFT wrote, with the values of cases.py and other settings where ``changes`` has them."""
    (folder / peft.CONFIG).write_text(json.dumps(golden["config"] | changes), encoding="utf-8")
    shapes = {name: tuple(shape) for name, shape in golden["shapes"].items()}
    make = lambda name: cases.weight(name, shapes[name], golden["seed"], "")  # noqa: E731
    write_file(folder / peft.WEIGHTS, shapes, np.dtype(np.float32), make)


def logits(model: nn.Module, params: Params, seed: int) -> np.ndarray:
    """Of the last positions of the first row, [SHOWN_POSITIONS, shown tokens]."""
    tokens = cases.texts(seed)[0][0][None]
    position = np.arange(tokens.shape[1], dtype=np.int32)[None]
    mask = np.tril(np.ones((1, tokens.shape[1], tokens.shape[1]), bool))

    def apply(params: Params) -> jax.Array:
        hidden = model.apply({"params": params}, tokens, position, mask)
        return project(hidden, model.apply({"params": params}, method="head"), model.logit_cap)

    return np.asarray(jax.jit(apply)(params))[0, -cases.SHOWN_POSITIONS :, cases.SHOWN_VOCAB]


if __name__ == "__main__":
    main()
