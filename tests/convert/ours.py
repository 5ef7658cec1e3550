"""What this project computes for the models in cases.py, in the form of goldens.json."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.convert.engine import make_slots
from dpo_jax.convert.pretrained import TABLES, Pretrained, open_pretrained
from dpo_jax.convert.tensors import write_tensors
from dpo_jax.logprobs import token_scores
from dpo_jax.models import init_params
from dpo_jax.models.layers import project
from dpo_jax.sampling import make_sampler, row_draws
from tests.convert import cases

NO_EOS = -1


def write_folder(folder: Path, name: str, seed: int, dtype=np.float32, shard_bytes: int = 10**9) -> Pretrained:
    """Writes a case as a Hugging Face folder, under the names of our tables."""
    config = cases.config_of(name)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    pretrained = open_pretrained(str(folder))
    shapes = jax.eval_shape(lambda: init_params(pretrained.model(), jax.random.key(0)))
    slots = {slot.theirs: slot.shape for slot in make_slots(TABLES[pretrained.family].rules, shapes)}
    make = lambda n: cases.weight(n, slots[n], seed, config["model_type"])  # noqa: E731
    write_tensors(folder, slots, dtype, make, shard_bytes)
    return pretrained


def measure(pretrained: Pretrained, seed: int) -> dict:
    """Logits, log-probabilities and greedy continuations of a model that lies in a folder."""
    model = pretrained.model()
    params = pretrained.params(model)
    rows, prompts = cases.texts(seed)
    score = jax.jit(lambda *args: _score(model, *args))
    measured: dict = {}
    for side in ("right", "left"):
        tokens, real = cases.padded(rows, side)
        logits, logps = score(params, tokens, real)
        shown = [np.asarray(logits)[r, real[r] > 0][-cases.SHOWN_POSITIONS :] for r in range(len(rows))]
        measured[f"logits_{side}"] = np.stack(shown)[..., cases.SHOWN_VOCAB]
        measured[f"logps_{side}"] = np.asarray(logps)
    tokens, real = cases.padded(prompts, "right")
    sample = jax.jit(make_sampler(model, max_new_tokens=cases.NEW_TOKENS, eos=NO_EOS))
    greedy = np.zeros(len(prompts), np.float32)
    out = sample(params, tokens, real.sum(1).astype(np.int32), row_draws(0, np.arange(len(prompts))), greedy)
    return measured | {"generated": np.asarray(out.tokens_RT)}


def _score(model, params, tokens, real):
    variables = {"params": params}
    position = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    length = tokens.shape[1]
    mask = jnp.tril(jnp.ones((1, length, length), bool)) & (real > 0)[:, None, :]
    hidden = model.apply(variables, tokens, position, mask)
    head = model.apply(variables, method="head")
    logp = token_scores(hidden[:, :-1], head, tokens[:, 1:], 16, model.logit_cap).logp
    counted = real[:, 1:] * real[:, :-1]
    return project(hidden, head, model.logit_cap), jnp.sum(logp * counted, axis=1)


def check(ours: dict, golden: dict) -> None:
    """Raises AssertionError unless the numbers agree: logits to 2e-4, log-probabilities to 1e-3 nats, every token."""
    for side in ("right", "left"):
        np.testing.assert_allclose(ours[f"logits_{side}"], golden[f"logits_{side}"], rtol=0, atol=2e-4, err_msg=side)
        np.testing.assert_allclose(ours[f"logps_{side}"], golden[f"logps_{side}"], rtol=0, atol=1e-3, err_msg=side)
    np.testing.assert_array_equal(ours["generated"], golden["generated"])
