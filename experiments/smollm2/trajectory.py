"""Repeats a recorded training run step by step: the same weights, token ids and optimizer, our train step.

A recording is a JSON file with ``meta`` (loss, β, optimizer, learning rate) and ``steps`` (token ids and masks of each
batch, and the loss, gradient norm and metrics that the other trainer measured on it).

    python -m experiments.smollm2.trajectory --model=runs/smollm2/hf --golden=RUN.json --out=runs/smollm2/dpo.json
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from dpo_jax.convert.pretrained import open_pretrained
from dpo_jax.losses.objective import make_objective
from dpo_jax.main import command, parse_flags
from dpo_jax.optim import AdamW
from dpo_jax.parallel import DataParallel
from dpo_jax.state import Hyper, StepConfig
from dpo_jax.steps import init_state, make_train_step
from dpo_jax.types import CHOSEN, PROMPT, REJECTED, UNUSED, PreferenceBatch, TokenBatch

# The recordings' names of losses, and what they are here.
LOSSES = {
    "sigmoid": ("dpo", None),
    "ipo": ("ipo", "mean"),
    "apo_zero": ("apo_zero", None),
    "kto": ("kto", None),
    "orpo": ("orpo", None),
}
# (ours, theirs): what is compared at every step beside the loss.
COMPARED = {
    "grad_norm": "grad_norm",
    "rewards/chosen": "rewards/chosen",
    "rewards/rejected": "rewards/rejected",
    "logps/chosen": "logps/chosen",
    "logps/rejected": "logps/rejected",
}


def rows(
    tokens: Sequence[Sequence[int]],
    real: Sequence[Sequence[int]],
    answer: Sequence[Sequence[int]],
    roles: Sequence[int],
    with_prompt: bool = False,
) -> TokenBatch:
    """A batch of one answer a row from token ids and masks, padded on the right to a multiple of 128 tokens.

    Args:
      tokens: ids, R rows of any lengths.
      real: 1 where a token is no padding.
      answer: 1 where a token belongs to the answer.
      roles: of the rows.
      with_prompt: whether a second slot scores the prompt, of chosen rows only.
    """
    length = -(-max(map(len, tokens)) // 128) * 128
    ids, real_RL, answer_RL = (
        np.array([list(row) + [0] * (length - len(row)) for row in part], np.int32) for part in (tokens, real, answer)
    )
    roles_R = np.array(roles, np.int32)
    counted = answer_RL[:, 1:] * real_RL[:, 1:]
    role_RS = roles_R[:, None]
    if with_prompt:
        counted = counted | (real_RL[:, 1:] * (roles_R == CHOSEN)[:, None])
        role_RS = np.stack([roles_R, np.where(roles_R == CHOSEN, PROMPT, UNUSED)], axis=1)
    source = np.broadcast_to(np.arange(length - 1, dtype=np.int32), counted.shape)
    slot = (1 - answer_RL[:, 1:]) if with_prompt else np.zeros_like(counted)
    position = np.maximum(np.cumsum(real_RL, axis=1) - 1, 0)
    weight, score = counted.astype(np.float32), np.zeros(role_RS.shape, np.float32)
    return TokenBatch(
        ids,
        position.astype(np.int32),
        real_RL,
        answer_RL,
        source,
        ids[:, 1:],
        slot,
        weight,
        np.broadcast_to(np.arange(role_RS.shape[1], dtype=np.int32), role_RS.shape),
        role_RS.astype(np.int32),
        score,
    )


def pairs(batch: Mapping[str, Any]) -> PreferenceBatch:
    """Rows of all chosen, then of all rejected answers → chosen and rejected of each pair in turn."""
    count = len(batch["input_ids"]) // 2
    order = [i + side * count for i in range(count) for side in (0, 1)]
    parts = ([batch[key][i] for i in order] for key in ("input_ids", "attention_mask", "completion_mask"))
    return PreferenceBatch(rows(*parts, roles=[CHOSEN, REJECTED] * count))


def pairs_with_prompt(batch: Mapping[str, Any]) -> PreferenceBatch:
    """The same from separate arrays of both sides, whose labels are −100 on the prompt."""
    tokens, real, answer = [], [], []
    for i in range(len(batch["chosen_input_ids"])):
        for side in ("chosen", "rejected"):
            tokens.append(batch[f"{side}_input_ids"][i])
            real.append(batch[f"{side}_attention_mask"][i])
            answer.append([int(label != -100) for label in batch[f"{side}_labels"][i]])
    return PreferenceBatch(rows(tokens, real, answer, [CHOSEN, REJECTED] * (len(tokens) // 2), with_prompt=True))


def unpaired(batch: Mapping[str, Any]) -> PreferenceBatch:
    """Labelled answers, and answers after the prompts of others."""
    roles = [CHOSEN if label else REJECTED for label in batch["label"]]
    own = rows(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], roles)
    keys = ("KL_input_ids", "KL_attention_mask", "KL_completion_mask")
    return PreferenceBatch(own, rows(*(batch[key] for key in keys), roles=[CHOSEN] * len(roles)))


READERS = {"kto": unpaired, "orpo": pairs_with_prompt}


def replay(golden: Mapping[str, Any], folder: str) -> Iterator[dict[str, Any]]:
    """Takes the recorded steps; yields what was measured here and there.

    Args:
      golden: a recording.
      folder: the model that it began with.
    """
    meta = golden["meta"]
    name, reduction = LOSSES[meta["variant"]]
    objective, numbers = make_objective(name, {"beta": meta["beta"]}, reduction=reduction)
    optimizer = _optimizer(meta["optimizer"])
    pretrained = open_pretrained(folder)
    model = pretrained.model(remat="full")  # the same numbers in half of the memory
    params = pretrained.params(model)
    parallel = DataParallel(jax.local_devices()[:1])
    answers = 1 if name == "kto" else 2
    config = StepConfig(answers, "constant", 0, meta["steps"], head_chunk=256)
    step = parallel.train_step(make_train_step(model, objective, optimizer, config, parallel.axis))
    hyper = Hyper({k: np.float32(v) for k, v in numbers.items()}, np.float32(meta["learning_rate"]))
    state = parallel.replicate(init_state(objective, optimizer, params, jax.tree.map(np.array, params)))
    hyper = parallel.replicate(hyper)
    del params
    read = READERS.get(name, pairs)
    for recorded in golden["steps"]:
        begin = time.monotonic()
        state, metrics = step(state, parallel.shard(read(recorded["batch"]), 1), hyper)
        ours = {key: metric.compute() for key, metric in parallel.unreplicate(metrics).items()}
        theirs = recorded["metrics"] | {"loss": recorded["loss_exact"]}
        row: dict[str, Any] = {"step": recorded["step"], "seconds": round(time.monotonic() - begin, 1)}
        for ours_key, theirs_key in {"loss": "loss", **COMPARED}.items():
            if theirs_key in theirs and ours_key in ours:
                row[ours_key] = [ours[ours_key], theirs[theirs_key]]
        yield row


def relative(pair: Sequence[float]) -> float:
    """|ours − theirs| / |theirs|; absolute where theirs is 0."""
    ours, theirs = pair
    return abs(ours - theirs) / (abs(theirs) or 1.0)


def _optimizer(meta: Mapping[str, Any]) -> Any:
    b1, b2 = meta["betas"]
    return AdamW(b1=b1, b2=b2, epsilon=meta["eps"], weight_decay=meta["weight_decay"], clip_norm=meta["max_grad_norm"])


@command()
def main(_: Sequence[str]) -> None:
    """Replays one recording and writes what it found; exits with 1 when the first or the last step is off."""
    flags_ = flags.FLAGS
    golden = json.loads(Path(flags_.golden).read_text(encoding="utf-8"))
    table = []
    for row in replay(golden, flags_.model):
        table.append(row)
        logging.info("%s", json.dumps(row))
    out = Path(flags_.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        json.dumps({"variant": golden["meta"]["variant"], "steps": table}, indent=1) + "\n", encoding="utf-8"
    )
    first, last = relative(table[0]["loss"]), relative(table[-1]["loss"])
    verdict = "agree" if first <= 1e-4 and last <= 1e-2 else "DISAGREE"
    print(
        f"{golden['meta']['variant']}: loss off by {first:.1e} at step 1 and {last:.1e} at step {len(table)}: {verdict}"
    )
    if verdict != "agree":
        raise SystemExit(1)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "folder of the model that the recording began with", required=True)
    flags.DEFINE_string("golden", None, "the recording", required=True)
    flags.DEFINE_string("out", None, "where the comparison goes, JSON", required=True)
    app.run(main, flags_parser=parse_flags)
