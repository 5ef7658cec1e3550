"""Whether the layouts agree on real pairs: log-probabilities, and gradients for random cotangents, in fp32.

    python -m experiments.data.equal_layouts --data=harmless-base-test.jsonl.gz

A loss sees the scores of its answers and nothing else of a batch. Where the scores and the vector–Jacobian products of
an arbitrary cotangent are equal, so are the values and gradients of every loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from dpo_jax.data.encode import Encoded, Encoder, Encoding
from dpo_jax.data.example import Example
from dpo_jax.data.files import find_files
from dpo_jax.data.formats import parse_row
from dpo_jax.data.layouts import LAYOUTS, Shape
from dpo_jax.data.preparation import Reader
from dpo_jax.data.tokenizer import train_tokenizer
from dpo_jax.logprobs import score
from dpo_jax.models import init_params, make_model
from dpo_jax.parallel import DataParallel
from dpo_jax.types import UNUSED

_DATA = flags.DEFINE_string("data", None, "Preference pairs: a file, a folder or a glob.", required=True)
_PAIRS = flags.DEFINE_integer("pairs", 12, "How many to compare, the first that are used.")
_SHAPE = Shape(2, prompt_length=256, answer_length=129, row_length=512, row_examples=8)
_VOCAB = 2048


def read_pairs() -> list[Example]:
    """The first pairs, encoded with a tokenizer that is trained on all of them."""
    records = [record for _, record in Reader("skip", 1.0).records(find_files(_DATA.value), parse_row)]
    texts = [text for r in records for text in (r.prompt_text(), *(reply.text() for reply in r.replies))]
    encoder = Encoder(train_tokenizer(texts, _VOCAB), Encoding(_SHAPE.prompt_length, _SHAPE.answer_length))
    items = encoder.encode(records[: 2 * _PAIRS.value])
    return [e for item in items if isinstance(item, Encoded) for e in item.examples][: _PAIRS.value]


def scores_and_pull_back(model: Any, params: Any, examples: Sequence[Example], layout: str) -> tuple[Any, Any]:
    """Scores of all answers [X, A], and the gradient for a cotangent that is the same in every layout."""
    batch = LAYOUTS[layout](examples, _SHAPE)
    used = np.flatnonzero(batch.role_RS.reshape(-1, 2)[:, 0] != UNUSED)
    rng = np.random.default_rng(0)
    cotangent = {name: jnp.asarray(rng.normal(size=(len(used), 2)), jnp.float32) for name in ("sum", "tail")}

    def total(params: Any) -> tuple[jax.Array, Any]:
        found = jax.tree.map(lambda a: a[used][..., 0], score(model, params, batch, (2, 1), 512))
        return sum(jnp.sum(getattr(found, name) * c) for name, c in cotangent.items()), found

    (_, found), gradient = jax.value_and_grad(total, has_aux=True)(params)
    return found, gradient


def main(_: Sequence[str]) -> None:
    examples = read_pairs()
    sizes = dict(context_length=512, width=64, layers=2, heads=4, mlp_width=128, dtype=jnp.float32)
    model = make_model("gpt2", {**sizes, "vocab_size": _VOCAB})
    params = init_params(model, jax.random.key(0))
    parallel = DataParallel(jax.local_devices()[:1])
    results = {}
    for layout in LAYOUTS:
        step = parallel.eval_step(lambda p, layout=layout: scores_and_pull_back(model, p, examples, layout))
        results[layout] = parallel.unreplicate(step(parallel.replicate(params)))
    scores, gradient = results["concatenated"]
    largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(gradient))
    print(f"{len(examples)} pairs; log-probabilities from {scores.sum.min():.1f} to {scores.sum.max():.1f} nats")
    print("| layout | log-probabilities, relative | gradient, of its largest entry |\n|---|---|---|")
    for layout, (found, other) in results.items():
        off = float(np.max(np.abs(found.sum - scores.sum) / np.abs(scores.sum)))
        pairs = zip(jax.tree.leaves(other), jax.tree.leaves(gradient), strict=True)
        worst = max(float(np.abs(a - b).max()) for a, b in pairs) / largest
        print(f"| {layout} | {off:.1e} | {worst:.1e} |")


if __name__ == "__main__":
    app.run(main)
