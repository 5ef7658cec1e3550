"""A report of a sweep: all numbers are there, text stays text, and nothing comes from elsewhere."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpo_jax import figures, report, results
from dpo_jax.config import to_json
from tests import tiny_run

EVIL = "<script>alert('x')</script>"
METHODS, NOISE, RATES, SEEDS = ("dpo", "ipo"), ("0", "0.2"), ("0.1", "0.2"), ("0", "1")


def write_run(place: Path, gain: float, seed: int) -> None:
    """A finished run whose reward rises by ``gain`` an evaluation, and whose KL by 2 nats."""
    (place / "samples").mkdir(parents=True)
    rng, lines = np.random.default_rng(seed), []
    base = rng.uniform(0.3, 0.5, 40)
    for t in range(3):
        rows = [
            {"prompt": f"{EVIL} {i}", "answer": f"{EVIL} & {t}", "reward": base[i] + gain * t, "log_ratio": 2.0 * t}
            for i in range(40)
        ]
        (place / "samples" / f"step_{5 * t:06d}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        numbers = {"samples/reward": base.mean() + gain * t, "samples/kl": 2.0 * t, "eval/logps/chosen": -9.0 - t}
        lines.append(json.dumps({"step": 5 * t, **numbers}))
    (place / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (place / "config.json").write_text(to_json(tiny_run.make_config(Path("x"), seed=seed)))
    (place / "summary.json").write_text("{}")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    axes = {"loss.name": METHODS, "data.flip": NOISE, "optim.learning_rate": RATES, "seed": SEEDS}
    runs = {}
    for m in METHODS:
        for n in NOISE:
            for r in RATES:
                for s in SEEDS:
                    name = f"name={m},flip={n},learning_rate={r},seed={s}"
                    runs[name] = dict(zip(axes, (m, n, r, s), strict=True))
                    gain = 0.1 + 0.05 * (m == "ipo") + 0.05 * (r == "0.2")
                    write_run(folder / "runs" / name, gain, int(s))
    runs["unfinished"] = dict(zip(axes, ("ipo", "0", "0.1", "2"), strict=True))
    (folder / "sweep.json").write_text(json.dumps({"axes": axes, "runs": runs}))
    return folder


@pytest.fixture(scope="module")
def out(sweep: Path) -> Path:
    return report.run(sweep, sweep / "report").parent


class Reader(HTMLParser):
    """Tags and what they refer to; raises where they are not nested."""

    VOID = {"meta", "img"}

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.links, self.open, self.words = [], [], [], []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.words.append(data)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_page_stands_alone_and_shows_text_as_it_is(out: Path) -> None:
    reader = Reader()
    reader.feed((out / "report.html").read_text(encoding="utf-8"))
    assert not reader.open
    assert "script" not in reader.tags and "link" not in reader.tags
    assert reader.links and all(link.startswith("data:image/png;base64,") for link in reader.links)
    assert any(EVIL in words for words in reader.words)
    assert any("1 runs are not finished and left out: unfinished" in words for words in reader.words)


def test_pictures_are_there(out: Path) -> None:
    for name in ("across", "frontier", "curves_0", "curves_1"):
        with Image.open(out / f"{name}.png") as image:
            assert min(image.size) > 300 and len(set(image.convert("L").getdata())) > 20


def test_a_legend_is_no_wider_than_its_figure() -> None:
    results = {"all": {f"a method with a long name, {i}": [] for i in range(5)}}
    figure = figures.frontier(results, list(results["all"]), {})
    for name in results["all"]:
        figure.axes[0].plot([], [], label=name)
    figure.legends.clear()
    figures._legend(figure, figure.axes[0])
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width


def test_the_better_rate_is_chosen_and_its_reward_reported(sweep: Path, out: Path) -> None:
    found = {(r["at"], r["condition"], r["method"]): r for r in rows(out / "best.csv")}
    assert len(found) == 2 * 2 * 4  # methods, conditions; the best point and three levels of KL
    best = found["best point", "flip 0.2", "ipo"]
    assert (best["chosen"], best["of"], best["KL, nats"], best["seeds"]) == ("0.2, step 10", "4", "4.00", "2")
    _, runs, _ = results.load(sweep)
    test = [r.path("test")[1][2].mean() for r in runs if r.method == "ipo" and r.setting == ("0.2",)]
    assert float(best["reward"]) == pytest.approx(np.mean(test), abs=5e-4)


def test_methods_are_compared_at_equal_kl(out: Path) -> None:
    """Rewards rise by 0.2 and 0.15 for 2 nats: at 1, 2 and 3 nats they are 0.025, 0.05 and 0.075 apart."""
    found = [r for r in rows(out / "comparisons.csv") if r["condition"] == "flip 0"]
    assert [r["at"] for r in found] == ["best point", "KL 1 nats", "KL 2 nats", "KL 3 nats"]
    assert [float(r["difference"]) for r in found] == pytest.approx([0.1, 0.025, 0.05, 0.075], abs=1e-9)
    assert all(r["comparison"] == "ipo − dpo" for r in found)


def test_what_was_given_to_methods_and_what_differs(out: Path) -> None:
    fairness = rows(out / "fairness.csv")
    assert [(r["method"], r["settings tried"], r["seeds"], r["steps"]) for r in fairness] == [
        ("dpo", "2", "0, 1", "10"),
        ("ipo", "2", "0, 1", "10"),
    ]
    assert "All methods were given the same" in (out / "report.html").read_text(encoding="utf-8")
    assert list(rows(out / "configs.csv")[0]) == ["run", "seed"]
    assert len(rows(out / "evaluations.csv")) == 16 * 3


def test_roles_of_axes() -> None:
    labels = {"a": ["1", "2"], "optim.learning_rate": ["3"], "b": ["4", "5"], "seed": ["0", "1"]}
    roles = results.roles_of(labels, None, None, "seed")
    assert (roles.compared, roles.tuned, roles.conditions) == ("a", ("optim.learning_rate",), ("b",))
    roles = results.roles_of(labels, "b", ["a"], "seed")
    assert (roles.compared, roles.tuned, roles.conditions) == ("b", ("a",), ())
    with pytest.raises(ValueError, match="has no axis c; it has a, optim.learning_rate, b, seed"):
        results.roles_of(labels, "c", None, "seed")
    with pytest.raises(ValueError, match="has nothing to compare"):
        results.roles_of({"seed": ["0", "1"]}, None, None, "seed")


def test_a_sweep_without_finished_runs_is_told(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"axes": {"a": ["1"]}, "runs": {"run": {"a": "1"}}}))
    with pytest.raises(ValueError, match="no run of .* is finished"):
        report.run(tmp_path, tmp_path / "out")
