"""From a Hugging Face folder through a run to samples and back to a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import export, sample, train
from dpo_jax.convert.pretrained import open_pretrained, save_pretrained
from dpo_jax.data.tokenizer import open_tokenizer
from dpo_jax.models import make_model
from dpo_jax.trees import named_leaves
from tests import tiny_run
from tests.tiny import tiny_params

PROMPTS = ["good", "so bad"]
LONG = dict(prompt_length=8, answer_length=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir of a finished run, the folder that it started from)."""
    folder = tmp_path_factory.mktemp("run")
    start, workdir = folder / "start", folder / "run"
    start.mkdir()
    sizes = dict(vocab_size=272, context_length=32, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24)
    model = make_model("llama", sizes)
    save_pretrained(start, model, tiny_params(model, scale=4.0))
    tiny_run.write_data(folder)
    changes = {f"data.{name}": value for name, value in LONG.items()} | {"init.hf": str(start), "train.steps": 2}
    config = tiny_run.make_config(folder, **changes, **{"eval.examples": 0, "eval.prompts": 0, "checkpoint.every": 2})
    train.run(config, workdir)
    return workdir, start


def test_the_run_has_the_family_and_the_sizes_of_the_folder(run, tmp_path: Path) -> None:
    workdir, start = run
    export.export(workdir, tmp_path / "out", dtype="float32")
    first, last = (open_pretrained(str(folder)) for folder in (start, tmp_path / "out"))
    assert first.fields == last.fields and first.family == last.family == "llama"
    before, after = (named_leaves(p.params(p.model())) for p in (first, last))
    moved = [np.abs(after[name] - before[name]).max() for name in before]
    # Two steps of Adam move every parameter by at most twice the learning rate.
    assert 0 < max(moved) <= 2.1e-2


def test_an_export_has_all_that_is_needed_to_serve_it(run, tmp_path: Path) -> None:
    workdir, _ = run
    out = tmp_path / "out"
    export.export(workdir, out, dtype="bfloat16", shard_bytes=10_000)
    assert open_tokenizer(out).encode("so good") == open_tokenizer(
        workdir.parent / f"tokenizer-{tiny_run.VOCAB}"
    ).encode("so good")
    assert len(list(out.glob("model-*.safetensors"))) > 1 and (out / "model.safetensors.index.json").is_file()
    ids = json.loads((out / "generation_config.json").read_text())
    assert ids["eos_token_id"] == open_tokenizer(out).eos_token_id
    card = (out / "README.md").read_text()
    assert "loss dpo" in card and '"learning_rate": 0.01' in card and "| train/loss |" in card


def test_both_sides_are_sampled_and_written(run, tmp_path: Path, capsys) -> None:
    workdir, _ = run
    out = tmp_path / "samples.jsonl"
    sample.main(str(workdir), PROMPTS, str(out), sample.Request(completions=3, max_new_tokens=5, rows=4, seed=1))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["side"], r["prompt"], r["completion"]) for r in rows] == [
        (side, prompt, i) for side in sample.SIDES for prompt in PROMPTS for i in range(3)
    ]
    assert all(1 <= r["tokens"] <= 5 and r["logp"] < 0 for r in rows)
    assert len({(r["text"], r["tokens"]) for r in rows if r["side"] == "policy" and r["prompt"] == "good"}) > 1
    shown = capsys.readouterr().out
    assert "[policy: " in shown and "[reference: " in shown and "tokens/s" in shown
    # The batch has another size, the draws are the same.
    result = sample.sample_run(workdir, PROMPTS, sample.Request(completions=3, max_new_tokens=5, rows=6, seed=1))
    assert [c.text for c in result.completions] == [r["text"] for r in rows]
    assert result.tokens_per_second > 0


def test_the_terminal_shows_two_columns() -> None:
    cells = [sample.Completion(side, 0, 0, text, 2, -1.5, ended) for side, text, ended in
             (("policy", "left\nword", True), ("reference", "right", False))]  # fmt: skip
    lines = sample.side_by_side(["ask"], sample.Result(tuple(cells), 12.4), 90).splitlines()
    assert lines[1] == "ask" and lines[-1] == "12 tokens/s"
    column = (90 - 3) // 2
    assert [(line[:column].rstrip(), line[column + 3 :]) for line in lines[3:6]] == [
        ("[policy: 2 tokens, -1.5 nats]", "[reference: 2 tokens, -1.5 nats, cut off]"),
        ("left", "right"),
        ("word", ""),
    ]


def test_prompts_come_from_lines_or_jsonl(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"text": "two"}\n')
    assert sample.read_prompts(tmp_path / "p.txt") == ["one", "two"]
    with pytest.raises(ValueError, match=r"p\.jsonl, line 2: expected an object with the field prompt"):
        sample.read_prompts(tmp_path / "p.jsonl")


def test_what_is_missing_is_named(run, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no workdir of a run"):
        sample.sample_run(tmp_path, PROMPTS, sample.Request())
    with pytest.raises(ValueError, match="at least one prompt"):
        sample.sample_run(run[0], [], sample.Request())
    with pytest.raises(ValueError, match="known: float32, bfloat16, float16"):
        export.export(run[0], tmp_path / "x", dtype="int8")


def test_a_model_that_is_too_small_for_the_data_is_refused(tmp_path: Path) -> None:
    from dpo_jax.start import make_start_model

    model = make_model("gpt2", dict(vocab_size=64, context_length=8, width=8, layers=1, heads=1, mlp_width=8))
    save_pretrained(tmp_path, model, tiny_params(model), dtype=jnp.float32)
    config = tiny_run.make_config(tmp_path, **{"init.hf": str(tmp_path)})
    with pytest.raises(ValueError, match=r"has 8 positions; sequences have up to 11"):
        make_start_model(config, 64)


def test_layers_side_by_side_divide_those_of_the_model_that_is_read(run) -> None:
    """Not those of config.model, whose sizes are not read then."""
    from dpo_jax.start import make_start_model

    _, start = run
    config = tiny_run.make_config(start.parent, **{"init.hf": str(start), "model.layers": 5, "model.unroll": 2})
    assert make_start_model(config, 64).config.unroll == 2
    config = tiny_run.make_config(start.parent, **{"init.hf": str(start), "model.layers": 3, "model.unroll": 3})
    with pytest.raises(ValueError, match="model.unroll is 3; expected a divisor of the model's 2 layers"):
        make_start_model(config, 64)
