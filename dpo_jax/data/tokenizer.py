"""Byte-level BPE: trained with ``tokenizers``, kept as a transformers tokenizer.

BOS, EOS, PAD and MORE are four different tokens that no text can produce: ``<|eos|>`` in a review is read as seven
characters. ``encode`` gives the text's own tokens alone; whoever builds a sequence puts the special tokens where they
belong.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dpo_jax.data import folders

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
MORE = "<|more|>"  # begins a text that is not the beginning of a document
SPECIAL_TOKENS = (PAD, BOS, EOS, MORE)  # ids 0 to 3

_FILE = "tokenizer.json"
_ALPHABET = 256  # a byte-level vocabulary holds every byte
_REMEDY = "Train the tokenizer again, or set config.data.tokenizer to a folder that `save_pretrained` wrote."


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer.

    Args:
      texts: what to learn the merges from; read once.
      vocab_size: size of the vocabulary with the special tokens, tokens.

    Returns:
      The tokenizer. Fewer texts than the vocabulary needs give a smaller vocabulary.

    Raises:
      ValueError: the vocabulary cannot hold every byte and the special tokens.
    """
    least = _ALPHABET + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ValueError(f"vocab_size is {vocab_size}; a byte-level vocabulary needs at least {least} tokens.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[MORE],
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Writes the tokenizer; the folder is the old one or the whole new one, whenever the process is killed.

    Args:
      tokenizer: what to write.
      folder: its place; an older tokenizer there is replaced.

    Raises:
      OSError: the folder cannot be written.
    """
    with folders.replaced_folder(folder, "the tokenizer") as incomplete:
        tokenizer.save_pretrained(incomplete)


def open_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Reads any tokenizer from disk, such as that of a downloaded model; only an EOS is asked of it.

    Args:
      folder: a folder with ``tokenizer.json``.

    Returns:
      The tokenizer. It may lack BOS and PAD, or use one token for two purposes: padding is never told by its token.

    Raises:
      OSError: there is no tokenizer, or it cannot be read.
      ValueError: the tokenizer has no EOS.
    """
    tokenizer = _read(Path(folder))
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer in {folder} has no EOS token, so no answer could end; give it one.")
    return tokenizer


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Reads a tokenizer of ``train_tokenizer`` from disk; nothing is ever downloaded.

    Args:
      folder: a folder with ``tokenizer.json``, as ``save_tokenizer`` writes it.

    Returns:
      The tokenizer.

    Raises:
      OSError: there is no tokenizer, or it cannot be read.
      ValueError: the tokenizer lacks BOS, EOS or PAD, or two of them are the same token.
    """
    tokenizer = _read(Path(folder))
    special = {"BOS": tokenizer.bos_token_id, "EOS": tokenizer.eos_token_id, "PAD": tokenizer.pad_token_id}
    missing = [name for name, token_id in special.items() if token_id is None]
    if missing:
        raise ValueError(f"The tokenizer in {folder} has no {', '.join(missing)} token; give it one and save it again.")
    if len(set(special.values())) < len(special):
        raise ValueError(
            f"The tokenizer in {folder} uses one token for two purposes: {special}; expected different tokens, "
            "or padding and the end of an answer look alike. Give each a token of its own, and save it again."
        )
    return tokenizer


def tokenizer_fingerprint(folder: str | Path) -> str:
    """Identity of a saved tokenizer, by content.

    Args:
      folder: a folder that ``save_tokenizer`` wrote.

    Returns:
      sha256 of ``tokenizer.json``, hexadecimal.

    Raises:
      OSError: there is no tokenizer.
    """
    return hashlib.sha256(_tokenizer_file(Path(folder)).read_bytes()).hexdigest()


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], special: bool = False) -> list[np.ndarray]:
    """Tokens of the texts alone: no BOS, no EOS, and none out of characters that spell one.

    Args:
      tokenizer: a tokenizer.
      texts: what to encode.
      special: whether characters that spell a special token are one, as in a rendered chat template.

    Returns:
      int32 [n] for every text.
    """
    return _ids(tokenizer.backend_tokenizer, texts, special)


class Continuation:
    """Encodes texts that go on after others: without the space that SentencePiece puts before a whole text.

    A special token inside of a text is followed by what follows it in a whole one.

    Args:
      tokenizer: a tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._whole = tokenizer.backend_tokenizer
        self._bare = _without_prefix(self._whole)
        added = tokenizer.added_tokens_decoder.values()
        # What the tokenizer looks for first: with and without special tokens.
        self._added = {
            special: any_of(t.content for t in added if special or not t.special) for special in (False, True)
        }

    def encode(self, texts: Sequence[str], special: bool = False) -> list[np.ndarray]:
        """As :func:`encode`."""
        if self._bare is None:
            return _ids(self._whole, texts, special)
        cuts = [found.start() if (found := self._added[special].search(text)) else len(text) for text in texts]
        heads = _ids(self._bare, [text[:cut] for text, cut in zip(texts, cuts, strict=True)], special)
        tails = _ids(self._whole, [text[cut:] for text, cut in zip(texts, cuts, strict=True)], special)
        return [np.concatenate(both) for both in zip(heads, tails, strict=True)]


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds any of the texts, the longest first."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _ids(backend: Tokenizer, texts: Sequence[str], special: bool) -> list[np.ndarray]:
    # What tokenizer(texts) calls in the end, without the lists and masks that it makes of the result.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = not special
    return [np.array(row.ids, np.int32) for row in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def _without_prefix(backend: Tokenizer) -> Tokenizer | None:
    """The tokenizer without the space before a text; None where it has none."""
    spec = json.loads(backend.to_str())
    bare = {**spec, **{part: _bare(spec[part]) for part in ("normalizer", "pre_tokenizer")}}
    return None if bare == spec else Tokenizer.from_str(json.dumps(bare))


def _bare(part: Any) -> Any:
    match part:
        case {"type": "Prepend"}:
            return None
        case {"type": "Sequence", "normalizers": inner}:
            return {**part, "normalizers": [bare for p in inner if (bare := _bare(p))]}
        case {"type": "Sequence", "pretokenizers": inner}:
            return {**part, "pretokenizers": [bare for p in inner if (bare := _bare(p))]}
        case {"type": "Metaspace"}:
            return {**part, "prepend_scheme": "never"}
        case {"type": "ByteLevel", "add_prefix_space": True}:
            return {**part, "add_prefix_space": False}
    return part


def decode(tokenizer: PreTrainedTokenizerFast, tokens: np.ndarray | Sequence[int]) -> str:
    """Text of the tokens, without the special ones.

    Args:
      tokenizer: the tokenizer that made them.
      tokens: int [n].

    Returns:
      The text; bytes that are no UTF-8 become U+FFFD.
    """
    return str(tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True))


def more_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id of MORE.

    Args:
      tokenizer: a tokenizer that ``train_tokenizer`` made.

    Returns:
      The id, in tokens of the vocabulary.

    Raises:
      ValueError: the tokenizer has no such token.
    """
    token_id = tokenizer.get_vocab().get(MORE)
    if token_id is None:
        raise ValueError(
            f"The tokenizer has no token {MORE}, which begins windows from the middle of a review; "
            "use a tokenizer of `train_tokenizer`, or openings alone."
        )
    return token_id


def _read(folder: Path) -> PreTrainedTokenizerFast:
    _tokenizer_file(folder)
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a file that it cannot parse
        raise OSError(f"Cannot read the tokenizer in {folder}: {error}. {_REMEDY}") from error


def _tokenizer_file(folder: Path) -> Path:
    path = folder / _FILE
    if not path.is_file():
        there = "exists, without" if folder.is_dir() else "does not exist; expected a folder with"
        raise FileNotFoundError(f"No tokenizer: {folder} {there} {_FILE}. {_REMEDY}")
    return path
