"""One record of preference data as its source means it: a prompt with its answers, still text. Also how rows fail.

Every source ends in ``Record``; ``dpo_jax/data/encode.py`` turns records into examples.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_jax.types import CHOSEN, REJECTED

ROLES = ("system", "user", "assistant", "tool")
# What other formats call these.
_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
    "developer": "system",
}


class BadRow(ValueError):
    """A row that cannot be used, and why.

    Attributes:
      reason: one word or two, under which such rows are counted.
      sides: what can still be looked at: a record of each answer with its own prompt.
    """

    def __init__(self, reason: str, message: str, sides: tuple[Record, ...] = ()) -> None:
        super().__init__(message)
        self.reason, self.sides = reason, sides


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
      role: a name in ROLES.
      content: its text, as it is.
      weight: how much its tokens count where it is an assistant's; None is 1 for an assistant and 0 for all others.
    """

    role: str
    content: str
    weight: float | None = None


@dataclass(frozen=True)
class Reply:
    """One answer: plain text, or the messages that follow the prompt, of which the last is the assistant's.

    Attributes:
      content: the answer.
      role: CHOSEN (or desirable) or REJECTED (or undesirable).
      score: the annotator's, 0 where there is none.
    """

    content: str | tuple[Message, ...]
    role: int
    score: float = 0.0

    def text(self) -> str:
        """The answer's words: of a conversation those of its assistant turns, a line each."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(m.content for m in self.content if m.role == "assistant")


@dataclass(frozen=True)
class Record:
    """A prompt with its answers.

    Attributes:
      prompt: plain text, or messages.
      replies: (chosen, rejected), or one answer, or many scored ones of which pairs are made.
      scored: whether the replies are to be paired by their scores.
    """

    prompt: str | tuple[Message, ...]
    replies: tuple[Reply, ...]
    scored: bool = False

    def prompt_text(self) -> str:
        """The prompt's words: of a conversation ``role: words``, a line each."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(f"{m.role}: {m.content}" for m in self.prompt)


def field(row: Mapping[str, Any], *names: str) -> Any:
    """The first of the fields that the row has.

    Raises:
      BadRow: it has none of them, or all are null.
    """
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise BadRow("missing field", f"no field {' or '.join(map(repr, names))}; the row has {sorted(row)[:12]}")


def text_of(value: Any, name: str) -> str:
    """A string that can be written as UTF-8.

    Raises:
      BadRow: it is something else, or holds an unpaired surrogate or a NUL.
    """
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{name} is {_named(value)}; expected a string")
    if "\0" in value:
        raise BadRow("NUL", f"{name} holds a NUL character at position {value.index(chr(0))}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow("surrogate", f"{name} holds an unpaired surrogate at position {error.start}") from None
    return value


def number_of(value: Any, name: str) -> float:
    """A finite number, also spelt out as CSV has it.

    Raises:
      BadRow: it is something else.
    """
    number = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
    if not math.isfinite(number):
        raise BadRow("wrong type", f"{name} is {_named(value)}; expected a finite number")
    return number


def label_of(value: Any, name: str = "label") -> bool:
    """A boolean, or 0 or 1, also spelt out as CSV has it.

    Raises:
      BadRow: it is something else.
    """
    spelt = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in spelt:
        return spelt[value.strip().lower()]
    raise BadRow("wrong label", f"{name} is {_named(value)}; expected true or false")


def messages_of(value: Any, name: str) -> tuple[Message, ...]:
    """A list of {role, content} or of {from, value}, or one of them alone.

    Raises:
      BadRow: it is something else, or a role is unknown.
    """
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadRow("wrong type", f"{name} is {_named(value)}; expected a list of messages")
    return tuple(_message(item, f"{name}[{i}]") for i, item in enumerate(value))


def _message(item: Any, name: str) -> Message:
    if not isinstance(item, Mapping):
        raise BadRow("wrong type", f"{name} is {_named(item)}; expected an object with role and content")
    role = text_of(field(item, "role", "from"), f"{name}.role").strip().lower()
    role = _ALIASES.get(role, role)
    if role not in ROLES:
        raise BadRow("unknown role", f"{name}.role is {role[:40]!r}; known: {', '.join((*ROLES, *_ALIASES))}")
    weight = item.get("weight")
    if weight is not None and number_of(weight, f"{name}.weight") < 0:
        raise BadRow("wrong type", f"{name}.weight is {weight}; expected 0 or more")
    content = text_of(field(item, "content", "value"), f"{name}.content")
    return Message(role, content, None if weight is None else float(weight))


def is_conversation(value: Any) -> bool:
    """Whether a field looks like messages rather than text."""
    return isinstance(value, Mapping) or (isinstance(value, Sequence) and not isinstance(value, str))


def pair(
    prompt: str | tuple[Message, ...],
    chosen: str | tuple[Message, ...],
    rejected: str | tuple[Message, ...],
    scores: tuple[float, float] = (0.0, 0.0),
) -> Record:
    """A record of a chosen and a rejected answer."""
    return Record(prompt, (Reply(chosen, CHOSEN, scores[0]), Reply(rejected, REJECTED, scores[1])))


def as_conversation(record: Record) -> tuple[tuple[Message, ...], Record]:
    """(prompt, record), both as messages: a text prompt is a user's, text answers are the assistant's."""
    prompt = (Message("user", record.prompt),) if isinstance(record.prompt, str) else record.prompt
    replies = (
        replace(r, content=(Message("assistant", r.content),)) if isinstance(r.content, str) else r
        for r in record.replies
    )
    return prompt, replace(record, prompt=prompt, replies=tuple(replies))


def common_prefix(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """Splits two conversations into the prompt that they share, in whole messages, and the two answers.

    ``(u1 a1 u2 a2)`` and ``(u1 a1 u2 a3)`` give ``(u1 a1 u2)``, ``(a2)`` and ``(a3)``: never a prefix of the characters
    of a2 and a3. The prompt does not end with an assistant's turn, and equal conversations keep their last turns as
    answers.

    Returns:
      (prompt, chosen answer, rejected answer).

    Raises:
      BadRow: the conversations share no message, or one of them ends where the other goes on.
    """
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and chosen[shared - 1].role == "assistant":
        shared -= 1
    if not shared:
        raise BadRow("no common prompt", "chosen and rejected have no first message in common, so there is no prompt")
    check_answer(chosen[shared:], "chosen")
    check_answer(rejected[shared:], "rejected")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def check_answer(messages: Sequence[Message], name: str) -> None:
    """Raises BadRow unless an answer begins and ends with the assistant."""
    if not messages or messages[-1].role != "assistant" or messages[0].role != "assistant":
        roles = " ".join(m.role for m in messages)
        raise BadRow(
            "role order", f"after the shared prompt {name} has the roles ({roles}); expected the assistant's answer"
        )


def role_errors(messages: Sequence[Message]) -> Iterator[str]:
    """What is unusual in the order of roles, in words: a late system message, two turns of one role in a row."""
    for before, after in itertools.pairwise(messages):
        if after.role == "system":
            yield "a system message after the first"
        elif before.role == after.role and before.role != "tool":
            yield f"two {after.role} turns in a row"
    if messages and messages[0].role in ("assistant", "tool"):
        yield f"begins with the {messages[0].role}"


def _named(value: Any) -> str:
    kind = {"NoneType": "null", "dict": "an object", "list": "a list", "str": "a string", "bool": "a boolean"}
    return f"{kind.get(type(value).__name__, type(value).__name__)} ({str(value)[:40]!r})"
