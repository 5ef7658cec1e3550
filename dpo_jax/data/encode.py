"""Records → examples: text becomes tokens, with the border between prompt and answer where generation has it.

The prompt is encoded alone, exactly as it is before generation, and each answer as what goes on after it: no token ever
reaches over the border, and none is there that generation lacks, such as the space that SentencePiece puts before a
text. One BOS begins the prompt where the tokenizer has one; EOS ends every whole answer and is trained on, whatever
token is used for padding. With the tokens 1 = BOS, 2 = EOS::

    record      user "a" → assistant "b"                       plain: "\\n\\nHuman: a\\n\\nAssistant:" + " b"
    prompt      BOS \\n\\nHuman: a \\n\\nAssistant:
    answer       b EOS
    weights     1 1

An answer of several turns trains on the assistant's alone, ``"b"``, then user ``"c"``, then ``"d"``::

    answer       b EOS \\n\\nHuman: c \\n\\nAssistant:  d EOS
    weights     1 1   0             0             1 1

Too long prompts lose their beginning (``keep_end``; BOS stays) or their end (``keep_start``); too long answers lose
their end and so their EOS, which is counted.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dpo_jax.data import tokenizer as tokenizers
from dpo_jax.data.example import Answer, Example
from dpo_jax.data.pairs import pairs_of
from dpo_jax.data.records import BadRow, Message, Record, Reply

TEMPLATES = ("plain", "chat")
TURNS = ("last", "all")
TRUNCATIONS = ("keep_end", "keep_start")
PAIRINGS = ("all", "best_worst")

_BATCH = 256  # records whose texts are encoded together
_MARKERS = {"user": "\n\nHuman:", "assistant": "\n\nAssistant:", "system": "\n\nSystem:", "tool": "\n\nTool:"}


@dataclass(frozen=True)
class Encoding:
    """How records become tokens.

    Attributes:
      prompt_length: longest prompt, tokens, its BOS included.
      answer_length: longest answer, tokens, its EOS included.
      template: how conversations become text: ``plain`` markers, or the tokenizer's own ``chat`` template.
      turns: of an unpaired conversation, whether the ``last`` assistant turn is the answer, or ``all`` are trained on.
        In a pair the turns before the answers are the same for both and cancel out, so they stay the prompt.
      truncate: which part of a too long prompt stays.
      pairs: of scored answers, ``all`` pairs or ``best_worst``.
    """

    prompt_length: int
    answer_length: int
    template: str = "plain"
    turns: str = "last"
    truncate: str = "keep_end"
    pairs: str = "all"

    def __post_init__(self) -> None:
        for name, known in (("template", TEMPLATES), ("turns", TURNS), ("truncate", TRUNCATIONS), ("pairs", PAIRINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"data.{name} is {getattr(self, name)!r}; known: {', '.join(known)}")


@dataclass(frozen=True)
class Segment:
    """A piece of an answer's text with one weight.

    Attributes:
      text: what is encoded.
      weight: of its tokens.
      ends: whether EOS follows, with the same weight.
    """

    text: str
    weight: float
    ends: bool = False


@dataclass(frozen=True)
class Encoded:
    """What became of a record.

    Attributes:
      examples: without their final uids; none where the record is of no use.
      dropped: why there is none.
      notes: how often a prompt was cut, an answer lost its EOS, a pair of scored answers was left out.
    """

    examples: tuple[Example, ...]
    dropped: str | None
    notes: Counter[str]


class Encoder:
    """Encodes records with one tokenizer.

    Args:
      tokenizer: a transformers tokenizer with an EOS.
      encoding: how.

    Raises:
      ValueError: there is no EOS, or a chat template is asked for and there is none.
    """

    def __init__(self, tokenizer: Any, encoding: Encoding) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token, so no answer could end; give it one and save it again")
        if encoding.template == "chat" and not tokenizer.chat_template:
            raise ValueError("data.template is 'chat', but the tokenizer has no chat template; add one, or use 'plain'")
        self.tokenizer, self.encoding = tokenizer, encoding
        # Looked up once: a transformers tokenizer searches for them at every reading.
        self._bos: int | None = tokenizer.bos_token_id
        self._eos = np.array([tokenizer.eos_token_id], np.int32)
        self._continuation = tokenizers.Continuation(tokenizer)
        self._special = encoding.template == "chat"
        spelt = tokenizers.encode(tokenizer, [tokenizer.eos_token], self._special)[0]
        self._anchor = tokenizer.eos_token if np.array_equal(spelt, self._eos) else ""
        self._render = _Chat(tokenizer) if self._special else _Plain()

    def identity(self) -> dict[str, Any]:
        """All of the encoding, JSON values, that ``tokenizer.json`` does not tell."""
        template = str(self.tokenizer.chat_template) if self._special else None
        ids = {"bos": self._bos, "eos": int(self._eos[0])}
        return {**asdict(self.encoding), **ids, "chat_template": template}

    def encode(self, records: Iterable[Record]) -> Iterator[Encoded | BadRow]:
        """Encodes records in order, each into examples or into the reason why that cannot be."""
        records = iter(records)
        while batch := list(itertools.islice(records, _BATCH)):
            rendered = [self._rendered(record) for record in batch]
            right = [r for r in rendered if not isinstance(r, BadRow)]
            prompts = iter(tokenizers.encode(self.tokenizer, [r.prompt for r in right], self._special))
            pieces = iter(self._continuation.encode([t for r in right for t in self._answer_texts(r)], self._special))
            for record, item in zip(batch, rendered, strict=True):
                if isinstance(item, BadRow):
                    yield item
                    continue
                own = list(itertools.islice(pieces, sum(map(len, item.answers))))
                try:
                    yield self._encoded(record, item, next(prompts), own)
                except BadRow as error:
                    yield error

    def prompt_tokens(self, prompt: str | tuple[Message, ...]) -> np.ndarray:
        """The tokens of a prompt as training has them: what generation is to begin with.

        Raises:
          BadRow: the prompt cannot be rendered, or has no token.
        """
        (tokens,) = tokenizers.encode(self.tokenizer, [self._render.prompt(prompt)], self._special)
        return self._cut_prompt(tokens, Counter())

    def _rendered(self, record: Record) -> _Rendered | BadRow:
        try:
            if self.encoding.turns == "all" and len(record.replies) == 1:
                record = _widened(record)
            answers = tuple(self._render.answer(record.prompt, reply.content) for reply in record.replies)
            return _Rendered(self._render.prompt(record.prompt), answers)
        except BadRow as error:
            return error

    def _answer_texts(self, rendered: _Rendered) -> Iterator[str]:
        """The texts of all segments; one that follows an EOS begins with it, where a text can: some tokenizers look
        back at it."""
        for segments in rendered.answers:
            for segment, anchored in zip(segments, self._anchored(segments), strict=True):
                yield self._anchor + segment.text if anchored else segment.text

    def _anchored(self, segments: Sequence[Segment]) -> list[bool]:
        return [bool(self._anchor) and before.ends for before in (Segment("", 0.0), *segments[:-1])]

    def _encoded(self, record: Record, rendered: _Rendered, prompt: np.ndarray, pieces: list[np.ndarray]) -> Encoded:
        notes: Counter[str] = Counter()
        if any(not reply.text().strip() for reply in record.replies):
            return Encoded((), "empty answer", notes)
        prompt = self._cut_prompt(prompt, notes)
        answers = []
        for segments, reply in zip(rendered.answers, record.replies, strict=True):
            answers.append(self._answer(segments, [pieces.pop(0) for _ in segments], reply, notes))
        if any(not answer.weights.any() for answer in answers):
            return Encoded((), "answer truncated away", notes)
        if record.scored:
            return self._paired(prompt, answers, notes)
        if len(answers) == 2 and np.array_equal(answers[0].tokens, answers[1].tokens):
            return Encoded((), "identical answers", notes)
        return Encoded((Example(0, prompt, tuple(answers)),), None, notes)

    def _paired(self, prompt: np.ndarray, answers: Sequence[Answer], notes: Counter[str]) -> Encoded:
        scored = [(answer.tokens, answer.score) for answer in answers]
        if self.encoding.pairs == "best_worst":
            by_score = sorted(scored, key=lambda item: item[1])
            scored = [by_score[-1], by_score[0]] if len(by_score) > 1 else by_score
        pairs = pairs_of(prompt, scored, uid=0)
        notes += Counter({"duplicate answers": pairs.duplicates, "ties": pairs.ties})
        return Encoded(pairs.examples, None if pairs.examples else "no pair of different scores", notes)

    def _cut_prompt(self, tokens: np.ndarray, notes: Counter[str]) -> np.ndarray:
        bos, most = self._bos, self.encoding.prompt_length
        if bos is not None and (not len(tokens) or tokens[0] != bos):
            tokens = np.concatenate([[bos], tokens]).astype(np.int32)
        if not len(tokens):
            raise BadRow("empty prompt", "the prompt is empty and there is no BOS: nothing predicts the answer")
        if len(tokens) <= most:
            return tokens
        notes["prompts truncated"] += 1
        if self.encoding.truncate == "keep_start":
            return tokens[:most]
        kept = 0 if bos is None else 1
        return np.concatenate([tokens[:kept], tokens[len(tokens) - (most - kept) :]])

    def _answer(
        self, segments: Sequence[Segment], pieces: Sequence[np.ndarray], reply: Reply, notes: Counter[str]
    ) -> Answer:
        own = [p[1:] if anchored else p for p, anchored in zip(pieces, self._anchored(segments), strict=True)]
        tokens = [np.concatenate([p, self._eos]) if s.ends else p for s, p in zip(segments, own, strict=True)]
        weights = [np.full(len(t), s.weight, np.float32) for s, t in zip(segments, tokens, strict=True)]
        joined, weight = np.concatenate(tokens).astype(np.int32), np.concatenate(weights)
        most = self.encoding.answer_length
        if len(joined) > most:
            notes["answers that lost their EOS"] += 1
        return Answer(joined[:most], weight[:most], reply.role, reply.score)


@dataclass(frozen=True)
class _Rendered:
    """A record as texts."""

    prompt: str
    answers: tuple[tuple[Segment, ...], ...]


class _Plain:
    """Text as it is; conversations with "Human:" and "Assistant:" before the turns."""

    def prompt(self, prompt: str | tuple[Message, ...]) -> str:
        if isinstance(prompt, str):
            return prompt
        return "".join(f"{_MARKERS[m.role]} {m.content}" for m in prompt) + _MARKERS["assistant"]

    def answer(self, prompt: str | tuple[Message, ...], content: str | tuple[Message, ...]) -> tuple[Segment, ...]:
        if isinstance(content, str):
            # A text prompt is followed by the text as it is; after a conversation comes the space of the marker.
            return (Segment(content if isinstance(prompt, str) else f" {content}", 1.0, ends=True),)
        segments: list[Segment] = []
        between = ""
        for i, message in enumerate(content):
            if message.role == "assistant":
                marker = _MARKERS["assistant"] if i else ""
                if between + marker:
                    segments.append(Segment(between + marker, 0.0))
                segments.append(Segment(f" {message.content}", _weight(message), ends=True))
                between = ""
            else:
                between += f"{_MARKERS[message.role]} {message.content}"
        return tuple(segments)


class _Chat:
    """The tokenizer's own template. Text that spells a special token is refused: it would become one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = (t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
        self._special = tokenizers.any_of([*tokenizer.all_special_tokens, *added])

    def prompt(self, prompt: str | tuple[Message, ...]) -> str:
        return self._text(_conversation(prompt), reply_follows=True)

    def answer(self, prompt: str | tuple[Message, ...], content: str | tuple[Message, ...]) -> tuple[Segment, ...]:
        before = _conversation(prompt)
        messages = (Message("assistant", content),) if isinstance(content, str) else content
        segments: list[Segment] = []
        # What the text so far is; pending text is of turns that are not trained on.
        done, pending = self._text(before, reply_follows=True), ""
        for i, message in enumerate(messages):
            upto = (*before, *messages[:i])
            if message.role == "assistant":
                header = self._text(upto, reply_follows=True) if i else done
                pending += self._after(done, header)
                full = self._text((*upto, message), reply_follows=False)
                said, rest = self._split_end(self._after(header, full))
                if pending:
                    segments.append(Segment(pending, 0.0))
                segments.append(Segment(said, _weight(message), ends=True))
                done, pending = full, rest
            else:
                full = self._text((*upto, message), reply_follows=False)
                pending, done = pending + self._after(done, full), full
        return tuple(segments)

    def _split_end(self, text: str) -> tuple[str, str]:
        """(the assistant's text without its EOS, the blanks after it): EOS is put back as a token."""
        eos = self._tokenizer.eos_token
        before, found, rest = text.rpartition(eos)
        return (before, rest) if found and not rest.strip() else (text, "")

    def _after(self, start: str, whole: str) -> str:
        if not whole.startswith(start):
            raise BadRow("template", "the chat template changes earlier turns when a later one is added; use 'plain'")
        return whole[len(start) :]

    def _text(self, messages: Sequence[Message], reply_follows: bool) -> str:
        for message in messages:
            if spelt := self._special.search(message.content):
                raise BadRow("special token", f"a {message.role} turn spells the special token {spelt[0]!r}")
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=reply_follows))
        except Exception as error:  # a template raises what its author likes, in jinja's types
            raise BadRow("template", f"the chat template refuses the conversation: {error}") from error


def _conversation(prompt: str | tuple[Message, ...]) -> tuple[Message, ...]:
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def _weight(message: Message) -> float:
    return 1.0 if message.weight is None else message.weight


def _widened(record: Record) -> Record:
    """Moves the border before the first assistant turn, so that all of them are trained on."""
    (reply,) = record.replies
    if isinstance(record.prompt, str) or isinstance(reply.content, str):
        return record
    first = next((i for i, m in enumerate(record.prompt) if m.role == "assistant"), len(record.prompt))
    if first == 0:
        raise BadRow("role order", "the conversation begins with the assistant, so there is no prompt")
    content = (*record.prompt[first:], *reply.content)
    return Record(record.prompt[:first], (Reply(content, reply.role, reply.score),))
