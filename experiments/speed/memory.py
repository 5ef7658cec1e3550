"""What a train step needs beside its state, for each choice of what layers keep: from the compiler; nothing is run.

python -m experiments.speed.memory --model=runs/smollm2/hf --positions=768
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import jax

from dpo_jax.build import build, guarded, guarded_step, make_parallel, state_shapes
from dpo_jax.config import Config, from_config_dict
from dpo_jax.data.tokenizer import open_tokenizer
from dpo_jax.main import command
from dpo_jax.models.config import REMAT
from dpo_jax.plan import GIB, longest_batch
from dpo_jax.progress import track
from experiments.smollm2 import config as smollm2


def main(argv: list[str] | None = None) -> None:
    """Prints a line for each choice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder; its weights are not read")
    parser.add_argument("--positions", type=int, default=768, help="of the one row of a step, filled by a pair")
    arguments = parser.parse_args(argv)
    with command():
        print("\n".join(table(arguments.model, arguments.positions)))


def table(model: Path, positions: int) -> Iterator[str]:
    """One line for each ``config.model.remat``: GiB of the state, and of what the step needs beside it.

    Args:
      model: Hugging Face folder.
      positions: of a row that one pair fills, prompt and answers a third each.
    """
    vocabulary = len(open_tokenizer(model))
    yield "| `model.remat` | state, GiB | beside it, GiB |"
    yield "|---|---|---|"
    for remat in track(list(REMAT), "steps compiled", unit="step"):
        state, beside = needed(configure(model, positions, remat), vocabulary)
        yield f"| {remat} | {state / GIB:.2f} | {beside / GIB:.2f} |"


def needed(config: Config, vocabulary: int) -> tuple[int, int]:
    """(bytes of the step's arguments, bytes beside them) of a compiled train step."""
    parts = build(config, vocab_size=vocabulary, answers=2)
    parallel = make_parallel(config.parallel, parts.model, jax.devices())
    state = jax.eval_shape(lambda s: guarded(s, 0), state_shapes(parts))
    step = parallel.train_step(guarded_step(config, parts, 100, parallel.axis))
    shapes = parallel.shapes(state, longest_batch(config, parts), parts.hyper, config.train.micro_batches)
    memory = step.lower(*shapes).compile().memory_analysis()
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes


def configure(model: Path, positions: int, remat: str) -> Config:
    """DPO of a model with one row a step."""
    config = smollm2.get_config()
    config.init.hf = str(model)
    third = positions // 3
    config.data.update(layout="packed", row_length=positions, prompt_length=third, answer_length=third, batch_size=1)
    config.model.remat = remat
    config.train.update(micro_batches=1, head_chunk=512)
    return from_config_dict(config)


if __name__ == "__main__":
    main()
