"""The loss family: one file a family, one line a loss.

To add a loss, write a pure function ``losses/<name>.py``, add its line here, and test it in ``tests/losses/``. A
keyword argument of a new name needs its range in ``RANGES`` (``losses/hyper.py``) and a placeholder in ``loss`` of
``configs/base.py`` too.
``python -m dpo_jax.losses`` prints all of them with formula, defaults, paper and needs.
"""

from __future__ import annotations

from functools import partial

from dpo_jax.losses.aot import aot, aot_unpaired, match_margins, match_ratios
from dpo_jax.losses.apo import apo_down, apo_zero, apo_zero_unpaired
from dpo_jax.losses.base import Answers, Loss
from dpo_jax.losses.bco import INITIAL_SHIFT, bco_pair, bco_unpaired, reward_shift
from dpo_jax.losses.beta_dpo import INITIAL_THRESHOLD, beta_dpo, dynamic_beta
from dpo_jax.losses.cpo import cpo
from dpo_jax.losses.cpo import likelihood as cpo_likelihood
from dpo_jax.losses.discopop import discopop
from dpo_jax.losses.dpo import dpo, sigmoid_norm
from dpo_jax.losses.dpop import dpop
from dpo_jax.losses.exo import exo_pair
from dpo_jax.losses.hinge import hinge
from dpo_jax.losses.ipo import ipo
from dpo_jax.losses.kto import kto, reference_point, weight_warning
from dpo_jax.losses.nca import nca_pair
from dpo_jax.losses.odpo import odpo
from dpo_jax.losses.orpo import likelihood as orpo_likelihood
from dpo_jax.losses.orpo import orpo
from dpo_jax.losses.r_dpo import r_dpo
from dpo_jax.losses.robust import robust
from dpo_jax.losses.sft import sft
from dpo_jax.losses.simpo import simpo
from dpo_jax.losses.sppo import sppo_hard
from dpo_jax.losses.unlikelihood import unlikelihood

# Pairs against a reference, through the divergence's score: DPO and its nearest kin.
_shaped = partial(Loss, sees="pairs", takes_divergence=True)

LOSSES: dict[str, Loss] = {
    "dpo": _shaped(dpo),
    "ipo": _shaped(ipo),
    "hinge": _shaped(hinge),
    "robust": _shaped(robust),
    "exo_pair": _shaped(exo_pair),
    "nca_pair": _shaped(nca_pair),
    "bco_pair": _shaped(bco_pair, couples_batch=True, statistic=reward_shift, state=INITIAL_SHIFT),
    "sppo_hard": _shaped(sppo_hard),
    "aot": Loss(aot, sees="pairs", couples_batch=True, statistic=match_margins),
    "aot_unpaired": Loss(aot_unpaired, sees="pairs", couples_batch=True, statistic=match_ratios),
    "apo_zero": Loss(apo_zero, sees="pairs"),
    "apo_down": _shaped(apo_down),
    "discopop": _shaped(discopop),
    "sigmoid_norm": _shaped(sigmoid_norm, reduction="mean"),
    "r_dpo": _shaped(r_dpo),
    "odpo": _shaped(odpo),
    "dpop": _shaped(dpop),
    "beta_dpo": _shaped(beta_dpo, couples_batch=True, statistic=dynamic_beta, state=INITIAL_THRESHOLD),
    "simpo": Loss(simpo, sees="pairs", needs_reference=False, reduction="mean"),
    "cpo": Loss(cpo, likelihood=cpo_likelihood, sees="pairs", needs_reference=False),
    "orpo": Loss(
        orpo, likelihood=orpo_likelihood, sees="pairs", needs_reference=False, needs_prompt=True, reduction="mean"
    ),
    "unlikelihood": Loss(unlikelihood, sees="pairs", needs_reference=False),
    "kto": Loss(kto, sees="answers", needs_mismatched=True, statistic=reference_point, advice=weight_warning),
    "apo_zero_unpaired": Loss(apo_zero_unpaired, sees="answers"),
    "bco_unpaired": Loss(
        bco_unpaired,
        sees="answers",
        takes_divergence=True,
        couples_batch=True,
        statistic=reward_shift,
        state=INITIAL_SHIFT,
    ),
    "sft": Loss(sft, sees="chosen", needs_reference=False),
}

__all__ = ["LOSSES", "Answers", "Loss"]
