"""How fast a training step is, beside TRL's, step by step in turns on the same pairs.

    python -m experiments.speed.run --model=runs/smollm2/hf --data=harmless-base-test.jsonl.gz --out=runs/speed
    python -m experiments.speed.run --model=small --tokenizer=runs/smollm2/hf --data=… --out=runs/speed_small
    python -m experiments.speed.run --device=gpu --model=1b --tokenizer=runs/smollm2/hf --data=… --out=runs/speed_1b \
        --rows=4 --row_length=2048 --head_chunk=2048 --together=1

Every variant is a process of its own. In each round, each of those alive takes one step on the round's pairs while the
others wait, so that whatever else the machine does meets all of them alike. TRL gets a virtual environment in
--out, or is taken from the one whose interpreter --trl_python names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from dpo_jax.convert.pretrained import open_pretrained, save_pretrained
from dpo_jax.data.tokenizer import open_tokenizer
from dpo_jax.main import command, parse_flags, with_gpu_flags
from dpo_jax.models import init_params, make_model
from experiments.speed import work
from experiments.speed.table import markdown

# Large buffers cost no page faults at every step, and lie in huge pages. A process can ask glibc for this as it starts;
# dpo_jax asks when it runs (allocator.py), which threads that are there by then do not heed.
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "10000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
TRL = ("trl==1.16.0", "torch==2.13.0", "transformers==5.23.0")
# Llamas with random weights and the vocabulary of --tokenizer: of 16 M parameters with SmolLM2's 49,152 tokens, in the
# shape of SmolLM2-135M, and in that of Llama 3.2 1B.
SHAPES = {
    "small": dict(width=256, layers=4, heads=4, mlp_width=768),
    "135m": dict(width=576, layers=30, heads=9, kv_heads=3, mlp_width=1536),
    "1b": dict(width=2048, layers=16, heads=32, kv_heads=8, mlp_width=8192),
}


@dataclass(frozen=True)
class Variant:
    """One way to take the same steps.

    Attributes:
      name: in the table.
      settings: of the worker.
      passes: through the model that the work needs: policy forward 1 and backward 2, reference 1; None where the update
        is another one (adapters).
      peer: whether it is TRL's.
      environment: variables of the process.
    """

    name: str
    settings: dict[str, Any]
    passes: int | None
    peer: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def ours(layout: str, dtype: str, reference: str, remat: str | None = None) -> Variant:
    """One of our own variants; ``remat`` stands in the place of the flag of that name."""
    names = {"step": "", "store": ", stored reference", "lora": ", LoRA rank 8"}
    passes = {"step": 4, "store": 3, "lora": None}[reference]
    settings = {"layout": layout, "dtype": dtype, "reference": reference}
    name = f"{layout}{names[reference]}"
    if remat is not None:
        name, settings["remat"] = f"{name}, remat {remat}", remat
    return Variant(f"{name}, {short(dtype)}", settings, passes, environment=MALLOC)


def trl(bf16: bool, tuned: bool) -> Variant:
    """TRL as it comes, or at its best (``trl_worker.py``)."""
    name = f"TRL{' at its best' if tuned else ''}, {'bf16' if bf16 else 'fp32'}"
    environment = MALLOC if tuned else {}
    return Variant(name, {"bf16": bf16, "tuned": tuned}, 3 if tuned else 4, peer=True, environment=environment)


def short(dtype: str) -> str:
    return {"float32": "fp32", "bfloat16": "bf16"}[dtype]


@dataclass(frozen=True)
class Device:
    """What is measured on a kind of devices.

    Attributes:
      base: what all are compared with.
      variants: all others.
      attention: of our own workers.
      warm: whether all steps are taken twice, and those of the second time count: where kernels are made for each shape
        that a step has. Elsewhere the first step alone does not count.
      environment: variables of every process.
    """

    base: Variant
    variants: tuple[Variant, ...]
    attention: str
    warm: bool
    environment: dict[str, str]


DEVICES = {
    "cpu": Device(
        trl(bf16=False, tuned=False),
        (
            ours("packed", "float32", "step"),
            trl(bf16=False, tuned=True),
            ours("packed", "float32", "store"),
            ours("packed", "float32", "step", remat="attention"),
            ours("packed", "bfloat16", "step"),
            trl(bf16=True, tuned=False),
            trl(bf16=True, tuned=True),
            ours("packed", "bfloat16", "store"),
            ours("shared_prefix", "float32", "step"),
            ours("concatenated", "float32", "step"),
            ours("packed", "float32", "lora"),
        ),
        "dense",
        False,
        {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
    ),
    "gpu": Device(
        trl(bf16=True, tuned=False),
        (
            ours("packed", "bfloat16", "step"),
            ours("packed", "bfloat16", "store"),
            ours("packed", "bfloat16", "lora"),
            trl(bf16=True, tuned=True),
        ),
        "triton",
        True,
        {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": with_gpu_flags("")},
    ),
}


class Process:
    """A worker: a process that answers each line with one of its own.

    Args:
      name: of what it measures.
      command: that starts it.
      environment: variables of its own.
      log: file that takes what else it says.
    """

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self.name, begin = name, time.perf_counter()
        everything = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
        with open(log, "a", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, env=everything
            )
        self.ready = self._read()
        told = {k: v for k, v in self.ready.items() if k != "positions"}
        logging.info("%s: ready %.1f s after its start, %s", name, time.perf_counter() - begin, told)

    def ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise OSError(f"the worker of {self.name} ended; workers.log says why")


class Runner(Process):
    """The worker of a variant, which takes a step when it is told to."""

    def __init__(
        self, variant: Variant, common: dict[str, Any], trl_python: str, out: Path, environment: dict[str, str]
    ) -> None:
        self.variant = variant
        self.steps: list[dict[str, Any]] = []
        self.rates: list[float] = []
        settings = {**variant.settings, **{k: common[k] for k in ("model", "batches")}}
        if variant.peer:
            script = str(Path(__file__).with_name("trl_worker.py"))
            command = [trl_python, script, json.dumps({**settings, "out": str(out / "trl")})]
        else:
            command = [sys.executable, "-m", "experiments.speed.ours", json.dumps({**common, **settings})]
        super().__init__(variant.name, command, {**environment, **variant.environment}, out / "workers.log")

    def step(self, number: int) -> None:
        self.steps.append(self.ask(str(number)))
        logging.info("%s: step %d, %s", self.name, number, self.steps[-1])

    def rate(self) -> None:
        self.rates.append(self.ask("rate")["rate"])


def measure(
    groups: Sequence[Sequence[Variant]],
    common: dict[str, Any],
    trl_python: str,
    out: Path,
    environment: dict[str, str],
) -> Iterator[Any]:
    """Runs the groups one after the other; in each, the variants take turns. Yields a record for each variant.

    A step that comes first in its process does not count: memory is touched, and kernels are chosen there.
    """
    batches = work.load(Path(common["batches"]))
    for number, group in enumerate(groups):
        workers = [Runner(variant, common, trl_python, out, environment) for variant in group]
        for step in range(len(batches)):
            # Each round begins with another worker.
            for worker in workers[step % len(workers) :] + workers[: step % len(workers)]:
                worker.step(step)
                worker.rate() if step + 1 < len(batches) else None
        for worker in workers:
            worker.end()
            yield {
                "group": number,
                "name": worker.variant.name,
                "peer": worker.variant.peer,
                "dtype": "bf16" if "bf16" in worker.variant.name else "fp32",
                "passes": worker.variant.passes,
                "ready": worker.ready,
                "steps": worker.steps,
                "rate": max(worker.rates),
            }


def make_random(folder: Path, shape: str, tokenizer_folder: str) -> None:
    """A Llama of one of SHAPES with random weights, as a Hugging Face folder."""
    tokenizer = open_tokenizer(Path(tokenizer_folder))
    sizes = {**SHAPES[shape], "context_length": 2048, "tied_head": True, "vocab_size": len(tokenizer)}
    model = make_model("llama", sizes)
    folder.mkdir(parents=True, exist_ok=True)
    params = jax.tree.map(jax.device_get, init_params(model, jax.random.key(0)))
    save_pretrained(folder, model, params, token_ids={"eos_token_id": tokenizer.eos_token_id})
    tokenizer.save_pretrained(folder)


def grouped(device: Device, chosen: Sequence[Variant], together: int) -> list[list[Variant]]:
    """Who takes turns with whom: ``together`` variants, the base one of them; or each of them and the base alone."""
    if together == 1:
        return [[variant] for variant in (device.base, *chosen)]
    count = together - 1
    return [[device.base, *chosen[i : i + count]] for i in range(0, len(chosen), count)]


def trl_environment(folder: Path) -> str:
    """A virtual environment with TRL; returns its interpreter."""
    python, whole = folder / "bin" / "python", folder / ".installed"
    if not whole.exists():
        logging.info("Installing %s into %s", ", ".join(TRL), folder)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *TRL], check=True)
        whole.touch()
    return str(python)


@command()
def main(_: Sequence[str]) -> None:
    """Measures, and writes numbers and table."""
    options = flags.FLAGS
    out = Path(options.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_platforms", "cpu")  # what is measured is what the workers use
    model, device = options.model, DEVICES[options.device]
    if model in SHAPES:
        model = str(out / "model")
        make_random(Path(model), options.model, options.tokenizer)
    batches = work.read_batches(
        options.data,
        options.tokenizer or model,
        rows=options.rows,
        row_length=options.row_length,
        steps=options.steps + 1,
    )
    if device.warm:
        batches = batches[1:] * 2
    work.save(batches, out / "batches.json")
    common = {
        "model": model,
        "batches": str(out / "batches.json"),
        "row_length": options.row_length,
        "remat": options.remat,
        "head_chunk": options.head_chunk,
        "attention": device.attention,
        "unroll": options.unroll,
        "cache": options.programs,
    }
    chosen = [v for v in device.variants if not options.only or v.name in options.only]
    groups = [[v for v in chosen if not v.peer]] if options.no_trl else grouped(device, chosen, options.together)
    trl_python = "" if options.no_trl else options.trl_python or trl_environment(out / "trl_environment")
    config = open_pretrained(model).model().config
    useful = {
        "pairs": [len(batch) for batch in batches],
        "tokens": [work.tokens(batch) for batch in batches],
        "flops": [work.needed_flops(config, batch, passes=1) for batch in batches],
    }
    uncounted = options.steps if device.warm else 1
    result: dict[str, Any] = {"model": options.name, "base": device.base.name, "uncounted": uncounted, "useful": useful}
    result |= {"load": [os.getloadavg()], "variants": []}
    for record in measure(groups, common, trl_python, out, device.environment):
        result["variants"].append(record)
        result["load"].append(os.getloadavg())
        (out / "speed.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(markdown(result))
    (out / "speed.md").write_text(markdown(result), encoding="utf-8")


if __name__ == "__main__":
    flags.DEFINE_string(
        "model",
        None,
        f"Hugging Face folder of a Llama; one of random weights: {', '.join(SHAPES)}",
        required=True,
    )
    flags.DEFINE_enum("device", "cpu", list(DEVICES), "what to measure on")
    flags.DEFINE_string("tokenizer", None, "folder of the tokenizer; None is the model's")
    flags.DEFINE_string("data", None, "preference pairs", required=True)
    flags.DEFINE_string("out", None, "where results and scratch files go", required=True)
    flags.DEFINE_string("trl_python", None, "interpreter with TRL; None makes a virtual environment in --out")
    flags.DEFINE_string("name", "model", "of the model, in the table")
    flags.DEFINE_integer("steps", 6, "steps that count, after the first")
    flags.DEFINE_integer("rows", 1, "packed rows whose pairs are those of a step")
    flags.DEFINE_integer("row_length", 768, "positions of a packed row: about 4 pairs")
    flags.DEFINE_integer("head_chunk", 128, "targets whose logits exist at a time")
    flags.DEFINE_string("remat", "dots", "what layers keep for the backward pass")
    flags.DEFINE_integer("unroll", 1, "layers compiled side by side")
    flags.DEFINE_integer("together", 3, "processes alive at a time; memory is what limits it")
    flags.DEFINE_multi_string("only", [], "name of a variant to measure; all, where it is not given")
    flags.DEFINE_string("programs", None, "folder that keeps our compiled programs for another run; None keeps none")
    flags.DEFINE_bool("no_trl", False, "measure our own variants only")
    app.run(main, flags_parser=parse_flags)
