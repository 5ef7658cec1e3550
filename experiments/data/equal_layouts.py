"""Whether the layouts agree on real pairs, in fp32: log-probabilities, and value and gradient of every loss.

    python -m experiments.data.equal_layouts --data=harmless-base-test.jsonl.gz

Policy and reference are two fresh models. Gradients are with respect to all parameters; a difference is given relative
to the largest entry of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from dpo_jax.data.mismatched import mismatch
from dpo_jax.data.preparation import Reader
from dpo_jax.data.tokenizer import train_tokenizer
from dpo_jax.logprobs import score
from dpo_jax.losses import LOSSES
from dpo_jax.losses.objective import Scored, make_objective
from dpo_jax.main import command, parse_flags
from dpo_jax.models import init_params, make_model
from dpo_jax.parallel import DataParallel
from dpo_jax.types import UNUSED, SequenceLogps

_DATA = flags.DEFINE_string("data", None, "Preference pairs: a file, a folder or a glob.", required=True)
_PAIRS = flags.DEFINE_integer("pairs", 12, "How many to compare, the first that are used.")
_SHAPE = Shape(2, prompt_length=256, answer_length=129, with_prompt=True, row_length=512, row_examples=8)
_VOCAB = 2048


def read_pairs() -> list[Example]:
    """The first pairs, encoded with a tokenizer that is trained on all of them."""
    records = [record for _, record in Reader("skip", 1.0).records(find_files(_DATA.value), parse_row)]
    texts = [text for r in records for text in (r.prompt_text(), *(reply.text() for reply in r.replies))]
    encoder = Encoder(train_tokenizer(texts, _VOCAB), Encoding(_SHAPE.prompt_length, _SHAPE.answer_length))
    items = encoder.encode(records[: 2 * _PAIRS.value])
    return [e for item in items if isinstance(item, Encoded) for e in item.examples][: _PAIRS.value]


class Layout:
    """Scores of pairs in one layout, [X, 2, 2] (answer, then its prompt), and the way back to the parameters."""

    def __init__(self, name: str, model: Any, examples: Sequence[Example], parallel: DataParallel) -> None:
        batch = LAYOUTS[name](examples, _SHAPE)
        used = np.flatnonzero(batch.role_RS.reshape(-1, 2, 2)[:, 0, 0] != UNUSED)
        self.role, self.rating = (a.reshape(-1, 2, 2)[used] for a in (batch.role_RS, batch.score_RS))

        def of(params: Any) -> SequenceLogps:
            return jax.tree.map(lambda a: a[used], score(model, params, batch, (2, 2), 512))

        step = parallel.eval_step(of)
        pull_back = parallel.eval_step(lambda params, cotangent: jax.vjp(of, params)[1](cotangent)[0])
        self.scores: Callable[..., SequenceLogps] = lambda params: parallel.unreplicate(step(params))
        self.pull_back: Callable[..., Any] = lambda params, cotangent: parallel.unreplicate(
            pull_back(params, parallel.replicate(cotangent))
        )


def loss_and_cotangent(name: str, scored: Scored, ratio_B: np.ndarray) -> tuple[float, SequenceLogps]:
    """Value of a loss, and its gradient with respect to the scores; ``ratio_B`` is of mismatched answers, nats."""
    objective, hyper = make_objective(name)
    numbers = {key: jnp.float32(value) for key, value in hyper.items()}
    totals = objective.totals(scored.role, scored.policy.count)
    state: Mapping[str, Any] = objective.initial_state()
    statistics, _ = objective.statistics(numbers, state, scored, totals, ratio_B, np.ones(len(ratio_B), bool))
    loss = lambda policy: objective.loss(numbers, scored.replace(policy=policy), totals, statistics)  # noqa: E731
    value, cotangent = jax.value_and_grad(loss)(jax.tree.map(jnp.asarray, scored.policy))
    return float(value), cotangent


def results(layout: str, model: Any, examples: Sequence[Example], policy: Any, reference: Any) -> dict[str, Any]:
    """Scores, and (value, gradient) of each loss by its name."""
    parallel = DataParallel(jax.local_devices()[:1])
    own, other = (Layout(layout, model, e, parallel) for e in (examples, mismatch(examples)))
    policy, reference = parallel.replicate(policy), parallel.replicate(reference)
    scored = Scored(own.scores(policy), own.scores(reference), own.role, own.rating)
    ratio_B = (other.scores(policy).sum - other.scores(reference).sum)[..., 0].reshape(-1)
    found: dict[str, Any] = {"scores": scored.policy}
    for name in LOSSES:
        value, cotangent = loss_and_cotangent(name, scored, ratio_B)
        found[name] = value, own.pull_back(policy, cotangent)
    return found


@command()
def main(_: Sequence[str]) -> None:
    examples = read_pairs()
    sizes = dict(context_length=512, width=64, layers=2, heads=4, mlp_width=128, dtype=jnp.float32)
    model = make_model("gpt2", {**sizes, "vocab_size": _VOCAB})
    policy, reference = (init_params(model, jax.random.key(seed)) for seed in (0, 1))
    found = {layout: results(layout, model, examples, policy, reference) for layout in LAYOUTS}
    base = found["concatenated"]
    sums = base["scores"].sum[..., 0]
    print(f"{len(examples)} pairs; log-probabilities from {sums.min():.1f} to {sums.max():.1f} nats")
    for layout in [name for name in LAYOUTS if name != "concatenated"]:
        off = np.max(np.abs(found[layout]["scores"].sum[..., 0] - sums) / np.abs(sums))
        print(f"\n{layout} against concatenated: log-probabilities differ by {off:.1e} of themselves at most")
        print("\n| loss | value | value, relative difference | gradient, of its largest entry |\n|---|---|---|---|")
        for name in LOSSES:
            (value, gradient), (other, other_gradient) = base[name], found[layout][name]
            largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(gradient))
            gap = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), gradient, other_gradient)
            worst = max(jax.tree.leaves(gap)) / largest
            print(f"| {name} | {value:.5g} | {abs(other - value) / abs(value):.1e} | {worst:.1e} |")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
