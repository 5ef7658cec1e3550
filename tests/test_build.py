"""Examples are looked at before a run begins, without reading those that are known."""

from __future__ import annotations

import pytest

from dpo_jax.build import check_examples
from dpo_jax.data.layouts import Shape
from dpo_jax.data.prepared import PreparedExamples
from dpo_jax.types import CHOSEN, REJECTED
from tests import tiny_run

ROOM = Shape(2, 3, 8)  # answers, and the longest prompt and answer that make_examples gives


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> PreparedExamples:
    folder = tmp_path_factory.mktemp("data")
    return PreparedExamples(tiny_run.write_data(folder), "train")


def test_prepared_examples_are_not_read(source: PreparedExamples, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreparedExamples, "__getitem__", lambda *_: pytest.fail("an example was read"))
    assert check_examples(source, ROOM, tiny_run.VOCAB) == {CHOSEN: tiny_run.EXAMPLES, REJECTED: tiny_run.EXAMPLES}


@pytest.mark.parametrize(
    ("shape", "vocab_size", "message"),
    [
        (Shape(2, 2, 8), tiny_run.VOCAB, r"a prompt of 3 tokens .* room for 2 \(config.data.prompt_length\)"),
        (Shape(2, 3, 7), tiny_run.VOCAB, r"a prompt of .* and answers of .* and 7 \(config.data.answer_length\)"),
        (ROOM, tiny_run.VOCAB - 1, r"tokens from \d+ to 269; the tokenizer has those below 269"),
    ],
)
def test_the_first_that_does_not_fit_is_named(source, shape: Shape, vocab_size: int, message: str) -> None:
    for examples in (source, [source[i] for i in range(len(source))]):
        with pytest.raises(ValueError, match=r"example \d+ has " + message):
            check_examples(examples, shape, vocab_size)
