"""Small models of every family: their configs, and weights that are a function of a tensor's name."""

from __future__ import annotations

import zlib

import numpy as np

VOCAB = 96
LENGTHS = (24, 17)  # real tokens of the two rows that are scored
PROMPTS = (9, 5)  # and of the two prompts that are continued
NEW_TOKENS = 64
SHOWN_POSITIONS = 3  # the last real ones of a row whose logits are kept
SHOWN_VOCAB = slice(0, None, 7)

_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=128,
)
_NEOX = {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"}
_GPT2 = dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128)


def _rope(kind: str, theta: float = 10000.0, **settings: float) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **settings}}


_LLAMA3 = _rope("llama3", factor=4.0, original_max_position_embeddings=32, low_freq_factor=1.0, high_freq_factor=4.0)
_LAYERS4 = {"num_hidden_layers": 4}
_PATTERN = ["sliding_attention", "full_attention"]

# Name → (model_type, architecture, settings beside the type's defaults).
CASES: dict[str, tuple[str, str, dict]] = {
    "gpt2": ("gpt2", "GPT2LMHeadModel", _GPT2),
    "pythia": ("gpt_neox", "GPTNeoXForCausalLM", _NEOX | _rope("default", partial_rotary_factor=0.25)),
    "neox_sequential_linear_tied": (
        "gpt_neox",
        "GPTNeoXForCausalLM",
        _NEOX
        | dict(use_parallel_residual=False, tie_word_embeddings=True)
        | _rope("linear", factor=2.0, partial_rotary_factor=0.5),
    ),
    "llama_untied": ("llama", "LlamaForCausalLM", _COMMON | dict(rms_norm_eps=1e-5)),
    "llama3_tied": ("llama", "LlamaForCausalLM", _COMMON | _LLAMA3 | dict(tie_word_embeddings=True)),
    "llama_linear_biases": (
        "llama",
        "LlamaForCausalLM",
        _COMMON | _rope("linear", factor=3.0) | dict(attention_bias=True, mlp_bias=True),
    ),
    "llama_yarn": (
        "llama",
        "LlamaForCausalLM",
        _COMMON | _rope("yarn", factor=4.0, original_max_position_embeddings=32) | dict(head_dim=16),
    ),
    "mistral_window": ("mistral", "MistralForCausalLM", _COMMON | dict(sliding_window=5, num_key_value_heads=1)),
    "qwen2_tied": ("qwen2", "Qwen2ForCausalLM", _COMMON | _rope("default", 1e6) | dict(tie_word_embeddings=True)),
    "qwen2_yarn_late_window": (
        "qwen2",
        "Qwen2ForCausalLM",
        _COMMON
        | _rope("yarn", 1e6, factor=2.0, original_max_position_embeddings=64)
        | dict(use_sliding_window=True, sliding_window=6, max_window_layers=1),
    ),
    "qwen3_head_norms": ("qwen3", "Qwen3ForCausalLM", _COMMON | _rope("default", 1e6) | dict(head_dim=16)),
    "gemma2_caps_windows": (
        "gemma2",
        "Gemma2ForCausalLM",
        _COMMON
        | _LAYERS4
        | dict(head_dim=16, query_pre_attn_scalar=8, sliding_window=6, attn_logit_softcapping=2.0)
        | dict(final_logit_softcapping=3.0, layer_types=_PATTERN * 2),
    ),
    "gemma3_two_ropes": (
        "gemma3_text",
        "Gemma3ForCausalLM",
        _COMMON
        | _LAYERS4
        | dict(
            head_dim=16, query_pre_attn_scalar=16, sliding_window=6, layer_types=[_PATTERN[0], *_PATTERN, _PATTERN[0]]
        )
        | {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            }
        },
    ),
}


def config_of(name: str) -> dict:
    """The config.json of a case."""
    kind, architecture, settings = CASES[name]
    ids = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return {"model_type": kind, "architectures": [architecture], "dtype": "float32", **ids, **settings}


def weight(name: str, shape: tuple[int, ...], seed: int, kind: str) -> np.ndarray:
    """The tensor of that name: large enough that every part of a model shows in its logits.

    Args:
      name: as in the file.
      shape: its shape; a wrong one gives other numbers.
      seed: of the case.
      kind: model_type; Gemma keeps the distance of a norm's scale from 1.
    """
    normal = np.random.default_rng([zlib.crc32(name.encode()), seed]).standard_normal(shape)
    if len(shape) == 2:
        table = any(part in name for part in ("embed", "wte", "lm_head"))
        return (normal * (0.5 if table else 0.2)).astype(np.float32)
    is_scale = name.endswith("weight") and not kind.startswith("gemma")
    return (normal * 0.2 + is_scale).astype(np.float32)


def texts(seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(the rows that are scored, the prompts that are continued), int32 each."""
    rng = np.random.default_rng([1, seed])
    draw = lambda n: rng.integers(1, VOCAB, n).astype(np.int32)  # noqa: E731
    return [draw(n) for n in LENGTHS], [draw(n) for n in PROMPTS]


def padded(rows: list[np.ndarray], side: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, 1 where they are real), padded on one side, int32 [R, L]."""
    length = max(map(len, rows))
    tokens, real = np.zeros((2, len(rows), length), np.int32)
    for r, row in enumerate(rows):
        span = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        tokens[r, span], real[r, span] = row, 1
    return tokens, real
