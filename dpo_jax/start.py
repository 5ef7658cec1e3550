"""What a run starts from: a model of the config's own sizes or of a Hugging Face folder, and its first parameters."""

from __future__ import annotations

import math
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.checkpoint import load_params
from dpo_jax.config import Config
from dpo_jax.convert.pretrained import open_pretrained
from dpo_jax.models import init_params, make_model
from dpo_jax.types import Params


def make_start_model(config: Config, vocab_size: int) -> nn.Module:
    """The module of a run; ``init.hf`` gives its family and sizes where it is set, else ``model`` does.

    Args:
      config: the experiment.
      vocab_size: V of the tokenizer.

    Raises:
      OSError: ``init.hf`` cannot be read.
      ValueError: sizes that do not fit; a model with fewer tokens or positions than the data has.
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
    pretrained = open_pretrained(config.init.hf)
    sizes = dict(pretrained.fields)
    longest = config.data.prompt_length + config.data.answer_length
    if vocab_size > sizes["vocab_size"] or longest > sizes["context_length"]:
        raise ValueError(
            f"config.init.hf {config.init.hf} has {sizes['vocab_size']} tokens, {sizes['context_length']} positions; "
            f"the tokenizer has {vocab_size} tokens and sequences have up to {longest} (config.data.prompt_length + "
            "config.data.answer_length): set config.data.tokenizer to the model's folder, or shorten the sequences"
        )
    return pretrained.model(**settings, unroll=math.gcd(m.unroll, sizes["layers"]))


def start_params(config: Config, model: nn.Module) -> Params:
    """The parameters that a run starts from: ``init.run``'s policy, else ``init.hf``'s weights, else fresh ones.

    Args:
      config: the experiment.
      model: of ``make_start_model``.

    Raises:
      OSError: files that are missing or damaged.
      ValueError: parameters of another model.
    """
    if config.init.run is not None:
        return load_params(Path(config.init.run), jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
    if config.init.hf is not None:
        return open_pretrained(config.init.hf).params(model)
    return init_params(model, jax.random.key(config.seed))
