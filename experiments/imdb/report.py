"""What the sentiment experiment found: a table, samples side by side and the path of reward against KL."""

from __future__ import annotations

import itertools
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from absl import logging

from dpo_jax.data.prepared import PreparedExamples, read_metadata
from dpo_jax.prefer import EXAMPLES_FOLDER
from dpo_jax.writers import read_metrics, split_lines

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # told apart by the colour-blind too (Okabe & Ito)
FIGURE, TABLE, SAMPLES = "reward_kl.png", "report.md", "samples.md"

ACCURACY = "eval/rewards/accuracies"
ROWS = {
    "samples/reward": ("reward of samples, P(positive)", "{:.3f}"),
    "samples/kl": ("KL(policy ‖ reference), nats a sequence", "{:z.2f}"),
    ACCURACY: ("implicit-reward accuracy on held-out pairs", "{:.3f}"),
    "eval/rewards/margins": ("implicit-reward margin, β · nats", "{:.3f}"),
    "samples/length": ("length of answers, tokens", "{:.1f}"),
    "samples/eos_share": ("share of answers that end with EOS", "{:.3f}"),
    "samples/repetition": ("repeated trigrams, share", "{:.3f}"),
}


def write(workdir: Path, shown: int = 4) -> None:
    """Writes and prints the report of a finished experiment.

    Args:
      workdir: folder of the experiment, with the DPO run in ``dpo``.
      shown: samples that are printed side by side.
    """
    evaluations = evaluations_of(workdir)
    table = _table(evaluations[0], evaluations[-1])
    samples = _samples(workdir / "dpo" / "samples", int(evaluations[-1]["step"]), shown)
    (workdir / TABLE).write_text(table + "\n" + samples, encoding="utf-8")
    draw([evaluations], best_of(workdir), workdir / FIGURE)
    print(table, samples, sep="\n")
    _say_where(workdir)


def evaluations_of(workdir: Path) -> list[dict[str, float]]:
    """The rows of the DPO run's ``metrics.jsonl`` that have samples."""
    return [row for row in read_metrics(workdir / "dpo" / "metrics.jsonl") if "samples/reward" in row]


def _table(first: dict[str, float], last: dict[str, float]) -> str:
    lines = ["| | reference | policy |", "|---|---|---|"]
    for name, (title, form) in ROWS.items():
        before, after = (form.format(row[name]) for row in (first, last))
        if name == ACCURACY:
            before = "–"  # its own implicit rewards are all 0: every pair is a tie
        error = f" ± {form.format(last[name + '_se'])}" if f"{name}_se" in last else ""
        lines.append(f"| {title} | {before} | {after}{error} |")
    return "\n".join(lines) + "\n\n± is one standard error over the sampled prompts.\n"


def _samples(folder: Path, last: int, shown: int) -> str:
    before, after = (
        [json.loads(line) for line in split_lines((folder / f"step_{step:06d}.jsonl").read_text(encoding="utf-8"))]
        for step in (0, last)
    )
    blocks = []
    for a, b in list(zip(before, after, strict=True))[:shown]:
        blocks += [f"prompt      {a['prompt']}"]
        blocks += [_wrapped("reference", a), _wrapped("policy", b), ""]
    return "\n".join(blocks)


def _wrapped(name: str, row: dict[str, object]) -> str:
    head = f"{name:<10}"
    text = f"({row['reward']:.2f}) {row['answer']}".replace("\n", " ")
    return textwrap.fill(text, 110, initial_indent=head + "  ", subsequent_indent=" " * 12)


def draw(runs: Sequence[list[dict[str, float]]], best: tuple[int, float], path: Path) -> None:
    """Draws the paths of reward against KL, a line a run, a point an evaluation with bars of one standard error.

    Args:
      runs: rows of ``metrics.jsonl`` that have samples, of each run.
      best: (n, mean reward of the best of n answers of the reference).
      path: of the PNG.
    """
    matplotlib.use("Agg")
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for rows, color in zip(runs, itertools.cycle(COLORS), strict=False):
        kl, reward = ([row[f"samples/{name}"] for row in rows] for name in ("kl", "reward"))
        kl_error, reward_error = ([row[f"samples/{name}_se"] for row in rows] for name in ("kl", "reward"))
        label = f"seed {runs.index(rows)}" if len(runs) > 1 else "DPO, a point an evaluation"
        axes.errorbar(
            kl, reward, xerr=kl_error, yerr=reward_error, color=color, marker="o", ms=4, lw=1.2, capsize=2, label=label
        )
    axes.axhline(best[1], color="black", ls="--", lw=1, label=f"best of {best[0]} answers of the reference")
    axes.set_xlabel("KL(policy ‖ reference), nats a sequence")
    axes.set_ylabel("reward of samples, P(positive)")
    axes.set_title("DPO on IMDb sentiment: reward bought with KL")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def best_of(workdir: Path) -> tuple[int, float]:
    """Answers sampled a prompt, and the mean reward of the best of them, from the held-out pairs."""
    folder = workdir / "preferences" / EXAMPLES_FOLDER
    best: dict[bytes, float] = {}
    for example in PreparedExamples(folder, "eval"):
        key = example.prompt.tobytes()
        best[key] = max(best.get(key, 0.0), example.answers[0].score)
    answers = read_metadata(folder).details["config"]["prefer"]["answers"]
    return answers, sum(best.values()) / len(best)


def _say_where(workdir: Path) -> None:
    run = workdir / "dpo"
    for what, path in {
        "figure": workdir / FIGURE,
        "table and samples": workdir / TABLE,
        "config": run / "config.json",
        "metrics": run / "metrics.jsonl",
        "TensorBoard events": run / "tensorboard",
        "checkpoints": run / "checkpoints",
        "all samples": run / "samples",
    }.items():
        logging.info("%-18s %s", what, path)
