"""What the speed benchmark rests on: the same work in every variant, counted right; nothing here is timed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dpo_jax.convert.pretrained import save_pretrained
from dpo_jax.data.layouts import Shape
from dpo_jax.data.tokenizer import save_tokenizer, train_tokenizer
from dpo_jax.flops import dot_flops, inner_programs
from dpo_jax.models import init_params, make_model
from dpo_jax.trees import parameter_count
from experiments.speed import breakdown, losses, memory, run, sampling, work
from experiments.speed.ours import Settings, Worker
from experiments.speed.table import agreement, markdown
from tests.tiny import VOCAB, random_examples

SIZES = dict(vocab_size=VOCAB, context_length=64, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24)
ROW, CHUNK = 64, 8


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A tiny Llama, and two steps of pairs."""
    folder = tmp_path_factory.mktemp("speed")
    model = make_model("llama", {**SIZES, "tied_head": True})
    params = jax.tree.map(np.asarray, init_params(model, jax.random.key(0)))
    save_pretrained(folder, model, params, token_ids={"eos_token_id": 0})
    examples = random_examples(4, Shape(2, prompt_length=10, answer_length=6))
    work.save([examples[:2], examples[2:]], folder / "batches.json")
    return dict(model=str(folder), batches=str(folder / "batches.json"), row_length=ROW, head_chunk=CHUNK)


@pytest.fixture(scope="module")
def worker(common: dict[str, object]) -> Worker:
    return Worker(Settings(**common))  # type: ignore[arg-type]


def largest_array(jaxpr: Any) -> int:
    """Elements of the largest array that a traced program names."""
    sizes = [math.prod(v.aval.shape) for e in jaxpr.eqns for v in e.outvars if hasattr(v.aval, "shape")]
    return max([*sizes, *(largest_array(inner) for e in jaxpr.eqns for inner in inner_programs(e)), 0])


def test_a_step_does_the_products_that_the_formula_counts(worker: Worker) -> None:
    state, batch, hyper = jax.tree.map(lambda a: a[0], worker.arguments(0))
    trips = -(-int((batch.answers.weight_RM > 0).sum()) // CHUNK)
    step = worker.function
    jaxpr = jax.make_jaxpr(step)(state, batch, hyper).jaxpr
    width, layers, mlp, heads, groups, size = 16, 2, 24, 4, 2, 4
    matrices = width * size * (2 * heads + 2 * groups) + 3 * width * mlp
    body = layers * (2 * matrices * ROW + 4 * heads * size * ROW**2)
    chunk = -(-len(batch.answers.target_RM[0, 0]) // -(-len(batch.answers.target_RM[0, 0]) // CHUNK))
    head = 2 * VOCAB * width * chunk * trips
    statistics = 2 * 2 * VOCAB * chunk * trips  # entropy and collision
    # Policy forward, reference, and twice as much backward; there scores and the head's logits are computed once more.
    scores = layers * 2 * heads * size * ROW**2
    assert dot_flops(jaxpr, trips) == 4 * body + scores + 5 * head + 2 * statistics
    # Scores of one layer; nothing grows with layers × positions², or with targets × vocabulary.
    assert largest_array(jaxpr) == heads * ROW**2


def test_all_positions_in_use_need_what_the_formula_says(worker: Worker) -> None:
    (example,) = random_examples(1, Shape(2, prompt_length=10, answer_length=6))
    p, (a, b) = len(example.prompt), (len(x.tokens) for x in example.answers)
    matrices = 16 * 4 * 12 + 3 * 16 * 24
    keys = sum(range(1, p + 1)) + sum(range(p + 1, p + a)) + sum(range(p + 1, p + b))
    needed = 2 * (2 * matrices * (p + a + b - 2) + 4 * 16 * keys) + 2 * VOCAB * 16 * (a + b)
    assert work.needed_flops(worker.model.config, [example], passes=1) == needed
    assert work.tokens([example]) == 2 * p + a + b


def test_steps_have_the_pairs_of_full_rows(tmp_path: Path) -> None:
    # A letter is a token: a prompt of 9 with answers of n and m takes 9 + n + m positions, with their EOS and less one.
    lengths = [divmod(i, 20) for i in np.random.default_rng(0).permutation(400).tolist()]
    lines = [json.dumps({"prompt": "p" * 8, "chosen": "c" * n, "rejected": "r" * m}) for n, m in [*lengths, (300, 1)]]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    train_tokenizer(list("pcr"), 260).save_pretrained(tmp_path)
    read = lambda steps: work.read_batches(  # noqa: E731
        str(tmp_path / "pairs.jsonl"), str(tmp_path), rows=2, row_length=64, steps=steps
    )
    batches = read(80)
    answers = [tuple(len(a.tokens) for a in example.answers) for batch in batches for example in batch]
    assert len(set(answers)) == len(answers) > 300
    places = [sum(map(work.places, batch)) for batch in batches]
    # In the file's order, two pairs to a row, they would fill three quarters.
    assert max(places) <= 2 * 64 and np.mean(places) > 0.94 * 2 * 64
    with pytest.raises(ValueError, match="pairs for 8[0-9] steps of 2 rows of 64 positions; 100 were asked for"):
        read(100)


def test_variants_take_the_same_steps_and_are_traced_once(common: dict[str, object], worker: Worker) -> None:
    expected = [worker.take(step) for step in (0, 1)]
    assert expected[0] == pytest.approx(np.log(2), abs=1e-6) and expected[1] != expected[0]
    assert worker.parallel.traces == {"train_step": 1}
    stored = Worker(Settings(**common, layout="shared_prefix", reference="store"))  # type: ignore[arg-type]
    assert stored.state.reference is None
    # Sums in another order, and an Adam step of 1e-5 on what they give.
    assert [stored.take(step) for step in (0, 1)] == pytest.approx(expected, abs=2e-6)


def test_workers_take_turns_and_make_a_table(common: dict[str, object], tmp_path: Path) -> None:
    variant = run.ours("packed", "float32", "step")
    (record,) = run.measure([[variant]], common, "", tmp_path, run.DEVICES["cpu"].environment)
    assert record["steps"][0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    batches = work.load(Path(str(common["batches"])))
    useful = {"pairs": [2, 2], "tokens": list(map(work.tokens, batches)), "flops": [1.0, 1.0]}
    result = json.loads(json.dumps({"model": "tiny", "useful": useful, "load": [[1.0]], "variants": [record]}))
    assert "| packed, fp32 |" in markdown(result)


def test_a_row_with_other_losses_does_not_count() -> None:
    row = {"dtype": "fp32", "passes": 4, "steps": [{"loss": 0.7}]}
    assert agreement(row, {"steps": [{"loss": 0.7001}]}) == "1e-04"
    assert "does not count" in agreement(row, {"steps": [{"loss": 0.71}]})


def test_a_loss_costs_its_median_share_of_dpo() -> None:
    text = losses.table({"dpo": [1.0, 2.0, 4.0, 1.0, 1.0], "kto": [2.0, 4.0, 4.0, 2.0, 5.0]})
    # 2, 2, 1, 2 and 5 times dpo in the same round.
    assert "| dpo | 1.00 | 1.00 to 1.00 |" in text
    assert "| kto | 2.00 | 1.50 to 3.50 |" in text


def test_a_breakdown_says_what_a_step_does(worker: Worker) -> None:
    text = worker.step.lower(*worker.arguments(0)).compile().as_text()
    events, purpose = breakdown.traced(lambda: worker.take(0)), breakdown.purposes(text, breakdown.of_a_step)
    total = breakdown.seconds(events, purpose)
    layers, head, attention = "layers: products", "head: products", "attention, without its matrices"
    expected = {(part, which) for part in (layers, head, attention) for which in breakdown.PASSES} | {("optimizer", "")}
    assert expected <= {key for key, value in total.items() if value > 0}
    assert f"| {layers} | {total[layers, 'reference']:.2f} |" in breakdown.table(total, breakdown.PASSES)


@pytest.mark.parametrize(
    ("path", "product", "purpose"),
    [
        (
            "jvp(Llama)/Llama._read/while/body/closed_call/blocks/mlp/gate/dot_general",
            True,
            "layers: products, forward",
        ),
        (
            "transpose(jvp(Llama))/Llama._read/while/body/blocks/attention/key/cond/branch_0_fun/dot_general",
            True,
            "layers: products, backward",
        ),
        (
            "jvp(Llama)/Llama._read/while/body/jit(dynamic_update_index_in_dim)/dynamic_update_slice",
            False,
            "layers: all else, forward",
        ),
        (
            "Llama/Llama._read/while/body/blocks/attention/while/body/exp",
            False,
            "attention, without its matrices, reference",
        ),
        ("transpose(jvp())/while/body/cond/branch_0_fun/dot_general", True, "head: products, backward"),
        ("cond/branch_1_fun/mul", False, "optimizer, "),
    ],
)
def test_an_operation_is_of_what_it_is_for(path: str, product: bool, purpose: str) -> None:
    assert ", ".join(breakdown.of_a_step(f"jit(_fun)/{path}", product)) == purpose


def test_every_loss_takes_a_step(common: dict[str, object]) -> None:
    # orpo reads the prompt's log-probability, kto the answers of other examples.
    for name in ("orpo", "kto"):
        assert np.isfinite(Worker(Settings(**common, loss=name)).take(0))  # type: ignore[arg-type]


def test_as_many_tokens_are_sampled_as_there_is_room_for(common: dict[str, object]) -> None:
    settings = sampling.Settings(str(common["model"]), 1, 5, (), "float32")
    sample = sampling.OurSampler(settings, [[1, 2, 3], [4]])
    assert sample() == 2 * 5


def test_answers_end_at_the_tokens_that_words_begin_with(common: dict[str, object], tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["so good a film", "so bad a film"] * 3, 272)
    save_tokenizer(tokenizer, tmp_path)
    ends = sampling.first_tokens(str(tmp_path), ["so bad", tokenizer.eos_token])
    assert ends == (tokenizer.encode("so", add_special_tokens=False)[0], tokenizer.eos_token_id)
    everything = sampling.Settings(str(common["model"]), 1, 5, tuple(range(VOCAB)), "float32")
    assert sampling.OurSampler(everything, [[1, 2, 3], [4]])() == 2


def test_sampling_is_reported_by_all_its_tokens_and_seconds() -> None:
    """Not by a mean of rates, and without what came before it counted."""

    class Peer:
        def ask(self, _: str) -> dict[str, float]:
            return {"tokens": 40, "seconds": 4.0}

    counts = iter([10**9, 30, 50])
    result = sampling.measure(lambda: next(counts), Peer(), warm=1, batches=2)  # type: ignore[arg-type]
    assert [batch["tokens"] for batch in result["ours"]] == [30, 50] and len(result["transformers"]) == 2
    result["ours"] = [{"tokens": 30, "seconds": 3.0}, {"tokens": 50, "seconds": 1.0}]
    said = sampling.report(sampling.Settings("", 64, 256, (), "float32"), [[1, 2]] * 4, result)
    assert "4 prompts of up to 2 tokens, 64 at a time, at most 256 new tokens each (10.0 and 10.0 on average)" in said
    assert "ours 20 tokens/s, transformers 10, × 2.00" in said


def test_a_breakdown_says_what_the_sampler_does(common: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text("[[1, 2, 3], [4]]", encoding="utf-8")
    lines = breakdown.of_sampling(str(common["model"]), str(tmp_path / "prompts.json"), 5, "float32").splitlines()
    assert lines[0] == "| | prompts, s | new tokens, s | all, s | share |"
    assert {"layers: products", "head: products", "attention, without its matrices", "drawing"} <= {
        line.split("|")[1].strip() for line in lines if line.startswith("| ")
    }


def test_layers_that_keep_less_need_less_memory(common: dict[str, object]) -> None:
    everything, inputs = (
        memory.needed(memory.configure(Path(str(common["model"])), ROW, remat), VOCAB) for remat in ("none", "full")
    )
    model = make_model("llama", {**SIZES, "tied_head": True})
    count = parameter_count(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
    assert everything[0] == inputs[0] > 4 * 4 * count  # parameters, reference and two moments in fp32, and the batch
    assert 0 < inputs[1] < everything[1]
