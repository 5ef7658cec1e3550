"""The names of GPT-NeoX and Pythia."""

from __future__ import annotations

from typing import Any

from dpo_jax.convert.engine import Rule
from dpo_jax.convert.table import Table, layer_norm, linear, read_rope, require, write_rope
from dpo_jax.models.neox import NeoXConfig

_L = "gpt_neox.layers.{n}"


def _read(hf: Any) -> dict[str, Any]:
    require(hf, hidden_act="gelu")
    return dict(
        vocab_size=hf.vocab_size,
        context_length=hf.max_position_embeddings,
        width=hf.hidden_size,
        layers=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        mlp_width=hf.intermediate_size,
        norm_epsilon=hf.layer_norm_eps,
        tied_head=hf.tie_word_embeddings,
        parallel=hf.use_parallel_residual,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        ropes=(read_rope(hf.rope_parameters, hf.max_position_embeddings),),
    )


def _write(c: NeoXConfig) -> dict[str, Any]:
    # The share is always written: this family's default is not 1.
    rope = {**write_rope(c.ropes[0]), "partial_rotary_factor": c.ropes[0].share}
    return dict(
        vocab_size=c.vocab_size,
        max_position_embeddings=c.context_length,
        hidden_size=c.width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        intermediate_size=c.mlp_width,
        layer_norm_eps=c.norm_epsilon,
        tie_word_embeddings=c.tied_head,
        use_parallel_residual=c.parallel,
        attention_bias=c.qkv_bias,
        rope_parameters=rope,
    )


NEOX = Table(
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    rules=(
        Rule("gpt_neox.embed_in.weight", "token_embedding"),
        Rule("embed_out.weight", "head"),
        *layer_norm(f"{_L}.input_layernorm", "blocks/attention_norm"),
        *layer_norm(f"{_L}.post_attention_layernorm", "blocks/mlp_norm"),
        *linear(f"{_L}.attention.query_key_value", "blocks/qkv"),
        *linear(f"{_L}.attention.dense", "blocks/attention_out"),
        *linear(f"{_L}.mlp.dense_h_to_4h", "blocks/mlp/in"),
        *linear(f"{_L}.mlp.dense_4h_to_h", "blocks/mlp/out"),
        *layer_norm("gpt_neox.final_layer_norm", "final_norm"),
    ),
    read=_read,
    write=_write,
    ignored=r"gpt_neox\.layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",
)
