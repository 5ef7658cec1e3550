"""What checks look at, and what they say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_jax.data.records import Record
from dpo_jax.types import CHOSEN


@dataclass(frozen=True)
class Case:
    """One row of the data.

    Attributes:
      place: its file and line.
      record: what it says.
    """

    place: str
    record: Record

    @property
    def prompt(self) -> str:
        return self.record.prompt_text()

    @property
    def answers(self) -> tuple[str, ...]:
        return tuple(reply.text() for reply in self.record.replies)

    @property
    def is_pair(self) -> bool:
        return len(self.record.replies) == 2 and not self.record.scored

    @property
    def preferences(self) -> Iterator[tuple[str, str]]:
        """(better, worse) answers; none for a single answer or equal scores."""
        replies = self.record.replies
        if self.is_pair:
            yield replies[0].text(), replies[1].text()
        elif self.record.scored:
            for a in replies:
                yield from ((a.text(), b.text()) for b in replies if a.score > b.score)


@dataclass(frozen=True)
class Finding:
    """One thing that matters before training.

    Attributes:
      check: its name, in words.
      count: how many rows (or groups) it concerns.
      summary: one sentence with the numbers.
      serious: whether training should wait for an answer; the others are good to know.
      rows: (place, detail) of all of them.
      numbers: what plots and tables are made of; any JSON.
    """

    check: str
    count: int
    summary: str
    serious: bool = False
    rows: Sequence[tuple[str, str]] = ()
    numbers: dict[str, Any] = field(default_factory=dict)


def share(count: int, total: int) -> str:
    """ "5 of 200 (2.5 %)"."""
    return f"{count} of {total} ({100 * count / max(1, total):.1f} %)"


def labelled_sides(cases: Sequence[Case]) -> tuple[list[Case], list[str], list[str | None], list[bool]]:
    """What a label is predicted from: one answer, the other where there are two, and whether the first is better.

    The better answer of a pair stands first in every other pair, so that the place says nothing. Of scored answers the
    best and the worst are taken.
    """
    kept: list[Case] = []
    first: list[str] = []
    second: list[str | None] = []
    labels: list[bool] = []
    for case in cases:
        replies = case.record.replies
        if len(replies) == 1:
            sides: tuple[str, str | None] = (replies[0].text(), None)
            label = replies[0].role == CHOSEN
        else:
            best, worst = replies[0], replies[1]
            if case.record.scored:
                best, worst = max(replies, key=lambda r: r.score), min(replies, key=lambda r: r.score)
                if best.score == worst.score:
                    continue
            label = len(kept) % 2 == 0
            sides = (best.text(), worst.text()) if label else (worst.text(), best.text())
        kept.append(case)
        first.append(sides[0])
        second.append(sides[1])
        labels.append(label)
    return kept, first, second, labels
