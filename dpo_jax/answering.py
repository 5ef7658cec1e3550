"""Any number of prompts, answered on all devices by one compiled sampler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from dpo_jax.ahead import Begun
from dpo_jax.parallel import Parallel
from dpo_jax.sampling import Samples, make_sampler
from dpo_jax.types import Params

_ROUNDS = 8  # prompts for each seat in a call: seats are empty at its end, and until then nobody sees an answer


class Answerer:
    """Samples an answer to each of many prompts; whoever ends early makes room for the next.

    Args:
      model: a family's module.
      parallel: the devices; prompts are split over them.
      prompt_length: longest prompt, tokens.
      rows: prompts that are answered at a time, or as many more as divide over the devices.
      max_new_tokens: room for an answer, tokens.
      settings: eos, top_k and top_p of :func:`make_sampler`.

    Attributes:
      rows: prompts that are answered at a time.

    Raises:
      ValueError: no row or no room.
    """

    def __init__(
        self,
        model: nn.Module,
        parallel: Parallel,
        *,
        prompt_length: int,
        rows: int,
        max_new_tokens: int,
        **settings: Any,
    ) -> None:
        if rows < 1 or max_new_tokens < 1:
            raise ValueError(f"rows is {rows} and max_new_tokens {max_new_tokens}; expected at least 1 of both")
        self._parts, lanes = parallel.row_parts, parallel.axis.parts
        self.rows = -(-rows // self._parts) * self._parts
        self._prompt_length, self._room, self._config = prompt_length, max_new_tokens, model.config
        seats = self.rows * lanes // self._parts
        sampler = make_sampler(model, max_new_tokens=max_new_tokens, seats=seats, lanes=lanes, **settings)
        self._sample = parallel.row_function(sampler, "sample")

    def __call__(
        self, params: Params, prompts: Sequence[np.ndarray], draws_R2: np.ndarray, temperature: float
    ) -> Begun[Samples]:
        """Begins to answer; the result has samples of all prompts, in order. Arguments and errors as of ``parts``."""
        if not prompts:
            raise ValueError("there is no prompt to answer; give at least one")
        begun = list(self.parts(params, prompts, draws_R2, temperature))
        return Begun(lambda: jax.tree.map(lambda *arrays: np.concatenate(arrays), *(b.result() for b in begun)))

    def parts(
        self, params: Params, prompts: Sequence[np.ndarray], draws_R2: np.ndarray, temperature: float
    ) -> Iterator[Begun[Samples]]:
        """Begins to answer a part of the prompts whenever another one is asked for.

        Args:
          params: replicated parameters.
          prompts: int32 [p] each, p from 1 to ``prompt_length``.
          draws_R2: of :func:`row_draws`, for each prompt.
          temperature: 1 samples from the model itself, 0 takes the likeliest token.

        Yields:
          Samples of the next prompts, in order, on the host.

        Raises:
          ValueError: a prompt is empty or too long, or has a token that the model does not know; or prompt and answer
            may have more tokens than the model has positions.
        """
        if self._prompt_length + self._room > self._config.context_length:
            raise ValueError(
                f"prompts of up to {self._prompt_length} tokens and max_new_tokens {self._room} do not fit into the "
                f"model's {self._config.context_length} positions; shorten one of them"
            )
        size = min(_ROUNDS, -(-len(prompts) // self.rows)) * self.rows
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            yield self._begin(params, prompts[part], draws_R2[part], temperature, size)

    def _begin(
        self, params: Params, prompts: Sequence[np.ndarray], draws_R2: np.ndarray, temperature: float, size: int
    ) -> Begun[Samples]:
        """One call, filled up to its size by prompts without tokens, which are not answered."""
        tokens_RP, length_R = np.zeros((size, self._prompt_length), np.int32), np.zeros(size, np.int32)
        for r, prompt in enumerate(prompts):
            if not 0 < len(prompt) <= self._prompt_length:
                raise ValueError(
                    f"a prompt has {len(prompt)} tokens; expected at least one, and at most data.prompt_length, "
                    f"{self._prompt_length}; raise it where prompts are longer"
                )
            if not 0 <= np.min(prompt) <= np.max(prompt) < self._config.vocab_size:
                raise ValueError(
                    f"a prompt has tokens from {np.min(prompt)} to {np.max(prompt)}; the model has rows for those "
                    f"below {self._config.vocab_size}: leave what spells the others out of the prompt"
                )
            tokens_RP[r, : len(prompt)], length_R[r] = prompt, len(prompt)
        draws_R2, count = np.pad(draws_R2, ((0, size - len(prompts)), (0, 0))), len(prompts)
        # Dealt out, so that each device has as many: a device computes the rows that lie together.
        dealt = np.arange(size).reshape(-1, self._parts).T.ravel()
        rows = (tokens_RP, length_R, draws_R2, np.full(size, temperature, np.float32))
        begun = self._sample(params, *(a[dealt] for a in rows))
        place = np.argsort(dealt)[:count]
        return Begun(lambda: jax.tree.map(lambda a: a[place], begun.result()))
