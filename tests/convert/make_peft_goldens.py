"""Writes peft_goldens.json: what PEFT, transformers and torch compute for the adapters in peft_cases.py.

Not a test; needs torch 2.13, transformers 5.23 and peft 0.21, which the project itself does without:

    python -m tests.convert.make_peft_goldens tests/convert/peft_goldens.json [SEED]

With ``check`` it puts adapters that this project has exported in front of their models, and fails unless they give the
same numbers:

    python -m tests.convert.make_peft_goldens check GOLDENS.json FOLDER
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
from safetensors.torch import load_file, save_file

from tests.convert import cases, make_goldens, peft_cases


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "check":
        _check(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    goldens = {name: _golden(name, seed) for name in peft_cases.CASES}
    lines = (f'"{name}": {{\n' + ",\n".join(_line(*item) for item in g.items()) + "}" for name, g in goldens.items())
    Path(sys.argv[1]).write_text('{"cases": {\n' + ",\n".join(lines) + "}}\n", encoding="utf-8")


def _line(key: str, value: object) -> str:
    return f'"{key}": {json.dumps(value)}'


def _golden(name: str, seed: int) -> dict:
    """The folder that PEFT writes, its tensors as shapes, and the numbers once they have the values of cases.py."""
    settings = peft.LoraConfig(
        r=peft_cases.RANK,
        lora_alpha=peft_cases.ALPHA,
        target_modules=list(peft_cases.CASES[name].modules),
        fan_in_fan_out=name == "gpt2",
        task_type="CAUSAL_LM",
    )
    with tempfile.TemporaryDirectory() as folder:
        peft.get_peft_model(make_goldens.load(name, seed), settings).save_pretrained(folder)
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        file = Path(folder) / "adapter_model.safetensors"
        shapes = {n: list(t.shape) for n, t in load_file(file).items()}
        tensors = {n: torch.from_numpy(cases.weight(n, tuple(shape), seed, "")) for n, shape in shapes.items()}
        save_file(tensors, file, metadata={"format": "pt"})
        logits = _logits(name, seed, folder)
    config |= {"target_modules": sorted(config["target_modules"]), "base_model_name_or_path": None}
    return {"seed": seed, "config": config, "shapes": shapes, "logits": np.round(logits, 6).tolist()}


def _check(goldens: Path, folder: Path) -> None:
    for name, golden in json.loads(goldens.read_text(encoding="utf-8"))["cases"].items():
        found = _logits(name, golden["seed"], folder / name)
        np.testing.assert_allclose(found, golden["logits"], rtol=0, atol=1e-5, err_msg=name)
        print(f"{name}: PEFT reads our adapters and computes the same")


@torch.no_grad()
def _logits(name: str, seed: int, folder: str | Path) -> np.ndarray:
    """Of the last positions of the first row, [SHOWN_POSITIONS, shown tokens]."""
    model = peft.PeftModel.from_pretrained(make_goldens.load(name, seed), folder).eval()
    tokens = torch.from_numpy(cases.texts(seed)[0][0]).long()[None]
    return model(input_ids=tokens).logits[0, -cases.SHOWN_POSITIONS :, cases.SHOWN_VOCAB].numpy()


if __name__ == "__main__":
    main()
