"""Adapters on models of cases.py, as PEFT's settings and as our own."""

from __future__ import annotations

from dataclasses import dataclass

RANK, ALPHA = 3, 6.0


@dataclass(frozen=True)
class Case:
    """Which layers of a model have adapters: ``modules`` are PEFT's target_modules, ``layers`` our pattern."""

    modules: tuple[str, ...]
    layers: str


# Name in cases.CASES → adapters. GPT-2 keeps its layers transposed and has two named c_proj; NeoX fuses its queries.
CASES = {
    "gpt2": Case(("attn.c_attn", "mlp.c_proj"), "qkv|mlp_out"),
    "pythia": Case(("attention.query_key_value", "mlp.dense_h_to_4h"), "qkv|mlp/in"),
    "llama_untied": Case(("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"), "query|attention/out|mlp/down"),
}
