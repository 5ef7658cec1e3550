"""Anthropic HH (Bai et al. 2022, arXiv 2204.05862): whole dialogues, split at the last "Assistant:"."""

from __future__ import annotations

from dpo_jax.data.formats import hh_pair
from dpo_jax.data.public.base import PublicSet

_ORIGIN = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main"
_SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")

SET = PublicSet(
    urls={
        "train": tuple(f"{_ORIGIN}/{subset}/train.jsonl.gz" for subset in _SUBSETS),
        "eval": tuple(f"{_ORIGIN}/{subset}/test.jsonl.gz" for subset in _SUBSETS),
    },
    parse=hh_pair,
)
