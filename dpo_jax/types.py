"""The data structures that every layer shares, and the axis legend.

Axis letters in names (``logits_RMV`` is an array of shape [R, M, V]):

====  =================================================================
B     answers or pairs that a loss sees (one value each)
X     examples (a prompt with its A answers); R·S == X·A
A     answers of an example: 2 (chosen, rejected) or 1
R     rows of a batch
S     response slots in a row
L     positions in a row
M     targets in a row
D     width of the model
H, K  query heads, key/value heads
E     size of a head
F     width of the MLP
V     vocabulary
N     layers
====  =================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import struct

Array = jax.Array | np.ndarray
Params = Any  # a nested dict of arrays
Targets = Callable[[Any], Any]  # a tree of shapes → the same shapes, with the shardings that arrays are to have


def on_host(shapes: Any) -> Any:
    """The target of arrays that lie on the host, whole."""
    return shapes


# Values of ``TokenBatch.role_RS``.
UNUSED, CHOSEN, REJECTED, PROMPT = 0, 1, 2, 3


@struct.dataclass
class TokenBatch:
    """R rows of tokens, and which of them are to be predicted for which answer.

    How examples lie in rows is the layout's business (``dpo_jax/data/layouts.py``); model, log-probabilities and losses
    read this one structure. A query attends to a key iff both belong to the same group (≠ 0), the key is not later in
    the row, and the key is a prompt token or of the query's own branch.

    Attributes:
      tokens_RL: int32, model inputs.
      position_RL: int32, position inside the token's own sequence (prompt + answer).
      group_RL: int32, which example the token belongs to; 0 is padding.
      branch_RL: int32, 0 is the prompt, seen by every answer; 1, 2, … is one answer each.
      source_RM: int32, index in the row of the hidden state that predicts target m.
      target_RM: int32, the token to be predicted.
      slot_RM: int32, which slot of the row the target is laid for.
      weight_RM: float32, 0 is padding or a masked turn, 1 counts; any weight ≥ 0 is allowed.
      scored_RS: int32, the slot whose targets count for this one: itself or, where its answer repeats that of another
        slot, the one whose targets are laid.
      role_RS: int32, what the slot holds: UNUSED, CHOSEN (or desirable), REJECTED (or undesirable) or PROMPT.
      score_RS: float32, the annotator's score of the answer, 0 where there is none.
      reference_RM: float32, stored log-probability of target m under the reference, nats; None where the reference is
        scored in the step.
      branches: most answers of a group; static.
    """

    tokens_RL: Array
    position_RL: Array
    group_RL: Array
    branch_RL: Array
    source_RM: Array
    target_RM: Array
    slot_RM: Array
    weight_RM: Array
    scored_RS: Array
    role_RS: Array
    score_RS: Array
    reference_RM: Array | None = None
    branches: int = struct.field(pytree_node=False, default=1)


@struct.dataclass
class PreferenceBatch:
    """What one training step reads.

    Attributes:
      answers: the examples' own answers. Their slots, in row order, are [X, A] answers, or [X, A, 2] when each answer
        is followed by a slot for its prompt.
      mismatched: answers of *other* examples after these prompts, for KTO's KL term; scored without a gradient. None
        when the loss does not ask for them.
    """

    answers: TokenBatch
    mismatched: TokenBatch | None = None


@struct.dataclass
class SequenceLogps:
    """Scores of answers under one set of parameters: fp32 arrays of one shape, [X, A, C], [X, A] or [B].

    Attributes:
      sum: Σ_t w_t · log p(token t), nats.
      tail: the part of ``sum`` from tokens past the length of the example's shortest answer, nats (LD-DPO).
      count: Σ_t w_t, tokens.
      entropy: Σ_t w_t · H(p_t), nats, without a gradient.
      overlap: Σ_t w_t · (log p(token t) − log Σ_v p_t(v)²), nats, without a gradient (WPO).
    """

    sum: Array
    tail: Array
    count: Array
    entropy: Array
    overlap: Array
