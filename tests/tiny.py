"""Small examples and models that tests share."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import steps
from dpo_jax.data.example import Answer, Example
from dpo_jax.data.layouts import LAYOUTS, Shape
from dpo_jax.logprobs import score
from dpo_jax.losses.objective import make_objective
from dpo_jax.models import init_params, make_model
from dpo_jax.optim import AdamW
from dpo_jax.parallel import DataParallel, run_compiled
from dpo_jax.state import Hyper, StepConfig
from dpo_jax.types import CHOSEN, REJECTED, PreferenceBatch

VOCAB = 37

# Op by op, a test would spend a minute on compiling hundreds of small programs.
jit_score = jax.jit(score, static_argnums=(0, 3, 4))


def tiny_model(**sizes: Any):
    """A GPT-2 of two layers that compiles in a moment."""
    fields = dict(vocab_size=VOCAB, context_length=32, width=16, layers=2, heads=2, mlp_width=32, dtype=jnp.float32)
    return make_model("gpt2", {**fields, **sizes})


def windowed_model():
    """A Gemma 2 of the same size, one of whose layers sees three positions."""
    fields = dict(vocab_size=VOCAB, context_length=32, width=16, layers=2, heads=4, kv_heads=2, mlp_width=32)
    return make_model("gemma2", {**fields, "head_size": 4, "windows": (3, None)})


def tiny_params(model, seed: int = 0, scale: float = 8.0):
    """Fresh parameters with large matrices, so that distributions are far from even."""
    return jax.tree.map(lambda p: p * scale if p.ndim > 1 else p, _fresh(model, seed))


@functools.cache
def _fresh(model, seed: int):
    return jax.tree.map(np.asarray, run_compiled(lambda key: init_params(model, key), jax.random.key(seed)))


class Bigram(nn.Module):
    """The smallest family: a token's hidden state is its own embedding. Compiles far faster than a decoder."""

    logit_cap = None

    def setup(self) -> None:
        self.token_embedding = self.param("token_embedding", nn.initializers.normal(1.0), (VOCAB, 8))
        self.head_matrix = self.param("kernel", nn.initializers.normal(1.0), (VOCAB, 8))

    def __call__(self, tokens_RL, position_RL, mask_RLL):
        return self.token_embedding[tokens_RL]

    def head(self):
        return self.head_matrix


def make_answer(tokens, role: int = CHOSEN, score: float = 0.0) -> Answer:
    tokens = np.asarray(tokens, np.int32)
    return Answer(tokens, np.ones(len(tokens), np.float32), role, score)


def random_examples(count: int, shape: Shape, seed: int = 0) -> list[Example]:
    """Examples of all lengths that ``shape`` allows."""
    rng = np.random.default_rng(seed)
    draw = lambda most: rng.integers(1, VOCAB, rng.integers(1, most + 1)).astype(np.int32)  # noqa: E731
    roles = (CHOSEN, REJECTED)
    return [
        Example(
            i,
            draw(shape.prompt_length),
            tuple(
                make_answer(draw(shape.answer_length), roles[a] if shape.answers == 2 else roles[i % 2])
                for a in range(shape.answers)
            ),
        )
        for i in range(count)
    ]


def ranked_examples(prompts: int, shape: Shape, answers: int = 4) -> list[Example]:
    """All pairs of several answers to each prompt, as a ranking gives them; each prompt is a family."""
    rng = np.random.default_rng(5)
    draw = lambda most: rng.integers(1, VOCAB, rng.integers(1, most + 1)).astype(np.int32)  # noqa: E731
    found: list[Example] = []
    for family in range(prompts):
        prompt = np.append(draw(shape.prompt_length)[1:], family).astype(np.int32)  # no two are equal
        ranked = [draw(shape.answer_length) for _ in range(answers)]
        for better, worse in itertools.combinations(ranked, 2):
            pair = make_answer(better, CHOSEN), make_answer(worse, REJECTED)
            found.append(Example(len(found), prompt, pair, family))
    return found


@dataclass
class Setup:
    """A train step with all that it eats, for some loss on some devices."""

    parallel: DataParallel
    function: Any
    step: Any
    state: Any
    hyper: Any

    def run(self, batches: list[PreferenceBatch], micro_batches: int = 1):
        """Steps over the batches; returns (state on the host, metrics of each step)."""
        state, metrics = self.state, []
        for batch in batches:
            state, m = self.step(state, self.parallel.shard(batch, micro_batches), self.hyper)
            metrics.append({k: v.compute() for k, v in self.parallel.unreplicate(m).items()})
        return self.parallel.unreplicate(state), metrics


def setup(loss: str, *, answers: int = 2, devices: int = 1, learning_rate: float = 1e-2, model=None, **options: Any):
    """A compiled train step; the reference differs from the policy.

    The optimizer's epsilon is large: with the usual 1e-8, Adam divides rounding noise by rounding noise wherever a
    gradient is 0, and no two orders of summation would agree.
    """
    model = model or Bigram()
    objective, numbers = make_objective(loss, **options.pop("objective", {}))
    optimizer = AdamW(b1=0.9, b2=0.95, epsilon=1e-3, weight_decay=0.01, clip_norm=1.0)
    parallel = DataParallel(jax.devices()[:devices])
    config = StepConfig(answers, "cosine", 1, 10, 16, **options)
    function = steps.make_train_step(model, objective, optimizer, config, parallel.axis)
    state = steps.init_state(objective, optimizer, tiny_params(model, 0, 1.0), tiny_params(model, 1, 1.0))
    traced = Hyper({k: np.float32(v) for k, v in numbers.items()}, np.float32(learning_rate))
    step = parallel.train_step(function)
    return Setup(parallel, function, step, parallel.replicate(state), parallel.replicate(traced))


def lay_out(examples: list[Example], shape: Shape, layout: str = "concatenated") -> PreferenceBatch:
    return PreferenceBatch(LAYOUTS[layout](examples, shape))
