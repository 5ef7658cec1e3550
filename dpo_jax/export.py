"""Writes the policy of a run as a Hugging Face folder: weights, configs, tokenizer and a model card.

python -m dpo_jax.export --workdir=runs/imdb/dpo --out=runs/imdb/dpo-hf
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from dpo_jax.checkpoint import load_params
from dpo_jax.config import Config, from_dict, to_json
from dpo_jax.convert.pretrained import save_pretrained
from dpo_jax.data.folders import replaced_folder
from dpo_jax.data.tokenizer import open_tokenizer
from dpo_jax.models import init_params
from dpo_jax.sources import tokenizer_folder
from dpo_jax.start import make_start_model

DTYPES = ("float32", "bfloat16", "float16")


def export(workdir: Path, out: Path, *, dtype: str = "float32", shard_bytes: int = 5_000_000_000) -> None:
    """Exports the newest policy of a run.

    Args:
      workdir: the run's folder.
      out: the new folder; an older one there is replaced once all is written.
      dtype: of the weights' files, a name in DTYPES.
      shard_bytes: largest file, bytes.

    Raises:
      OSError: no run, no tokenizer, or no room.
      ValueError: an unknown dtype, or no checkpoint.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype is {dtype!r}; known: {', '.join(DTYPES)}")
    config = read_config(workdir)
    tokenizer = open_tokenizer(tokenizer_folder(config.data))
    model = make_start_model(config, len(tokenizer))
    params = load_params(workdir, jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with replaced_folder(out, "the exported model") as folder:
        save_pretrained(folder, model, params, dtype=jnp.dtype(dtype), shard_bytes=shard_bytes, token_ids=ids)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(config, _summary(workdir)), encoding="utf-8")
    logging.info("wrote %s", out)


def read_config(workdir: Path) -> Config:
    """The config of a run.

    Raises:
      OSError: the folder holds no run.
      ValueError: a config that this version does not understand.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} is no workdir of a run: it has no config.json")
    return from_dict(json.loads(path.read_text(encoding="utf-8")))


def model_card(config: Config, results: dict[str, Any]) -> str:
    """What the model is, in Markdown: data, loss, results and the whole config."""
    numbers = "\n".join(f"| {name} | {value:.6g} |" for name, value in results.items())
    table = f"| metric | value |\n|---|---|\n{numbers}\n" if results else "The run has not been finished.\n"
    base = config.init.hf or config.init.run or f"random parameters (seed {config.seed})"
    source = config.data.source if config.data.path is None else f"{config.data.source}: {config.data.path}"
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [dpo_jax]\n---\n"
        f"# Trained with the loss {config.loss.name}\n\n"
        f"Started from {base}; data: {source}. Trained with dpo_jax.\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".")\ntokenizer = AutoTokenizer.from_pretrained(".")\n```\n\n'
        f"## Results\n\n{table}\n## Config\n\n```json\n{to_json(config)}```\n"
    )


def _summary(workdir: Path) -> dict[str, Any]:
    path = workdir / "summary.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


if __name__ == "__main__":
    from absl import app, flags

    from dpo_jax.main import user_errors

    flags.DEFINE_string("workdir", None, "folder of the run", required=True)
    flags.DEFINE_string("out", None, "the Hugging Face folder to write", required=True)
    flags.DEFINE_enum("dtype", "float32", DTYPES, "of the weights")
    flags.DEFINE_float("shard_gb", 5.0, "largest file of weights, gigabytes")

    def _main(_: list[str]) -> None:
        f = flags.FLAGS
        with user_errors():
            export(Path(f.workdir), Path(f.out), dtype=f.dtype, shard_bytes=int(f.shard_gb * 1e9))

    app.run(_main)
