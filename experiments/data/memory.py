"""Time and peak memory of preparing pairs from a file that is made on the fly, for several sizes.

python -m experiments.data.memory --pairs=10000,100000,1000000
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from dpo_jax.data.encode import Encoder, Encoding
from dpo_jax.data.preparation import Part, Request, prepare
from dpo_jax.data.prepared import PreparedExamples
from dpo_jax.data.tokenizer import train_tokenizer
from dpo_jax.main import command, parse_flags

_PAIRS = flags.DEFINE_list("pairs", ["10000", "100000"], "Sizes, pairs; each is prepared by a process of its own.")
_ONE = flags.DEFINE_integer("one", None, "Prepare this size here, and print its numbers as JSON.")
_WORDS = [
    "the", "of", "a", "small", "large", "film", "was", "good", "bad", "and", "then", "it", "rained", "so",
    "we", "left", "early", "without", "a", "word", "about", "it",
]  # fmt: skip


def write_pairs(path: Path, count: int) -> None:
    """Writes random pairs of about 90 words."""
    rng = random.Random(0)
    with path.open("w") as file:
        for i in range(count):
            row = {
                "prompt": f"{i} " + " ".join(rng.choices(_WORDS, k=30)),
                "chosen": " ".join(rng.choices(_WORDS, k=30)),
                "rejected": " ".join(rng.choices(_WORDS, k=30)),
            }
            file.write(json.dumps(row) + "\n")


def measure(count: int) -> dict[str, float]:
    """Prepares so many pairs, and tells how long it took and how much memory the process has had at most."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        write_pairs(path, count)
        tokenizer = train_tokenizer([" ".join(_WORDS)] * 10, 512)
        encoder = Encoder(tokenizer, Encoding(64, 64))
        request = Request(Part(None, str(path)), None, 0.05, "raise", 0.01)
        before = _peak_mib()
        began, used = time.monotonic(), time.process_time()
        place = prepare(request, encoder, "none", Path(folder) / "data")
        seconds, processor = time.monotonic() - began, time.process_time() - used
        prepared = sum(len(PreparedExamples(place, split)) for split in ("train", "eval"))
        assert prepared == count
    return {
        "pairs": count,
        "pairs_per_second": count / seconds,
        "pairs_per_processor_second": count / processor,
        "peak_mib_before": before,
        "peak_mib": _peak_mib(),
    }


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@command()
def main(_: Sequence[str]) -> None:
    if _ONE.value is not None:
        print(json.dumps(measure(_ONE.value)))
        return
    print(
        "| pairs | pairs/s | pairs per processor second | peak RSS before, MiB | peak RSS, MiB |\n|---|---|---|---|---|"
    )
    for size in _PAIRS.value:
        command = [sys.executable, "-m", "experiments.data.memory", f"--one={size}"]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        numbers = json.loads(out.splitlines()[-1])
        print("| " + " | ".join(f"{value:.0f}" for value in numbers.values()) + " |", flush=True)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
