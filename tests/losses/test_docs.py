"""The page of losses is whole, and made of what the code says."""

from __future__ import annotations

import inspect
import re

import pytest

from dpo_jax.losses import LOSSES
from dpo_jax.losses.__main__ import page
from dpo_jax.losses.divergences import DIVERGENCES
from dpo_jax.losses.hyper import parameters_of
from dpo_jax.losses.reporting import GLOSSARY


@pytest.fixture(scope="module")
def sections() -> dict[str, str]:
    """The page by its second-level headings."""
    parts = re.split(r"^## ", page(), flags=re.MULTILINE)[1:]
    return {part.split("\n", 1)[0]: part for part in parts}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_formula_defaults_paper_and_needs(sections, name):
    section, loss = sections[name], LOSSES[name]
    assert inspect.getdoc(loss.fn).split("\n\n")[0].rstrip(".") in section
    assert ("a reference" in section) == loss.needs_reference
    assert ("the whole batch at once" in section) == loss.couples_batch
    for parameter, default in parameters_of(loss).items():
        assert re.search(rf"^- `{parameter}` = {default:g}, in .+: \S", section, re.MULTILINE)
    if name != "sft":
        assert re.search(r"- paper: .+arXiv \d{4}\.\d{5}", section)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_documents_every_argument(name):
    fn = LOSSES[name].fn
    docstring = inspect.getdoc(fn)
    for argument in inspect.signature(fn).parameters:
        assert re.search(rf"^  {argument}: \S", docstring, re.MULTILINE), argument
    assert "Returns:" in docstring


def test_divergences_and_metrics_are_listed(sections):
    assert all(f"| {name} |" in sections["Divergences"] for name in DIVERGENCES)
    rows = [line for line in sections["Metrics"].splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(GLOSSARY)
