"""Rows that are wrong by themselves: empty and equal answers, roles out of order, turns inside of answers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dpo_jax.data.checks.case import Case, Finding, share
from dpo_jax.data.records import Message, role_errors

# How turns begin in the usual formats: inside of an answer they are another turn that was not split off.
_MARKER = re.compile(
    r"\b(?:Human|Assistant):|(?:^|\n)\s*(?:Human|Assistant|User)\s*:|<\|im_start\|>|<\|start_header_id\|>|\[INST\]"
    r"|### (?:Human|User):"
)


def answers(cases: Sequence[Case]) -> list[Finding]:
    """Answers without words, and pairs of equal answers."""
    empty, equal = [], []
    for case in cases:
        names = ("chosen", "rejected") if case.is_pair else tuple(f"answer {i + 1}" for i in range(len(case.answers)))
        blank = [name for name, answer in zip(names, case.answers, strict=True) if not answer.strip()]
        if blank:
            empty.append((case.place, f"{' and '.join(blank)} has no words"))
        if len(case.answers) > 1 and len(set(case.answers)) < len(case.answers):
            equal.append((case.place, case.answers[0][:80]))
    total = len(cases)
    return [
        Finding("empty answers", len(empty), f"{share(len(empty), total)} rows have an empty answer", True, empty),
        Finding("identical answers", len(equal), f"{share(len(equal), total)} rows have equal answers", True, equal),
    ]


def roles(cases: Sequence[Case]) -> list[Finding]:
    """Conversations whose roles do not alternate, and answers that hold the beginning of another turn."""
    order: dict[str, list[str]] = {}
    markers: dict[str, str] = {}
    conversations = 0
    for case in cases:
        wrong = [errors for turns in _conversations(case) if (errors := sorted(set(role_errors(turns))))]
        conversations += len(wrong)
        for errors in wrong:
            order.setdefault(case.place, []).append("; ".join(errors))
        held = [match.group().strip() for answer in case.answers if (match := _MARKER.search(answer))]
        if held:
            markers.setdefault(case.place, f"an answer holds {held[0]!r}")
    total = len({case.place for case in cases})
    out_of_order = [(place, " | ".join(dict.fromkeys(errors))) for place, errors in order.items()]
    return [
        Finding(
            "role order",
            len(order),
            f"{share(len(order), total)} rows have roles out of order, in {conversations} conversations",
            False,
            out_of_order,
        ),
        Finding(
            "turns inside of answers",
            len(markers),
            f"{share(len(markers), total)} rows have an answer with another speaker's turn in it",
            True,
            list(markers.items()),
        ),
    ]


def _conversations(case: Case) -> list[tuple[Message, ...]]:
    prompt = case.record.prompt
    if isinstance(prompt, str):
        return []
    contents = [reply.content for reply in case.record.replies]
    return [(*prompt, *content) for content in contents if not isinstance(content, str)]
