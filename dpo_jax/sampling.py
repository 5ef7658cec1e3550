"""Sampling with a key/value cache: a token at a time in every seat, and the next prompt where an answer has ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dpo_jax.drawing import draw_token, keep_likeliest, likeliest_token
from dpo_jax.models import unrolled
from dpo_jax.models.decoder import Context
from dpo_jax.models.layers import Cache, project
from dpo_jax.prefill import prefill
from dpo_jax.sharding import constrain
from dpo_jax.types import Array, Params

# Every fourth seat: when so many are free, the next prompts are read, since together they fill a row, and few seats
# have idled; when no more are in use, and nobody waits, the others are left out.
_FEW = 4


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


@struct.dataclass
class _Asked:
    """What a sampler is called with, of R prompts."""

    prompt_RP: Array
    length_R: Array
    draws_R2: Array
    temperature_R: Array


@struct.dataclass
class _Seats:
    """S rows of a cache, and the prompts that are being answered in them.

    Attributes:
      row_S: int32, which prompt sits there; R where none does.
      length_S: int32, tokens of the prompt.
      age_S: int32, how many tokens have been sampled after it.
      hidden_SD: hidden states of the latest tokens.
      cache: P slots for the seat's prompt, then T that all seats write to at the same time, one after the other, and
        then the first again: no answer has more tokens, so none is overwritten before its answer has ended.
    """

    row_S: jax.Array
    length_S: jax.Array
    age_S: jax.Array
    hidden_SD: jax.Array
    cache: Cache


@struct.dataclass
class _State:
    """Where sampling stands.

    Attributes:
      seats: who is being answered.
      taken: int32, prompts that have been given a seat.
      clock: int32, tokens of each seat since all of them were last free.
      samples: what has been sampled.
      context: in which the layers read the next tokens.
    """

    seats: _Seats
    taken: jax.Array
    clock: jax.Array
    samples: Samples
    context: Context


def make_sampler(
    model: nn.Module,
    *,
    max_new_tokens: int,
    eos: int | Sequence[int],
    top_k: int | None = None,
    top_p: float | None = None,
    seats: int | None = None,
    lanes: int = 1,
) -> Callable[[Params, Array, Array, Array, Array], Samples]:
    """Builds the pure function (params, prompt_RP, length_R, draws_R2, temperature_R) → Samples.

    Prompts are padded on the right to P tokens, and those of length 0 are not answered; T = ``max_new_tokens``; a
    temperature of 0 takes the likeliest token. Prompts for which there is no seat wait, and take those of answers that
    have ended. The random numbers of a row depend on its own ``row_draws`` and on the place of the token alone, so a
    row's completion does not depend on the rows beside it, but for the rounding of sums. The cache has the model's
    compute dtype: samples come from the same function that scores them. While it works, the layers' parameters lie
    there twice.

    Args:
      model: a family's module.
      max_new_tokens: T, tokens of room for an answer, its EOS included.
      eos: the token, or the tokens any of which, ends an answer.
      top_k: draws among this many of the likeliest tokens only; None is all.
      top_p: draws among the fewest likeliest tokens whose probabilities add up to this; None is all.
      seats: prompts that are answered at a time; None is all.
      lanes: rows of prompts that are read at a time: as many as one program's rows are split over.

    Raises:
      ValueError: ``top_k`` below 1, or ``top_p`` outside (0, 1].
    """
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"top_k is {top_k} and top_p {top_p}; expected at least 1, and more than 0 up to 1")
    limits = _Limits(max_new_tokens, np.atleast_1d(np.asarray(eos, np.int32)), top_k, top_p)

    def sample(params: Params, prompt_RP: Array, length_R: Array, draws_R2: Array, temperature_R: Array) -> Samples:
        asked = _Asked(prompt_RP, length_R, draws_R2, temperature_R)
        return _Sampling(model, params, limits, asked, min(seats or len(length_R), len(length_R)), lanes).run()

    return sample


@dataclasses.dataclass(frozen=True)
class _Limits:
    """Of an answer, and of what its tokens are drawn from."""

    max_new_tokens: int
    ends: np.ndarray
    top_k: int | None
    top_p: float | None


class _Sampling:
    """One call of a sampler: what stays as it is while its states follow each other."""

    def __init__(
        self, model: nn.Module, params: Params, limits: _Limits, asked: _Asked, seats: int, lanes: int
    ) -> None:
        self._model, self._params, self._limits = model, params, limits
        self._asked, self._count, self._lanes = asked, seats, lanes
        self._few = min(seats, -(-seats // (_FEW * lanes)) * lanes)
        self._rows, self._prompt_slots = np.shape(asked.prompt_RP)
        self._order_R = jnp.argsort(asked.length_R == 0, stable=True)
        self._answered = jnp.sum(asked.length_R > 0)
        # Copies, made once: a part of an array is a copy on CPUs, which each token would make anew.
        self._layers = [jax.tree.map(lambda a, n=n: a[n], params["blocks"]) for n in range(model.config.layers)]
        self._head_VD = model.apply({"params": params}, method="head")

    def run(self) -> Samples:
        """Seats prompts and adds tokens until others can be seated; the last few answers go on by themselves."""

        def many(state: _State) -> jax.Array:
            return (state.taken < self._answered) | (jnp.sum(_live(state)) > self._few)

        def with_others(state: Any) -> Any:
            return jax.lax.while_loop(lambda s: many(s) & ~self._waits(s), self._with_a_token, self._seated(state))

        state = jax.lax.while_loop(many, with_others, self._start())
        return jax.lax.while_loop(lambda s: jnp.any(_live(s)), self._with_a_token, self._closed_up(state)).samples

    def _start(self) -> _State:
        count, slots, room = self._count, self._prompt_slots, self._limits.max_new_tokens
        cache = self._model.apply({"params": self._params}, count, slots + room, method="empty_cache")
        slot_ST = jnp.broadcast_to(jnp.arange(cache.position.shape[1]), cache.position.shape)
        cache = cache.replace(position=jnp.where(slot_ST < slots, slot_ST, 0))
        c, none_S = self._model.config, jnp.zeros(count, jnp.int32)
        hidden_SD = jnp.zeros((count, c.width), c.output_dtype or c.dtype)
        seats = _Seats(jnp.full(count, self._rows), none_S, none_S, hidden_SD, cache)
        token_RT, none_R = jnp.zeros((self._rows, room), jnp.int32), jnp.zeros(self._rows, jnp.int32)
        samples = Samples(token_RT, token_RT.astype(jnp.float32), none_R, none_R.astype(bool))
        return self._ready(_over_devices(seats), jnp.int32(0), jnp.int32(0), samples)

    def _waits(self, state: _State) -> jax.Array:
        """Whether prompts wait that can be seated: all that are left, or as many as are read together."""
        left, free = self._answered - state.taken, jnp.sum(~_live(state))
        return (left > 0) & (free >= jnp.minimum(left, self._few))

    def _closed_up(self, state: _State) -> _State:
        """As few seats as are still in use."""
        kept = jnp.argsort(~_live(state), stable=True)[: self._few]
        seats = _over_devices(jax.tree.map(lambda a: a[kept], state.seats))
        return self._ready(seats, state.taken, state.clock, state.samples)

    def _seated(self, state: _State) -> _State:
        """The next prompts in the seats that are free, and read."""
        seats, asked, live_S = state.seats, self._asked, _live(state)
        turn_S = state.taken + jnp.cumsum(~live_S) - 1
        new_S = ~live_S & (turn_S < self._answered)
        row_S = jnp.where(new_S, self._order_R[turn_S], seats.row_S)
        prompt_SP = jnp.asarray(asked.prompt_RP)[row_S]
        length_S = jnp.where(new_S, jnp.asarray(asked.length_R)[row_S], seats.length_S)
        variables, before = {"params": self._params}, (seats.hidden_SD, seats.cache)
        hidden_SD, cache = prefill(self._model, variables, prompt_SP, length_S, new_S, *before, lanes=self._lanes)
        seats = _Seats(row_S, length_S, jnp.where(new_S, 0, seats.age_S), hidden_SD, cache)
        clock = jnp.where(jnp.any(live_S), state.clock, 0)
        return self._ready(seats, state.taken + jnp.sum(new_S), clock, state.samples)

    def _with_a_token(self, state: _State) -> _State:
        """Another token in every seat; those without a prompt sample too, and nobody keeps it."""
        seats, samples = state.seats, state.samples
        row_S, age_S = seats.row_S, seats.age_S
        token_S, logp_S = self._drawn(seats)
        ended_S = jnp.any(token_S[:, None] == self._limits.ends[None], axis=1)
        samples = Samples(
            tokens_RT=_with(samples.tokens_RT, token_S, row_S, age_S),
            logp_RT=_with(samples.logp_RT, logp_S, row_S, age_S),
            length_R=_with(samples.length_R, age_S + 1, row_S),
            ended_R=_with(samples.ended_R, ended_S, row_S),
        )
        hidden_SD, cache = self._read(token_S, seats, state.context)
        goes_on_S = _live(state) & ~ended_S & (age_S + 1 < self._limits.max_new_tokens)
        seats = dataclasses.replace(
            seats,
            row_S=jnp.where(goes_on_S, row_S, self._rows),
            age_S=jnp.where(goes_on_S, age_S + 1, age_S),
            hidden_SD=hidden_SD,
            cache=cache,
        )
        return self._ready(seats, state.taken, state.clock + 1, samples)

    def _drawn(self, seats: _Seats) -> tuple[jax.Array, jax.Array]:
        """A token for each seat, and its log-probability."""
        draws_S2, temperature_S = (
            jnp.asarray(a)[seats.row_S] for a in (self._asked.draws_R2, self._asked.temperature_R)
        )
        logits_SV = project(seats.hidden_SD, self._head_VD, self._model.logit_cap)
        warm_SV = logits_SV / jnp.where(temperature_S > 0, temperature_S, 1.0)[:, None]
        kept_SV = keep_likeliest(warm_SV, self._limits.top_k, self._limits.top_p)
        drawn_S = draw_token(kept_SV, jax.vmap(_uniform)(draws_S2, seats.age_S))
        token_S = jnp.where(temperature_S > 0, drawn_S, likeliest_token(logits_SV))
        taken_S = jnp.take_along_axis(logits_SV, token_S[:, None], axis=1)[:, 0]
        return token_S, taken_S - jax.nn.logsumexp(logits_SV, axis=1)

    def _read(self, token_S: jax.Array, seats: _Seats, context: Context) -> tuple[jax.Array, Cache]:
        """Hidden states of the tokens, and the cache with them in it."""
        stacked = self._params | {"blocks": jax.tree.map(lambda *parts: jnp.stack(parts), *self._layers)}
        arguments = token_S[:, None], _position(seats), seats.cache, context
        hidden_S1D, cache = unrolled(self._model).apply({"params": stacked}, *arguments, method="follow")
        return hidden_S1D[:, 0], cache

    def _ready(self, seats: _Seats, taken: jax.Array, clock: jax.Array, samples: Samples) -> _State:
        """A state in which the seats' next tokens can be read."""
        slots, room = self._prompt_slots, self._limits.max_new_tokens
        slot_1T = jnp.arange(seats.cache.value[0].shape[2])[None]
        back_1T = (clock - (slot_1T - slots)) % room  # how many tokens ago all seats wrote to a slot
        sampled_ST = (slot_1T < slots + room) & (back_1T <= seats.age_S[:, None])
        mask_ST = jnp.where(slot_1T < slots, slot_1T < seats.length_S[:, None], sampled_ST)
        arguments = _position(seats), mask_ST[:, None], seats.cache, slots + clock % room
        cache, context = self._model.apply({"params": self._params}, *arguments, method="prepare")
        return _State(dataclasses.replace(seats, cache=cache), taken, clock, samples, context)


def _live(state: _State) -> jax.Array:
    """bool [S], seats with a prompt."""
    return state.seats.row_S < len(state.samples.length_R)


def _position(seats: _Seats) -> jax.Array:
    """int32 [S, 1], of the next tokens."""
    return (seats.length_S + seats.age_S)[:, None]


def _over_devices(seats: _Seats) -> _Seats:
    """Split over the devices of a mesh, where there is one."""
    return jax.tree.map(lambda a: constrain(a, "rows", *[None] * (a.ndim - 1)), seats)


def _with(array: Any, values: jax.Array, *place: jax.Array) -> jax.Array:
    """The array with the values in their places; those of no row are left out."""
    return array.at[place].set(values, mode="drop")


def _uniform(draws_2: jax.Array, age: jax.Array) -> jax.Array:
    """The random number of an answer's token, in [0, 1)."""
    key = jax.random.fold_in(jax.random.key(draws_2[0]), draws_2[1])
    return jax.random.uniform(jax.random.fold_in(key, age))


def row_draws(seed: int, rows: np.ndarray) -> np.ndarray:
    """What decides the random numbers of each row, uint32 [R, 2]: the seed, and the number of the row."""
    return np.stack(np.broadcast_arrays(seed, rows), axis=1).astype(np.uint32)
