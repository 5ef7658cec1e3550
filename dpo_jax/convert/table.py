"""What a family says about its Hugging Face form, and what several families say alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_jax.convert.engine import Rule
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.rope import SCALINGS, Rope

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Table:
    """How a family is written on the Hugging Face hub.

    Attributes:
      architecture: the transformers class with the language-model head.
      prefix: of all names but the head's; files of the bare body lack it.
      rules: names of tensors.
      read: transformers config → fields of our config.
      write: our config → fields of the transformers config.
      ignored: regular expression of names that carry no weights.
    """

    architecture: str
    prefix: str
    rules: tuple[Rule, ...]
    read: Callable[[Any], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]
    ignored: str = ""


def linear(theirs: str, ours: str) -> tuple[Rule, ...]:
    """A linear layer that the file keeps as [out, in], with its bias."""
    return Rule(f"{theirs}.weight", f"{ours}/kernel", transpose=True), Rule(f"{theirs}.bias", f"{ours}/bias")


def layer_norm(theirs: str, ours: str) -> tuple[Rule, ...]:
    """A norm with scale and bias."""
    return Rule(f"{theirs}.weight", f"{ours}/norm/scale"), Rule(f"{theirs}.bias", f"{ours}/norm/bias")


def require(hf: Any, **expected: Any) -> None:
    """Raises ValueError unless a transformers config says what is expected; a tuple lists what is allowed."""
    for name, allowed in expected.items():
        allowed = allowed if isinstance(allowed, tuple) else (allowed,)
        got = getattr(hf, name, allowed[0])
        if got not in allowed:
            raise ValueError(f"{hf.model_type} with {name}={got!r} is not supported; supported: {allowed}")


def read_sizes(hf: Any) -> dict[str, Any]:
    """The fields that Llama's kin share."""
    return dict(
        vocab_size=hf.vocab_size,
        context_length=hf.max_position_embeddings,
        width=hf.hidden_size,
        layers=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        kv_heads=hf.num_key_value_heads,
        head_size=getattr(hf, "head_dim", None),
        mlp_width=hf.intermediate_size,
        norm_epsilon=hf.rms_norm_eps,
        tied_head=hf.tie_word_embeddings,
    )


def write_sizes(c: DecoderConfig) -> dict[str, Any]:
    """The other way round."""
    return dict(
        vocab_size=c.vocab_size,
        max_position_embeddings=c.context_length,
        hidden_size=c.width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.key_heads,
        head_dim=c.size,
        intermediate_size=c.mlp_width,
        rms_norm_eps=c.norm_epsilon,
        tie_word_embeddings=c.tied_head,
    )


_ROPE_KEYS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_length",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "attention_factor": "attention_factor",
    "partial_rotary_factor": "share",
    "rope_theta": "theta",
}
_MEANT_FOR = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "truncate",
        "attention_factor",
    ),
}


def read_rope(parameters: Mapping[str, Any], context_length: int) -> Rope:
    """A rotary embedding from ``rope_parameters``.

    Raises:
      ValueError: a type or a setting that is not supported.
    """
    settings = {key: value for key, value in parameters.items() if value is not None}
    kind = settings.pop("rope_type", settings.pop("type", "default"))
    settings.pop("type", None)
    if kind not in SCALINGS:
        raise ValueError(f"unsupported RoPE type {kind!r}; supported: {', '.join(SCALINGS)}")
    unknown = sorted(set(settings) - set(_ROPE_KEYS))
    if unknown:
        raise ValueError(f"RoPE of type {kind!r} with the settings {unknown} is not supported")
    allowed = ("rope_theta", "partial_rotary_factor", *_MEANT_FOR[kind])
    fields = {_ROPE_KEYS[key]: value for key, value in settings.items() if key in allowed}
    if kind in ("llama3", "yarn"):
        fields.setdefault("original_length", context_length)
    return Rope(scaling=kind, **fields)


def write_rope(rope: Rope) -> dict[str, Any]:
    """The other way round."""
    keys = ("rope_theta", *_MEANT_FOR[rope.scaling], *(("partial_rotary_factor",) if rope.share != 1 else ()))
    values = {key: getattr(rope, _ROPE_KEYS[key]) for key in keys}
    return {"rope_type": rope.scaling} | {key: value for key, value in values.items() if value is not None}


def read_windows(hf: Any) -> tuple[int | None, ...] | None:
    """Windows by layer from ``layer_types``; None where no layer has one."""
    windows = tuple(hf.sliding_window if kind == SLIDING else None for kind in hf.layer_types)
    return windows if any(windows) else None


def write_windows(c: DecoderConfig) -> dict[str, Any]:
    """The other way round."""
    windows = c.windows or (None,) * c.layers
    sizes = {window for window in windows if window is not None}
    if len(sizes) > 1:
        raise ValueError(f"layers with windows of different sizes {sorted(sizes)} have no Hugging Face form")
    kinds = [FULL if window is None else SLIDING for window in windows]
    return {"layer_types": kinds} | ({"sliding_window": sizes.pop()} if sizes else {})
