"""Hugging Face folders in and out: nothing is lost, and what is wrong is named."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from dpo_jax.convert import tensors
from dpo_jax.convert.pretrained import TABLES, open_pretrained, save_pretrained
from dpo_jax.convert.table import read_rope, write_rope
from dpo_jax.models import FAMILIES, init_params, logical_axes, make_model
from dpo_jax.models.rope import Rope
from dpo_jax.parallel import MeshParallel
from dpo_jax.trees import named_leaves
from dpo_jax.types import on_host
from tests.convert import cases, ours

INDEX = "model.safetensors.index.json"


def _bytes(folder: Path) -> dict[str, bytes]:
    return {name: entry.read().tobytes() for name, entry in tensors.read_entries(folder).items()}


@pytest.mark.parametrize("name", cases.CASES)
def test_a_round_trip_changes_no_bit(name: str, tmp_path: Path) -> None:
    """Read as fp32 from bf16 shards, written as one bf16 file: the same tensors, and a config that means the same."""
    there, back = tmp_path / "there", tmp_path / "back"
    there.mkdir(), back.mkdir()
    pretrained = ours.write_folder(there, name, 0, jnp.bfloat16, shard_bytes=20_000)
    assert len(list(there.glob("*.safetensors"))) > 1
    model = pretrained.model()
    save_pretrained(back, model, pretrained.params(model), dtype=jnp.bfloat16, token_ids={"eos_token_id": 3})
    assert [path.name for path in back.glob("*.safetensors")] == [tensors.SINGLE]
    assert _bytes(back) == _bytes(there)
    again = open_pretrained(str(back))
    assert again.model().config == model.config
    written = json.loads((back / "config.json").read_text())
    assert written["architectures"] == [cases.CASES[name][1]] and written["dtype"] == "bfloat16"
    assert json.loads((back / "generation_config.json").read_text())["eos_token_id"] == 3


def test_every_family_has_a_table() -> None:
    assert set(TABLES) == set(FAMILIES)
    for kind in TABLES:
        assert kind in transformers.CONFIG_MAPPING


def test_weights_come_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    pretrained = ours.write_folder(tmp_path, "llama3_tied", 0)
    half = pretrained.params(pretrained.model(param_dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {np.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", ["gpt2", "llama3_tied"])
def test_weights_go_straight_to_their_devices(name: str, tmp_path: Path) -> None:
    """Split over data 2 × fsdp 2 × tensor 2: the same bits as those read onto the host, where a run wants them."""
    pretrained = ours.write_folder(tmp_path, name, 0)
    model = pretrained.model(param_dtype=jnp.bfloat16)
    targets = _mesh(model).targets
    whole, split = (named_leaves(pretrained.params(model, to)) for to in (on_host, targets))
    expected = named_leaves(targets(jax.tree.map(lambda a: a, whole)))
    assert sum(not leaf.is_fully_replicated for leaf in split.values()) >= 6
    for path, leaf in split.items():
        assert (leaf.sharding, leaf.dtype) == (expected[path].sharding, jnp.bfloat16)
        np.testing.assert_array_equal(np.asarray(leaf), whole[path], err_msg=path)


def _mesh(model: nn.Module) -> MeshParallel:
    return MeshParallel(jax.devices(), dict(data=2, fsdp=2, tensor=2), logical_axes(model))


def test_rows_of_a_tensor_are_read_alone(tmp_path: Path) -> None:
    ours.write_folder(tmp_path, "gpt2", 0)
    entries = tensors.read_entries(tmp_path)
    entry = entries["transformer.h.1.attn.c_attn.weight"]
    np.testing.assert_array_equal(entry.read(3, 7), entry.read()[3:7])
    assert entry.read(5).shape == (entry.shape[0] - 5, entry.shape[1]) and entry.read(4, 4).size == 0
    last = max(entries.values(), key=lambda e: e.start)  # the file ends with it
    with last.path.open("rb+") as file:
        file.truncate(last.start + last.size - 1)
    with pytest.raises(OSError, match=f"tensor {last.name} ends after .* of "):
        last.read(1)


def test_other_readers_read_our_files(tmp_path: Path) -> None:
    """The safetensors library agrees with our reader and writer."""
    from safetensors.numpy import load_file

    ours.write_folder(tmp_path, "gpt2", 0)
    theirs = load_file(tmp_path / tensors.SINGLE)
    assert {name: array.tobytes() for name, array in theirs.items()} == _bytes(tmp_path)


def test_names_of_a_bare_body_are_understood(tmp_path: Path) -> None:
    """As in openai-community/gpt2: no prefix, and the buffers of old versions."""
    pretrained = ours.write_folder(tmp_path, "gpt2", 0)
    before = named_leaves(pretrained.params(pretrained.model()))
    entries = tensors.read_entries(tmp_path)
    arrays = {name.removeprefix("transformer."): entry.read() for name, entry in entries.items()}
    arrays["h.0.attn.bias"] = np.zeros((1, 1, 128, 128), np.float32)
    shapes = {name: array.shape for name, array in arrays.items()}
    tensors.write_tensors(tmp_path, shapes, np.float32, arrays.__getitem__, 10**9)
    after = named_leaves(open_pretrained(str(tmp_path)).params(pretrained.model()))
    for path, leaf in before.items():
        np.testing.assert_array_equal(after[path], leaf)


def _rewrite(folder: Path, change) -> None:
    arrays = {name: entry.read() for name, entry in tensors.read_entries(folder).items()}
    change(arrays)
    shapes = {name: array.shape for name, array in arrays.items()}
    tensors.write_tensors(folder, shapes, np.float32, arrays.__getitem__, 10**9)


def _load(folder: Path) -> None:
    pretrained = open_pretrained(str(folder))
    pretrained.params(pretrained.model())


def test_names_on_one_side_alone_are_listed_for_both(tmp_path: Path) -> None:
    ours.write_folder(tmp_path, "llama_untied", 0)
    _rewrite(tmp_path, lambda a: a.update({"model.layers.1.extra": a.pop("model.layers.1.mlp.up_proj.weight")}))
    with pytest.raises(
        ValueError, match=r"(?s)without a place in the model: model\.layers\.1\.extra\n.*not in the"
    ) as e:
        _load(tmp_path)
    assert "not in the files: model.layers.1.mlp.up_proj.weight" in str(e.value) and str(tmp_path) in str(e.value)


HEADS = {"gpt2": "lm_head.weight", "llama3_tied": "lm_head.weight", "neox_sequential_linear_tied": "embed_out.weight"}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_beside_a_tied_embedding_is_the_same_or_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "_BLOCK", 700)  # bytes: five rows, and 96 are no multiple of that
    pretrained = ours.write_folder(tmp_path, name, 0)
    before = named_leaves(pretrained.params(pretrained.model()))
    _rewrite(tmp_path, lambda a: a.update({HEADS[name]: before["token_embedding"].copy()}))
    after = named_leaves(pretrained.params(pretrained.model()))
    assert after.keys() == before.keys()
    np.testing.assert_array_equal(after["token_embedding"], before["token_embedding"])
    _rewrite(tmp_path, lambda a: a[HEADS[name]].__setitem__((95, 31), 7.0))
    with pytest.raises(ValueError, match=rf"{HEADS[name]} is not the embedding.*set tie_word_embeddings to false"):
        _load(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    pretrained = open_pretrained(str(tmp_path))
    assert pretrained.params(pretrained.model())["head"][95, 31] == 7.0
    _rewrite(tmp_path, lambda a: a.update({HEADS[name]: before["token_embedding"][:90]}))
    path.write_text(json.dumps(cases.config_of(name)))
    with pytest.raises(ValueError, match=f"{HEADS[name]} is not the embedding"):
        _load(tmp_path)


def test_an_untied_gpt2_survives(tmp_path: Path) -> None:
    sizes = dict(vocab_size=20, context_length=8, width=8, layers=1, heads=2, mlp_width=8, tied_head=False)
    model = make_model("gpt2", sizes)
    params = named_leaves(init_params(model, jax.random.key(0)))
    save_pretrained(tmp_path, model, init_params(model, jax.random.key(0)))
    pretrained = open_pretrained(str(tmp_path))
    assert pretrained.model().config == model.config
    np.testing.assert_array_equal(named_leaves(pretrained.params(model))["head"], params["head"])


def test_a_wrong_shape_names_file_and_tensor(tmp_path: Path) -> None:
    ours.write_folder(tmp_path, "llama_untied", 0)
    _rewrite(tmp_path, lambda a: a.update({"model.norm.weight": np.zeros(31, np.float32)}))
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor model\.norm\.weight has shape \[31\].*\[32\]"):
        _load(tmp_path)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    ours.write_folder(tmp_path, "llama_untied", 0)
    _rewrite(tmp_path, lambda a: a["model.norm.weight"].__setitem__(3, np.nan))
    with pytest.raises(ValueError, match=r"tensor model\.norm\.weight has numbers that are not finite"):
        _load(tmp_path)


def test_files_that_are_cut_short_or_missing_are_named(tmp_path: Path) -> None:
    ours.write_folder(tmp_path, "llama_untied", 0, shard_bytes=20_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-10])
    with pytest.raises(OSError, match=rf"{shards[1].name} is cut short: tensor .* lacks 10 bytes"):
        _load(tmp_path)
    shards[1].write_bytes(whole[:4])
    with pytest.raises(OSError, match=rf"{shards[1].name} is no safetensors file, or is cut short"):
        _load(tmp_path)
    shards[1].write_bytes(whole[:8] + b"x" + whole[9:])
    with pytest.raises(OSError, match=rf"{shards[1].name} has a damaged header"):
        _load(tmp_path)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"{shards[1].name} is missing, though {INDEX} names it"):
        _load(tmp_path)


def test_a_folder_without_weights_or_with_pickles_is_refused(tmp_path: Path) -> None:
    ours.write_folder(tmp_path, "gpt2", 0)
    (tmp_path / tensors.SINGLE).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has neither .*pytorch_model\.bin may run code when read"):
        _load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: gpt2, gpt_neox, llama"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification is not supported"),
        ({"hidden_act": "gelu"}, "llama with hidden_act='gelu' is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "RoPE type 'dynamic'"),
        ({"quantization_config": {"bits": 4}}, "quantized weights are not supported"),
    ],
)
def test_what_is_not_supported_is_named_with_its_file(change, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(cases.config_of("llama_untied") | change))
    with pytest.raises(ValueError, match=message) as error:
        open_pretrained(str(tmp_path))
    assert str(path) in str(error.value)


def test_damaged_and_missing_configs_and_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        open_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(OSError, match=r"config\.json is damaged"):
        open_pretrained(str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match="the model is 'no-such-model': there is no such folder, and it is no id"
    ):
        open_pretrained("no-such-model")
    with pytest.raises(OSError, match="hub does not give a model of that name"):
        open_pretrained("org/no-such-model")


@pytest.mark.parametrize(
    "rope",
    [
        Rope(5e5),
        Rope(scaling="linear", factor=2.0, share=0.5),
        Rope(scaling="llama3", factor=8.0, original_length=64, low_freq_factor=2.0, high_freq_factor=3.0),
        Rope(scaling="yarn", factor=4.0, original_length=64, beta_fast=16.0, truncate=False, attention_factor=1.5),
    ],
)
def test_rope_settings_survive(rope: Rope) -> None:
    assert read_rope(write_rope(rope), 128) == rope


def test_rope_settings_that_are_not_understood_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'default' with the settings \['mrope_section'\]"):
        read_rope({"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2]}, 128)


@pytest.mark.parametrize("split", [False, True])
def test_reading_needs_no_more_than_the_model_and_its_largest_tensor(split: bool, tmp_path: Path) -> None:
    sizes = dict(vocab_size=8192, context_length=16, width=64, layers=8, heads=4, mlp_width=256)
    model = make_model("llama", sizes)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    save_pretrained(tmp_path, model, jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes), shard_bytes=1_000_000)
    pretrained = open_pretrained(str(tmp_path))
    targets = _mesh(model).targets if split else on_host
    pretrained.params(model, targets)  # what is imported and compiled once
    total = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes))
    largest = 8192 * 64 * 4
    tracemalloc.start()
    try:
        pretrained.params(model, targets)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # On CPUs, what is on the devices counts too.
    assert (0 if split else total) < peak <= total + largest + 500_000, (total, peak)
