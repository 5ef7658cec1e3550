import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from dpo_jax import rewards
from dpo_jax.data import imdb, windows
from dpo_jax.data import tokenizer as tokenizers
from dpo_jax.rewards import sentiment
from dpo_jax.rewards.sentiment import SentimentReward

GOOD = ["A great film.", "I loved it, a wonderful story!", "Great acting and a great end."]
BAD = ["An awful film.", "I hated it, a boring story!", "Awful acting and a boring end."]


def reviews(count=30):
    texts = [
        (f"{text} Part {n}.", label) for n in range(count) for side, label in ((GOOD, 1), (BAD, 0)) for text in side
    ]
    return [imdb.review_of(text, label) for text, label in texts]


@pytest.fixture(scope="module")
def reward():
    return SentimentReward.train(reviews())


# Any unicode, nothing, and words that the reward does not know.
TEXTS = ["A great film.", "awful", "", "zzz", "映画 é \x00", "I loved it and hated it. " * 50]


def test_reward_is_a_probability_that_rises_with_praise(reward):
    values = reward(["great wonderful", "a film", "awful boring"])
    assert values.dtype == np.float64
    assert np.all((values > 0) & (values < 1))
    assert values[0] > values[1] > values[2]
    assert values[0] > 0.8
    assert values[2] < 0.2


def test_reward_is_that_of_scikit_learn(reward):
    texts, labels = [], []
    for review in reviews():
        runs = windows.sentence_runs(review.text, 130)
        texts += runs
        labels += [review.label] * len(runs)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=3, token_pattern=r"(?u)\b\w[\w']*\b")
    model = LogisticRegression(C=4.0, solver="liblinear").fit(vectorizer.fit_transform(texts), labels)
    np.testing.assert_allclose(reward(TEXTS), model.predict_proba(vectorizer.transform(TEXTS))[:, 1], rtol=1e-12)


def test_reward_by_hand():
    reward = SentimentReward(["bad", "good"], np.array([2.0, 3.0]), np.array([-1.0, 1.0]), 0.5, words=1)
    # good alone has the unit vector (0, 1); both words have (2, 3) / √13.
    expected = expit(np.array([1.5, 0.5, 0.5 + 1 / np.sqrt(13)]))
    np.testing.assert_allclose(reward(["Good!", "what?", "good, bad"]), expected, rtol=1e-12)


def test_no_texts_give_no_rewards(reward):
    assert reward([]).shape == (0,)


def test_training_is_reproducible(reward):
    again = rewards.train_reward("sentiment", iter(reviews()))
    assert again.fingerprint() == reward.fingerprint()
    assert again.fingerprint() != SentimentReward.train(reviews(29)).fingerprint()


def test_saved_reward_is_the_same_to_the_last_bit_and_holds_no_pickle(reward, tmp_path):
    reward.save(tmp_path / "reward")
    loaded = rewards.load_reward(tmp_path / "reward")
    assert loaded.fingerprint() == reward.fingerprint()
    assert loaded(TEXTS).tobytes() == reward(TEXTS).tobytes()
    assert sorted(path.name for path in (tmp_path / "reward").iterdir()) == ["reward.json", "weights.npz"]
    with np.load(tmp_path / "reward" / "weights.npz", allow_pickle=False) as arrays:
        assert {name: arrays[name].dtype for name in arrays} == dict.fromkeys(
            ["idf", "weight", "intercept"], np.float64
        )


def test_saving_again_replaces(reward, tmp_path):
    SentimentReward.train(reviews(5)).save(tmp_path / "reward")
    reward.save(tmp_path / "reward")
    assert rewards.load_reward(tmp_path / "reward").fingerprint() == reward.fingerprint()
    assert [path.name for path in tmp_path.iterdir()] == ["reward"]


def _cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def _flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _change_a_term(path):
    path.write_text(path.read_text().replace("great", "grate"))


def _age(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 0}))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("reward.json", _cut),
        ("reward.json", _change_a_term),
        ("reward.json", _age),
        ("weights.npz", _cut),
        ("weights.npz", _flip_a_bit),
        ("weights.npz", Path.unlink),
    ],
)
def test_damaged_reward_is_named(name, damage, reward, tmp_path):
    reward.save(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(OSError, match="Remove that folder and train the reward again"):
        rewards.load_reward(tmp_path)


def test_missing_reward_is_named(tmp_path):
    with pytest.raises(OSError, match=r"reward\.json does not exist. Train the reward first"):
        rewards.load_reward(tmp_path)


def test_unknown_rewards_list_the_valid_ones(reward, tmp_path):
    with pytest.raises(ValueError, match="Unknown reward 'length' in the configuration; choose one of 'sentiment'"):
        rewards.train_reward("length", reviews())
    reward.save(tmp_path)
    path = tmp_path / sentiment.REWARD_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "name": "length"}))
    with pytest.raises(ValueError, match=f"Unknown reward 'length' in {re.escape(str(path))}"):
        rewards.load_reward(tmp_path)


@pytest.mark.parametrize("count", [0, 5])
def test_one_label_alone_is_refused(count):
    with pytest.raises(ValueError, match="reviews of both labels"):
        rewards.train_reward("sentiment", [imdb.review_of(f"Good {n}", 1) for n in range(count)])


def test_too_few_reviews_are_refused():
    with pytest.raises(ValueError, match="No term stands in 3 of 2 runs.*Take more reviews"):
        rewards.train_reward("sentiment", [imdb.review_of("Good", 1), imdb.review_of("Bad", 0)])


def test_accuracy_counts(reward):
    assert rewards.accuracy(reward, ["great", "awful", "great", "awful"], [1, 0, 0, 0]) == 0.75
    with pytest.raises(ValueError, match="at least one text"):
        rewards.accuracy(reward, [], [])


def test_every_reward_has_its_own_name():
    for name, kind in rewards.REWARDS.items():
        assert kind.name == name


def test_real_reviews_are_judged_on_their_openings_too(tmp_path):
    # A fifth of the part trains in two seconds; the whole part is more accurate.
    reward = rewards.train_reward("sentiment", imdb.load_reviews("reward", tmp_path)[:1600])
    held_out = imdb.load_reviews("eval", tmp_path)
    tokenizer = tokenizers.train_tokenizer([review.text for review in held_out[:200]], 1000)
    found = rewards.held_out_accuracy(reward, held_out, tokenizer, window=64)
    assert found["reviews"] > 0.82
    assert 0.65 < found["openings"] < found["reviews"]
