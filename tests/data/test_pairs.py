import numpy as np
import pytest

from dpo_jax import types
from dpo_jax.data import pairs

PROMPT = np.array([1, 11], np.int32)


def test_four_answers_give_six_pairs():
    scores = [0.1, 0.9, 0.5, 0.3]
    made = pairs.pairs_of(PROMPT, [(np.array([n, 2]), score) for n, score in enumerate(scores)], uid=40)
    assert (made.duplicates, made.ties) == (0, 0)
    assert [example.uid for example in made.examples] == list(range(40, 46))
    found = set()
    for example in made.examples:
        chosen, rejected = example.answers
        assert (chosen.role, rejected.role) == (types.CHOSEN, types.REJECTED)
        assert chosen.score > rejected.score
        assert example.prompt.tolist() == [1, 11]
        assert chosen.weights.tolist() == [1, 1]
        found.add((int(chosen.tokens[0]), int(rejected.tokens[0])))
    assert found == {(1, 0), (2, 0), (3, 0), (1, 2), (1, 3), (2, 3)}


def test_ties_and_duplicates_are_left_out_and_counted():
    a, b, c = (np.array(tokens) for tokens in ([21, 2], [31, 32, 2], [41, 2]))
    made = pairs.pairs_of(PROMPT, [(a, 0.9), (b, 0.2), (a, 0.9), (c, 0.2)], uid=0)
    assert (made.duplicates, made.ties) == (1, 1)
    sides = [tuple(side.tokens.tolist() for side in example.answers) for example in made.examples]
    assert sides == [([21, 2], [31, 32, 2]), ([21, 2], [41, 2])]


def test_scores_that_differ_only_past_float32_are_ties():
    made = pairs.pairs_of(PROMPT, [(np.array([3]), 0.5), (np.array([4]), 0.5 + 1e-12)], uid=0)
    assert (made.examples, made.ties) == ((), 1)


def test_score_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="score nan; expected a finite number"):
        pairs.pairs_of(PROMPT, [(np.array([3]), 0.5), (np.array([4]), float("nan"))], uid=0)
