"""Preferences that no reward explains: where the methods must end with infinitely many labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.complex import run as experiment

SETTINGS = experiment.Settings(problems=2, pairs=(None,), steps=2000, betas=(2.0, 1.0, 0.6))


@pytest.fixture(scope="module")
def cyclic() -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    mu = rng.dirichlet(np.full(experiment.ANSWERS, 3.0), 2)
    p = np.stack([experiment.cyclic(rng)] * 2)
    labels = np.stack([experiment.make_labels(q, m, None, rng) for q, m in zip(p, mu, strict=True)])
    return experiment.policies(SETTINGS, labels, mu, p), mu, p


@pytest.mark.parametrize("make", experiment.ANNOTATORS.values())
def test_preferences_are_preferences(make):
    p = make(np.random.default_rng(0))
    np.testing.assert_allclose(p + p.T, 1, atol=1e-12)
    np.testing.assert_allclose(np.diag(p), 0.5)


def test_dpo_ends_where_rlhf_does(cyclic):
    """A table can hold any reward, so that DPO is RLHF, Bradley–Terry preferences or not (arXiv 2305.18290, §4)."""
    found, _, _ = cyclic
    np.testing.assert_allclose(found["dpo"], found["rlhf"], atol=2e-4)  # Adam has not quite arrived


def test_ipo_ends_at_its_closed_form(cyclic):
    """π ∝ μ exp(P(y ≻ μ)/τ), arXiv 2310.12036, eq. 12, which wins most against μ for its KL."""
    found, mu, p = cyclic
    wins = np.einsum("nab,nb->na", p, mu)
    expected = mu[:, None] * np.exp(wins[:, None] / np.array(SETTINGS.betas)[:, None])
    np.testing.assert_allclose(found["ipo"], expected / expected.sum(-1, keepdims=True), atol=2e-4)


def test_the_equilibrium_has_no_best_answer(cyclic):
    """Against the regularised Nash policy, the best reply is that policy: π ∝ μ exp(P(y ≻ π)/τ)."""
    found, mu, p = cyclic
    for n, tau in enumerate(SETTINGS.betas):
        policy = found["nash"][0, n]
        reply = mu[0] * np.exp(p[0] @ policy / tau)
        np.testing.assert_allclose(policy, reply / reply.sum(), atol=1e-5)


def test_quick_mode_ends_in_a_table_and_a_picture(tmp_path: Path):
    settings = experiment.Settings(problems=2, pairs=(None,), steps=50, betas=(4.0, 0.1))
    rows = experiment.run(settings, tmp_path)
    assert {row["method"] for row in rows} == {"dpo", "ipo", "rlhf", "best", "nash"}
    assert len((tmp_path / "results.csv").read_text().splitlines()) == len(rows) + 1
    with Image.open(tmp_path / "complex.png") as picture:
        assert min(picture.size) > 300
