"""The names of Llama, Mistral and Qwen: one layout, other settings."""

from __future__ import annotations

from typing import Any

from dpo_jax.convert.engine import Rule
from dpo_jax.convert.table import (
    Table,
    linear,
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

# Attention, MLP and the body around the layers; Gemma shares them.
COMMON_RULES = (
    Rule("model.embed_tokens.weight", "token_embedding"),
    Rule("lm_head.weight", "head"),
    Rule("model.norm.weight", "final_norm/scale"),
    Rule(f"{_L}.input_layernorm.weight", "blocks/attention_norm/scale"),
    *linear(f"{_L}.self_attn.q_proj", "blocks/attention/query"),
    *linear(f"{_L}.self_attn.k_proj", "blocks/attention/key"),
    *linear(f"{_L}.self_attn.v_proj", "blocks/attention/value"),
    *linear(f"{_L}.self_attn.o_proj", "blocks/attention/out"),
    Rule(f"{_L}.self_attn.q_norm.weight", "blocks/attention/query_norm/scale"),
    Rule(f"{_L}.self_attn.k_norm.weight", "blocks/attention/key_norm/scale"),
    *linear(f"{_L}.mlp.gate_proj", "blocks/mlp/gate"),
    *linear(f"{_L}.mlp.up_proj", "blocks/mlp/up"),
    *linear(f"{_L}.mlp.down_proj", "blocks/mlp/down"),
)
IGNORED = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"


def _read(hf: Any) -> dict[str, Any]:
    require(hf, hidden_act="silu")
    return read_sizes(hf) | {"ropes": (read_rope(hf.rope_parameters, hf.max_position_embeddings),)}


def _write(c: DecoderConfig) -> dict[str, Any]:
    return write_sizes(c) | {"rope_parameters": write_rope(c.ropes[0])}


def _read_llama(hf: Any) -> dict[str, Any]:
    biases = dict(qkv_bias=hf.attention_bias, out_bias=hf.attention_bias, mlp_bias=hf.mlp_bias)
    return _read(hf) | biases


def _write_llama(c: DecoderConfig) -> dict[str, Any]:
    return _write(c) | {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias}


def _read_mistral(hf: Any) -> dict[str, Any]:
    window = hf.sliding_window
    return _read(hf) | {"windows": (window,) * hf.num_hidden_layers if window else None}


def _write_mistral(c: DecoderConfig) -> dict[str, Any]:
    windows = set(c.windows or (None,))
    if len(windows) > 1:
        raise ValueError(f"a Mistral has one window for all layers, not {c.windows}")
    return _write(c) | {"sliding_window": windows.pop()}


def _read_qwen2(hf: Any) -> dict[str, Any]:
    return _read(hf) | {"windows": read_windows(hf)}


def _write_qwen2(c: DecoderConfig) -> dict[str, Any]:
    fields = _write(c) | write_windows(c) | {"use_sliding_window": c.windows is not None}
    del fields["head_dim"]  # always width / heads in this family
    return fields


def _read_qwen3(hf: Any) -> dict[str, Any]:
    return _read_qwen2(hf) | {"qkv_bias": hf.attention_bias, "out_bias": hf.attention_bias}


def _write_qwen3(c: DecoderConfig) -> dict[str, Any]:
    extra = {"use_sliding_window": c.windows is not None, "attention_bias": c.qkv_bias}
    return _write(c) | write_windows(c) | extra


_RULES = (*COMMON_RULES, Rule(f"{_L}.post_attention_layernorm.weight", "blocks/mlp_norm/scale"))
LLAMA = Table("LlamaForCausalLM", "model.", _RULES, _read_llama, _write_llama, IGNORED)
MISTRAL = Table("MistralForCausalLM", "model.", _RULES, _read_mistral, _write_mistral, IGNORED)
QWEN2 = Table("Qwen2ForCausalLM", "model.", _RULES, _read_qwen2, _write_qwen2, IGNORED)
QWEN3 = Table("Qwen3ForCausalLM", "model.", _RULES, _read_qwen3, _write_qwen3, IGNORED)
