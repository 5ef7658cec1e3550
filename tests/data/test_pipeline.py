"""Batches by step: whole epochs, exact resumption, shares of processes, fingerprints, mismatched answers."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import islice

import jax
import numpy as np
import pytest

from dpo_jax.data.layouts import LAYOUTS, Shape
from dpo_jax.data.pipeline import Pipeline
from dpo_jax.types import CHOSEN, UNUSED
from tests.tiny import random_examples, ranked_examples

SHAPE = Shape(2, prompt_length=5, answer_length=8, row_length=30, row_examples=4)
COUNT = 60
EXAMPLES = random_examples(COUNT, SHAPE)


def pipeline(layout: str = "packed", source=EXAMPLES, shape: Shape = SHAPE, **options) -> Pipeline:
    return Pipeline(source, shape, **{"layout": layout, "batch_size": 4, "seed": 3, **options})


def prompts_of(batch, layout: str) -> list[bytes]:
    """The prompts of a batch's examples, which tell the examples apart."""
    found = []
    rows = batch.answers
    every = 2 if layout == "concatenated" else 1
    for r in range(0, rows.tokens_RL.shape[0], every):
        for group in range(1, rows.group_RL[r].max() + 1):
            prompt = (rows.group_RL[r] == group) & (rows.branch_RL[r] == 0)
            answers = rows.tokens_RL[r : r + every][rows.group_RL[r : r + every] == group]
            found.append(rows.tokens_RL[r][prompt].tobytes() + b"|" + answers.tobytes())
    return found


def assert_equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_epoch_holds_every_example_once(layout: str) -> None:
    made = pipeline(layout)
    steps = made.steps(1.0)
    first, second = (
        [p for s in range(e * steps, e * steps + steps) for p in prompts_of(made.batch(s), layout)] for e in (0, 1)
    )
    everything = Counter(p for batch in made.eval_batches() for p in prompts_of(batch, layout))
    assert sum(everything.values()) == COUNT
    assert Counter(first) == everything
    if layout != "packed":  # whose epochs may differ by a step
        assert Counter(second) == everything
    assert first != second


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_continues_reads_what_it_would_have_read(layout: str) -> None:
    whole = list(islice(pipeline(layout).train_batches(0), 40))
    for a, b in zip(whole[17:], islice(pipeline(layout).train_batches(17), 23), strict=True):
        assert_equal(a, b)
    assert_equal(whole[30], pipeline(layout).batch(30))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_seed_gives_another_order(layout: str) -> None:
    assert prompts_of(pipeline(layout).batch(0), layout) != prompts_of(pipeline(layout, seed=4).batch(0), layout)


@pytest.mark.parametrize("mismatched", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shares_of_processes_are_the_whole(layout: str, mismatched: bool) -> None:
    whole = pipeline(layout, mismatched=mismatched)
    parts = [pipeline(layout, mismatched=mismatched, process=(i, 2)) for i in range(2)]
    for step in (0, 11):
        joined = jax.tree.map(lambda *a: np.concatenate(a), *(p.batch(step) for p in parts))
        assert sorted(prompts_of(joined, layout)) == sorted(prompts_of(whole.batch(step), layout))
        same = {a.tokens_RL.shape for a in (joined.answers, whole.batch(step).answers)}
        assert len(same) == 1
        if mismatched:
            used = [b.mismatched.role_RS[b.mismatched.role_RS != UNUSED].size for b in (joined, whole.batch(step))]
            assert used[0] == used[1]
    last = [list(p.eval_batches())[-1] for p in parts]
    assert {a.answers.tokens_RL.shape[0] for a in last} == {len(joined.answers.tokens_RL) // 2}


def test_every_packed_batch_has_the_same_shape_and_full_rows() -> None:
    made = pipeline(source=random_examples(400, SHAPE))
    for step in range(made.steps(2.0)):
        made.batch(step)
    assert made.filling.shapes == {(4, 30)}
    numbers = made.filling.numbers()
    assert numbers["compiled_shapes"] == 1
    assert numbers["padding_share"] < 0.12
    assert numbers["useful_tokens_per_row"] == pytest.approx(30 * (1 - numbers["padding_share"]))


def test_an_epoch_is_not_ordered_by_length() -> None:
    # What fills rows up comes before its turn. Where rows have just room for the longest example, those made last have
    # longer ones: in that order the correlation is 0.43.
    made = pipeline(source=random_examples(1000, SHAPE), shape=replace(SHAPE, row_length=19), batch_size=1)
    batches = [made.batch(step).answers for step in range(made.steps(1.0))]
    lengths = [b.weight_RM.sum() / (b.role_RS != UNUSED).sum() for b in batches]
    assert abs(np.corrcoef(lengths, range(len(lengths)))[0, 1]) < 3 / len(lengths) ** 0.5


def test_examples_of_a_prompt_stay_together_and_an_epoch_holds_them_once() -> None:
    shape = Shape(2, prompt_length=5, answer_length=8, row_length=64, row_examples=24, prompt_answers=4)
    ranked = [replace(e, family=None) for e in ranked_examples(30, shape)]
    rng = np.random.default_rng(0)
    source = [ranked[i] for i in rng.permutation(len(ranked))]
    made = pipeline(source=source, shape=shape, batch_size=2)
    for batches in ([made.batch(s) for s in range(made.steps(1.0))], list(made.eval_batches())):
        rows = [batch.answers for batch in batches]
        assert all(b.tokens_RL.shape == (2, 64) and b.branches == 4 for b in rows)
        # Six pairs and four answers to a group: all that there are of its prompt.
        pairs = sum(int((b.role_RS == CHOSEN).sum()) for b in rows)
        groups = [tuple(b.branch_RL[r][b.group_RL[r] == g]) for b in rows for r in (0, 1) for g in set(b.group_RL[r])]
        laid = [max(branches) for branches in groups if 0 in branches and max(branches)]
        assert pairs == 180 and len(laid) == 30 and max(laid) == 4
    padded = pipeline(source=source, shape=replace(shape, prompt_answers=None), batch_size=2)
    assert made.steps(1.0) < padded.steps(1.0) / 2
    assert_equal(list(islice(made.train_batches(3), 2))[1], made.batch(4))
    with_mismatched = pipeline(source=source, shape=shape, batch_size=2, mismatched=True).batch(0)
    assert (with_mismatched.mismatched.role_RS == CHOSEN).sum() == (with_mismatched.answers.role_RS == CHOSEN).sum()
    with pytest.raises(ValueError, match="data.prompt_answers is 1, and an example has 2 answers"):
        pipeline(shape=replace(SHAPE, prompt_answers=1))


def test_mismatched_answers_of_packed_rows_are_all_there() -> None:
    made = pipeline(mismatched=True)
    batch = made.batch(0)
    answers = [sorted(b.role_RS[b.role_RS != UNUSED].tolist()) for b in (batch.answers, batch.mismatched)]
    assert answers[0] == answers[1]
    assert batch.mismatched.tokens_RL.shape[0] % 4 == 0


def test_mismatched_answers_seldom_take_more_rows_than_the_batch() -> None:
    shape = replace(SHAPE, row_length=64, row_examples=24)
    made = pipeline(source=random_examples(1000, SHAPE), shape=shape, mismatched=True)
    batches = [made.batch(step) for step in range(made.steps(1.0) - 1)]
    assert {b.answers.tokens_RL.shape for b in batches} == {(4, 64)}
    assert {b.mismatched.tokens_RL.shape[1] for b in batches} == {72}
    # Of rows of 64 positions, 7 batches in 10 would take eight.
    assert np.mean([b.mismatched.tokens_RL.shape[0] == 4 for b in batches]) > 0.95


def test_mismatched_answers_that_might_not_fit_into_a_row_are_refused() -> None:
    shape = Shape(2, prompt_length=5, answer_length=8, row_length=18, row_examples=4)
    with pytest.raises(ValueError, match="up to 19 positions; a row has 18"):
        pipeline(source=EXAMPLES[:1], shape=shape, mismatched=True)


def test_fingerprints_tell_what_differs() -> None:
    base = pipeline().fingerprint()
    assert base == pipeline().fingerprint()
    assert set(base) == {"data", "pipeline"}
    other = pipeline(source=random_examples(COUNT, SHAPE, seed=1)).fingerprint()
    assert other["data"] != base["data"] and other["pipeline"] == base["pipeline"]
    for options in ({"seed": 4}, {"batch_size": 8}, {"layout": "concatenated"}, {"mismatched": True}):
        changed = pipeline(**options).fingerprint()
        assert changed["data"] == base["data"]
        differing = {k for k, v in json.loads(changed["pipeline"]).items() if json.loads(base["pipeline"])[k] != v}
        assert differing == set(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "stacked"}, "unknown layout 'stacked'; known: concatenated"),
        ({"source": []}, "no examples"),
        ({"process": (0, 3)}, "does not divide over 3 processes"),
        ({"shape": Shape(2, 5, 8)}, "row_length is not set"),
    ],
)
def test_what_cannot_be_a_pipeline_is_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(**options)
