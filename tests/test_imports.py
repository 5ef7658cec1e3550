"""Imports go only downward, jit and pmap live in one place, and nothing reads a format that can run code."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The layer of each module; a package's entry holds for all of its modules that have no entry of their own.
LAYERS = {
    "dpo_jax": 0,
    "dpo_jax.types": 0,
    "dpo_jax.trees": 0,
    "dpo_jax.hashing": 0,
    "dpo_jax.integrity": 0,
    "dpo_jax.buckets": 0,
    "dpo_jax.hub": 0,
    "dpo_jax.allocator": 0,
    "dpo_jax.ahead": 0,
    "dpo_jax.lora": 1,
    "dpo_jax.sharding": 0,
    "dpo_jax.placing": 0,
    "dpo_jax.logprobs": 1,
    "dpo_jax.losses": 1,
    "dpo_jax.metrics": 1,
    "dpo_jax.optim": 1,
    "dpo_jax.chips": 1,
    "dpo_jax.flops": 1,
    "dpo_jax.hlo": 0,
    "dpo_jax.models": 1,
    "dpo_jax.convert": 1,
    "dpo_jax.rewards": 1,
    "dpo_jax.writers": 1,
    "dpo_jax.progress": 1,
    "dpo_jax.page": 1,
    "dpo_jax.data": 1,
    "dpo_jax.data.pipeline": 2,
    "dpo_jax.state": 2,
    "dpo_jax.gradients": 2,
    "dpo_jax.steps": 2,
    "dpo_jax.parallel": 2,
    "dpo_jax.checkpoint": 2,
    "dpo_jax.snapshot": 2,
    "dpo_jax.stopping": 2,
    "dpo_jax.processes": 2,
    "dpo_jax.guards": 3,
    "dpo_jax.logbook": 3,
    "dpo_jax.meter": 3,
    "dpo_jax.profile": 3,
    "dpo_jax.start": 3,
    "dpo_jax.build": 3,
    "dpo_jax.reference": 3,
    "dpo_jax.shared": 3,
    "dpo_jax.grid": 3,
    "dpo_jax.workdir": 3,
    "dpo_jax.reproducer": 3,
    "dpo_jax.prefill": 2,
    "dpo_jax.drawing": 1,
    "dpo_jax.sampling": 2,
    "dpo_jax.answering": 3,
    "dpo_jax.refstore": 2,
    "dpo_jax.limits": 2,
    "dpo_jax.config": 3,
    "dpo_jax.config_flag": 3,
    "dpo_jax.sources": 3,
    "dpo_jax.evaluate": 3,
    "dpo_jax.opened": 3,
    "dpo_jax.train": 4,
    "dpo_jax.prefer": 4,
    "dpo_jax.plan": 4,
    "dpo_jax.audit": 4,
    "dpo_jax.report": 4,
    "dpo_jax.results": 3,
    "dpo_jax.comparison": 3,
    "dpo_jax.figures": 3,
    "dpo_jax.export": 4,
    "dpo_jax.sample": 4,
    "dpo_jax.population": 4,
    "dpo_jax.sweep": 4,
    "dpo_jax.main": 5,
}

OURS_ABOVE = {"configs", "experiments", "tests"}
# Formats that run code when they are read, and frameworks that the project does without.
BANNED_IMPORTS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "tensorflow", "torch"}
# Workers that run in another framework's environment, and are started there as processes.
PEERS = {"experiments.speed.trl_worker", "experiments.speed.generate_worker"}
COMPILERS = {"jit", "pjit", "pmap", "shard_map", "xmap"}
# Where a part of a program is handed to devices one by one: it knows the mesh, and nothing else does.
MAY_COMPILE = {"dpo_jax.parallel": COMPILERS, "dpo_jax.sharding": {"shard_map"}}

Sources = Mapping[str, str]  # dotted module name -> its text


def read_sources(*folders: str) -> dict[str, str]:
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {_module_name(path): path.read_text(encoding="utf-8") for path in paths}


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> int | None:
    """The layer of a module, None when it has no place in the table: a module at the top needs a line of its own."""
    if module.count(".") == 1:
        return LAYERS.get(module)
    while module not in LAYERS and "." in module:
        module = module.rpartition(".")[0]
    return LAYERS.get(module)


def imported(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """Yields (module, names taken from it) of all imports, those inside of functions too.

    What stands under ``if __name__ == "__main__"`` starts the module as a program; it belongs to no layer.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), [alias.name for alias in node.names]
        else:
            yield from imported(node)


def dependencies(sources: Sources) -> dict[str, set[str]]:
    """Which of the modules each module imports; ``from package import module`` counts as importing the module."""
    graph: dict[str, set[str]] = {}
    for module, text in sources.items():
        graph[module] = set()
        for target, names in imported(ast.parse(text)):
            submodules = {f"{target}.{name}" for name in names if f"{target}.{name}" in sources}
            graph[module] |= submodules
            if target in sources and len(submodules) < max(1, len(names)):
                graph[module].add(target)
    return graph


def layer_errors(sources: Sources) -> list[str]:
    errors = []
    for module, targets in dependencies(sources).items():
        layer = layer_of(module)
        if layer is None:
            errors.append(
                f"{module} has no layer: add it to LAYERS in tests/test_imports.py, beside modules of its kind"
            )
            continue
        above = sorted(target for target in targets if (layer_of(target) or 0) > layer)
        errors += [
            f"{module} (layer {layer}) imports {target} (layer {layer_of(target)}): hand over what it needs as an "
            "argument, or move one of them"
            for target in above
        ]
    return errors


def outside_errors(sources: Sources, banned: set[str]) -> list[str]:
    return [
        f"{module} imports {target or '.'}"
        for module, text in sources.items()
        for target, _ in imported(ast.parse(text))
        if target.partition(".")[0] in banned
    ]


def cycle_error(sources: Sources) -> str | None:
    try:
        graphlib.TopologicalSorter(dependencies(sources)).prepare()
    except graphlib.CycleError as error:
        return f"modules import each other in a circle: {' ← '.join(error.args[1])}"
    return None


def compile_errors(sources: Sources) -> list[str]:
    return [
        f"{module}, line {node.lineno}: {name} belongs in dpo_jax/parallel.py"
        for module, text in sources.items()
        for node, name in _names(ast.parse(text))
        if name in COMPILERS - MAY_COMPILE.get(module, set())
    ]


def _names(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Every name that is read or imported: ``jax.jit``, ``jit``, ``from jax import jit``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node, node.attr
        elif isinstance(node, ast.Name):
            yield node, node.id
        elif isinstance(node, ast.ImportFrom):
            yield from ((node, alias.name) for alias in node.names)


def trust_errors(sources: Sources) -> list[str]:
    """Places that would let a file from a stranger run code."""
    errors = []
    for module, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            trusting = _trusting(node)
            if trusting:
                errors.append(f"{module}, line {getattr(node, 'lineno', '?')}: {trusting}")
    return errors


# Archives that are unpacked whole may hold paths that lead out of their folder; shells read what strangers wrote.
TRUSTING_CALLS = {"extractall", "unpack_archive", "system", "popen"}


def _trusting(node: ast.AST) -> str | None:
    if isinstance(node, ast.Attribute) and node.attr in TRUSTING_CALLS:
        return node.attr
    if isinstance(node, ast.keyword) and node.arg == "shell":
        return node.arg
    if isinstance(node, ast.Constant) and node.value in ("trust_remote_code", "allow_pickle"):
        return node.value
    if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
        refused = isinstance(node.value, ast.Constant) and node.value.value is False
        return None if refused else node.arg
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
        return f"{node.func.id}()"
    return None


def test_imports_go_downward_only():
    assert layer_errors(read_sources("dpo_jax")) == []


def test_no_circular_imports():
    assert cycle_error(read_sources("dpo_jax")) is None


def test_package_does_not_import_what_stands_above_it():
    assert outside_errors(read_sources("dpo_jax"), OURS_ABOVE) == []


def test_no_relative_imports():
    assert outside_errors(read_sources("dpo_jax", "configs", "experiments", "tests"), {""}) == []


def test_no_pickle_and_no_other_framework():
    sources = read_sources("dpo_jax", "configs", "experiments")
    assert sources.keys() >= PEERS
    ours = {module: text for module, text in sources.items() if module not in PEERS}
    assert outside_errors(ours, BANNED_IMPORTS) == []


def test_no_code_of_strangers_is_run():
    assert trust_errors(read_sources("dpo_jax", "configs", "experiments")) == []


def test_jit_and_pmap_live_in_parallel_only():
    assert compile_errors(read_sources("dpo_jax")) == []


# The checks themselves, on sources that are wrong.


def test_upward_import_is_found():
    sources = {"dpo_jax.trees": "def f():\n    from dpo_jax import steps", "dpo_jax.steps": ""}
    assert len(layer_errors(sources)) == 1
    assert "dpo_jax.trees (layer 0) imports dpo_jax.steps (layer 2)" in layer_errors(sources)[0]


def test_downward_import_and_program_block_are_allowed():
    sources = {
        "dpo_jax.train": "import dpo_jax.steps\nif __name__ == '__main__':\n    from dpo_jax.main import main",
        "dpo_jax.steps": "from dpo_jax.losses.dpo import dpo",
        "dpo_jax.losses.dpo": "from dpo_jax.types import Array",
        "dpo_jax.types": "",
        "dpo_jax.main": "",
    }
    assert layer_errors(sources) == []
    assert cycle_error(sources) is None


def test_unknown_module_is_found():
    assert "dpo_jax.helpers has no layer: add it to LAYERS" in layer_errors({"dpo_jax.helpers": ""})[0]


def test_one_module_of_a_package_may_be_higher():
    assert layer_of("dpo_jax.data.pipeline") == 2
    assert layer_of("dpo_jax.data.anything.else") == 1


def test_circle_is_found():
    sources = {"dpo_jax.metrics": "import dpo_jax.optim", "dpo_jax.optim": "from dpo_jax.metrics import mean"}
    error = cycle_error(sources)
    assert error is not None
    assert "dpo_jax.metrics ← dpo_jax.optim" in error


@pytest.mark.parametrize(
    "line", ["import torch.nn", "from pickle import loads", "try:\n    import tensorflow\nfinally:\n    0"]
)
def test_banned_import_is_found(line):
    assert len(outside_errors({"dpo_jax.x": line}, BANNED_IMPORTS)) == 1


@pytest.mark.parametrize(
    "line", ["from jax import jit", "@jax.jit\ndef f(): 0", "f = jax.experimental.shard_map.shard_map"]
)
def test_compiler_outside_of_parallel_is_found(line):
    assert compile_errors({"dpo_jax.x": line})
    assert not compile_errors({"dpo_jax.parallel": line})


@pytest.mark.parametrize(
    "line",
    [
        "f(trust_remote_code=True)",
        "d = {'trust_remote_code': t}",
        "eval(x)",
        "f(allow_pickle=p)",
        "z.extractall(d)",
        "run(c, shell=s)",
    ],
)
def test_trust_in_strangers_is_found(line):
    assert len(trust_errors({"dpo_jax.x": line})) == 1
    assert trust_errors({"dpo_jax.x": "f(trust_remote_code=False, allow_pickle=False)"}) == []
