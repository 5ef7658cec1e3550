"""The table of a measurement, from what run.py wrote.

python -m experiments.speed.table runs/speed/speed.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dpo_jax.main import command

# Of losses, nats. TRL logs four digits; its own bf16 losses are up to 5e-2 from its fp32 ones.
TOLERANCE = {"fp32": 2e-4, "bf16": 5e-2}


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, help="what run.py has written")
    arguments = parser.parse_args(argv)
    with command():
        print(markdown(json.loads(arguments.measured.read_text(encoding="utf-8"))))


def markdown(result: dict[str, Any]) -> str:
    """One line a variant; ratios are to TRL as it comes, alive at the same time."""
    variants, useful = result["variants"], result["useful"]
    limits = {d: max((v["rate"] for v in variants if v["dtype"] == d), default=0.0) for d in ("fp32", "bf16")}
    bases = [v for v in variants if v["name"] == result.get("base", "TRL, fp32")]
    first = result.get("uncounted", 1)
    pairs, tokens, flops = (sum(useful[name][first:]) for name in ("pairs", "tokens", "flops"))
    count = len(useful["pairs"]) - first
    positions_limit = ", ".join(f"{d} {rate / 1e9:.0f} GFLOP/s" for d, rate in limits.items() if rate)
    peak = next((v["ready"]["device_flops"] for v in variants if v["ready"].get("device_flops")), None)
    loads = [load[0] for load in result["load"]]
    lines = [
        f"{result['model']}: {count} steps, {pairs} pairs, {tokens} useful "
        f"tokens; matrix products at best {positions_limit}; load of the machine {min(loads):.1f} to {max(loads):.1f}.",
        "",
        "| variant | pairs/s | useful tokens/s | × TRL | × TRL, processor time | × TRL, with the reference's pass | "
        "positions per useful token | share of the limit | peak memory, GiB | first step, s more | losses as TRL |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for v in variants:
        # Where each was alone, all are compared with the same.
        peer = next((b for b in bases if b["group"] == v["group"]), bases[0] if bases else None)
        seconds, cpu = (_counted(v, key, first) for key in ("seconds", "cpu_seconds"))
        passed = v["ready"].get("reference_seconds")  # not every recording has it
        ratios = ["–"] * 3
        if peer is not None:
            ratios[:2] = (
                f"{_counted(peer, k, first) / own:.2f}" for k, own in (("seconds", seconds), ("cpu_seconds", cpu))
            )
        if peer is not None and passed is not None:
            epoch = seconds + passed * tokens / sum(useful["tokens"])
            ratios[2] = f"{_counted(peer, 'seconds', first) / epoch:.2f}"
        share = "–"
        if v["passes"] is not None:
            rate = v["passes"] * flops / seconds
            share = f"{100 * rate / limits[v['dtype']]:.0f} %"
            share += f", MFU {100 * rate / peak:.1f} %" if peak else ""
        row = [
            v["name"],
            f"{pairs / seconds:.3f}",
            f"{tokens / seconds:.0f}",
            *ratios,
            f"{sum(v['ready']['positions'][first:]) / tokens:.2f}",
            share,
            f"{v['steps'][-1]['peak_bytes'] / 2**30:.2f}",
            f"{v['steps'][0]['seconds'] - seconds / count:.1f}",
            agreement(v, peer),
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _counted(variant: dict[str, Any], key: str, first: int) -> float:
    """Sum over the steps that count."""
    return sum(step[key] for step in variant["steps"][first:])


def agreement(variant: dict[str, Any], peer: dict[str, Any] | None) -> str:
    """How far the losses are from TRL's at the same step; a row whose losses differ does not count."""
    if peer is None:
        return "–"
    # Adapters make another update: they agree at the first step alone.
    steps = slice(0, 1 if variant["passes"] is None else None)
    off = max(abs(a["loss"] - b["loss"]) for a, b in zip(variant["steps"][steps], peer["steps"][steps], strict=True))
    return f"{off:.0e}" if off <= TOLERANCE[variant["dtype"]] else f"NO: {off:.0e}, the row does not count"


if __name__ == "__main__":
    main()
