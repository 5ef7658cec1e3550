"""Plans of all configs for pods, as the table of README.md: every step is compiled for its pod, minutes of a core each.

    pip install -r requirements-tpu.txt
    python -m experiments.tpu.plans --out=experiments/tpu/results

A plan that is there already is kept; remove it to compile it anew. ``--only`` names some of the configs.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpo_jax import plan
from dpo_jax.config import Config, from_config_dict
from dpo_jax.main import command
from dpo_jax.progress import track
from dpo_jax.workdir import write_atomically

CONFIGS = Path("configs/tpu")
TABLE_FILE = "plans.md"
_HEAD = (
    "| NAME | pod | mesh | micro-batches | `model.remat` | GiB a chip, of those there are | parameters + reference + "
    "optimizer + activations | PFLOP useful → spent | a step at least, bound by; MFU at most |"
)


def main(argv: list[str] | None = None) -> None:
    """Compiles what has no plan yet, and writes the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the plans; made when new")
    parser.add_argument("--only", help=f"names of configs in {CONFIGS}, with commas between; all by default")
    arguments = parser.parse_args(argv)
    with command():
        known = names()
        chosen = arguments.only.split(",") if arguments.only else known
        unknown = sorted(set(chosen) - set(known))
        if unknown:
            raise ValueError(f"--only names {', '.join(unknown)}; {CONFIGS} has {', '.join(known)}")
        write(chosen, arguments.out)


def names() -> list[str]:
    """All configs for pods."""
    return sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "base")


def write(chosen: Sequence[str], out: Path) -> None:
    """Makes the plans that are missing, then the table of all that are there.

    Args:
      chosen: names of configs.
      out: folder of the plans.

    Raises:
      OSError: the folder cannot be written, or there is no TPU compiler here.
    """
    out.mkdir(parents=True, exist_ok=True)
    missing = [name for name in chosen if not (out / f"{name}.json").exists()]
    for name in track(missing, "plans", unit="plan"):
        config = from_config_dict(importlib.import_module(f"configs.tpu.{name}").get_config())
        made = plan.make_plan(config, config.plan.topology or "")
        print(f"{name}: {plan.show(made, config)}", flush=True)
        write_atomically(out / f"{name}.json", json.dumps(_facts(made, config), indent=1) + "\n")
    text = "\n".join(table(out)) + "\n"
    write_atomically(out / TABLE_FILE, text)
    print(f"{text}\nplans and {TABLE_FILE} are in {out}")


def table(out: Path) -> Iterator[str]:
    """The lines of the Markdown table of all plans in a folder."""
    yield _HEAD
    yield "|" + "---|" * (_HEAD.count("|") - 1)
    for path in sorted(out.glob("*.json")):
        yield row(path.stem, json.loads(path.read_text(encoding="utf-8")))


def row(name: str, facts: dict[str, Any]) -> str:
    """One line of the table; a step that does not fit says so."""
    memory, work = facts["memory"], facts["work"]
    gib = {k: v / plan.GIB for k, v in memory.items()}
    parts = " + ".join(f"{gib[k]:.2f}" for k in ("parameters", "reference", "optimizer", "activations"))
    slowest = max(facts["seconds"], key=facts["seconds"].__getitem__)
    bound = f"{facts['seconds'][slowest]:.3g} s, {slowest}; {facts['mfu']:.0%}" + (
        "" if "links" in facts["seconds"] else " ¹"
    )
    cells = [
        f"`{name}`",
        facts["topology"],
        facts["mesh"],
        str(facts["micro_batches"]),
        facts["remat"],
        f"**{gib['total']:.2f}** of {gib['available']:.2f}" + ("" if facts["fits"] else ", does not fit"),
        parts,
        f"{work['useful'] / 1e15:.3g} → {work['spent'] / 1e15:.3g}: {work['spent'] / work['useful']:.2f}",
        bound if facts["fits"] else "–",
    ]
    return "| " + " | ".join(cells) + " |"


def _facts(made: plan.Plan, config: Config) -> dict[str, Any]:
    mesh = config.parallel
    axes = [f"{axis} {getattr(mesh, axis)}" for axis in ("fsdp", "tensor") if getattr(mesh, axis) > 1]
    memory = dataclasses.asdict(made.memory) | {"activations": made.memory.activations}
    return {
        "topology": made.topology,
        "mesh": " × ".join(axes),
        "micro_batches": config.train.micro_batches,
        "remat": config.model.remat,
        "attention": made.attention,
        "fits": made.memory.fits,
        "memory": memory,
        "work": {"useful": made.work.useful, "spent": made.work.spent},
        "traffic": None if made.traffic is None else [dataclasses.asdict(t) for t in made.traffic],
        "seconds": dict(made.seconds),
        "mfu": made.mfu,
        "compiled_with": {name: version(name) for name in ("jaxlib", "libtpu")},
    }


if __name__ == "__main__":
    main()
