"""The shapes in which preference rows come, each told by its fields. One function a shape, row → Record.

=======================================================  ==============================================================
fields                                                   shape
=======================================================  ==============================================================
prompt, chosen, rejected                                 text, or messages
chosen, rejected                                         messages (prompt: the longest common prefix of messages), or
                                                         a dialogue of Anthropic HH
conversations, chosen, rejected                          ShareGPT
conversations | messages, label                          one answer, desirable or not (KTO)
prompt, completion, label                                the same
prompt, completion; conversations; messages              one answer to be imitated (sft); no label, chosen or rejected
prompt, completions | responses, scores                  scored answers, to be paired
=======================================================  ==============================================================

Beside any of these, ``system`` is the first message of the conversation; a prompt that is text becomes the second.

To add a shape, write a function and its line in SHAPES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from dpo_jax.data import records
from dpo_jax.data.records import BadRow, Message, Record, Reply
from dpo_jax.types import CHOSEN, REJECTED

Row = Mapping[str, Any]
Parser = Callable[[Row], Record]

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def prompt_pair(row: Row) -> Record:
    """{prompt, chosen, rejected}: all text, or messages with the prompt apart or repeated in chosen and rejected."""
    prompt, chosen, rejected = (records.field(row, name) for name in ("prompt", "chosen", "rejected"))
    scores = _pair_scores(row)
    if not records.is_conversation(chosen) and not records.is_conversation(rejected):
        if records.is_conversation(prompt):
            spoken = _spoken(chosen, "chosen"), _spoken(rejected, "rejected")
            return records.pair(records.messages_of(prompt, "prompt"), spoken[0], spoken[1], scores)
        texts = [records.text_of(v, n) for v, n in ((prompt, "prompt"), (chosen, "chosen"), (rejected, "rejected"))]
        return records.pair(texts[0], texts[1], texts[2], scores)
    sides = records.messages_of(chosen, "chosen"), records.messages_of(rejected, "rejected")
    if not records.is_conversation(prompt):
        opening = records.text_of(prompt, "prompt")
        if sides[0][0].role != "assistant":
            # UltraFeedback's way: the prompt stands in both conversations as well.
            return records.pair(*records.common_prefix(*sides), scores)
        before: tuple[Message, ...] = (Message("user", opening),)
    else:
        before = records.messages_of(prompt, "prompt")
    answers = tuple(side[len(before) :] if side[: len(before)] == before else side for side in sides)
    for answer, name in zip(answers, ("chosen", "rejected"), strict=True):
        records.check_answer(answer, name)
    return records.pair(before, answers[0], answers[1], scores)


def bare_pair(row: Row) -> Record:
    """{chosen, rejected} that hold their prompt: conversations, or dialogues of Anthropic HH."""
    chosen, rejected = records.field(row, "chosen"), records.field(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return hh_pair(row)
    sides = records.messages_of(chosen, "chosen"), records.messages_of(rejected, "rejected")
    return records.pair(*records.common_prefix(*sides), _pair_scores(row))


def hh_pair(row: Row) -> Record:
    """Two dialogues of the form "\\n\\nHuman: … \\n\\nAssistant: …", split at the last "Assistant:".

    Raises:
      BadRow: there is no "Assistant:", or the dialogues differ before the last one.
    """
    sides = [records.text_of(records.field(row, name), name) for name in ("chosen", "rejected")]
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        if _ASSISTANT not in side:
            raise BadRow("no prompt", f"there is no field 'prompt', and {name} has no turn {_ASSISTANT.strip()!r}")
    prompts, answers = zip(*(split_dialogue(side) for side in sides), strict=True)
    if prompts[0] != prompts[1]:
        own = zip(prompts, answers, (CHOSEN, REJECTED), strict=True)
        raise BadRow(
            "prompts differ",
            f"chosen and rejected differ before the last {_ASSISTANT.strip()!r}",
            tuple(Record(prompt, (Reply((Message("assistant", a),), role),)) for prompt, a, role in own),
        )
    spoken = _spoken(answers[0], "chosen"), _spoken(answers[1], "rejected")
    return records.pair(prompts[0], *spoken, _pair_scores(row))


def split_dialogue(text: str) -> tuple[tuple[Message, ...], str]:
    """Splits an HH dialogue at its last "Assistant:" into the turns before and the answer.

    The space after each marker belongs to the marker; all else stays as it is.
    ``"\\n\\nHuman: Hi\\n\\nAssistant: Yes?"`` gives ``(user "Hi",)`` and ``"Yes?"``.
    """
    before, _, answer = text.rpartition(_ASSISTANT)
    turns: list[Message] = []
    for part in before.split(_HUMAN)[1:]:
        said, *answers = part.split(_ASSISTANT)
        turns.append(Message("user", said.removeprefix(" ")))
        turns += [Message("assistant", a.removeprefix(" ")) for a in answers]
    opening = before.split(_HUMAN)[0]
    if opening.strip() or not turns:
        raise BadRow("no prompt", f"the dialogue begins with {opening[:40]!r}; expected {_HUMAN.strip()!r}")
    return tuple(turns), answer.removeprefix(" ")


def sharegpt_pair(row: Row) -> Record:
    """{conversations, chosen, rejected} with messages of {from, value}."""
    before = records.messages_of(records.field(row, "conversations"), "conversations")
    answers = [records.messages_of(records.field(row, name), name) for name in ("chosen", "rejected")]
    for answer, name in zip(answers, ("chosen", "rejected"), strict=True):
        records.check_answer(answer, name)
    return records.pair(before, answers[0], answers[1], _pair_scores(row))


def labelled_completion(row: Row) -> Record:
    """{prompt, completion} with a label, or to be imitated: text or messages."""
    prompt, completion = records.field(row, "prompt"), records.field(row, "completion")
    role = _role(row)
    if not records.is_conversation(prompt) and not records.is_conversation(completion):
        content = records.text_of(completion, "completion")
        return Record(records.text_of(prompt, "prompt"), (Reply(content, role),))
    before = (
        records.messages_of(prompt, "prompt")
        if records.is_conversation(prompt)
        else (Message("user", records.text_of(prompt, "prompt")),)
    )
    answer = (
        records.messages_of(completion, "completion")
        if records.is_conversation(completion)
        else _spoken(completion, "completion")
    )
    records.check_answer(answer, "completion")
    return Record(before, (Reply(answer, role),))


def labelled_messages(row: Row) -> Record:
    """{messages} or {conversations} with a label, or to be imitated: the last turn is the answer."""
    name = "messages" if row.get("messages") is not None else "conversations"
    messages = records.messages_of(records.field(row, name), name)
    if len(messages) < 2:
        raise BadRow("role order", f"{name} has one turn; expected a prompt and an answer")
    records.check_answer(messages[-1:], name)
    return Record(messages[:-1], (Reply(messages[-1:], _role(row)),))


def scored_completions(row: Row) -> Record:
    """{prompt, completions, scores}: texts beside numbers, or objects of {text | content | response, score}."""
    items = records.field(row, "completions", "responses")
    if not isinstance(items, list | tuple) or not items:
        raise BadRow("wrong type", "completions is no list of answers")
    scores = row.get("scores")
    if scores is None:
        scores = [records.field(item, "score", "rating") if isinstance(item, Mapping) else None for item in items]
    if not isinstance(scores, list | tuple) or len(scores) != len(items):
        raise BadRow("wrong type", f"{len(items)} completions do not have as many scores")
    prompt = records.field(row, "prompt", "instruction")
    talks = records.is_conversation(prompt)
    replies = []
    for i, (item, score) in enumerate(zip(items, scores, strict=True)):
        text = records.field(item, "text", "content", "response", "completion") if isinstance(item, Mapping) else item
        said = records.text_of(text, f"completions[{i}]")
        number = records.number_of(score, f"scores[{i}]")
        replies.append(Reply((Message("assistant", said),) if talks else said, CHOSEN, number))
    before = records.messages_of(prompt, "prompt") if talks else records.text_of(prompt, "prompt")
    return Record(before, tuple(replies), scored=True)


def _with_system(record: Record, system: Any) -> Record:
    """The record with a row's system prompt, unless that is empty, before all other messages."""
    if system is None or system == "":
        return record
    opening = Message("system", records.text_of(system, "system"))
    before, record = records.as_conversation(record)
    if before[0].role != "system":
        return replace(record, prompt=(opening, *before))
    if before[0] != opening:
        raise BadRow("two system prompts", "the field 'system' and the first message are different system prompts")
    return record


def _spoken(value: Any, name: str) -> tuple[Message, ...]:
    return (Message("assistant", records.text_of(value, name)),)


def _role(row: Row) -> int:
    if not row.keys() & {"label", "chosen", "rejected"}:
        return CHOSEN  # nothing is said of answers that are only shown
    return CHOSEN if records.label_of(records.field(row, "label")) else REJECTED


def _pair_scores(row: Row) -> tuple[float, float]:
    names = ("score_chosen", "score_rejected")
    if any(row.get(name) is None for name in names):
        return 0.0, 0.0
    first, second = (records.number_of(row[name], name) for name in names)
    return first, second


# The first shape whose fields a row has is its shape.
SHAPES: tuple[tuple[tuple[str, ...], Parser], ...] = (
    (("conversations", "chosen", "rejected"), sharegpt_pair),
    (("prompt", "chosen", "rejected"), prompt_pair),
    (("chosen", "rejected"), bare_pair),
    (("prompt", "completion", "label"), labelled_completion),
    (("messages", "label"), labelled_messages),
    (("conversations", "label"), labelled_messages),
    (("prompt", "completions"), scored_completions),
    (("prompt", "responses"), scored_completions),
    (("instruction", "completions"), scored_completions),
    (("prompt", "completion"), labelled_completion),
    (("messages",), labelled_messages),
    (("conversations",), labelled_messages),
)


def parse_row(row: Row) -> Record:
    """Parses a row of any known shape.

    Raises:
      BadRow: it has no known shape, or not what its shape promises.
    """
    for names, parse in SHAPES:
        if all(row.get(name) is not None for name in names):
            return _with_system(parse(row), row.get("system"))
    shapes = "; ".join("{" + ", ".join(names) + "}" for names, _ in SHAPES)
    raise BadRow("missing field", f"the fields {sorted(row)[:12]} are of no known shape: {shapes}")
