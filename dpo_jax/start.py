"""What a run starts from: a model of the config's own sizes or of a Hugging Face folder, and its first parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import logging

from dpo_jax import buckets, lora
from dpo_jax.checkpoint import Saved, open_newest
from dpo_jax.config import Config
from dpo_jax.convert.peft import read_adapters
from dpo_jax.convert.pretrained import open_pretrained
from dpo_jax.hashing import hash_tree
from dpo_jax.models import init_params, make_model, param_shapes, rolled
from dpo_jax.parallel import run_compiled
from dpo_jax.trees import parameter_count, structure_diff
from dpo_jax.types import Params, Targets, on_host
from dpo_jax.workdir import read_config

_KEY = "config.init.hf"


def make_start_model(config: Config, vocab_size: int) -> nn.Module:
    """The module of a run, without adapters; ``init.hf`` gives its family and sizes where it is set, else ``model``.

    Args:
      config: the experiment.
      vocab_size: V of the tokenizer; a model of ``init.hf`` keeps its own.

    Raises:
      OSError: ``init.hf`` cannot be read.
      ValueError: sizes that do not fit; a model with fewer positions than the data has.
    """
    m = config.model
    settings = dict(
        dtype=jnp.dtype(m.dtype),
        param_dtype=jnp.dtype(m.param_dtype),
        output_dtype=None if m.output_dtype is None else jnp.dtype(m.output_dtype),
        remat=m.remat,
    )
    if config.init.hf is None:
        sizes = dict(context_length=m.context_length, width=m.width, layers=m.layers, heads=m.heads)
        rest = dict(vocab_size=vocab_size, mlp_width=m.mlp_width, unroll=m.unroll)
        return make_model(m.family, sizes | rest | settings)
    pretrained = open_pretrained(config.init.hf, key=_KEY)
    sizes = dict(pretrained.fields)
    longest = config.data.prompt_length + config.data.answer_length
    if longest > sizes["context_length"]:
        raise ValueError(
            f"config.init.hf {config.init.hf} has {sizes['context_length']} positions; sequences have up to {longest} "
            "(config.data.prompt_length + config.data.answer_length): shorten them"
        )
    return pretrained.model(**settings, unroll=m.unroll)


def check_tokenizer(tokenizer: Any, model: nn.Module) -> None:
    """Looks whether a model knows the tokens that all sequences have; how many of the others it lacks is logged.

    Some tokenizers have tokens that no text holds, as Gemma 3 has one for images, and their models no rows for them.

    Args:
      tokenizer: of the data.
      model: of ``make_start_model``.

    Raises:
      ValueError: BOS or EOS has no row in the model.
    """
    rows = model.config.vocab_size
    for name, token in (("BOS", tokenizer.bos_token_id), ("EOS", tokenizer.eos_token_id)):
        if token is not None and token >= rows:
            raise ValueError(
                f"the tokenizer's {name} token is {token}, and the model has rows for those below {rows}: set "
                "config.data.tokenizer to the model's own"
            )
    missing = sum(token >= rows for token in tokenizer.get_vocab().values())
    if missing:
        logging.info(
            "%d of the tokenizer's %d tokens have no row in the model, which has %d; no example may have them",
            missing,
            len(tokenizer),
            rows,
        )


def describe_start(config: Config, model: nn.Module) -> str:
    """What a run starts from, in words: ``from MODEL (config.init.hf), 124.44 M parameters``.

    Args:
      config: the experiment.
      model: of ``make_start_model``.
    """
    init, size = config.init, f"{parameter_count(param_shapes(model)) / 1e6:.2f} M parameters"
    if init.run is not None:
        return f"from the run {init.run} (config.init.run), {size}"
    if init.hf is not None:
        return f"from {init.hf} (config.init.hf), {size}"
    return f"from random parameters (seed {config.seed}), {size}"


def start_params(config: Config, model: nn.Module, targets: Targets = on_host) -> Params:
    """The parameters that a run starts from: ``init.run``'s policy, else ``init.hf``'s weights, else fresh ones.

    With adapters, these are the frozen base.

    Args:
      config: the experiment.
      model: of ``make_start_model``.
      targets: says where what is read from files is to lie.

    Raises:
      OSError: files that are missing or damaged.
      ValueError: parameters of another model.
    """
    if config.init.run is not None:
        return load_policy(buckets.fetched(config.init.run), model, targets)
    if config.init.hf is not None:
        return open_pretrained(config.init.hf, key=_KEY).params(model, targets)
    return run_compiled(lambda key: init_params(rolled(model), key), jax.random.key(config.seed))


def start_adapters(config: Config, model: nn.Module) -> Params:
    """The adapters that a run starts from: ``lora.init``'s, else fresh ones, which add nothing.

    Args:
      config: the experiment.
      model: with adapters.

    Raises:
      OSError: files that are missing or damaged.
      ValueError: adapters of another model, or of another rank, scale or layers than the config's.
    """
    if config.lora.init is None:
        return lora.fresh(_shapes(model)[1], config.seed)
    return read_adapters(buckets.fetched(config.lora.init), model)


def load_policy(workdir: Path, model: nn.Module, targets: Targets = on_host) -> Params:
    """The newest policy of a run, whole: adapters are merged into their base.

    Args:
      workdir: the run's folder.
      model: the module that is expected, without adapters.
      targets: says where the parameters are to lie; what is merged lies on the host.

    Raises:
      OSError: files that are missing or damaged.
      ValueError: no checkpoint, another model, or a base that is no longer what the run began with.
    """
    saved, (shapes, _) = open_newest(workdir), _shapes(model)
    if not any(map(lora.is_adapter, saved.names())):
        return saved.params(targets(shapes))
    merged = _merged(workdir, saved, model.config.vocab_size)
    wrong = structure_diff(merged, shapes)
    if wrong:
        raise ValueError(f"the policy of {workdir} is of another model:\n  " + "\n  ".join(wrong[:20]))
    return merged


def load_adapters(workdir: Path, model: nn.Module) -> tuple[nn.Module, Params]:
    """The newest adapters of a run, and the module that reads them.

    Args:
      workdir: the run's folder.
      model: its module, without adapters.

    Raises:
      OSError: files that are missing or damaged.
      ValueError: no checkpoint, or a run without adapters.
    """
    adapter = read_config(workdir).lora.adapter()
    if adapter is None:
        raise ValueError(f"{workdir} is a run without adapters (its config.lora.rank is not set): export it whole")
    model = lora.with_adapter(model, adapter)
    return model, open_newest(workdir).params(_shapes(model)[1])


def difference_from_start(saved: Saved, params: Params) -> str | None:
    """Both hashes, where parameters are not those that the run of a checkpoint began with; None where they are."""
    found, expected = hash_tree(params), saved.meta["start"]
    return None if found == expected else f"hash {found}, expected {expected}"


def _merged(workdir: Path, saved: Saved, vocab_size: int) -> Params:
    config = read_config(workdir)
    model = make_start_model(config, vocab_size)
    base = start_params(config, model)
    if difference := difference_from_start(saved, base):
        raise ValueError(
            f"{config.init.run or config.init.hf} (the base of {workdir}) holds other parameters than when adapters "
            f"were trained on it ({difference}); bring them back"
        )
    adapted, adapters = load_adapters(workdir, model)
    return lora.merge(base, adapters, adapted.config.adapter.scale)


def _shapes(model: nn.Module) -> tuple[Params, Params]:
    """Shapes of (base, adapters); nothing is computed."""
    return lora.split(param_shapes(model))
