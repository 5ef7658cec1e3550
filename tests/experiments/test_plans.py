"""The table of plans: a line by hand, and the README's lines are those of the plans that are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpo_jax import plan
from dpo_jax.flops import Work
from dpo_jax.hlo import Collective
from experiments.tpu import plans

FOLDER = Path(__file__).parents[2] / "experiments" / "tpu"


def test_a_plan_is_made_once_and_becomes_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    made = []

    def make_plan(config, topology):
        made.append(topology)
        gib = plan.GIB
        memory = plan.Memory(gib, gib // 2, 2 * gib, 8 * gib, 16 * gib)
        seconds = {"compute": 0.5, "memory": 0.1, "links": 2.0}
        traffic = [Collective("all-gather", 3, 1e9)]
        return plan.Plan(topology, 16, "", 10**9, "splash", memory, Work(1e15, 1.25e15), traffic, seconds)

    monkeypatch.setattr(plan, "make_plan", make_plan)
    monkeypatch.setattr(plans, "version", lambda name: "1")
    for _ in range(2):
        plans.main([f"--out={tmp_path}", "--only=pythia_2_8b_v5e_16"])
    assert made == ["v5e:4x4"]
    line = (tmp_path / plans.TABLE_FILE).read_text(encoding="utf-8").splitlines()[2]
    # 1e15 useful products in 2 s on 16 chips of 1.97e14 each: 16 %.
    assert line == (
        "| `pythia_2_8b_v5e_16` | v5e:4x4 | fsdp 16 | 4 | dots | **8.00** of 16.00 | 1.00 + 0.50 + 2.00 + 4.50 | "
        "1 → 1.25: 1.25 | 2 s, links; 16% |"
    )
    assert line in capsys.readouterr().out


def test_an_unknown_config_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="--only names gpt5; configs/tpu has llama3_70b_v5e_256, "):
        plans.main([f"--out={tmp_path}", "--only=gpt5"])


def test_every_config_has_its_plan_in_the_readme() -> None:
    kept = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (FOLDER / "results").glob("*.json")}
    assert sorted(kept) == plans.names()
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for line in plans.table(FOLDER / "results"):
        assert line in text
    assert all(facts["fits"] for facts in kept.values())
