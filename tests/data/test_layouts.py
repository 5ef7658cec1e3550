"""Layouts: the worked tables of the docstrings, equal scores in all of them, and errors."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from dpo_jax.data.example import Example
from dpo_jax.data.layouts import LAYOUTS, Shape, concatenated, packed, pad_rows, shared_prefix
from dpo_jax.logprobs import score
from dpo_jax.types import CHOSEN, PROMPT, REJECTED, UNUSED
from tests.tiny import jit_score, lay_out, make_answer, random_examples, ranked_examples, tiny_model, tiny_params

EXAMPLE = Example(0, np.array([7, 8], np.int32), (make_answer([3, 2], CHOSEN, 0.5), make_answer([4, 2], REJECTED)))
SECOND = Example(1, np.array([9], np.int32), (make_answer([5, 2], CHOSEN), make_answer([2], REJECTED, 0.25)))
SHAPE = Shape(answers=2, prompt_length=2, answer_length=3, row_length=8, row_examples=2)


def test_concatenated_is_the_table_of_its_docstring() -> None:
    batch = concatenated([EXAMPLE], SHAPE)
    np.testing.assert_array_equal(batch.tokens_RL, [[7, 8, 3, 0], [7, 8, 4, 0]])
    np.testing.assert_array_equal(batch.position_RL, [[0, 1, 2, 0]] * 2)
    np.testing.assert_array_equal(batch.group_RL, [[1, 1, 1, 0]] * 2)
    np.testing.assert_array_equal(batch.branch_RL, [[0, 0, 1, 0]] * 2)
    np.testing.assert_array_equal(batch.source_RM, [[1, 2, 0]] * 2)
    np.testing.assert_array_equal(batch.target_RM, [[3, 2, 0], [4, 2, 0]])
    np.testing.assert_array_equal(batch.weight_RM, [[1, 1, 0]] * 2)
    np.testing.assert_array_equal(batch.role_RS, [[CHOSEN], [REJECTED]])
    np.testing.assert_array_equal(batch.score_RS, [[0.5], [0.0]])


def test_shared_prefix_is_the_table_of_its_docstring() -> None:
    batch = shared_prefix([EXAMPLE], SHAPE)
    np.testing.assert_array_equal(batch.tokens_RL, [[7, 8, 3, 4, 0, 0]])
    np.testing.assert_array_equal(batch.position_RL, [[0, 1, 2, 2, 0, 0]])
    np.testing.assert_array_equal(batch.group_RL, [[1, 1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(batch.branch_RL, [[0, 0, 1, 2, 0, 0]])
    np.testing.assert_array_equal(batch.source_RM, [[1, 2, 1, 3, 0, 0]])
    np.testing.assert_array_equal(batch.target_RM, [[3, 2, 4, 2, 0, 0]])
    np.testing.assert_array_equal(batch.slot_RM, [[0, 0, 1, 1, 0, 0]])
    np.testing.assert_array_equal(batch.weight_RM, [[1, 1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(batch.role_RS, [[CHOSEN, REJECTED]])


def test_packed_is_the_table_of_its_docstring() -> None:
    batch = packed([EXAMPLE, SECOND], SHAPE)
    np.testing.assert_array_equal(batch.tokens_RL, [[7, 8, 3, 4, 9, 5, 0, 0]])
    np.testing.assert_array_equal(batch.position_RL, [[0, 1, 2, 2, 0, 1, 0, 0]])
    np.testing.assert_array_equal(batch.group_RL, [[1, 1, 1, 1, 2, 2, 0, 0]])
    np.testing.assert_array_equal(batch.branch_RL, [[0, 0, 1, 2, 0, 1, 0, 0]])
    np.testing.assert_array_equal(batch.source_RM, [[1, 2, 1, 3, 4, 5, 4, 0, 0, 0]])
    np.testing.assert_array_equal(batch.target_RM, [[3, 2, 4, 2, 5, 2, 2, 0, 0, 0]])
    np.testing.assert_array_equal(batch.slot_RM, [[0, 0, 1, 1, 2, 2, 3, 0, 0, 0]])
    np.testing.assert_array_equal(batch.weight_RM, [[1, 1, 1, 1, 1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch.role_RS, [[CHOSEN, REJECTED, CHOSEN, REJECTED]])
    np.testing.assert_array_equal(batch.score_RS, [[0.5, 0, 0, 0.25]])


def test_a_family_is_the_table_of_its_docstring() -> None:
    third = make_answer([5, 2], CHOSEN)
    first = replace(EXAMPLE, family=3)
    second = Example(1, EXAMPLE.prompt, (third, replace(EXAMPLE.answers[0], role=REJECTED)), family=3)
    batch = packed([first, second], replace(SHAPE, prompt_answers=3))
    np.testing.assert_array_equal(batch.tokens_RL, [[7, 8, 3, 4, 5, 0, 0, 0]])
    np.testing.assert_array_equal(batch.position_RL, [[0, 1, 2, 2, 2, 0, 0, 0]])
    np.testing.assert_array_equal(batch.group_RL, [[1, 1, 1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch.branch_RL, [[0, 0, 1, 2, 3, 0, 0, 0]])
    np.testing.assert_array_equal(batch.source_RM, [[1, 2, 1, 3, 1, 4, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.target_RM, [[3, 2, 4, 2, 5, 2, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.slot_RM, [[0, 0, 1, 1, 2, 2, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.scored_RS, [[0, 1, 2, 0]])
    np.testing.assert_array_equal(batch.role_RS, [[CHOSEN, REJECTED, CHOSEN, REJECTED]])
    assert batch.branches == 3


@pytest.mark.parametrize("answers", [1, 2])
def test_a_full_row_has_room_for_the_targets_of_a_family_whose_answers_differ(answers: int) -> None:
    different = [make_answer([i, 2], CHOSEN if i % 2 else REJECTED) for i in range(3, 7)]
    pairs = [Example(i, SECOND.prompt, tuple(different[i : i + answers]), 0) for i in range(0, 4, answers)]
    shape = Shape(answers, 1, 2, row_length=5, row_examples=len(pairs), prompt_answers=4)
    batch = packed(pairs, shape)
    np.testing.assert_array_equal(batch.tokens_RL, [[9, 3, 4, 5, 6]])
    np.testing.assert_array_equal(batch.target_RM[batch.weight_RM > 0], [3, 2, 4, 2, 5, 2, 6, 2])


def test_examples_of_one_number_and_other_prompts_are_no_family() -> None:
    batch = packed([replace(EXAMPLE, family=0), replace(SECOND, family=0)], replace(SHAPE, prompt_answers=4))
    np.testing.assert_array_equal(batch.tokens_RL, packed([EXAMPLE, SECOND], SHAPE).tokens_RL)


def test_a_packed_row_ends_where_the_next_example_does_not_fit_and_at_its_most_examples() -> None:
    by_room = packed([EXAMPLE, SECOND, EXAMPLE], replace(SHAPE, row_length=7, row_examples=5))
    assert [sorted(set(row)) for row in by_room.group_RL.tolist()] == [[0, 1, 2], [0, 1]]
    by_count = packed([EXAMPLE, SECOND, EXAMPLE], replace(SHAPE, row_length=20, row_examples=2))
    assert [sorted(set(row)) for row in by_count.group_RL.tolist()] == [[0, 1, 2], [0, 1]]
    np.testing.assert_array_equal(by_count.role_RS[1], [CHOSEN, REJECTED, UNUSED, UNUSED])
    with pytest.raises(ValueError, match=r"example 0 takes 4 positions, a row has 3 \(data.row_length\)"):
        packed([EXAMPLE], replace(SHAPE, row_length=3))
    with pytest.raises(ValueError, match="row_length is not set"):
        packed([EXAMPLE], replace(SHAPE, row_length=None))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prompt_counts_once_in_its_own_slot(layout: str) -> None:
    batch = LAYOUTS[layout]([EXAMPLE], replace(SHAPE, with_prompt=True))
    assert not batch.role_RS.reshape(-1, 2, 2)[1:].any()
    np.testing.assert_array_equal(batch.role_RS.reshape(-1, 2, 2)[0], [[CHOSEN, PROMPT], [REJECTED, UNUSED]])
    prompt_target = (batch.slot_RM == 1) & (batch.weight_RM > 0)
    np.testing.assert_array_equal(batch.target_RM[prompt_target], [8])
    np.testing.assert_array_equal(batch.source_RM[prompt_target], [0])


@pytest.mark.parametrize("with_prompt", [False, True])
def test_layouts_give_the_same_scores_and_pull_backs(with_prompt: bool) -> None:
    """A loss sees the scores alone: where their values and pull-backs are equal, so are those of every loss."""
    model = tiny_model()
    params = tiny_params(model)
    fields = ("sum", "tail", "count", "entropy", "overlap")
    shape = Shape(
        2, prompt_length=6, answer_length=9, with_prompt=with_prompt, row_length=40, row_examples=6, prompt_answers=4
    )
    examples = random_examples(5, shape) + ranked_examples(1, shape)

    def scores(layout: str):
        batch = LAYOUTS[layout](examples, shape)
        used = np.flatnonzero(batch.role_RS.reshape(-1, 2, 1 + with_prompt)[:, 0, 0] != UNUSED)

        rng = np.random.default_rng(0)
        cotangent = {n: rng.normal(size=(len(examples), 2, 1 + with_prompt)).astype(np.float32) for n in fields}

        def total(params):
            found = jax.tree.map(lambda a: a[used], score(model, params, batch, (2, 1 + with_prompt), 16))
            return sum((getattr(found, name) * c).sum() for name, c in cotangent.items()), found

        (_, found), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
        return found, grad

    expected, expected_grad = scores("concatenated")
    largest = max(float(abs(g).max()) for g in jax.tree.leaves(expected_grad))
    for layout in ("shared_prefix", "packed"):
        found, grad = scores(layout)
        for name in fields:
            a, b = getattr(found, name), getattr(expected, name)
            # fp32 sums of up to nine terms of about 10 nats each.
            np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-6, err_msg=f"{layout}: {name}")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), grad, expected_grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_rows_change_nothing(layout: str) -> None:
    shape = Shape(answers=2, prompt_length=4, answer_length=5, row_length=20, row_examples=2)
    model = tiny_model()
    params = tiny_params(model)
    batch = lay_out(random_examples(3, shape), shape, layout).answers
    padded = pad_rows(batch, batch.tokens_RL.shape[0] + 4)
    got = jit_score(model, params, padded, (2, 1), 16)
    expected = jit_score(model, params, batch, (2, 1), 16)
    count = len(expected.sum)
    # Not exactly equal: the compiler may sum in another order when there are more rows.
    np.testing.assert_allclose(got.sum[:count], expected.sum, rtol=2e-6)
    assert (got.sum[count:] == 0).all() and (got.count[count:] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example(5, np.arange(3, dtype=np.int32), EXAMPLE.answers), "example 5 has 3 prompt tokens"),
        (Example(6, np.zeros(0, np.int32), EXAMPLE.answers), "example 6 has 0 prompt tokens"),
        (Example(7, EXAMPLE.prompt, (make_answer([1] * 4), make_answer([1]))), r"answers of \[4, 1\] tokens"),
        (Example(8, EXAMPLE.prompt, (make_answer([]), make_answer([1]))), r"answers of \[0, 1\] tokens"),
        (Example(9, EXAMPLE.prompt, EXAMPLE.answers[:1]), "example 9 has 1 answers where 2"),
    ],
)
def test_an_example_that_breaks_its_promise_is_named(layout: str, example: Example, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LAYOUTS[layout]([EXAMPLE, example], SHAPE)
