"""The experiment in experiments/theory: its quick mode runs, and its committed results say what its README does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.theory import run as theory

FOLDER = Path(theory.__file__).parent


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads((FOLDER / "results/summary.json").read_text())


def test_quick_mode_runs_and_agrees_with_theory(tmp_path, capsys):
    theory.main([f"--out={tmp_path}", "--quick"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert all(row["largest_error"] < 1e-3 for row in summary["tabular"])
    for row in summary["bandits"]:
        if row["loss"] == "ipo":
            # c alone is decided on D3'; between a and b a short run wanders.
            assert row["policy"][2] == pytest.approx(row["ipo_closed_form"][2], abs=0.01)
        elif row["tau"] <= 1:
            assert row["policy"][2] < 0.02
    assert all(row["largest_error"] < 1e-5 for row in summary["flips"])
    assert {p.name for p in tmp_path.iterdir()} == {"bandits.csv", "summary.json", "tables.md", "theory.png"}
    assert str(tmp_path) in capsys.readouterr().out.splitlines()[-1]


def test_dpo_reached_the_bradley_terry_optimum(committed):
    assert {row["beta"] for row in committed["tabular"]} == {0.1, 0.5, 1.0}
    assert all(row["largest_error"] < 1e-3 for row in committed["tabular"])


def test_ipo_ended_at_its_closed_form_and_dpo_collapsed(committed):
    rows = committed["bandits"]
    assert {row["tau"] for row in rows} == {0.1, 0.5, 1.0, 5.0}
    assert all(row["largest_error"] < 0.01 for row in rows if row["loss"] == "ipo")
    collapsed = [row for row in rows if row["loss"] == "dpo" and row["tau"] <= 1]
    assert all(row["policy"][-1] < 1e-3 for row in collapsed)
    assert all(row["policy"][0] > 0.999 for row in collapsed if row["bandit"] != "D3'")


def test_robust_was_unbiased(committed):
    assert all(row["largest_error"] < 1e-5 and row["largest_deviation"] < 4 for row in committed["flips"])


def test_the_readme_holds_the_committed_tables():
    readme, tables = ((FOLDER / name).read_text() for name in ("README.md", "results/tables.md"))
    assert readme.split("<!-- tables.md -->\n")[1].split("<!-- end -->")[0].strip() == tables.strip()
