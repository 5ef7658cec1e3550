"""The train step: identities at the start, exactness over devices and micro-batches, and how often it is compiled."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from dpo_jax.data.example import Answer, Example
from dpo_jax.data.layouts import LAYOUTS, Shape
from dpo_jax.data.pipeline import Pipeline
from dpo_jax.losses import LOSSES
from dpo_jax.losses.objective import make_objective
from dpo_jax.models import make_model
from dpo_jax.types import REJECTED, PreferenceBatch
from tests.tiny import lay_out, random_examples, setup, tiny_model

SHAPE = Shape(answers=2, prompt_length=5, answer_length=8)
ROWS = 16


def batches_for(loss: str, count: int = 3, layout: str = "concatenated", shape: Shape = SHAPE) -> list[PreferenceBatch]:
    """Batches as the pipeline makes them, with what the loss asks for."""
    entry = LOSSES[loss]
    shape = Shape(shape.answers, shape.prompt_length, shape.answer_length, entry.needs_prompt)
    source = random_examples(ROWS * count, shape)
    pipeline = Pipeline(source, shape, layout=layout, batch_size=ROWS, seed=0, mismatched=entry.needs_mismatched)
    return [pipeline.batch(step) for step in range(count)]


def assert_same_run(got, expected) -> None:
    """Losses, metrics and parameters to 1e-5: fp32 sums in another order, through three AdamW steps."""
    (state, metrics), (expected_state, expected_metrics) = got, expected
    for a, b in zip(metrics, expected_metrics, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            # Entropies, rewards and norms are sums over many tokens of size 1 to 100: relative, with a floor.
            np.testing.assert_allclose(a[name], b[name], rtol=2e-5, atol=1e-5, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), state.params, expected_state.params
    )


@functools.cache
def plain_run(loss: str):
    """One device, one micro-batch: what all others are compared with."""
    return setup(loss).run(batches_for(loss))


@pytest.mark.parametrize("loss", ["dpo", "orpo", "kto"])
def test_gpus_add_in_a_fixed_order(loss: str) -> None:
    prepared = setup(loss, model=tiny_model())
    state, hyper = (prepared.parallel.unreplicate(tree) for tree in (prepared.state, prepared.hyper))
    batch = jax.tree.map(lambda a: a[None], batches_for(loss, 1)[0])
    text = jax.jit(prepared.function).trace(state, batch, hyper).lower(lowering_platforms=("cuda",)).as_text()
    # Two threads that add to one row at a time do it in either order; with unique indices none do.
    scatters = re.findall(r'"stablehlo.scatter"\(.*', text)
    assert len(scatters) >= 3 and all("unique_indices = true" in line for line in scatters)


COUPLED = [name for name, entry in LOSSES.items() if entry.couples_batch or entry.needs_mismatched]


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("loss", ["dpo", "sft", *COUPLED])
def test_devices_change_nothing(loss: str, devices: int) -> None:
    assert_same_run(setup(loss, devices=devices).run(batches_for(loss)), plain_run(loss))


@pytest.mark.parametrize(("devices", "micro_batches"), [(1, 4), (2, 2)])
@pytest.mark.parametrize("loss", ["dpo", "sft", *COUPLED])
def test_micro_batches_change_nothing(loss: str, devices: int, micro_batches: int) -> None:
    assert_same_run(setup(loss, devices=devices).run(batches_for(loss), micro_batches), plain_run(loss))


@pytest.mark.parametrize("loss", ["dpo", "kto", "orpo"])
def test_layouts_change_nothing(loss: str) -> None:
    layouts = ("concatenated", "shared_prefix")
    one, other = (setup(loss).run(batches_for(loss, layout=layout)) for layout in layouts)
    assert_same_run(one, other)


def test_the_order_of_rows_changes_nothing_for_kto() -> None:
    """z pairs prompts with other answers by their uids, so that shuffling within a batch is harmless."""
    shape = SHAPE
    examples = random_examples(ROWS, shape)

    class Source:
        def __init__(self, order):
            self.rows = [examples[i] for i in order]

        def __len__(self):
            return ROWS

        def __getitem__(self, index):
            return self.rows[index]

    def run(order):
        pipeline = Pipeline(Source(order), shape, layout="concatenated", batch_size=ROWS, seed=0, mismatched=True)
        return setup("kto").run([next(iter(pipeline.eval_batches()))])

    got, expected = run(np.random.default_rng(0).permutation(ROWS)), run(range(ROWS))
    assert_same_run(got, expected)


@pytest.mark.parametrize(
    ("loss", "expected"), [("dpo", np.log(2)), ("ipo", 1 / (4 * 0.1**2)), ("hinge", 1.0), ("kto", 0.5)]
)
def test_a_policy_that_is_its_reference_has_the_known_loss(loss: str, expected: float) -> None:
    s = setup(loss)
    params = s.parallel.unreplicate(s.state.params)
    s.state = s.state.replace(reference=s.parallel.replicate(params))
    _, (metrics,) = s.run(batches_for(loss, 1))
    # The same program on the same numbers: margins are 0, so only the link's own rounding is left.
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    assert metrics["rewards/margins"] == 0.0
    assert metrics["rewards/accuracies"] == 0.0  # strict: a tie is no success


def test_swapping_the_answers_flips_the_margin() -> None:
    examples = random_examples(ROWS, SHAPE)
    swap = lambda e: type(e)(  # noqa: E731
        e.uid,
        e.prompt,
        tuple(type(a)(b.tokens, b.weights, a.role) for a, b in zip(e.answers, e.answers[::-1], strict=True)),
    )
    (_, (one,)), (_, (other,)) = (
        setup("dpo").run([lay_out(e, SHAPE)]) for e in (examples, [swap(e) for e in examples])
    )
    assert abs(one["rewards/margins"]) > 1e-3
    np.testing.assert_allclose(one["rewards/margins"], -other["rewards/margins"], rtol=1e-5)


def test_the_step_is_compiled_once_whatever_the_hyper_parameters() -> None:
    s = setup("dpo", learning_rate=1e-2)
    batches = batches_for("dpo", 3)
    start = s.parallel.unreplicate(s.state)
    _, first = s.run(batches)
    s.state = s.parallel.replicate(start)
    loss = {name: number * 3 if name == "dpo.beta" else number for name, number in s.hyper.loss.items()}
    s.hyper = s.hyper.replace(loss=loss, learning_rate=s.hyper.learning_rate * 2)
    _, second = s.run(batches)
    assert s.parallel.traces == {"train_step": 1}
    assert first[0]["loss"] != second[0]["loss"], "the changed numbers must have been used"


def test_no_reference_is_kept_or_scored_when_none_is_needed() -> None:
    s = setup("sft")
    assert s.state.reference is None
    batch = s.parallel.shard(batches_for("sft", 1)[0], 1)
    text = s.step.lower(s.state, batch, s.hyper).as_text()
    with_reference = setup("dpo")
    other = with_reference.step.lower(with_reference.state, batch, with_reference.hyper).as_text()
    assert text.count("dot_general") < other.count("dot_general")


def test_the_reference_stays_and_moves_only_when_told_to() -> None:
    still, moving = setup("dpo"), setup("dpo", reference_sync_every=2, reference_sync_rate=0.6)
    reference = still.parallel.unreplicate(still.state.reference)
    batches = batches_for("dpo", 2)
    after, _ = still.run(batches)
    jax.tree.map(np.testing.assert_array_equal, after.reference, reference)
    moved, _ = moving.run(batches)
    expected = jax.tree.map(lambda p, r: np.float32(0.6) * p + np.float32(1 - 0.6) * r, moved.params, reference)
    # One fused multiply-add may round differently from two operations.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), moved.reference, expected)


def test_unused_rows_count_nowhere() -> None:
    """A batch filled up with padding has the loss and the gradient of its real rows."""
    from dpo_jax.data.layouts import pad_rows

    batch = lay_out(random_examples(ROWS, SHAPE), SHAPE)
    padded = PreferenceBatch(pad_rows(batch.answers, 2 * batch.answers.tokens_RL.shape[0]))
    assert_same_run(setup("dpo").run([padded]), setup("dpo").run([batch]))


def test_unpaired_data_trains_with_kto() -> None:
    shape = Shape(answers=1, prompt_length=5, answer_length=8)
    batches = batches_for("kto", 2, shape=shape)
    assert (batches[0].answers.role_RS == REJECTED).any(), "both kinds must occur"
    one, two = setup("kto", answers=1).run(batches), setup("kto", answers=1, devices=4).run(batches, 2)
    assert_same_run(two, one)


# --- stored log-probabilities of the reference -----------------------------------------------------------------------

# Mismatched answers, a loss of the whole batch, slots for prompts, and tokens past the shortest answer.
ALL_KINDS = make_objective("dpo + 0.5*kto + 0.3*aot + 0.2*orpo", reduction="desensitized")[0]


def run_all_kinds(layout: str, stored: bool):
    s = setup("dpo + 0.5*kto + 0.3*aot + 0.2*orpo", objective={"reduction": "desensitized"})
    shape = Shape(2, 5, 8, ALL_KINDS.needs_prompt, row_length=40, row_examples=4, with_reference=stored)
    source = random_examples(3 * ROWS, shape)
    pipeline = Pipeline(source, shape, layout=layout, batch_size=8, seed=0, mismatched=ALL_KINDS.needs_mismatched)
    if stored:
        pipeline.attach = attach_bigram(s.parallel.unreplicate(s.state.reference))
        s.state = s.state.replace(reference=None)
    state, metrics = s.run([pipeline.batch(step) for step in range(3)])
    return state.replace(reference=None), metrics


@functools.cache
def scored_run(packed: bool):
    return run_all_kinds("packed" if packed else "concatenated", stored=False)


def attach_bigram(params) -> Callable[[Example], Example]:
    """Gives answers the log-probabilities of a Bigram: token after token, in float64."""
    logits = np.asarray(params["token_embedding"], np.float64) @ np.asarray(params["kernel"], np.float64).T
    logps = log_softmax(logits, axis=-1)

    def attach(example: Example) -> Example:
        def of(answer: Answer) -> Answer:
            before = np.concatenate([example.prompt[-1:], answer.tokens[:-1]])
            return replace(answer, reference=logps[before, answer.tokens].astype(np.float32))

        return replace(example, answers=tuple(map(of, example.answers)))

    return attach


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stored_reference_changes_nothing(layout: str) -> None:
    """Loss, metrics and three updates are those of a reference that is scored in the step."""
    assert_same_run(run_all_kinds(layout, stored=True), scored_run(layout == "packed"))


def test_with_a_stored_reference_none_is_kept_or_scored() -> None:
    def products(loss: str, stored: bool) -> int:
        s = setup(loss)
        if stored:
            s.state = s.state.replace(reference=None)
        batch = batches_for("dpo", 1)[0]
        if stored:
            answers = batch.answers
            batch = batch.replace(answers=answers.replace(reference_RM=np.zeros_like(answers.weight_RM)))
        return s.step.lower(s.state, s.parallel.shard(batch, 1), s.hyper).as_text().count("dot_general")

    without = products("cpo", stored=False)
    assert products("dpo", stored=True) == without < products("dpo", stored=False)


def test_at_a_vocabulary_of_128k_a_step_holds_a_few_chunks_of_logits() -> None:
    vocabulary, targets, chunk = 2**17, 128, 16
    sizes = dict(vocab_size=vocabulary, context_length=256, width=8, layers=1, heads=2, mlp_width=8)
    run = setup("dpo", model=make_model("llama", dict(sizes, dtype=jnp.bfloat16)))
    shape = Shape(2, 8, targets)
    batch = lay_out(random_examples(4, shape), shape)
    assert batch.answers.target_RM.shape == (8, targets)
    compiled = run.step.lower(run.state, run.parallel.shard(batch, 1), run.hyper).compile()
    head, logits = 4 * 8 * vocabulary, 4 * chunk * vocabulary  # bytes
    # Gradients of both tables and what the optimizer makes of them; a chunk's logits, probabilities and errors. The
    # logits of all targets would take 512 MiB.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * head + 4 * logits < 2**26
