"""GPT-2's names. Its Conv1D weights are [in, out], as ours are."""

from __future__ import annotations

from typing import Any

from dpo_jax.convert.engine import Rule
from dpo_jax.convert.table import Table, layer_norm, require
from dpo_jax.models.gpt2 import Gpt2Config

_H = "transformer.h.{n}"
_PARTS = {"attn.c_attn": "qkv", "attn.c_proj": "attention_out", "mlp.c_fc": "mlp_in", "mlp.c_proj": "mlp_out"}


def _read(hf: Any) -> dict[str, Any]:
    require(hf, activation_function=("gelu_new", "gelu_pytorch_tanh"), add_cross_attention=False)
    require(hf, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    return dict(
        vocab_size=hf.vocab_size,
        context_length=hf.n_positions,
        width=hf.n_embd,
        layers=hf.n_layer,
        heads=hf.n_head,
        mlp_width=hf.n_inner or 4 * hf.n_embd,
        norm_epsilon=hf.layer_norm_epsilon,
        tied_head=hf.tie_word_embeddings,
    )


def _write(c: Gpt2Config) -> dict[str, Any]:
    return dict(
        vocab_size=c.vocab_size,
        n_positions=c.context_length,
        n_embd=c.width,
        n_layer=c.layers,
        n_head=c.heads,
        n_inner=c.mlp_width,
        layer_norm_epsilon=c.norm_epsilon,
        tie_word_embeddings=c.tied_head,
    )


GPT2 = Table(
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    rules=(
        Rule("transformer.wte.weight", "token_embedding"),
        Rule("lm_head.weight", "head"),
        Rule("transformer.wpe.weight", "position_embedding"),
        *layer_norm(f"{_H}.ln_1", "blocks/attention_norm"),
        *layer_norm(f"{_H}.ln_2", "blocks/mlp_norm"),
        *(Rule(f"{_H}.{theirs}.weight", f"blocks/{ours}/kernel") for theirs, ours in _PARTS.items()),
        *(Rule(f"{_H}.{theirs}.bias", f"blocks/{ours}/bias") for theirs, ours in _PARTS.items()),
        *layer_norm("transformer.ln_f", "final_norm"),
    ),
    read=_read,
    write=_write,
    ignored=r"transformer\.h\.\d+\.attn\.(masked_)?bias",
)
