"""The loss family: one file a family, one line a loss.

To add a loss, write a pure function ``losses/<name>.py``, add its line here, and test it in ``tests/losses/``.
"""

from __future__ import annotations

from dpo_jax.losses.base import Answers, Loss
from dpo_jax.losses.dpo import dpo
from dpo_jax.losses.ipo import ipo
from dpo_jax.losses.kto import kto, reference_point
from dpo_jax.losses.sft import sft

LOSSES: dict[str, Loss] = {
    "sft": Loss(sft, sees="chosen", needs_reference=False),
    "dpo": Loss(dpo, sees="pairs"),
    "ipo": Loss(ipo, sees="pairs"),
    "kto": Loss(kto, sees="answers", needs_mismatched=True, statistic=reference_point),
}

__all__ = ["LOSSES", "Answers", "Loss"]
