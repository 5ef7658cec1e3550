"""Token windows of reviews: openings for supervised fine-tuning, later sentences beside them, and prompts.

Windows hold whole sentences. With a review of three sentences, ``11 12 13``, ``21 22 23 24`` and ``31 32``:

======  =======================================  =======================================
window  opening                                  continuations
======  =======================================  =======================================
9       BOS 11 12 13 21 22 23 24 EOS             MORE 31 32 EOS
6       BOS 11 12 13 EOS                         MORE 21 22 23 24 EOS | MORE 31 32 EOS
4       BOS 11 12 13                             MORE 21 22 23 | MORE 31 32 EOS
======  =======================================  =======================================

A sentence that does not fit by itself is cut at the window and has no EOS, since the text does not end there; what is
cut off is left out. Prompts are BOS and the first tokens of an opening, so BOS stands for the beginning of a review and
for nothing else: a window from the middle of a review under BOS would teach the model that reviews begin there.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from dpo_jax import types
from dpo_jax.data import tokenizer as tokenizers
from dpo_jax.data.example import Answer, Example
from dpo_jax.data.imdb import Review

_BATCH = 1000  # reviews that are encoded together, which keeps memory constant

_END = re.compile(r"[.!?…]+[\"')\]”’]*(?= )")
_LAST_WORD = re.compile(r"[\w.'’-]*$")
_ABBREVIATIONS = frozenset(
    ("mr", "mrs", "ms", "dr", "st", "vs", "prof", "jr", "sr", "lt", "sgt", "col", "gen", "capt", "e.g", "i.e", "cf")
)
_INITIALS = re.compile(r"(?:[A-HJ-Z]|[A-Z](?:\.[A-Z])+)$")  # J. K., U.S.; a lone I is a pronoun


@dataclass(frozen=True)
class Window:
    """A sequence to learn from.

    Attributes:
      tokens: int32 [n], BOS or MORE, then text, then EOS where the last sentence is whole; 2 ≤ n ≤ the window.
      complete: whether it ends with EOS.
    """

    tokens: np.ndarray
    complete: bool


def sentences_of(text: str, characters: int | None = None) -> list[str]:
    """Splits a text after ``. ! ? …``; abbreviations, initials and dots before a small letter do not end a sentence.

    ``"Mr. Lee ran... and fell. Why? (He slipped.) ok"`` gives ``"Mr. Lee ran... and fell."``, ``" Why?"`` and
    ``" (He slipped.) ok"``.

    Args:
      text: with single spaces between words.
      characters: leave out the sentences that begin after that many characters; None takes all.

    Returns:
      The sentences, which joined are the text or its beginning; all but the first begin with their space.
    """
    sentences: list[str] = []
    start = 0
    last = len(text) if characters is None else characters
    for match in _END.finditer(text):
        if start > last:
            return sentences
        if _ends_sentence(text, match):
            sentences.append(text[start : match.end()])
            start = match.end()
    if start < len(text) and start <= last:
        sentences.append(text[start:])
    return sentences


def sentence_runs(text: str, characters: int) -> list[str]:
    """Cuts a text into runs of whole sentences.

    With 12 characters, ``"Bad. Sad. I left early."`` gives ``"Bad. Sad."`` and ``" I left early."``.

    Args:
      text: with single spaces between words.
      characters: most characters of a run; a longer sentence is a run by itself.

    Returns:
      The runs, which joined are the text.
    """
    runs: list[str] = []
    for sentence in sentences_of(text):
        if runs and len(runs[-1]) + len(sentence) <= characters:
            runs[-1] += sentence
        else:
            runs.append(sentence)
    return runs


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    if "!" in match.group() or "?" in match.group():
        return True
    follower = text[match.end() + 1 : match.end() + 2]
    if not follower or follower.islower():
        return False
    last = _LAST_WORD.search(text, max(0, match.start() - 12), match.start())
    word = last.group() if last else ""
    return not (word.lower() in _ABBREVIATIONS or _INITIALS.match(word))


def encode_sentences(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], characters: int | None = None
) -> list[list[np.ndarray]]:
    """Tokens of every sentence.

    Joined, they are the tokens of the whole text: byte-level BPE never merges over the space between two sentences.

    Args:
      tokenizer: a byte-level tokenizer.
      texts: cleaned texts.
      characters: as of ``sentences_of``.

    Returns:
      For every text its sentences, int32 [n] each.
    """
    split = [sentences_of(text, characters) for text in texts]
    tokens = iter(tokenizers.encode(tokenizer, [sentence for sentences in split for sentence in sentences]))
    return [list(itertools.islice(tokens, len(sentences))) for sentences in split]


def opening_window(sentences: Sequence[np.ndarray], window: int, bos: int, eos: int) -> Window:
    """BOS, as many whole sentences from the start as fit, EOS; a first sentence that does not fit is cut, without EOS.

    Args:
      sentences: tokens of the sentences of one text, at least one.
      window: most tokens of the result, special tokens included; at least 2.
      bos: id of BOS.
      eos: id of EOS.

    Returns:
      The opening.

    Raises:
      ValueError: no sentence, or a window too small for a token.
    """
    return _pack(sentences, 0, window, bos, eos)[0]


def continuation_windows(sentences: Sequence[np.ndarray], window: int, more: int, eos: int) -> Iterator[Window]:
    """The sentences after the opening, as many to a window as fit, each window begun with MORE.

    Args:
      sentences: tokens of the sentences of one text, at least one.
      window: most tokens of a window, special tokens included; at least 2.
      more: id of MORE.
      eos: id of EOS.

    Yields:
      The windows that follow the opening of the same size.

    Raises:
      ValueError: no sentence, or a window too small for a token.
    """
    _, start = _pack(sentences, 0, window, more, eos)
    while start < len(sentences):
        packed, start = _pack(sentences, start, window, more, eos)
        yield packed


def _pack(sentences: Sequence[np.ndarray], start: int, window: int, first: int, eos: int) -> tuple[Window, int]:
    # The window that begins with sentence `start`, and the sentence that the next window begins with.
    if not sentences or window < 2:
        raise ValueError(f"{len(sentences)} sentences in a window of {window} tokens; expected at least 1 and 2.")
    room = window - 2
    if len(sentences[start]) > room:
        cut = sentences[start][: window - 1]
        return Window(np.concatenate([[first], cut]).astype(np.int32), complete=False), start + 1
    end = start
    while end < len(sentences) and len(sentences[end]) <= room:
        room -= len(sentences[end])
        end += 1
    return Window(np.concatenate([[first], *sentences[start:end], [eos]]).astype(np.int32), complete=True), end


def review_windows(
    reviews: Iterable[Review], tokenizer: PreTrainedTokenizerFast, window: int, continuations: bool = False
) -> Iterator[tuple[int, Window]]:
    """Windows of many reviews.

    Args:
      reviews: the reviews; read once, encoded in batches.
      tokenizer: a byte-level tokenizer with EOS, and with MORE for continuations; EOS stands for a BOS that it lacks.
      window: most tokens of a window, special tokens included.
      continuations: whether windows from later in a review follow its opening.

    Yields:
      (uid, window): the opening has the uid of its review, its n-th continuation has that uid + n.

    Raises:
      ValueError: the window is too small, or the tokenizer has no MORE.
    """
    eos = tokenizer.eos_token_id
    bos = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    more = tokenizers.more_token_id(tokenizer) if continuations else None
    reviews = iter(reviews)
    while batch := list(itertools.islice(reviews, _BATCH)):
        texts = [review.text for review in batch]
        encoded = encode_sentences(tokenizer, texts) if continuations else _encode_openings(tokenizer, texts, window)
        for review, sentences in zip(batch, encoded, strict=True):
            yield review.uid, opening_window(sentences, window, bos, eos)
            if more is not None:
                for n, later in enumerate(continuation_windows(sentences, window, more, eos), start=1):
                    yield review.uid + n, later


def _encode_openings(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], window: int) -> list[list[np.ndarray]]:
    # A token has about four characters: few texts must be encoded far past the window, and those are encoded whole.
    encoded = encode_sentences(tokenizer, texts, characters=5 * window)
    short = [i for i, sentences in enumerate(encoded) if sum(map(len, sentences)) < window]
    for i, sentences in zip(short, encode_sentences(tokenizer, [texts[i] for i in short]), strict=True):
        encoded[i] = sentences
    return encoded


def window_example(uid: int, window: Window) -> Example:
    """A window as an example with one answer: its first token is the prompt, the rest counts.

    ====== ======= ======================= =====================
    window  prompt  answer                  weights
    ====== ======= ======================= =====================
    BOS 11 12 EOS → BOS  | 11 12 EOS        | 1 1 1
    ====== ======= ======================= =====================

    Args:
      uid: identity of the example.
      window: of an opening or a continuation.

    Returns:
      The example; role CHOSEN, score 0.
    """
    answer = window.tokens[1:]
    return Example(uid, window.tokens[:1], (Answer(answer, np.ones(len(answer), np.float32), types.CHOSEN),))


def prompt_tokens(opening: Window, seed: int, uid: int, shortest: int = 2, longest: int = 8) -> np.ndarray:
    """BOS and the first k tokens of an opening; k is drawn evenly from shortest … longest, by seed and uid alone.

    With k = 2, ``BOS 11 12 13 EOS`` gives ``BOS 11 12``. The tokens are those of the opening, never those of a text cut
    off and encoded again: at the border, prompt and answer are split as the model was taught. A shorter opening gives
    all but one of its text tokens, but at least one.

    Args:
      opening: the window of a review's beginning.
      seed: of the experiment.
      uid: of the review.
      shortest: least k, text tokens; at least 1.
      longest: greatest k, text tokens.

    Returns:
      int32 [1 + k].

    Raises:
      ValueError: not 1 ≤ shortest ≤ longest.
    """
    if not 1 <= shortest <= longest:
        raise ValueError(f"Prompts of {shortest} to {longest} tokens; expected 1 ≤ shortest ≤ longest.")
    drawn = int(np.random.default_rng([seed, uid]).integers(shortest, longest, endpoint=True))
    text_tokens = len(opening.tokens) - 1 - int(opening.complete)
    return opening.tokens[: 1 + max(1, min(drawn, text_tokens - 1))]
