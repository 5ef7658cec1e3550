"""Sampling with a key/value cache: the prompts, several in a row, then a token at a time until every row has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dpo_jax.models import unrolled
from dpo_jax.models.layers import Cache, project
from dpo_jax.prefill import prefill
from dpo_jax.types import Array, Params

_ALIGNED = 16  # slots of the cache come in as many: products read rows of fp32 from where lines of 64 bytes begin


@struct.dataclass
class Samples:
    """Completions of R prompts.

    Attributes:
      tokens_RT: int32, sampled tokens, EOS included; 0 after the end.
      logp_RT: float32, log-probability of each under the untempered model, nats; 0 after the end.
      length_R: int32, sampled tokens, EOS included.
      ended_R: bool, whether the EOS came before the room ran out.
    """

    tokens_RT: Array
    logp_RT: Array
    length_R: Array
    ended_R: Array


def make_sampler(
    model: nn.Module,
    *,
    max_new_tokens: int,
    eos: int | Sequence[int],
    top_k: int | None = None,
    top_p: float | None = None,
    lanes: int = 1,
) -> Callable[[Params, Array, Array, Array, Array], Samples]:
    """Builds the pure function (params, prompt_RP, length_R, draws_R2, temperature_R) → Samples.

    Prompts are padded on the right to P tokens; T = ``max_new_tokens``; a temperature of 0 takes the likeliest token.
    The random numbers of a row depend on its own ``row_draws`` and on the place of the token alone, so a row's
    completion does not depend on the rows beside it, but for the rounding of sums. The cache has the model's compute
    dtype: samples come from the same function that scores them. While it works, the layers' parameters lie there twice.

    Args:
      model: a family's module.
      max_new_tokens: T, tokens of room for an answer, its EOS included.
      eos: the token, or the tokens any of which, ends an answer.
      top_k: draws among this many of the likeliest tokens only; None is all.
      top_p: draws among the fewest likeliest tokens whose probabilities add up to this; None is all.
      lanes: rows of prompts that are read at a time: as many as one program's rows are split over.

    Raises:
      ValueError: ``top_k`` below 1, or ``top_p`` outside (0, 1].
    """
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"top_k is {top_k} and top_p {top_p}; expected at least 1, and more than 0 up to 1")
    stepped = unrolled(model)
    ends = np.atleast_1d(np.asarray(eos, np.int32))

    def sample(params: Params, prompt_RP: Array, length_R: Array, draws_R2: Array, temperature_R: Array) -> Samples:
        rows, prompt_slots = prompt_RP.shape
        room = max_new_tokens + -(prompt_slots + max_new_tokens) % _ALIGNED
        key_R = jax.vmap(lambda draws: jax.random.fold_in(jax.random.key(draws[0]), draws[1]))(draws_R2)
        variables = {"params": params}
        # Copies, made once: a part of an array is a copy on CPUs, which each token would make anew.
        layers = [jax.tree.map(lambda a, n=n: a[n], params["blocks"]) for n in range(model.config.layers)]
        head_VD = model.apply(variables, method="head")
        seen_RP = jnp.arange(prompt_slots)[None] < length_R[:, None]

        def draw(hidden_RD: Array, t: Array) -> tuple[Array, Array]:
            logits_RV = project(hidden_RD, head_VD, model.logit_cap)
            uniform_R = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, t)))(key_R)
            warmth_R = jnp.where(temperature_R > 0, temperature_R, 1.0)
            drawn_R = draw_token(keep_likeliest(logits_RV / warmth_R[:, None], top_k, top_p), uniform_R)
            token_R = jnp.where(temperature_R > 0, drawn_R, likeliest_token(logits_RV))
            taken_R = jnp.take_along_axis(logits_RV, token_R[:, None], axis=1)[:, 0]
            return token_R, taken_R - jax.nn.logsumexp(logits_RV, axis=1)

        def read(token_R: Array, t: Array, cache: Cache) -> tuple[Array, Cache]:
            slot = jnp.arange(prompt_slots + room)[None]
            sampled_1T = (slot >= prompt_slots) & (slot <= prompt_slots + t)
            mask_RT = jnp.pad(seen_RP, ((0, 0), (0, room))) | sampled_1T
            stacked = params | {"blocks": jax.tree.map(lambda *parts: jnp.stack(parts), *layers)}
            position_R1, start = (length_R + t)[:, None], prompt_slots + t
            hidden_RQD, cache = stepped.apply(
                {"params": stacked}, token_R[:, None], position_R1, mask_RT[:, None], cache, start
            )
            return hidden_RQD[:, 0], cache

        def body(carry: tuple) -> tuple:
            t, hidden_RD, cache, out = carry
            token_R, logp_R = draw(hidden_RD, t)
            live_R = ~out.ended_R
            out = Samples(
                tokens_RT=out.tokens_RT.at[:, t].set(jnp.where(live_R, token_R, 0)),
                logp_RT=out.logp_RT.at[:, t].set(jnp.where(live_R, logp_R, 0.0)),
                length_R=out.length_R + live_R,
                ended_R=out.ended_R | jnp.any(token_R[:, None] == ends[None], axis=1),
            )
            return t + 1, *read(token_R, t, cache), out

        def unfinished(carry: tuple) -> Array:
            t, _, _, out = carry
            return (t < max_new_tokens) & ~jnp.all(out.ended_R)

        last_RD, cache = prefill(model, variables, prompt_RP, length_R, room=room, lanes=lanes)
        empty = jnp.zeros((rows, max_new_tokens), jnp.int32)
        out = Samples(empty, empty.astype(jnp.float32), jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool))
        return jax.lax.while_loop(unfinished, body, (jnp.int32(0), last_RD, cache, out))[3]

    return sample


def row_draws(seed: int, rows: np.ndarray) -> np.ndarray:
    """What decides the random numbers of each row, uint32 [R, 2]: the seed, and the number of the row."""
    return np.stack(np.broadcast_arrays(seed, rows), axis=1).astype(np.uint32)


def keep_likeliest(logits_RV: Array, top_k: int | None, top_p: float | None) -> Array:
    """Logits with −∞ outside of the ``top_k`` likeliest tokens, and of those outside of the nucleus of mass ``top_p``.

    The nucleus (arXiv 1904.09751) holds a token iff the likelier ones add up to less than ``top_p``; tokens as likely
    as its last one stay.
    """
    if top_k is not None and top_k < logits_RV.shape[1]:
        least_R1 = jax.lax.top_k(logits_RV, top_k)[0][:, -1:]
        logits_RV = jnp.where(logits_RV < least_R1, -jnp.inf, logits_RV)
    if top_p is not None and top_p < 1:
        sorted_RV = jnp.sort(logits_RV, axis=1)[:, ::-1]
        p_RV = jax.nn.softmax(sorted_RV, axis=1)
        kept_RV = jnp.cumsum(p_RV, axis=1) - p_RV < top_p
        least_R1 = jnp.min(jnp.where(kept_RV, sorted_RV, jnp.inf), axis=1, keepdims=True)
        logits_RV = jnp.where(logits_RV < least_R1, -jnp.inf, logits_RV)
    return logits_RV


def likeliest_token(logits_RV: Array) -> Array:
    """The first of the likeliest tokens, int32 [R], as ``argmax`` finds it, which CPUs run through number by number."""
    logits_RGB = _in_blocks(logits_RV, -jnp.inf)
    g_R = jnp.argmax(jnp.max(logits_RGB, axis=2), axis=1)
    return (g_R * logits_RGB.shape[2] + jnp.argmax(_block(logits_RGB, g_R), axis=1)).astype(jnp.int32)


def draw_token(logits_RV: Array, uniform_R: Array) -> Array:
    """Draws from softmax(logits) by inverting its distribution function: first that of blocks, then one block's.

    Far cheaper than Gumbel noise over the vocabulary, which needs R·V random numbers.

    Args:
      logits_RV: float32.
      uniform_R: float32 in [0, 1).

    Returns:
      int32 [R]; never a token of probability 0.
    """
    p_RV = jnp.exp(logits_RV - jnp.max(logits_RV, axis=1, keepdims=True))
    p_RGB = _in_blocks(p_RV, 0.0)
    mass_RG = jnp.sum(p_RGB, axis=2)
    g_R, rest_R = _invert(mass_RG, uniform_R * jnp.sum(mass_RG, axis=1))
    v_R, _ = _invert(_block(p_RGB, g_R), rest_R)
    return (g_R * p_RGB.shape[2] + v_R).astype(jnp.int32)


def _in_blocks(x_RV: Array, filler: float) -> Array:
    """[R, G, B], about √V blocks of √V, the last one filled up."""
    rows, vocab = x_RV.shape
    size = int(vocab**0.5)
    filled = jnp.pad(x_RV, ((0, 0), (0, -vocab % size)), constant_values=filler)
    return filled.reshape(rows, -1, size)


def _block(x_RGB: Array, g_R: Array) -> Array:
    """Each row's block of number g, [R, B]."""
    return jnp.take_along_axis(x_RGB, g_R[:, None, None], axis=1)[:, 0]


def _invert(mass_RN: Array, point_R: Array) -> tuple[Array, Array]:
    """The entry in whose share of the mass a point lies, and how far into it. Rounding may put the point past the end:
    the last entry with any mass is taken then."""
    upper_RN = jnp.cumsum(mass_RN, axis=1)
    last_R = mass_RN.shape[1] - 1 - jnp.argmax(mass_RN[:, ::-1] > 0, axis=1)
    index_R = jnp.minimum(jnp.sum(upper_RN <= point_R[:, None], axis=1), last_R)
    below_R = jnp.take_along_axis(upper_RN - mass_RN, index_R[:, None], axis=1)[:, 0]
    return index_R, jnp.maximum(point_R - below_R, 0.0)
