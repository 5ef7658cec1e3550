"""One example: a prompt and its answers as tokens. Every source ends here, every layout starts here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Answer:
    """One answer to a prompt.

    Attributes:
      tokens: int32 [n], the answer with its EOS where it has one; n ≥ 1.
      weights: float32 [n], how much each token counts: 1, or 0 in a masked turn.
      role: CHOSEN (or desirable) or REJECTED (or undesirable), of ``dpo_jax.types``.
      score: the annotator's score, 0 where there is none.
      reference: float32 [n], stored log-probabilities of the tokens under the reference, nats; None where it is scored
        in the step.
    """

    tokens: np.ndarray
    weights: np.ndarray
    role: int
    score: float = 0.0
    reference: np.ndarray | None = None

    @property
    def content(self) -> bytes:
        """What is read and counted of it: answers of equal content after one prompt have equal scores."""
        return np.asarray(self.tokens, np.int32).tobytes() + np.asarray(self.weights, np.float32).tobytes()


@dataclass(frozen=True)
class Example:
    """A prompt with its answers: (chosen, rejected), or a single one.

    Attributes:
      uid: identity of the example in its source: stable over epochs, shuffles and processes.
      prompt: int32 [p], with the BOS where the tokenizer has one; p ≥ 1, since the first target needs a source.
      answers: one or two answers.
      family: examples of one family, one after the other, have their prompt in common and lie together in a packed row,
        each different answer once; None is an example on its own.
    """

    uid: int
    prompt: np.ndarray
    answers: tuple[Answer, ...]
    family: int | None = None
