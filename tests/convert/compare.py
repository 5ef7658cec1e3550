"""Compares this project with goldens made a moment ago, and exports every case for transformers to read back.

python -m tests.convert.compare GOLDENS.json FOLDER
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from dpo_jax.convert.pretrained import save_pretrained
from tests.convert import ours


def main() -> None:
    goldens, folder = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["cases"], Path(sys.argv[2])
    for name, golden in goldens.items():
        with tempfile.TemporaryDirectory() as there:
            pretrained = ours.write_folder(Path(there), name, golden["seed"])
            measured = ours.measure(pretrained, golden["seed"])
            ours.check(measured, golden)
            out = folder / name
            out.mkdir(parents=True)
            model = pretrained.model()
            save_pretrained(out, model, pretrained.params(model))
        off = max(np.abs(measured[f"logits_{s}"] - np.array(golden[f"logits_{s}"])).max() for s in ("left", "right"))
        print(f"{name}: logits within {off:.1e}, continuations the same")


if __name__ == "__main__":
    main()
