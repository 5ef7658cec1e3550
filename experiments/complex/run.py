"""Preferences that no reward explains: python -m experiments.complex.run --out=runs/complex

Tables of six answers under three kinds of annotators, trained to the end with DPO, IPO and RLHF; what they win against
the reference, and against their worst opponent, at equal KL. The README says more.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax

from dpo_jax.comparison import at_kl, interval
from dpo_jax.losses.dpo import dpo
from dpo_jax.losses.ipo import ipo
from dpo_jax.main import command
from dpo_jax.parallel import run_compiled
from experiments.theory.answers import make_answers

ANSWERS, LEARNING_RATE, MIRROR_STEPS = 6, 0.03, 3000
MIRROR_RATE, LEAST_TAU = 0.05, 0.1  # of mirror descent, which goes round in circles for less τ
LEVELS = (0.1, 0.3, 0.6, None)  # KL(policy ‖ reference), nats; None is wherever a path is at its best


@dataclass(frozen=True)
class Settings:
    """How much is run."""

    problems: int = 20
    pairs: tuple[int | None, ...] = (100, None)  # labelled pairs; None is infinitely many
    steps: int = 3000
    betas: tuple[float, ...] = tuple(np.geomspace(30, 0.03, 24).tolist())


QUICK = Settings(problems=2, pairs=(None,), steps=1500, betas=tuple(np.geomspace(4, 0.05, 12).tolist()))


def bradley_terry(rng: np.random.Generator) -> np.ndarray:
    """One annotator with a reward: P(i ≻ j) = σ(ρ_i − ρ_j)."""
    return _sigmoid(_differences(2 * rng.normal(size=ANSWERS)))


def mixture(rng: np.random.Generator) -> np.ndarray:
    """Two groups of annotators, of 60 and 40 %, each with a strong reward of its own."""
    first, second = (_sigmoid(_differences(6 * rng.normal(size=ANSWERS))) for _ in range(2))
    return 0.6 * first + 0.4 * second


def cyclic(rng: np.random.Generator) -> np.ndarray:
    """Each answer beats the next two of a ring with 90 %, and loses to the two before it; opposite ones tie."""
    ahead = (np.arange(ANSWERS)[None] - np.arange(ANSWERS)[:, None]) % ANSWERS
    return np.select([np.isin(ahead, (1, 2)), np.isin(ahead, (4, 5))], [0.9, 0.1], 0.5)


ANNOTATORS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "Bradley–Terry": bradley_terry,
    "mixture": mixture,
    "cyclic": cyclic,
}


def make_labels(p_AA: np.ndarray, mu_A: np.ndarray, pairs: int | None, rng: np.random.Generator) -> np.ndarray:
    """Weights [A, A] of (winner, loser), adding to 1: both answers of a pair come from the reference."""
    exact = mu_A[:, None] * mu_A[None] * p_AA * (1 - np.eye(ANSWERS))
    exact /= exact.sum()
    return exact if pairs is None else rng.multinomial(pairs, exact.ravel()).reshape(exact.shape) / pairs


def train(loss: Callable, labels_AA: jax.Array, mu_A: jax.Array, beta: jax.Array, steps: int) -> jax.Array:
    """The policy [A] after Adam on the exact mean of a loss over all labels."""
    first, second = (jnp.repeat(jnp.arange(ANSWERS), ANSWERS), jnp.tile(jnp.arange(ANSWERS), ANSWERS))
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))

    def mean_loss(theta_A: jax.Array) -> jax.Array:
        logp_A, ref_A = jax.nn.log_softmax(theta_A), jnp.log(mu_A)
        chosen, rejected = (make_answers(logp_A[side], ref_A[side]) for side in (first, second))
        return jnp.sum(labels_AA.ravel() * loss(chosen, rejected, beta=beta))

    def step(carry: tuple, _: None) -> tuple:
        theta, state = carry
        updates, state = optimizer.update(jax.grad(mean_loss)(theta), state)
        return (theta + updates, state), None

    theta = jnp.log(mu_A)
    return jax.nn.softmax(jax.lax.scan(step, (theta, optimizer.init(theta)), None, steps)[0][0])


def rlhf(labels_AA: jax.Array, mu_A: jax.Array, betas: jax.Array, steps: int) -> jax.Array:
    """Bradley–Terry rewards by maximum likelihood, then the optimum of E r − β·KL: π ∝ μ exp(r/β), [β, A]."""
    # DPO with β = 1 from a uniform reference is the likelihood of rewards r = θ.
    policy_A = train(dpo, labels_AA, jnp.full(ANSWERS, 1 / ANSWERS), jnp.float32(1.0), steps)
    return jax.nn.softmax(jnp.log(mu_A)[None] + jnp.log(policy_A)[None] / betas[:, None])


def nash(p_AA: np.ndarray, mu_A: np.ndarray, tau: float) -> np.ndarray:
    """The policy that no other beats, both paying τ·KL from μ (arXiv 2312.00886): π ∝ μ exp(P(y ≻ π)/τ)."""
    log_pi = np.log(mu_A)
    for _ in range(MIRROR_STEPS):
        log_pi = (1 - MIRROR_RATE * tau) * log_pi + MIRROR_RATE * (tau * np.log(mu_A) + p_AA @ np.exp(log_pi))
        log_pi -= np.logaddexp.reduce(log_pi)
    return np.exp(log_pi)


def policies(settings: Settings, labels: np.ndarray, mu: np.ndarray, p: np.ndarray) -> dict[str, np.ndarray]:
    """Policies [problem, β, A] of every method; labels and p are [problem, A, A], mu is [problem, A]."""
    betas = jnp.array(settings.betas)

    def all_of(labels_AA: jax.Array, mu_A: jax.Array) -> dict[str, jax.Array]:
        trained = {
            name: jax.vmap(partial(train, loss, labels_AA, mu_A, steps=settings.steps))(beta=betas)
            for name, loss in (("dpo", dpo), ("ipo", ipo))
        }
        return trained | {"rlhf": rlhf(labels_AA, mu_A, betas, settings.steps)}

    found = run_compiled(jax.vmap(all_of), jnp.asarray(labels, jnp.float32), jnp.asarray(mu, jnp.float32))
    wins = np.einsum("nab,nb->na", p, mu)
    best = mu[:, None] * np.exp(wins[:, None] / np.array(settings.betas)[:, None] * 2)
    known = {"best": best / best.sum(-1, keepdims=True)}
    taus = [beta for beta in settings.betas if beta >= LEAST_TAU]
    known["nash"] = np.array([[nash(q, m, tau) for tau in taus] for q, m in zip(p, mu, strict=True)])
    return {name: np.asarray(value, np.float64) for name, value in found.items()} | known


def measure(policy_A: np.ndarray, mu_A: np.ndarray, p_AA: np.ndarray) -> tuple[float, float, float]:
    """(KL from the reference in nats, P(policy ≻ reference), P(policy ≻ its worst opponent))."""
    kl = float(np.sum(policy_A * (np.log(np.maximum(policy_A, 1e-30)) - np.log(mu_A))))
    return kl, float(policy_A @ p_AA @ mu_A), float((policy_A @ p_AA).min())


def run(settings: Settings, out: Path) -> list[dict[str, object]]:
    """Runs everything, writes ``results.csv`` and ``complex.png``, and returns the rows."""
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for annotator, make in ANNOTATORS.items():
        for pairs in settings.pairs:
            rng = np.random.default_rng(0)
            mu = rng.dirichlet(np.full(ANSWERS, 3.0), settings.problems)
            p = np.stack([make(rng) for _ in range(settings.problems)])
            labels = np.stack([make_labels(q, m, pairs, rng) for q, m in zip(p, mu, strict=True)])
            found = policies(settings, labels, mu, p)
            rows += _rows(annotator, pairs, found, mu, p)
    with (out / "results.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, out / "complex.png")
    return rows


def _rows(
    annotator: str, pairs: int | None, found: dict[str, np.ndarray], mu: np.ndarray, p: np.ndarray
) -> list[dict[str, object]]:
    paths = {
        name: np.array([[measure(pi, m, q) for pi in path] for path, m, q in zip(value, mu, p, strict=True)])
        for name, value in found.items()
    }
    values = {
        (name, level, k): np.array([_at(path, level, k) for path in value])
        for name, value in paths.items()
        for level in LEVELS
        for k in (1, 2)
    }
    rows = []
    for name in paths:
        for level in LEVELS:
            row: dict[str, object] = {
                "annotators": annotator,
                "pairs": pairs or "infinite",
                "method": name,
                "kl": level or "any",
            }
            for k, what in ((1, "reference"), (2, "worst")):
                own = values[name, level, k]
                row |= _mean(f"beats_{what}", own) | _mean(f"{what}_less_dpo", own - values["dpo", level, k])
            rows.append(row | {"problems": int(np.isfinite(own).sum())})
    return rows


def _at(path: np.ndarray, level: float | None, k: int) -> float:
    """Column ``k`` of a path [β, (KL, wins, wins)] at a level of KL; nan where it begins past it or ends before."""
    if level is None:
        return float(path[:, k].max())
    return at_kl(path[:, 0], path[:, k], level) if path[0, 0] <= level else float("nan")


def _mean(name: str, values: np.ndarray) -> dict[str, float]:
    """Mean and the half of its 95 % interval over the problems whose path reaches the level."""
    known = values[np.isfinite(values)]
    mean = known.mean() if len(known) else float("nan")
    return {name: round(float(mean), 4), f"{name}_±": round(interval(known), 4)}


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """Wins less those of DPO at equal KL, with 95 % intervals: against the reference and the worst opponent."""
    matplotlib.use("Agg")
    figure, axes = plt.subplots(2, len(ANNOTATORS), figsize=(11, 6), layout="constrained", sharex=True)
    lines = [key for key in dict.fromkeys((r["method"], r["pairs"]) for r in rows) if key[0] not in ("dpo", "best")]
    for column, annotator in zip(axes.T, ANNOTATORS, strict=True):
        for ax, what in zip(column, ("reference", "worst"), strict=True):
            for i, key in enumerate(lines):
                place = annotator, *key
                own = [r for r in rows if (r["annotators"], r["method"], r["pairs"]) == place and r["kl"] != "any"]
                x = np.array([r["kl"] for r in own], float) + 0.006 * (i - len(lines) / 2)
                y, error = ([r[f"{what}_less_dpo{end}"] for r in own] for end in ("", "_±"))
                color = f"C{('ipo', 'rlhf', 'nash').index(str(key[0]))}"
                mark = "o-" if key[1] == "infinite" else "s:"
                ax.errorbar(x, y, error, fmt=mark, ms=3, capsize=2, color=color, label=f"{key[0]}, {key[1]} pairs")
            ax.axhline(0, color="black", lw=0.8)
            ax.set(title=f"{annotator} annotators", ylabel=f"wins against the {what},\nless DPO's", xlabel="KL, nats")
            ax.grid(alpha=0.3)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _differences(reward_A: np.ndarray) -> np.ndarray:
    return reward_A[:, None] - reward_A[None]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="fewer problems, steps and β")
    arguments = parser.parse_args(argv)
    begin = time.monotonic()
    with command():
        for row in run(QUICK if arguments.quick else Settings(), arguments.out):
            print(*row.values(), sep="\t")
    print(f"done in {time.monotonic() - begin:.0f} s; results.csv and complex.png are in {arguments.out}")


if __name__ == "__main__":
    main()
