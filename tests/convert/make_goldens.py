"""Writes goldens.json: what transformers and torch compute for the models in cases.py.

Not a test; needs torch 2.13 and transformers 5.23, which the project itself does without:

    python -m tests.convert.make_goldens tests/convert/goldens.json [FIRST_SEED]

With ``check`` it loads folders that this project has exported, one a case, and fails unless they give the same numbers:

    python -m tests.convert.make_goldens check GOLDENS.json FOLDER
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.convert import cases

LEAST_GAP = 2e-3  # between the two likeliest tokens of a greedy step; less would make it a toss-up


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "check":
        _check(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    path, first = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    goldens = {}
    for name in cases.CASES:
        goldens[name] = _golden(name, first)
        print(name, "seed", goldens[name]["seed"])
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    path.write_text(_dump({"versions": versions, "cases": goldens}), encoding="utf-8")


def _check(goldens: Path, folder: Path) -> None:
    for name, golden in json.loads(goldens.read_text(encoding="utf-8"))["cases"].items():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder / name, dtype=torch.float32, attn_implementation="eager"
        )
        found = _measure(model.eval(), golden["seed"])
        for key in ("logits_right", "logits_left", "logps_right", "logps_left", "generated"):
            # The same program on the same weights; the goldens are rounded.
            np.testing.assert_allclose(found[key], golden[key], rtol=0, atol=1e-5, err_msg=f"{name} {key}")
        print(f"{name}: transformers reads our export and computes the same")


def _golden(name: str, first: int) -> dict:
    for seed in range(first, first + 100):
        golden = _measure(load(name, seed), seed)
        if golden.pop("gap") >= LEAST_GAP:
            return golden
    raise SystemExit(f"{name}: no seed without a toss-up")


def load(name: str, seed: int) -> transformers.PreTrainedModel:
    """A model from a folder whose files have the names and shapes that transformers itself gives them."""
    config = cases.config_of(name)
    kind = config["model_type"]
    with tempfile.TemporaryDirectory() as folder:
        fresh = transformers.CONFIG_MAPPING[kind].from_dict(config)
        transformers.AutoModelForCausalLM.from_config(fresh).save_pretrained(folder)
        file = Path(folder) / "model.safetensors"
        tensors = {n: cases.weight(n, tuple(t.shape), seed, kind) for n, t in load_file(file).items()}
        save_file({n: torch.from_numpy(t) for n, t in tensors.items()}, file, metadata={"format": "pt"})
        (Path(folder) / "config.json").write_text(json.dumps(config))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
    return model.eval()


@torch.no_grad()
def _measure(model: transformers.PreTrainedModel, seed: int) -> dict:
    rows, prompts = cases.texts(seed)
    golden: dict = {"seed": seed}
    for side in ("right", "left"):
        tokens, real = (torch.from_numpy(a).long() for a in cases.padded(rows, side))
        position = (real.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=tokens, attention_mask=real, position_ids=position).logits
        logp = logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
        counted = real[:, 1:] * real[:, :-1]
        golden[f"logps_{side}"] = (logp.double() * counted).sum(1).tolist()
        shown = [logits[r, real[r].bool()][-cases.SHOWN_POSITIONS :, cases.SHOWN_VOCAB] for r in range(len(rows))]
        golden[f"logits_{side}"] = [row.tolist() for row in shown]
    return golden | _continue(model, prompts)


def _continue(model: transformers.PreTrainedModel, prompts: list[np.ndarray]) -> dict:
    tokens, real = (torch.from_numpy(a).long() for a in cases.padded(prompts, "left"))
    out = model.generate(
        tokens,
        attention_mask=real,
        do_sample=False,
        max_new_tokens=cases.NEW_TOKENS,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    likeliest = torch.stack(out.scores).topk(2, dim=-1).values
    return {
        "generated": out.sequences[:, tokens.shape[1] :].tolist(),
        "gap": float((likeliest[..., 0] - likeliest[..., 1]).min()),
    }


def _dump(goldens: dict) -> str:
    """JSON with one line for each entry of a case, and numbers to the six digits that the comparison needs."""
    lines = []
    for name, golden in goldens["cases"].items():
        entries = (f'   "{key}": {json.dumps(_round(value))}' for key, value in golden.items())
        lines.append(f'  "{name}": {{\n' + ",\n".join(entries) + "\n  }")
    return f'{{\n "versions": {json.dumps(goldens["versions"])},\n "cases": {{\n' + ",\n".join(lines) + "\n }\n}\n"


def _round(value: object) -> object:
    if isinstance(value, list):
        return [_round(item) for item in value]
    return round(value, 5) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
