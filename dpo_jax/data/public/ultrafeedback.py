"""UltraFeedback, binarized (Cui et al. 2023, arXiv 2310.01377): conversations that both hold the prompt."""

from __future__ import annotations

from dpo_jax.data.formats import prompt_pair
from dpo_jax.data.public.base import PublicSet

_ORIGIN = "https://huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized/resolve/main/data"

SET = PublicSet(
    urls={
        "train": (f"{_ORIGIN}/train_prefs-00000-of-00001.parquet",),
        "eval": (f"{_ORIGIN}/test_prefs-00000-of-00001.parquet",),
    },
    parse=prompt_pair,
)
