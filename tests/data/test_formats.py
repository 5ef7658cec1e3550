"""The shapes of rows: each becomes the record that it means, and what is wrong with a row is named."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_jax.data.formats import parse_row, split_dialogue
from dpo_jax.data.records import BadRow, Message, Record, Reply, role_errors
from dpo_jax.types import CHOSEN, REJECTED


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


def chat(*turns: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def system(text: str) -> Message:
    return Message("system", text)


def pair(prompt, chosen, rejected, scores=(0.0, 0.0)) -> Record:
    return Record(prompt, (Reply(chosen, CHOSEN, scores[0]), Reply(rejected, REJECTED, scores[1])))


TURNS = (user("a"),), (assistant("b"),), (assistant("c"),)

SHAPES = {
    "text": ({"prompt": "a", "chosen": "b", "rejected": "c"}, pair("a", "b", "c")),
    "scores": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 2, "score_rejected": 0.5},
        pair("a", "b", "c", (2.0, 0.5)),
    ),
    "messages with a prompt": (
        {"prompt": chat("a"), "chosen": chat("a", "b")[1:], "rejected": chat("a", "c")[1:]},
        pair(*TURNS),
    ),
    "messages that repeat the prompt": (
        {"prompt": chat("a"), "chosen": chat("a", "b"), "rejected": chat("a", "c")},
        pair(*TURNS),
    ),
    "messages and text": ({"prompt": chat("a"), "chosen": "b", "rejected": "c"}, pair(*TURNS)),
    "ultrafeedback": ({"prompt": "a", "chosen": chat("a", "b"), "rejected": chat("a", "c")}, pair(*TURNS)),
    "implicit prompt": ({"chosen": chat("a", "b"), "rejected": chat("a", "c")}, pair(*TURNS)),
    "a prefix of messages, not of characters": (
        {"chosen": chat("a", "same start b"), "rejected": chat("a", "same start c")},
        pair((user("a"),), (assistant("same start b"),), (assistant("same start c"),)),
    ),
    "answers of several turns": (
        {"chosen": chat("a", "b", "x", "y"), "rejected": chat("a", "c", "x", "z")},
        pair(
            (user("a"),),
            (assistant("b"), user("x"), assistant("y")),
            (assistant("c"), user("x"), assistant("z")),
        ),
    ),
    "a shared first answer": (
        {"chosen": chat("a", "b", "x", "y"), "rejected": chat("a", "b", "x", "z")},
        pair((user("a"), assistant("b"), user("x")), (assistant("y"),), (assistant("z"),)),
    ),
    "equal conversations keep an answer": (
        {"chosen": chat("a", "b"), "rejected": chat("a", "b")},
        pair((user("a"),), (assistant("b"),), (assistant("b"),)),
    ),
    "hh": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        pair(*TURNS),
    ),
    "hh with scores": (
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b",
            "rejected": "\n\nHuman: a\n\nAssistant: c",
            "score_chosen": "2.5",
            "score_rejected": "-1",
        },
        pair(*TURNS, (2.5, -1.0)),
    ),
    "system beside texts": (
        {"system": "s", "prompt": "a", "chosen": "b", "rejected": "c"},
        pair((system("s"), user("a")), *TURNS[1:]),
    ),
    "system beside messages": (
        {"system": "s", "chosen": chat("a", "b"), "rejected": chat("a", "c")},
        pair((system("s"), user("a")), *TURNS[1:]),
    ),
    "system beside messages that begin with it": (
        {"system": "s", "messages": [{"role": "system", "content": "s"}, *chat("a", "b")], "label": True},
        Record((system("s"), user("a")), (Reply((assistant("b"),), CHOSEN),)),
    ),
    "system beside scored texts": (
        {"system": "s", "prompt": "a", "completions": ["b", "c"], "scores": ["1", 2.5]},
        Record(
            (system("s"), user("a")),
            (Reply((assistant("b"),), CHOSEN, 1.0), Reply((assistant("c"),), CHOSEN, 2.5)),
            scored=True,
        ),
    ),
    "an empty system": (
        {"system": "", "prompt": "a", "chosen": "b", "rejected": "c"},
        pair("a", "b", "c"),
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": {"from": "gpt", "value": "b"},
            "rejected": {"from": "gpt", "value": "c"},
        },
        pair(*TURNS),
    ),
    "kto text": ({"prompt": "a", "completion": "b", "label": True}, Record("a", (Reply("b", CHOSEN),))),
    "kto from csv": ({"prompt": "a", "completion": "b", "label": "False"}, Record("a", (Reply("b", REJECTED),))),
    "kto messages": (
        {"messages": chat("a", "b"), "label": False},
        Record((user("a"),), (Reply((assistant("b"),), REJECTED),)),
    ),
    "shown text": ({"prompt": "a", "completion": "b"}, Record("a", (Reply("b", CHOSEN),))),
    "shown messages": ({"messages": chat("a", "b")}, Record((user("a"),), (Reply((assistant("b"),), CHOSEN),))),
    "scored texts": (
        {"prompt": "a", "completions": ["b", "c"], "scores": [1, 2.5]},
        Record("a", (Reply("b", CHOSEN, 1.0), Reply("c", CHOSEN, 2.5)), scored=True),
    ),
    "scored objects": (
        {"prompt": "a", "responses": [{"text": "b", "score": 1}, {"text": "c", "score": 3}]},
        Record("a", (Reply("b", CHOSEN, 1.0), Reply("c", CHOSEN, 3.0)), scored=True),
    ),
    "weights": (
        {"messages": [*chat("a"), {"role": "assistant", "content": "b", "weight": 0.5}], "label": True},
        Record((user("a"),), (Reply((Message("assistant", "b", 0.5),), CHOSEN),)),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_is_the_record_that_it_means(name: str) -> None:
    row, record = SHAPES[name]
    assert parse_row(row) == record


BAD = {
    "unknown shape": ({"question": "a"}, "missing field"),
    "null": ({"prompt": "a", "chosen": None, "rejected": "c"}, "missing field"),
    "answer is a number": ({"prompt": "a", "chosen": 5, "rejected": "c"}, "wrong type"),
    "prompt is a number": ({"prompt": 5, "chosen": "b", "rejected": "c"}, "wrong type"),
    "no messages": ({"prompt": [], "chosen": "b", "rejected": "c"}, "wrong type"),
    "message is text": ({"messages": ["a", "b"], "label": True}, "wrong type"),
    "role is unknown": ({"messages": [{"role": "critic", "content": "x"}], "label": True}, "unknown role"),
    "no content": ({"messages": [{"role": "user"}], "label": True}, "missing field"),
    "label is null": ({"prompt": "a", "completion": "b", "label": None}, "missing field"),
    "half of a pair": ({"messages": chat("a", "b"), "chosen": chat("a", "b"), "rejected": None}, "missing field"),
    "label is text": ({"prompt": "a", "completion": "b", "label": "good"}, "wrong label"),
    "label is 2": ({"prompt": "a", "completion": "b", "label": 2}, "wrong label"),
    "score is NaN": ({"prompt": "a", "completions": ["b"], "scores": [float("nan")]}, "wrong type"),
    "scores do not match": ({"prompt": "a", "completions": ["b"], "scores": [1, 2]}, "wrong type"),
    "score is a word": ({"prompt": "a", "completions": ["b"], "scores": ["good"]}, "wrong type"),
    "score is infinite": ({"prompt": "a", "completions": ["b"], "scores": ["inf"]}, "wrong type"),
    "score is enormous": ({"prompt": "a", "completions": ["b"], "scores": [10**400]}, "wrong type"),
    "system is a number": ({"system": 1, "prompt": "a", "chosen": "b", "rejected": "c"}, "wrong type"),
    "two systems": (
        {"system": "s", "messages": [{"role": "system", "content": "t"}, *chat("a", "b")], "label": True},
        "two system prompts",
    ),
    "surrogate": ({"prompt": "a", "chosen": "b\ud800", "rejected": "c"}, "surrogate"),
    "NUL": ({"prompt": "a", "chosen": "b\0", "rejected": "c"}, "NUL"),
    "weight below 0": (
        {"messages": [*chat("a"), {"role": "assistant", "content": "b", "weight": -1}], "label": True},
        "wrong type",
    ),
    "no shared prompt": ({"chosen": chat("a", "b"), "rejected": chat("x", "c")}, "no common prompt"),
    "answer of the user": ({"chosen": chat("a", "b", "x"), "rejected": chat("a", "c")}, "role order"),
    "one goes on": ({"chosen": chat("a", "b"), "rejected": chat("a", "b", "x", "y")}, None),
    "dialogues differ": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: c"},
        "prompts differ",
    ),
    "no dialogue": ({"chosen": "b", "rejected": "c"}, "no prompt"),
    "dialogue without a human": ({"chosen": "\n\nAssistant: b", "rejected": "\n\nAssistant: c"}, "no prompt"),
    "one turn": ({"messages": chat("a"), "label": True}, "role order"),
}


@pytest.mark.parametrize("name", [name for name, (_, reason) in BAD.items() if reason])
def test_what_is_wrong_with_a_row_is_named(name: str) -> None:
    row, reason = BAD[name]
    with pytest.raises(BadRow) as caught:
        parse_row(row)
    assert caught.value.reason == reason


def test_a_conversation_that_goes_on_is_an_answer_of_several_turns() -> None:
    record = parse_row(BAD["one goes on"][0])
    assert [len(reply.content) for reply in record.replies] == [1, 3]


def test_a_dialogue_is_split_at_its_last_assistant() -> None:
    turns, answer = split_dialogue("\n\nHuman: a\n\nAssistant: b\n\nHuman: c \n\nAssistant:  d\n\nHuman: e")
    assert turns == (user("a"), assistant("b"), user("c "))
    assert answer == " d\n\nHuman: e"


def test_roles_that_do_not_alternate_are_told() -> None:
    assert list(role_errors((user("a"), assistant("b")))) == []
    assert list(role_errors((user("a"), user("b")))) == ["two user turns in a row"]
    assert list(role_errors((assistant("a"), Message("system", "b")))) == [
        "a system message after the first",
        "begins with the assistant",
    ]


def parsed(row: dict) -> Record | BadRow:
    try:
        return parse_row(row)
    except BadRow as error:
        return error


TEXT = st.text(max_size=12)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[]), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "text", "score", "weight"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
FIELDS = ["prompt", "chosen", "rejected", "messages", "conversations", "label", "completion", "completions", "scores"]


@given(st.dictionaries(st.sampled_from(FIELDS), VALUE, max_size=5))
def test_any_row_is_a_record_or_names_its_reason(row: dict) -> None:
    record = parsed(row)
    if isinstance(record, Record):
        assert record.replies
        for reply in record.replies:
            reply.text().encode()
        record.prompt_text().encode()


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "human", "gpt", "tool", "system"]), TEXT), max_size=6))
def test_random_roles_are_conversations_or_name_their_reason(turns: list) -> None:
    messages = [{"role": role, "content": text} for role, text in turns]
    row = json.loads(json.dumps({"chosen": [*messages, {"role": "assistant", "content": "x"}], "rejected": messages}))
    record = parsed(row)
    if isinstance(record, BadRow):
        assert record.reason in ("NUL", "role order", "no common prompt", "wrong type", "missing field")
    else:
        assert record.prompt and record.prompt[-1].role != "assistant"
        assert all(reply.content[-1].role == "assistant" for reply in record.replies)
