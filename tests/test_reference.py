"""Runs with a stored reference: equal to those without, shared, extended, and never half-written or stale."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from dpo_jax import lora, reference, train
from dpo_jax.build import build
from dpo_jax.data.layouts import LAYOUTS, Shape, split_targets
from dpo_jax.data.pipeline import Pipeline
from dpo_jax.parallel import DataParallel
from dpo_jax.refstore import IDENTITY, ReferenceStore, answer_key, identity_hash
from dpo_jax.sources import open_dataset
from dpo_jax.start import start_params
from dpo_jax.stopping import Stopped
from dpo_jax.types import UNUSED
from tests import tiny_run
from tests.test_train import never
from tests.tiny import random_examples, ranked_examples

SHAPE = Shape(2, prompt_length=5, answer_length=8, row_length=30, row_examples=4)
EXAMPLES = random_examples(20, SHAPE)
ME = {name: name for name in IDENTITY}


@pytest.fixture(autouse=True)
def _forget_programs() -> Iterator[None]:
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    tiny_run.write_data(folder)
    return folder


def value_of(example, answer) -> np.ndarray:
    """Stands for a model: depends on prompt and answer alone."""
    seed = np.frombuffer(answer_key(example.prompt, answer.tokens), np.uint32)
    return -np.random.default_rng(seed).random(len(answer.tokens)).astype(np.float32)


class Score:
    """Scores examples and remembers them; fails after some."""

    def __init__(self, most: int = 10**9) -> None:
        self.scored: list[bytes] = []
        self._most = most

    def __call__(self, examples):
        for example in examples:
            if len(self.scored) >= self._most:
                raise KeyboardInterrupt
            self.scored += [answer_key(example.prompt, a.tokens) for a in example.answers]
            yield example, tuple(value_of(example, a) for a in example.answers)


def pipeline(source=EXAMPLES, layout: str = "concatenated", mismatched: bool = False) -> Pipeline:
    shape = replace(SHAPE, with_reference=True)
    return Pipeline(source, shape, layout=layout, batch_size=4, seed=3, mismatched=mismatched)


# --- what is scored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_batch_finds_its_log_probabilities_where_its_targets_are(layout: str, tmp_path: Path) -> None:
    batches, held_out = (pipeline(s, layout, mismatched=True) for s in (EXAMPLES[:15], EXAMPLES[15:]))
    needs = [reference.need_of(batches, 7), reference.need_of(held_out, None)]
    store = reference.open_store(tmp_path, ME, needs, Score())
    for made in (batches, held_out):
        made.attach = store.attach
    for batch in [*map(batches.batch, range(7)), *held_out.eval_batches()]:
        for rows in (batch.answers, batch.mismatched):
            real = rows.weight_RM > 0
            assert (rows.reference_RM[real] < 0).all() and (rows.reference_RM[~real] == 0).all()
    first = pipeline(EXAMPLES[:15], layout)
    first.attach = store.attach
    batch = next(iter(first.eval_batches())).answers
    row, example = batch.reference_RM[0], EXAMPLES[0]
    if layout != "packed":
        expected = np.concatenate([value_of(example, a) for a in example.answers])
        count = len(expected) if layout == "shared_prefix" else len(example.answers[0].tokens)
        np.testing.assert_array_equal(row[:count], expected[:count])
    with pytest.raises(KeyError, match="written for other data"):
        batches.batch(50)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_layout_does_to_tokens_is_undone(layout: str) -> None:
    shape = replace(SHAPE, row_length=64, row_examples=6, prompt_answers=4)
    examples = EXAMPLES + ranked_examples(3, shape)
    batch = LAYOUTS[layout](examples, shape)
    for example, found in zip(examples, split_targets(batch.target_RM, batch, examples), strict=True):
        for tokens, answer in zip(found, example.answers, strict=True):
            np.testing.assert_array_equal(tokens, answer.tokens)


def test_only_what_is_missing_is_scored_and_the_old_values_stay(tmp_path: Path) -> None:
    first, again, more, kto = Score(), Score(), Score(), Score()
    reference.open_store(tmp_path, ME, [reference.need_of(pipeline(EXAMPLES[:12]), 3)], first)
    assert len(first.scored) == len(set(first.scored)) == 24
    reference.open_store(tmp_path, ME, [reference.need_of(pipeline(EXAMPLES[:12]), 99)], again)
    assert again.scored == []
    reference.open_store(tmp_path, ME, [reference.need_of(pipeline(), 5)], more)
    assert len(more.scored) == 16 and not set(more.scored) & set(first.scored)
    store = reference.open_store(tmp_path, ME, [reference.need_of(pipeline(mismatched=True), 3)], kto)
    assert 0 < len(kto.scored) <= 3 * 4 * 2, "the mismatched answers of three steps"
    assert len(store) == len({*first.scored, *more.scored, *kto.scored})
    for example in EXAMPLES:
        for got, answer in zip(store.logps(example), example.answers, strict=True):
            np.testing.assert_array_equal(got, value_of(example, answer))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_of_less_than_an_epoch_has_scored_what_it_reads_and_no_more(layout: str, tmp_path: Path) -> None:
    batches, longer, first, second = pipeline(EXAMPLES, layout), pipeline(EXAMPLES, layout), Score(), Score()
    store = reference.open_store(tmp_path, ME, [reference.need_of(batches, 1)], first)
    batches.attach = store.attach
    rows = batches.batch(0).answers
    assert len(first.scored) == (rows.role_RS != UNUSED).sum() < 40
    reference.open_store(tmp_path, ME, [reference.need_of(longer, longer.steps(1.0))], second)
    assert len(second.scored) + len(first.scored) == 40


def test_what_was_written_before_a_kill_is_not_scored_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_WRITE_EVERY", 0.0)
    need, rest = reference.need_of(pipeline(), 5), Score()
    with pytest.raises(KeyboardInterrupt):
        reference.open_store(tmp_path, ME, [need], Score(most=6))
    assert len(ReferenceStore(tmp_path, ME)) == 6 and not ReferenceStore(tmp_path, ME).covers
    store = reference.open_store(tmp_path, ME, [need], rest)
    assert len(rest.scored) == 34 and len(store) == 40 and need.fingerprint in store.covers


def test_a_pass_that_is_asked_to_stop_writes_what_it_has_and_goes_on_later(tmp_path: Path) -> None:
    need, first, rest = reference.need_of(pipeline(), 5), Score(), Score()
    with pytest.raises(Stopped):
        reference.open_store(tmp_path, ME, [need], first, lambda: len(first.scored) >= 6)
    assert len(ReferenceStore(tmp_path, ME)) == len(first.scored) == 6
    store = reference.open_store(tmp_path, ME, [need], rest)
    assert len(rest.scored) == 34 and len(store) == 40 and need.fingerprint in store.covers


def test_a_pass_that_is_killed_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    small, whole = (reference.need_of(pipeline(s), 5) for s in (EXAMPLES[:5], EXAMPLES))
    with pytest.raises(KeyboardInterrupt):
        reference.open_store(tmp_path, ME, [small], Score(most=4))
    with pytest.raises(FileNotFoundError):
        ReferenceStore(tmp_path, ME)
    before = reference.open_store(tmp_path, ME, [small], Score())
    with pytest.raises(KeyboardInterrupt):
        reference.open_store(tmp_path, ME, [whole], Score(most=6))
    assert len(ReferenceStore(tmp_path, ME)) == len(before) == 10
    assert len(reference.open_store(tmp_path, ME, [whole], Score())) == 40


def test_a_store_that_is_replaced_can_still_be_read(tmp_path: Path) -> None:
    """Another run may extend the store that this one reads."""
    small, whole = (reference.need_of(pipeline(s), 5) for s in (EXAMPLES[:5], EXAMPLES))
    old = reference.open_store(tmp_path, ME, [small], Score())
    reference.open_store(tmp_path, ME, [whole], Score())
    for example in EXAMPLES[:5]:
        np.testing.assert_array_equal(old.logps(example)[0], value_of(example, example.answers[0]))


def test_several_processes_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need = reference.need_of(pipeline(), 5)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="run the same config once with one process"):
        reference.open_store(tmp_path, ME, [need], Score())
    monkeypatch.undo()
    reference.open_store(tmp_path, ME, [need], Score())
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert len(reference.open_store(tmp_path, ME, [need], Score(most=0))) == 40


# --- whose it is -----------------------------------------------------------------------------------------------------


def identity(data: Path, weights: str = "w", retouch: Callable = lambda tokenizer: tokenizer, **changes) -> str:
    config = tiny_run.make_config(data, **changes)
    dataset = open_dataset(config.data)
    parts = build(config, vocab_size=len(dataset.tokenizer), answers=dataset.answers)
    return identity_hash(reference.identity_of(config, parts, retouch(dataset.tokenizer), weights))


def test_another_reference_has_another_identity(pairs: Path) -> None:
    def renamed(tokenizer):
        tokenizer.add_tokens(["<new>"])
        return tokenizer

    def worded(tokenizer):
        tokenizer.chat_template = "{{ messages }}"
        return tokenizer

    found = [
        identity(pairs),
        identity(pairs, weights="v"),
        identity(pairs, retouch=renamed),
        identity(pairs, **{"data.template": "chat"}),
        identity(pairs, retouch=worded, **{"data.template": "chat"}),
        identity(pairs, **{"data.truncate": "keep_start"}),
        identity(pairs, **{"data.answer_length": 9}),
        identity(pairs, **{"model.dtype": "bfloat16"}),
        identity(pairs, **{"model.param_dtype": "bfloat16", "lora.rank": 2}),
        identity(pairs, **{"model.output_dtype": "bfloat16"}),
        identity(pairs, **{"model.heads": 4}),  # whose parameters have the same shapes
    ]
    assert len(set(found)) == len(found)


def test_what_log_probabilities_do_not_depend_on_shares_a_store(pairs: Path) -> None:
    changes = {"loss.name": "kto", "loss.beta": 0.5, "data.layout": "shared_prefix", "data.batch_size": 8}
    others = {"optim.learning_rate": 1.0, "model.remat": "full", "lora.rank": 2}
    assert identity(pairs, **changes, **others) == identity(pairs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference.sync_every": 3}, "keeps the log-probabilities of a reference that stands still"),
        ({"loss.name": "simpo"}, "loss 'simpo' reads no reference: there is nothing to store"),
    ],
)
def test_a_store_that_could_not_be_used_is_refused(pairs: Path, changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_run.make_config(pairs, **{"reference.store": "stores", **changes})


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_runs_with_a_store_equal_those_without_and_continue_to_the_bit(pairs: Path, tmp_path: Path) -> None:
    quick = {"eval.prompts": 0, "optim.epsilon": 1e-3, "model.layers": 1, "train.micro_batches": 1}
    with_store = quick | {"reference.store": str(tmp_path / "stores")}
    plain = train.run(tiny_run.make_config(pairs, **quick), tmp_path / "plain")
    config = tiny_run.make_config(pairs, **with_store)
    trainer = train.Trainer(config, tmp_path / "stored")
    summary = trainer.train(never())
    assert trainer.parallel.traces == {"reference": 1, "train_step": 1, "eval_step": 1}
    assert summary.keys() == plain.keys()
    for name in plain:
        # fp32 sums in another order, through ten steps.
        assert summary[name] == pytest.approx(plain[name], rel=2e-5, abs=1e-5, nan_ok=True), name
    # As if it had been stopped after its checkpoint of step 5; the same programs, so that they are compiled once.
    expected = tiny_run.results(tmp_path / "stored")
    shutil.rmtree(tmp_path / "stored" / "checkpoints" / "10")
    trainer.train(never())
    assert tiny_run.results(tmp_path / "stored") == expected


def test_the_reference_pass_scores_in_rows_like_those_of_the_run(pairs: Path) -> None:
    """Packed rows on two devices, the last batch not full, in one compiled program; the base alone, of adapters."""
    packed = {"data.layout": "packed", "data.row_length": 40, "data.row_examples": 3, "data.batch_size": 8}
    config = tiny_run.make_config(pairs, **packed, **{"parallel.devices": 2, "train.micro_batches": 1, "lora.rank": 2})
    dataset = open_dataset(config.data)
    parts = build(config, vocab_size=len(dataset.tokenizer), answers=2)
    parallel = DataParallel(jax.local_devices()[:2])
    model = lora.with_adapter(parts.model, None)
    params = start_params(config, model)
    run = reference.ReferencePass(config, parts, parallel, lambda: params)
    found = {e.uid: logps for e, logps in run(iter(dataset.train))}
    assert parallel.traces == {"reference": 1}
    assert len(found) == len(dataset.train)
    forward = jax.jit(lambda t, p, m: model.apply({"params": params}, t, p, m))
    head = np.asarray(model.apply({"params": params}, method="head"), np.float64)
    length = config.data.prompt_length + config.data.answer_length
    mask = np.tril(np.ones((1, length, length), bool))
    for example in (dataset.train[0], dataset.train[25]):
        for answer, got in zip(example.answers, found[example.uid], strict=True):
            tokens = np.concatenate([example.prompt, answer.tokens])
            padded = np.pad(tokens, (0, length - len(tokens)))[None]
            logits = np.asarray(forward(padded, np.arange(length)[None], mask)[0], np.float64) @ head.T
            logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            before = len(example.prompt) - 1 + np.arange(len(answer.tokens))
            np.testing.assert_allclose(got, logps[before, answer.tokens], atol=1e-5)
