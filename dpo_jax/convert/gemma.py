"""The names of Gemma 2 and of Gemma 3's text models."""

from __future__ import annotations

from typing import Any

from dpo_jax.convert.engine import Rule
from dpo_jax.convert.llama import COMMON_RULES, IGNORED
from dpo_jax.convert.table import (
    FULL,
    SLIDING,
    Table,
    read_rope,
    read_sizes,
    read_windows,
    require,
    write_rope,
    write_sizes,
    write_windows,
)
from dpo_jax.models.config import DecoderConfig

_L = "model.layers.{n}"
_RULES = (
    *COMMON_RULES,
    Rule(f"{_L}.post_attention_layernorm.weight", "blocks/attention_out_norm/scale"),
    Rule(f"{_L}.pre_feedforward_layernorm.weight", "blocks/mlp_norm/scale"),
    Rule(f"{_L}.post_feedforward_layernorm.weight", "blocks/mlp_out_norm/scale"),
)


def _read(hf: Any) -> dict[str, Any]:
    require(hf, hidden_activation="gelu_pytorch_tanh", use_bidirectional_attention=(False, None))
    return read_sizes(hf) | dict(
        windows=read_windows(hf),
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        query_scale=hf.query_pre_attn_scalar**-0.5,
        logit_cap=hf.final_logit_softcapping,
    )


def _write(c: DecoderConfig) -> dict[str, Any]:
    extra = dict(
        attention_bias=c.qkv_bias,
        query_pre_attn_scalar=round(c.score_scale**-2),
        final_logit_softcapping=c.logit_cap,
        attn_logit_softcapping=c.attention_cap,
    )
    return write_sizes(c) | write_windows(c) | extra


def _read_gemma2(hf: Any) -> dict[str, Any]:
    rope = read_rope(hf.rope_parameters, hf.max_position_embeddings)
    return _read(hf) | {"ropes": (rope,), "attention_cap": hf.attn_logit_softcapping}


def _write_gemma2(c: DecoderConfig) -> dict[str, Any]:
    return _write(c) | {"rope_parameters": write_rope(c.ropes[0])}


def _read_gemma3(hf: Any) -> dict[str, Any]:
    # Its attention has no soft cap, whatever the config says.
    ropes = tuple(read_rope(hf.rope_parameters[kind], hf.max_position_embeddings) for kind in (SLIDING, FULL))
    return _read(hf) | {"ropes": ropes, "rope_of_layer": tuple(int(kind == FULL) for kind in hf.layer_types)}


def _write_gemma3(c: DecoderConfig) -> dict[str, Any]:
    ropes = c.ropes if len(c.ropes) > 1 else c.ropes * 2
    return _write(c) | {"rope_parameters": {SLIDING: write_rope(ropes[0]), FULL: write_rope(ropes[1])}}


GEMMA2 = Table("Gemma2ForCausalLM", "model.", _RULES, _read_gemma2, _write_gemma2, IGNORED)
GEMMA3 = Table("Gemma3ForCausalLM", "model.", _RULES, _read_gemma3, _write_gemma3, IGNORED)
