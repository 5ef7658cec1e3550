"""Writes the policy of a run as a Hugging Face folder: weights, configs, tokenizer and a model card.

    python -m dpo_jax.export --workdir=runs/imdb/dpo --out=runs/imdb/dpo-hf

Adapters are merged into the weights; with --adapter they alone are written, as a folder of PEFT. Where they were
trained on the policy of a run, that is exported first, and given as their base:

    python -m dpo_jax.export --workdir=runs/sft --out=runs/sft-hf
    python -m dpo_jax.export --workdir=runs/dpo --out=runs/dpo-adapter --adapter --base=runs/sft-hf
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from absl import logging

from dpo_jax import buckets
from dpo_jax.checkpoint import open_newest
from dpo_jax.config import Config, to_json
from dpo_jax.convert.peft import write_adapters
from dpo_jax.convert.pretrained import open_pretrained, save_pretrained
from dpo_jax.data.folders import replaced_folder
from dpo_jax.data.tokenizer import open_tokenizer
from dpo_jax.sources import tokenizer_folder
from dpo_jax.start import difference_from_start, load_adapters, load_policy, make_start_model
from dpo_jax.workdir import read_config

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
    _check_dtype(dtype)
    config = read_config(workdir)
    tokenizer = open_tokenizer(tokenizer_folder(config.data))
    model = make_start_model(config, len(tokenizer))
    params = load_policy(workdir, model)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # transformers refuses a padding token that the embedding has no row for.
    ids = {name: token if token is None or token < model.config.vocab_size else None for name, token in ids.items()}
    with replaced_folder(out, "the exported model") as folder:
        save_pretrained(folder, model, params, dtype=jnp.dtype(dtype), shard_bytes=shard_bytes, token_ids=ids)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(config, _summary(workdir)), encoding="utf-8")
    logging.info("wrote %s", out)


def export_adapter(workdir: Path, out: Path, *, dtype: str = "float32", base: str | None = None) -> None:
    """Exports the newest adapters of a run, as PEFT does.

    Args:
      workdir: the run's folder.
      out: the new folder; an older one there is replaced once all is written.
      dtype: of the adapters' file, a name in DTYPES.
      base: folder or hub id of the model that they stand on; None is ``init.hf``, where the run began with that.

    Raises:
      OSError: no run, no tokenizer, no such base, or no room.
      ValueError: an unknown dtype, no checkpoint, a run without adapters, or another base than they were trained on.
    """
    _check_dtype(dtype)
    config = read_config(workdir)
    tokenizer = open_tokenizer(tokenizer_folder(config.data))
    plain = make_start_model(config, len(tokenizer))
    model, adapters = load_adapters(workdir, plain)
    base = _base(config, workdir) if base is None else _checked_base(base, workdir, plain)
    with replaced_folder(out, "the exported adapters") as folder:
        write_adapters(folder, model, adapters, base, jnp.dtype(dtype))
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(config, _summary(workdir), adapter=True), encoding="utf-8")
    logging.info("wrote %s", out)


def _base(config: Config, workdir: Path) -> str | None:
    if config.init.run is None:
        return config.init.hf
    raise ValueError(
        f"the adapters of {workdir} stand on the policy of {config.init.run} (config.init.run), a workdir, which PEFT "
        f"cannot read: write it by python -m dpo_jax.export --workdir={config.init.run} --out=FOLDER, and give "
        "--base=FOLDER"
    )


def _checked_base(base: str, workdir: Path, model: nn.Module) -> str:
    params = open_pretrained(base, key="--base").params(model)
    if difference := difference_from_start(open_newest(workdir), params):
        raise ValueError(
            f"--base={base} is not what the adapters of {workdir} were trained on ({difference}): give the model that "
            "the run started from, exported in float32 or in the dtype of its parameters"
        )
    return base


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"--dtype is {dtype!r}; known: {', '.join(DTYPES)}")


def model_card(config: Config, results: dict[str, Any], adapter: bool = False) -> str:
    """What the model (or an adapter of it) is, in Markdown: data, loss, results and the whole config."""
    numbers = "\n".join(f"| {name} | {value:.6g} |" for name, value in results.items())
    table = f"| metric | value |\n|---|---|\n{numbers}\n" if results else "The run has not been finished.\n"
    base = config.init.run or config.init.hf or f"random parameters (seed {config.seed})"
    source = config.data.source if config.data.path is None else f"{config.data.source}: {config.data.path}"
    library, loader = ("peft", "AutoPeftModelForCausalLM") if adapter else ("transformers", "AutoModelForCausalLM")
    return (
        f"---\nlibrary_name: {library}\npipeline_tag: text-generation\ntags: [dpo_jax]\n---\n"
        f"# Trained with the loss {config.loss.name}\n\n"
        f"Started from {base}; data: {source}. Trained with dpo_jax.\n\n"
        f"```python\nfrom {library} import {loader}\nfrom transformers import AutoTokenizer\n\n"
        f'model = {loader}.from_pretrained(".")\ntokenizer = AutoTokenizer.from_pretrained(".")\n```\n\n'
        f"## Results\n\n{table}\n## Config\n\n```json\n{to_json(config)}```\n"
    )


def _summary(workdir: Path) -> dict[str, Any]:
    path = workdir / "summary.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


if __name__ == "__main__":
    from absl import app, flags

    from dpo_jax.main import command, parse_flags

    flags.DEFINE_string("workdir", None, "folder of the run", required=True)
    flags.DEFINE_string("out", None, "the Hugging Face folder to write", required=True)
    flags.DEFINE_enum("dtype", "float32", DTYPES, "of the weights")
    flags.DEFINE_float("shard_gb", 5.0, "largest file of a model's weights, gigabytes")
    flags.DEFINE_bool("adapter", False, "write the adapters alone, as a folder of PEFT")
    flags.DEFINE_string("base", None, "with --adapter: the exported model that they were trained on; else init.hf")

    def _main(_: list[str]) -> None:
        f = flags.FLAGS
        with command():
            if f.base and not f.adapter:
                raise ValueError("--base is the model under adapters that are written alone: give --adapter too")
            workdir, out = buckets.fetched(f.workdir), buckets.local(f.out, "--out")
            if f.adapter:
                export_adapter(workdir, out, dtype=f.dtype, base=f.base)
                return
            export(workdir, out, dtype=f.dtype, shard_bytes=int(f.shard_gb * 1e9))

    app.run(_main, flags_parser=parse_flags)
