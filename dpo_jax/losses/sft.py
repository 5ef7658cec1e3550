"""Supervised fine-tuning: the likelihood of the chosen answer."""

from __future__ import annotations

from dpo_jax.losses.base import Answers
from dpo_jax.types import Array


def sft(chosen: Answers) -> Array:
    """−log π(y|x) / (mean number of tokens): its mean over the batch is the token-mean negative log-likelihood.

    As a term beside a preference loss it is the NLL term of RPO (arXiv 2404.19733, eq. 1), as in ``dpo + 1.0*sft``.

    Args:
      chosen: the answers to imitate, [B].

    Returns:
      float32 [B], nats per token.
    """
    return -chosen.sum_B / chosen.mean_count
