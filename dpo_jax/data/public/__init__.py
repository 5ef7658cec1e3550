"""Public preference sets: where they come from, and how their rows are read.

A set is named in ``data.path`` and downloaded once: ``hh``, ``ultrafeedback``, ``shp``, ``tldr``; or read from files
that are already here: ``shp:downloads/shp``. To add one, write its file and its line in PUBLIC_SETS.
"""

from __future__ import annotations

from dpo_jax.data.public import hh, shp, tldr, ultrafeedback
from dpo_jax.data.public.base import PublicSet, download

__all__ = ["PUBLIC_SETS", "PublicSet", "download"]

PUBLIC_SETS: dict[str, PublicSet] = {
    "hh": hh.SET,
    "ultrafeedback": ultrafeedback.SET,
    "shp": shp.SET,
    "tldr": tldr.SET,
}
