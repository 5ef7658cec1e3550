"""Mistral (arXiv 2310.06825): a Llama whose every layer sees only a window of the latest positions."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_jax.models.llama import Llama, LlamaConfig


@dataclass(frozen=True, kw_only=True)
class MistralConfig(LlamaConfig):
    """A Mistral; ``windows`` says what its layers see. Later versions have none."""

    kv_heads: int | None = 8


class Mistral(Llama):
    """The family: Llama's layers, whose attention heeds the windows of the config."""
