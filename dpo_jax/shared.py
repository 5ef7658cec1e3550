"""What runs of one process have in common, made once: opened data, judges, first parameters, compiled programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import TypeVar

from dpo_jax.config import Config, to_json

T = TypeVar("T")


class Shared:
    """Things by what they were made from. Runs on their own have one each; those of a sweep have one together."""

    def __init__(self) -> None:
        self._made: dict[Hashable, object] = {}

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` gave for this key, made now when it is asked for the first time."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[return-value]


def compiled_seed(config: Config) -> int:
    """The seed where steps have it compiled in, as those with dropout have; 0 for all others."""
    return config.seed if config.lora.rank is not None and config.lora.dropout else 0


def program_key(config: Config) -> str:
    """What of a config its compiled steps depend on: configs with equal keys run the same programs.

    Left out are the numbers that are traced (the learning rate and those of the losses) and what only the host reads.
    A key of the config that is not named here counts, so that a new one can never share a program by mistake.
    """
    objective = config.objective()[0]
    data = dataclasses.replace(config.data, path=None, eval_path=None, dir="", flip=0.0, tokenizer=None)
    changed = dataclasses.replace(
        config,
        seed=compiled_seed(config),
        data=data,
        init=dataclasses.replace(config.init, run=None),
        loss=dataclasses.replace(config.loss, name=" + ".join(term.name for term in objective.terms), hyper={}),
        optim=dataclasses.replace(config.optim, learning_rate=1.0),
        train=dataclasses.replace(config.train, steps=None, epochs=None, log_every=1),
        eval=dataclasses.replace(config.eval, every=1, examples=0, prompts=0, temperature=1.0, reward=""),
        checkpoint=None,  # type: ignore[arg-type]
        prefer=None,  # type: ignore[arg-type]
    )
    return to_json(changed)
