"""Losses, rewards and gradients against the numbers that TRL 1.16's own lines gave (``make_goldens.py``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.losses.objective import Scored, make_objective
from dpo_jax.metrics import compute
from dpo_jax.types import CHOSEN, PROMPT, REJECTED
from tests.losses.examples import sum_tokens

GOLDENS = json.loads(Path(__file__).with_name("goldens.json").read_text())
ANSWERS = GOLDENS["answers"]
LONGEST = max(len(a) for a in ANSWERS["policy"])

# Both sides work in fp32 on sums of at most nine tokens: a few roundings of 6e-8, which exp and squares multiply by at
# most some tens.
TOLERANCE = 1e-5

# TRL's case -> our words. β is written out wherever the papers' default, which is ours, is not TRL's 0.1.
PAIRED: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo/sigmoid": ("dpo", {}),
    "dpo/sigmoid_forward_kl": ("dpo", {"divergence": "forward_kl"}),
    "dpo/sigmoid_jensen_shannon": ("dpo", {"divergence": "jensen_shannon"}),
    "dpo/sigmoid_alpha": ("dpo", {"divergence": "alpha", "hyper": {"divergence_alpha": 0.3}}),
    "dpo/sigmoid_desensitized": ("dpo", {"reduction": "desensitized", "hyper": {"length_alpha": 0.4}}),
    "dpo/sigmoid_wpo": ("dpo", {"wpo": True}),
    # TRL's `sigmoid` takes label smoothing and ignores it; ours, asked for none, agrees.
    "dpo/sigmoid_ignores_label_smoothing": ("dpo", {}),
    "dpo/hinge": ("hinge", {"hyper": {"beta": 0.4}}),
    # TRL averages IPO's log-ratios over tokens; the paper, and our default, sums them.
    "dpo/ipo": ("ipo", {"reduction": "mean"}),
    "dpo/ipo_forward_kl": ("ipo", {"reduction": "mean", "divergence": "forward_kl"}),
    "dpo/exo_pair": ("exo_pair", {"hyper": {"label_smoothing": 1e-3}}),
    "dpo/nca_pair": ("nca_pair", {}),
    "dpo/robust": ("robust", {"hyper": {"label_smoothing": 0.2}}),
    # TRL's pairwise BCO has no reward shift; the paper, and our default, has: see ZERO_SHIFT.
    "dpo/bco_pair": ("bco_pair", {}),
    "dpo/sppo_hard": ("sppo_hard", {"hyper": {"beta": 0.1}}),
    "dpo/aot": ("aot", {"hyper": {"label_smoothing": 0.1}}),
    "dpo/aot_unpaired": ("aot_unpaired", {"hyper": {"label_smoothing": 0.1}}),
    "dpo/apo_zero": ("apo_zero", {}),
    "dpo/apo_down": ("apo_down", {}),
    "dpo/discopop": ("discopop", {}),
    "dpo/sigmoid_norm": ("sigmoid_norm", {"hyper": {"beta": 5.0}}),
    "dpo/sft": ("sft", {}),
    "dpo/mpo": ("0.8*dpo + 0.2*bco_pair + 1.0*sft", {}),
    "cpo/cpo": ("cpo", {"hyper": {"label_smoothing": 0.1}}),
    "cpo/simpo": ("simpo", {}),
    "orpo/orpo": ("orpo", {}),
}
UNPAIRED: dict[str, tuple[str, dict[str, Any]]] = {
    "kto/kto": ("kto", {"hyper": {"desirable_weight": 1.2, "undesirable_weight": 0.9}}),
    "kto/apo_zero_unpaired": ("apo_zero_unpaired", {}),
}
ZERO_SHIFT = {"bco_pair": {"shift": jnp.float32(0.0)}}

# What TRL logs differently, by case: LD-DPO's rewards and log-probabilities are the desensitised ones there, SimPO's
# and ORPO's log-probabilities are means over tokens (ours are always sums), and plain likelihood is given a reference.
OTHER_METRICS = {
    "dpo/sigmoid_desensitized": ("rewards/", "logps/"),
    "cpo/simpo": ("logps/",),
    "orpo/orpo": ("logps/",),
    "dpo/sft": ("rewards/",),
}


def test_every_golden_is_compared():
    assert set(GOLDENS["cases"]) == set(PAIRED) | set(UNPAIRED)
    assert GOLDENS["made_by"]["trl"].startswith("1.16.")


@pytest.mark.parametrize("case", [*PAIRED, *UNPAIRED])
def test_loss_gradient_and_metrics_are_trls(case):
    golden = GOLDENS["cases"][case]
    paired = case in PAIRED
    name, words = (PAIRED if paired else UNPAIRED)[case]
    objective, hyper = make_objective(name, **words)
    tokens, scored_of = _batch(paired)
    scored = scored_of(tokens)
    totals = objective.totals(scored.role, scored.policy.count)
    difference_B = jnp.asarray(ANSWERS["mismatched_policy"]) - jnp.asarray(ANSWERS["mismatched_reference"])
    numbers, _ = objective.statistics(
        hyper, objective.initial_state(), scored, totals, difference_B, jnp.ones(len(difference_B), bool)
    )
    numbers |= {k: v for k, v in ZERO_SHIFT.items() if k in numbers}

    loss, gradient = jax.value_and_grad(lambda t: objective.loss(hyper, scored_of(t), totals, numbers))(tokens)

    np.testing.assert_allclose(loss, golden["loss"], rtol=TOLERANCE, atol=TOLERANCE)
    expected = _pad(golden["gradient"], paired)
    np.testing.assert_allclose(gradient[:, :, 0], expected, rtol=TOLERANCE, atol=TOLERANCE)
    metrics = compute(objective.metrics(hyper, scored, totals, numbers))
    for key, value in golden["metrics"].items():
        if key.startswith(OTHER_METRICS.get(case, ())) or (not paired and key == "rewards/margins"):
            continue
        assert metrics[key] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), key


def _batch(paired: bool):
    """Token log-probabilities [X, A, 2, T], answer and prompt, and a function from them to the scored batch."""
    prompt = _pad(ANSWERS["prompt"], paired)
    lengths = np.array([len(a) for a in ANSWERS["policy"]])
    prompt_lengths = np.array([len(a) for a in ANSWERS["prompt"]])
    both = np.stack([_arrange(lengths, paired), _arrange(prompt_lengths, paired)], -1)
    mask = np.arange(LONGEST) < both[..., None]
    if paired:
        role = np.broadcast_to(np.array([[CHOSEN, PROMPT], [REJECTED, PROMPT]], np.int32), both.shape)
    else:
        kinds = np.where(ANSWERS["desirable"], CHOSEN, REJECTED).astype(np.int32)[:, None]
        role = np.stack([kinds, np.full_like(kinds, PROMPT)], -1)

    def full(name: str) -> jnp.ndarray:
        return jnp.asarray(np.stack([_pad(ANSWERS[name], paired), prompt], 2))

    collision, reference = full("log_collision"), sum_tokens(full("reference"), jnp.zeros(mask.shape), mask)

    def scored_of(tokens: jnp.ndarray) -> Scored:
        return Scored(sum_tokens(tokens, collision, mask), reference, jnp.asarray(role), jnp.zeros(both.shape))

    return full("policy"), scored_of


def _pad(ragged: list[list[float]], paired: bool) -> np.ndarray:
    """[X, A, T], zeros past the end."""
    rows = np.zeros((len(ragged), LONGEST), np.float32)
    for row, values in zip(rows, ragged, strict=True):
        row[: len(values)] = values
    return _arrange(rows, paired)


def _arrange(rows: np.ndarray, paired: bool) -> np.ndarray:
    """TRL's order, all chosen answers first, as [X, A, …]."""
    return np.stack(np.split(rows, 2), 1) if paired else rows[:, None]
