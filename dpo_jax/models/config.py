"""What all decoder families are described by. A family sets its own defaults and adds what it alone has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from dpo_jax.lora import Adapter
from dpo_jax.models.rope import Rope

INPUT, ATTENDED = "input", "attended"
_ATTENTION = (INPUT, ATTENDED, "qkv", *(f"attention/{name}" for name in ("query", "key", "value")))
_OUT = ("attention_out", "attention/out", "mlp_out", "mlp/out", "mlp/down")
# What a layer keeps for the backward pass, from most to least: its input, what attention saw, and products.
REMAT: dict[str, tuple[str, ...] | None] = {
    "none": None,  # everything
    "dots": (*_ATTENTION, *_OUT, "mlp_in", "mlp/in", "mlp/gate", "mlp/up"),
    "gate": (*_ATTENTION, "mlp/gate"),
    "attention": _ATTENTION,
    "full": (INPUT,),
}
# How whole rows are attended to: dense blocks, or a kernel of TPUs (interpreted, slowly, on CPUs), or one of GPUs.
ATTENTION = ("dense", "splash", "interpreted", "triton", "cudnn")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and switches of a decoder.

    Attributes:
      vocab_size: V.
      context_length: longest sequence that the model is meant for, tokens.
      width: D.
      layers: N.
      heads: H.
      mlp_width: F.
      kv_heads: K, a divisor of H; None is H.
      head_size: E; None is D / H.
      norm_epsilon: added to the variance (or mean square) in norms.
      tied_head: whether logits are products with the token embedding; otherwise with a matrix of their own.
      qkv_bias: whether queries, keys and values have biases.
      out_bias: whether the output of attention has one.
      mlp_bias: whether the MLP's products have them.
      query_scale: what multiplies q·k; None is 1/√E.
      attention_cap: c of c·tanh(score / c) for attention scores; None leaves them alone.
      logit_cap: the same for logits.
      windows: for each layer, how many of the latest positions a token sees; None (for a layer, or altogether) is all.
      ropes: rotary embeddings; empty for a family that has none.
      rope_of_layer: for each layer, its index in ``ropes``; empty when all layers share the first.
      dtype: of activations and products.
      param_dtype: of parameters.
      output_dtype: of the final hidden states and of the product with the head; None is ``dtype``.
      unroll: layers of the scan that are compiled side by side; a divisor of N.
      remat: a name in REMAT.
      attention: a name in ATTENTION.
      adapter: low-rank adapters of linear layers; None for none.
    """

    vocab_size: int
    context_length: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    kv_heads: int | None = None
    head_size: int | None = None
    norm_epsilon: float = 1e-5
    tied_head: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    query_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    windows: tuple[int | None, ...] | None = None
    ropes: tuple[Rope, ...] = ()
    rope_of_layer: tuple[int, ...] = ()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    output_dtype: Any = None
    unroll: int = 1
    remat: str = "none"
    attention: str = "dense"
    adapter: Adapter | None = None

    def __post_init__(self) -> None:
        if self.head_size is None and self.width % self.heads:
            raise ValueError(f"model.width {self.width} is not a multiple of model.heads {self.heads}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"model.heads {self.heads} is not a multiple of model.kv_heads {self.kv_heads}")
        if self.layers % self.unroll:
            raise ValueError(f"model.unroll is {self.unroll}; expected a divisor of the model's {self.layers} layers")
        for name in ("windows", "rope_of_layer"):
            entries = getattr(self, name)
            if entries and len(entries) != self.layers:
                raise ValueError(f"model.{name} has {len(entries)} entries for {self.layers} layers")
        for name, known in (("remat", REMAT), ("attention", ATTENTION)):
            if getattr(self, name) not in known:
                raise ValueError(f"model.{name} is {getattr(self, name)!r}; known: {', '.join(known)}")

    @property
    def key_heads(self) -> int:
        """K."""
        return self.kv_heads or self.heads

    @property
    def size(self) -> int:
        """E."""
        return self.head_size or self.width // self.heads

    @property
    def score_scale(self) -> float:
        """What multiplies q·k."""
        return self.size**-0.5 if self.query_scale is None else self.query_scale
