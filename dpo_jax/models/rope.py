"""Rotary position embeddings (arXiv 2104.09864) and the scalings that stretch them over longer texts.

Each pair of coordinates (i, i + E'/2) of a query or key is turned by position · frequency_i, E' being the share of the
head that is rotated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.types import Array

SCALINGS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """One rotary embedding.

    Attributes:
      theta: base of the wavelengths.
      share: part of each head that is rotated, in (0, 1].
      scaling: a name in SCALINGS.
      factor: how many times longer the texts become (all scalings but default).
      original_length: texts that the unscaled model was trained on, tokens (llama3 and yarn).
      low_freq_factor: llama3: wavelengths beyond original_length / low_freq_factor are stretched in full.
      high_freq_factor: llama3: wavelengths below original_length / high_freq_factor are left alone.
      beta_fast: yarn: frequencies that turn more often than this within original_length are left alone.
      beta_slow: yarn: those that turn less often are stretched in full.
      truncate: yarn: whether the border between the two is widened to whole coordinates.
      attention_factor: yarn: what multiplies cos and sin; None is 0.1 · ln(factor) + 1.
    """

    theta: float = 10000.0
    share: float = 1.0
    scaling: str = "default"
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.scaling not in SCALINGS:
            raise ValueError(f"unsupported RoPE type {self.scaling!r}; supported: {', '.join(SCALINGS)}")

    def angles(self, position_RQ: Array, size: int) -> tuple[Array, Array]:
        """cos and sin of position · frequency, float32 [R, Q, E'/2] each, for heads of ``size`` coordinates."""
        angle = position_RQ[..., None].astype(jnp.float32) * self.frequencies(size)[None, None]
        return jnp.cos(angle) * self.magnitude, jnp.sin(angle) * self.magnitude

    @property
    def magnitude(self) -> float:
        if self.scaling != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def frequencies(self, size: int) -> np.ndarray:
        """Turns of each pair of coordinates, float32 [E'/2], radians a position."""
        rotated = int(size * self.share)
        wave = np.float32(self.theta) ** (np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated))
        plain = np.float32(1.0) / wave
        if self.scaling == "linear":
            return plain / np.float32(self.factor)
        if self.scaling == "llama3":
            return self._llama3(plain)
        if self.scaling == "yarn":
            return self._yarn(plain, rotated)
        return plain

    def _llama3(self, plain: np.ndarray) -> np.ndarray:
        """Llama 3.1: long waves are stretched, short ones are not, and those between are blended by wavelength."""
        low, high = self.low_freq_factor, self.high_freq_factor
        wavelength = 2 * math.pi / plain
        kept = np.clip((self.original_length / wavelength - low) / (high - low), 0.0, 1.0)
        return ((1 - kept) * plain / self.factor + kept * plain).astype(np.float32)

    def _yarn(self, plain: np.ndarray, rotated: int) -> np.ndarray:
        """YaRN (arXiv 2309.00071, section 3.2): the same, blended linearly by coordinate."""

        def coordinate(turns: float) -> float:
            return rotated * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = coordinate(self.beta_fast), coordinate(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotated - 1)
        high += 0.001 if low == high else 0.0
        stretched = np.clip((np.arange(rotated // 2, dtype=np.float32) - low) / (high - low), 0.0, 1.0)
        return (plain / self.factor * stretched + plain * (1 - stretched)).astype(np.float32)


@jax.custom_vjp
def rotate(x_RQHE: Array, cos_RQE: Array, sin_RQE: Array) -> Array:
    """Turns the first coordinates of every head, as many as the angles are for; the rest stay. In fp32.

    Angles carry no gradient. That of x is turned back: left to itself, it is a sum of padded halves.
    """
    half = cos_RQE.shape[-1]
    cos, sin = cos_RQE[:, :, None], sin_RQE[:, :, None]
    x = x_RQHE.astype(jnp.float32)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return turned.astype(x_RQHE.dtype)


rotate.defvjp(
    lambda x, cos, sin: (rotate(x, cos, sin), (cos, sin)),
    lambda angles, cotangent: (rotate(cotangent, angles[0], -angles[1]), None, None),
)
