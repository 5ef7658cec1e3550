"""What a source takes of its tokenizer, and no more."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from dpo_jax import sources
from dpo_jax.data.imdb import Review
from dpo_jax.data.tokenizer import train_tokenizer
from tests import tiny_run


@pytest.mark.parametrize("special", [{"pad_token": "<|eos|>"}, {"pad_token": None}, {"bos_token": None}])
def test_the_judge_of_samples_works_with_any_tokenizer(special, tmp_path: Path, monkeypatch) -> None:
    """As GPT-2's without PAD and Qwen's without BOS: it reads texts, and openings only to say how good it is."""
    reviews = [Review(i, f"so {('good', 'bad')[i % 2]} a film {i}. And more.", 1 - i % 2) for i in range(12)]
    monkeypatch.setattr(sources, "load_reviews", lambda *_: reviews)
    tokenizer = train_tokenizer([review.text for review in reviews], 270)
    for name, token in special.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = dataclasses.replace(tiny_run.make_config(tmp_path).data, tokenizer=str(tmp_path / "tokenizer"))
    good, bad = sources.imdb_reward(data, "sentiment")(["so good a film", "so bad a film"])
    assert good > bad
    with pytest.raises(ValueError, match="has no .* token|one token for two purposes"):
        sources.imdb_tokenizer(data)
