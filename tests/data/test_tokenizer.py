import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dpo_jax.data import tokenizer as tokenizers

TEXTS = ["The film was good.", "The film was bad, wasn't it?", "Ein schöner Film – naïve 映画!"] * 10
TOKENIZER = tokenizers.train_tokenizer(TEXTS, 300)


def test_vocabulary_has_the_size_and_four_special_tokens():
    assert len(TOKENIZER) == 300
    ids = [TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id, tokenizers.more_token_id(TOKENIZER)]
    assert sorted(ids) == [0, 1, 2, 3]


@given(st.text(max_size=80).map(lambda text: text.encode("utf-8", "ignore").decode()))
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back_and_makes_no_special_token(text):
    (tokens,) = tokenizers.encode(TOKENIZER, [text])
    assert tokens.dtype == np.int32
    assert np.all(tokens >= len(tokenizers.SPECIAL_TOKENS))
    assert tokenizers.decode(TOKENIZER, tokens) == text


@pytest.mark.parametrize("special", tokenizers.SPECIAL_TOKENS)
def test_characters_that_spell_a_special_token_are_text(special, tmp_path):
    tokenizers.save_tokenizer(TOKENIZER, tmp_path / "tokenizer")
    for tokenizer in (TOKENIZER, tokenizers.load_tokenizer(tmp_path / "tokenizer")):
        (tokens,) = tokenizers.encode(tokenizer, [f"a {special}{special} b"])
        assert tokens.min() >= len(tokenizers.SPECIAL_TOKENS)
        assert tokenizers.decode(tokenizer, tokens) == f"a {special}{special} b"


def test_decode_leaves_special_tokens_out():
    (tokens,) = tokenizers.encode(TOKENIZER, ["The film"])
    assert tokenizers.decode(TOKENIZER, [TOKENIZER.bos_token_id, *tokens, TOKENIZER.eos_token_id]) == "The film"


@pytest.mark.parametrize("special", [False, True])
def test_tokens_are_those_that_transformers_gives_whatever_the_file_says_of_length(special):
    own, theirs = (tokenizers.train_tokenizer(TEXTS, 300) for _ in range(2))
    own.backend_tokenizer.enable_truncation(4)
    own.backend_tokenizer.enable_padding(length=99)
    texts = [*TEXTS[:3], f"a {own.eos_token} b", ""]
    expected = theirs(texts, add_special_tokens=False, split_special_tokens=not special)["input_ids"]
    assert [row.tolist() for row in tokenizers.encode(own, texts, special)] == expected
    assert (own.eos_token_id in expected[3]) == special


def test_no_text_gives_no_tokens():
    assert tokenizers.encode(TOKENIZER, []) == []
    assert tokenizers.encode(TOKENIZER, [""])[0].tolist() == []


def test_saved_tokenizer_is_the_same_for_us_and_for_transformers(tmp_path):
    folder = tmp_path / "tokenizer"
    tokenizers.save_tokenizer(TOKENIZER, folder)
    expected = tokenizers.encode(TOKENIZER, TEXTS)
    for loaded in (tokenizers.load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)):
        assert loaded.get_vocab() == TOKENIZER.get_vocab()
        assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<|bos|>", "<|eos|>", "<|pad|>")
        for got, want in zip(tokenizers.encode(loaded, TEXTS), expected, strict=True):
            assert got.tolist() == want.tolist()


def test_training_is_reproducible_and_the_fingerprint_tells_tokenizers_apart(tmp_path):
    tokenizers.save_tokenizer(TOKENIZER, tmp_path / "a")
    tokenizers.save_tokenizer(tokenizers.train_tokenizer(iter(TEXTS), 300), tmp_path / "b")
    tokenizers.save_tokenizer(tokenizers.train_tokenizer(TEXTS, 299), tmp_path / "c")
    a, b, c = (tokenizers.tokenizer_fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c
    assert len(a) == 64


def test_a_save_that_fails_keeps_the_old_tokenizer(tmp_path, monkeypatch):
    folder = tmp_path / "tokenizer"
    tokenizers.save_tokenizer(TOKENIZER, folder)
    before = tokenizers.tokenizer_fingerprint(folder)
    other = tokenizers.train_tokenizer(TEXTS, 280)
    write = type(other).save_pretrained

    def fail_at_the_end(self, path):
        write(self, path)
        raise OSError("disk full")

    monkeypatch.setattr(type(other), "save_pretrained", fail_at_the_end)
    with pytest.raises(OSError, match="disk full"):
        tokenizers.save_tokenizer(other, folder)
    assert tokenizers.tokenizer_fingerprint(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="at least 260"):
        tokenizers.train_tokenizer(TEXTS, 259)


def test_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(OSError, match="nowhere does not exist; expected a folder with tokenizer.json"):
        tokenizers.load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(OSError, match="exists, without tokenizer.json"):
        tokenizers.tokenizer_fingerprint(tmp_path)


def test_damaged_tokenizer_is_named(tmp_path):
    tokenizers.save_tokenizer(TOKENIZER, tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(OSError, match="Cannot read the tokenizer in .*Train the tokenizer again"):
        tokenizers.load_tokenizer(tmp_path / "tokenizer")


@pytest.mark.parametrize(
    ("pad", "message"),
    [("<|eos|>", "one token for two purposes"), (None, "has no PAD token")],
    ids=["shared", "missing"],
)
def test_tokenizer_without_a_pad_token_of_its_own_is_refused(pad, message, tmp_path):
    folder = tmp_path / "tokenizer"
    tokenizers.save_tokenizer(TOKENIZER, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": pad}))
    with pytest.raises(ValueError, match=message):
        tokenizers.load_tokenizer(folder)


def test_tokenizer_without_more_is_refused_for_continuations(tmp_path):
    folder = tmp_path / "tokenizer"
    tokenizers.save_tokenizer(TOKENIZER, folder)
    for path in folder.iterdir():
        path.write_text(path.read_text().replace(tokenizers.MORE, "<|other|>"))
    with pytest.raises(ValueError, match="has no token <|more|>"):
        tokenizers.more_token_id(tokenizers.load_tokenizer(folder))
