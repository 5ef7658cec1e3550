"""Rows that meet other rows: duplicates, near duplicates, contradictions, cycles, prompts of both splits."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from dpo_jax.data.checks.case import Case, Finding, share
from dpo_jax.types import CHOSEN, REJECTED

_WORD = re.compile(r"\w+")
_SHINGLE = 5  # words
_HASHES, _BANDS = 64, 16  # two texts with 80 % of their shingles in common share a band with probability 0.9998
_NEAR = 0.8  # share of shingles in common


def repeats(cases: Sequence[Case]) -> list[Finding]:
    """Rows that repeat an earlier one: exactly, or in nearly the same words."""
    exact: list[tuple[str, str]] = []
    first: dict[bytes, Case] = {}
    for case in cases:
        key = _key(case.prompt, *case.answers, *(str(r.role) for r in case.record.replies))
        if key in first:
            exact.append((case.place, f"repeats {first[key].place}"))
        else:
            first[key] = case
    near = list(_near_duplicates(list(first.values())))
    total = len(cases)
    return [
        Finding("duplicates", len(exact), f"{share(len(exact), total)} rows repeat an earlier row", True, exact),
        Finding(
            "near duplicates",
            len(near),
            f"{share(len(near), total)} rows share {100 * _NEAR:.0f} % or more of their phrases with an earlier row",
            False,
            near,
        ),
    ]


def _near_duplicates(cases: Sequence[Case]) -> Iterator[tuple[str, str]]:
    """Candidates by locality-sensitive hashing, confirmed on their shingles."""
    # (a·x + b) mod a prime: as many random orders of all shingles.
    draws = np.random.default_rng(0).integers(1, 2**31 - 1, (2, _HASHES), dtype=np.int64).astype(np.uint64)
    prime = np.uint64(2**31 - 1)
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    shingles: list[frozenset[int]] = []
    for number, case in enumerate(cases):
        own = _shingles("\n".join((case.prompt, *case.answers)))
        shingles.append(own)
        if not own:
            continue
        values = np.fromiter(own, np.uint64, len(own))[:, None]
        signature = ((values * draws[0] + draws[1]) % prime).min(axis=0).reshape(_BANDS, -1)
        candidates: set[int] = set()
        for band, part in enumerate(signature):
            bucket = buckets[band, part.tobytes()]
            candidates.update(bucket[:50])
            bucket.append(number)
        for other in sorted(candidates):
            common = len(own & shingles[other]) / len(own | shingles[other])
            if common >= _NEAR:
                yield case.place, f"{100 * common:.0f} % of the phrases of {cases[other].place}"
                break


def _shingles(text: str) -> frozenset[int]:
    words = _WORD.findall(text.lower())
    grams = (" ".join(words[i : i + _SHINGLE]) for i in range(max(1, len(words) - _SHINGLE + 1)))
    return frozenset(
        int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=4).digest(), "big") >> 1 for gram in grams
    )


def contradictions(cases: Sequence[Case]) -> list[Finding]:
    """Preferences that cannot all be right: A over B beside B over A, and longer circles.

    Every row of both sides is concerned, since nothing tells which side is wrong.
    """
    edges: dict[bytes, dict[tuple[str, str], list[str]]] = defaultdict(lambda: defaultdict(list))
    for case in cases:
        for better, worse in case.preferences:
            if better != worse:
                edges[_key(case.prompt)][better, worse].append(case.place)
    against: dict[str, str] = {}
    circles = []
    for graph in edges.values():
        for (better, worse), places in graph.items():
            opposite = graph.get((worse, better))
            if opposite:
                against |= {place: f"contradicts {opposite[0]}" for place in places if place not in against}
        if len(graph) > 2:
            circles += [(" → ".join(places), f"a circle of {len(places)} preferences") for places in _circles(graph)]
    both = [*against.items(), *_label_conflicts(cases)]
    return [
        Finding("contradictions", len(both), f"{len(both)} rows say the opposite of another row", True, both),
        Finding(
            "circles", len(circles), f"{len(circles)} prompts have preferences that go round in a circle", True, circles
        ),
    ]


def _label_conflicts(cases: Sequence[Case]) -> Iterator[tuple[str, str]]:
    """Single answers that are called both desirable and undesirable."""
    places: dict[bytes, dict[int, list[str]]] = defaultdict(lambda: {CHOSEN: [], REJECTED: []})
    for case in cases:
        if len(case.answers) == 1:
            places[_key(case.prompt, case.answers[0])][case.record.replies[0].role].append(case.place)
    for seen in places.values():
        for role, other in ((CHOSEN, REJECTED), (REJECTED, CHOSEN)):
            if seen[other]:
                yield from ((place, f"the same answer has the other label in {seen[other][0]}") for place in seen[role])


def _circles(graph: Mapping[tuple[str, str], Sequence[str]]) -> Iterator[list[str]]:
    """A shortest circle of three preferences or more through each knot of answers that beat each other."""
    after: dict[str, list[str]] = defaultdict(list)
    for better, worse in graph:
        after[better].append(worse)
    done: set[str] = set()
    for start in list(after):
        path = _way_back(start, after, done)
        if path:
            done.update(path)
            yield [graph[a, b][0] for a, b in zip(path, [*path[1:], start], strict=True)]


def _way_back(start: str, after: dict[str, list[str]], without: set[str]) -> list[str] | None:
    """The shortest way from an answer over at least two others back to it, breadth first; None where there is none."""
    if start in without:
        return None
    paths = [[start]]
    reached = {start}
    while paths:
        longer = []
        for path in paths:
            for following in after[path[-1]]:
                if following == start and len(path) > 2:
                    return path
                if following not in reached and following not in without:
                    reached.add(following)
                    longer.append([*path, following])
        paths = longer
    return None


def overlap(train: Iterable[Case], held_out: Sequence[Case]) -> Finding:
    """Held-out rows whose prompt is also trained on."""
    known = {_normal(case.prompt): case.place for case in train}
    rows = [(c.place, f"the prompt of {known[_normal(c.prompt)]}") for c in held_out if _normal(c.prompt) in known]
    summary = f"{share(len(rows), len(held_out))} held-out rows have a prompt that is also trained on"
    return Finding("prompts of both splits", len(rows), summary, True, rows)


def _normal(text: str) -> bytes:
    return _key(" ".join(_WORD.findall(text.lower())) or text)


def _key(*texts: str) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "big") + raw)
    return digest.digest()
