"""The store of reference log-probabilities: what is written comes back, and nothing stale or damaged is ever used."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dpo_jax import refstore
from dpo_jax.data.layouts import Shape
from dpo_jax.refstore import ReferenceStore, write_store
from tests.tiny import random_examples

ME = {name: name for name in refstore.IDENTITY}
EXAMPLES = random_examples(12, Shape(2, 6, 9))


def logps_of(example):
    return tuple(-np.arange(1, len(a.tokens) + 1, dtype=np.float32) / (1 + example.uid) for a in example.answers)


def items(examples=EXAMPLES):
    return [(example, logps_of(example)) for example in examples]


def test_what_is_written_comes_back_by_content(tmp_path) -> None:
    write_store(tmp_path, ME, items())
    store = ReferenceStore(tmp_path, ME)
    for example in reversed(EXAMPLES):
        assert example in store
        for got, expected in zip(store.logps(replace(example, uid=999)), logps_of(example), strict=True):
            np.testing.assert_array_equal(got, expected)


def test_an_answer_that_comes_again_is_kept_once(tmp_path) -> None:
    write_store(tmp_path, ME, items() + items())
    assert len(ReferenceStore(tmp_path, ME)) == len(
        {refstore.answer_key(e.prompt, a.tokens) for e in EXAMPLES for a in e.answers}
    )


def test_prompt_and_answer_are_told_apart() -> None:
    a, b = np.array([1, 2]), np.array([3])
    assert refstore.answer_key(a, b) != refstore.answer_key(a[:1], np.array([2, 3]))


@pytest.mark.parametrize("name", refstore.IDENTITY)
def test_a_store_of_another_identity_is_never_found(name: str, tmp_path) -> None:
    write_store(tmp_path, ME, items())
    with pytest.raises(FileNotFoundError, match="no log-probabilities of this reference"):
        ReferenceStore(tmp_path, ME | {name: "other"})


def test_an_identity_names_all_that_matters() -> None:
    for identity in ({k: v for k, v in ME.items() if k != "dtype"}, ME | {"seed": "0"}):
        with pytest.raises(ValueError, match="expected"):
            refstore.identity_hash(identity)


def test_a_folder_that_was_moved_to_another_identity_is_refused(tmp_path) -> None:
    other = ME | {"weights": "v"}
    write_store(tmp_path, ME, items()).rename(refstore.store_folder(tmp_path, other))
    with pytest.raises(OSError, match="damaged"):
        ReferenceStore(tmp_path, other)


@pytest.mark.parametrize("file", ["logps.array_record", "keys.npy", "store.json"])
def test_damage_is_found(file: str, tmp_path) -> None:
    path = write_store(tmp_path, ME, items()) / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data[: -len(data) // 3] if file == "store.json" else data)
    with pytest.raises(OSError, match="Remove that folder"):
        ReferenceStore(tmp_path, ME)


def test_other_data_is_named(tmp_path) -> None:
    write_store(tmp_path, ME, items(EXAMPLES[:5]))
    store = ReferenceStore(tmp_path, ME)
    assert EXAMPLES[7] not in store
    with pytest.raises(KeyError, match="example 7 has an answer"):
        store.logps(EXAMPLES[7])


@pytest.mark.parametrize("bad", [np.zeros(99, np.float32), np.array([np.nan], np.float32)])
def test_log_probabilities_that_do_not_fit_leave_no_store(bad: np.ndarray, tmp_path) -> None:
    with pytest.raises(ValueError, match="one finite number for each token"):
        write_store(tmp_path, ME, [(EXAMPLES[0], (bad, bad))])
    with pytest.raises(ValueError, match="no example"):
        write_store(tmp_path, ME, [])
    assert not list(tmp_path.iterdir())
