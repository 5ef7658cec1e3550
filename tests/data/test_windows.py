import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax import types
from dpo_jax.data import tokenizer as tokenizers
from dpo_jax.data import windows
from dpo_jax.data.imdb import clean_text, review_of

BOS, EOS, MORE = 1, 2, 3
SENTENCES = [np.array(tokens) for tokens in ([11, 12, 13], [21, 22, 23, 24], [31, 32])]
TOKENIZER = tokenizers.train_tokenizer(["A good film. It was so good! Was it? <|eos|> is no end."] * 20, 300)

# Any text, and texts that look like reviews and like special tokens.
WORDS = st.sampled_from(
    ["Mr. Lee", "ran.", "Why?", "No!", "...", "ok", "I.", "U.S.", "<|eos|>", "<|bos|>", "é", '"Yes."', "<br />"]
)
TEXTS = st.one_of(st.text(max_size=200), st.lists(WORDS, max_size=40).map(" ".join))


@pytest.mark.parametrize(
    ("size", "opening", "continuations"),
    [
        (9, [BOS, 11, 12, 13, 21, 22, 23, 24, EOS], [[MORE, 31, 32, EOS]]),
        (6, [BOS, 11, 12, 13, EOS], [[MORE, 21, 22, 23, 24, EOS], [MORE, 31, 32, EOS]]),
        (4, [BOS, 11, 12, 13], [[MORE, 21, 22, 23], [MORE, 31, 32, EOS]]),
    ],
)
def test_windows_are_those_of_the_table(size, opening, continuations):
    first = windows.opening_window(SENTENCES, size, BOS, EOS)
    later = list(windows.continuation_windows(SENTENCES, size, MORE, EOS))
    assert first.tokens.tolist() == opening
    assert [window.tokens.tolist() for window in later] == continuations
    for window in [first, *later]:
        assert window.tokens.dtype == np.int32
        assert window.complete == (window.tokens[-1] == EOS)


@pytest.mark.parametrize(("sentences", "size"), [([], 9), (SENTENCES, 1)])
def test_window_without_room_or_text_is_refused(sentences, size):
    with pytest.raises(ValueError, match="expected at least 1 and 2"):
        windows.opening_window(sentences, size, BOS, EOS)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Mr. Lee ran... and fell. Why? (He slipped.) ok", ["Mr. Lee ran... and fell.", " Why?", " (He slipped.) ok"]),
        ("Set in the U.S. by J. K. Ray. Dull.", ["Set in the U.S. by J. K. Ray.", " Dull."]),
        ("Wow! what a film", ["Wow!", " what a film"]),
        ("It beat me and I. Then 3.5 stars.", ["It beat me and I.", " Then 3.5 stars."]),
        ("no end", ["no end"]),
        ("", []),
    ],
)
def test_sentences(text, sentences):
    assert windows.sentences_of(text) == sentences


@pytest.mark.parametrize(("characters", "count"), [(0, 1), (8, 1), (9, 2), (13, 2), (14, 3), (99, 4)])
def test_sentences_that_begin_late_are_left_out(characters: int, count: int):
    """They begin after 0, 9, 14 and 20 characters."""
    text = "It is so. Why? Well! End"
    assert windows.sentences_of(text, characters) == ["It is so.", " Why?", " Well!", " End"][:count]


def test_runs_of_sentences():
    assert windows.sentence_runs("Bad. Sad. I left early.", 12) == ["Bad. Sad.", " I left early."]
    assert windows.sentence_runs("", 12) == []


@given(TEXTS)
@settings(max_examples=150, deadline=None)
def test_sentences_and_their_tokens_join_to_the_text(raw):
    text = clean_text(raw)
    assert "".join(windows.sentences_of(text)) == text

    (sentences,) = windows.encode_sentences(TOKENIZER, [text])
    whole = tokenizers.encode(TOKENIZER, [text])[0]
    assert np.concatenate([*sentences, np.zeros(0, np.int32)]).tolist() == whole.tolist()


@given(TEXTS, st.integers(2, 40), st.integers(0, 2**53 - 1))
@settings(max_examples=150, deadline=None)
def test_windows_of_any_text_keep_their_promises(raw, size, uid):
    text = clean_text(raw) or "x"
    found = list(windows.review_windows([review_of(text, 1)], TOKENIZER, size, continuations=True))
    bos, eos, more = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, tokenizers.more_token_id(TOKENIZER)
    for n, (_, window) in enumerate(found):
        tokens = window.tokens.tolist()
        assert 2 <= len(tokens) <= size
        assert tokens[0] == (more if n else bos)
        assert not {bos, more, TOKENIZER.pad_token_id} & set(tokens[1:])
        assert tokens.count(eos) == int(window.complete)
        assert eos not in tokens[:-1]
    assert [uid for uid, _ in found] == [found[0][0] + n for n in range(len(found))]

    opening = found[0][1]
    whole = tokenizers.encode(TOKENIZER, [text])[0].tolist()
    own = opening.tokens.tolist()[1 : len(opening.tokens) - int(opening.complete)]
    assert own == whole[: len(own)]
    prompt = windows.prompt_tokens(opening, seed=0, uid=uid).tolist()
    assert prompt == opening.tokens.tolist()[: len(prompt)]
    assert 2 <= len(prompt) <= 9
    assert eos not in prompt


@pytest.mark.parametrize("size", [4, 16, 64])
def test_openings_are_the_same_with_and_without_continuations(size):
    texts = ["Good. " * 90, "x" * 900 + ". Good.", "é. " * 5, "A long one, so long! " * 40, "no"]
    reviews = [review_of(text, 0) for text in texts]
    alone = dict(windows.review_windows(reviews, TOKENIZER, size))
    beside = dict(windows.review_windows(reviews, TOKENIZER, size, continuations=True))
    assert list(alone) == [review.uid for review in reviews]
    for uid, window in alone.items():
        assert window.tokens.tolist() == beside[uid].tokens.tolist()


def test_more_than_a_batch_of_reviews_comes_in_order():
    reviews = [review_of(f"Film {n}.", 0) for n in range(2100)]
    found = list(windows.review_windows(iter(reviews), TOKENIZER, 16))
    assert [uid for uid, _ in found] == [review.uid for review in reviews]


def test_example_of_a_window():
    example = windows.window_example(7, windows.Window(np.array([BOS, 11, 12, EOS], np.int32), complete=True))
    assert example.uid == 7
    assert example.prompt.tolist() == [BOS]
    (answer,) = example.answers
    assert answer.tokens.tolist() == [11, 12, EOS]
    assert answer.weights.tolist() == [1, 1, 1]
    assert answer.weights.dtype == np.float32
    assert answer.role == types.CHOSEN
    assert answer.score == 0


def test_prompt_lengths_are_even_and_depend_on_seed_and_uid_alone():
    opening = windows.Window(np.array([BOS, *range(11, 40), EOS], np.int32), complete=True)
    lengths = [len(windows.prompt_tokens(opening, 0, uid)) - 1 for uid in range(1400)]
    counts = np.bincount(lengths, minlength=9)
    assert counts[:2].tolist() == [0, 0]
    assert counts.sum() == 1400
    # 200 expected of each length, with a standard deviation of 13.
    assert np.all(np.abs(counts[2:] - 200) < 60)
    assert lengths == [len(windows.prompt_tokens(opening, 0, uid)) - 1 for uid in range(1400)]
    assert lengths != [len(windows.prompt_tokens(opening, 1, uid)) - 1 for uid in range(1400)]


@pytest.mark.parametrize(
    ("tokens", "complete", "expected"),
    [([BOS, 11, 12, 13, EOS], True, [BOS, 11, 12]), ([BOS, 11, EOS], True, [BOS, 11]), ([BOS, 11], False, [BOS, 11])],
)
def test_prompt_leaves_a_token_of_the_text_to_the_answer(tokens, complete, expected):
    opening = windows.Window(np.array(tokens, np.int32), complete)
    assert windows.prompt_tokens(opening, 0, 0, shortest=8, longest=8).tolist() == expected


@pytest.mark.parametrize(("shortest", "longest"), [(0, 4), (5, 4)])
def test_prompts_of_impossible_length_are_refused(shortest, longest):
    opening = windows.Window(np.array([BOS, 11, 12], np.int32), complete=False)
    with pytest.raises(ValueError, match="shortest ≤ longest"):
        windows.prompt_tokens(opening, 0, 0, shortest, longest)
