"""What a compiled program moves between chips, read from its text: loops are counted as often as they run.

Compilers for TPUs run a transfer beside other work by cutting it into pieces, which share a channel and count once; and
they fuse a sum with the choice of a device's part of it, which is a reduce-scatter.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)\}?")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_LIMIT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_SUM_AND_CHOICE = "all-reduce-scatter"  # how the compiler names such a fusion
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}")


@dataclass(frozen=True)
class Collective:
    """One kind of traffic.

    Attributes:
      kind: a name in KINDS.
      count: how often it runs in a step.
      sent: bytes that each chip sends, by the ring algorithm.
    """

    kind: str
    count: int
    sent: float


def collectives(text: str, devices: int) -> list[Collective]:
    """Traffic of one call of a program, by kind.

    A chip sends (n−1)/n of an array to gather or to scatter it among n, and twice that to sum it.

    Args:
      text: ``compiled.as_text()``.
      devices: that the program runs on.
    """
    bodies = computations(text)
    entry = next(name for name, body in bodies.items() if body.entry)

    @functools.cache
    def traffic(name: str) -> Mapping[tuple[str, ...], Collective]:
        """By place; pieces of one transfer have the same."""
        total: dict[tuple[str, ...], Collective] = {}
        for line in bodies[name].lines:
            found = _collective(name, line, devices)
            if found is not None:
                total[found.kind, *_identity(line)] = found
            loop = " while(" in line
            for callee in _callees(line):
                for place, part in traffic(callee).items() if callee in bodies else ():
                    key = (*place, line.split(" = ")[0].strip()) if loop else place
                    total[key] = _times(part, _trips(line, bodies)) if loop else part
        return total

    found = traffic(entry).values()
    kinds = [(kind, [part for part in found if part.kind == kind]) for kind in KINDS]
    return [Collective(kind, sum(p.count for p in parts), sum(p.sent for p in parts)) for kind, parts in kinds if parts]


@dataclass(frozen=True)
class Body:
    """A computation of a program: whether it is the entry, and its instructions, a line each."""

    entry: bool
    lines: list[str]


def computations(text: str) -> dict[str, Body]:
    """What a program is made of, by name: its entry, and the bodies of its loops, fusions and branches."""
    bodies: dict[str, Body] = {}
    current: Body | None = None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = bodies[header[2]] = Body(bool(header[1]), [])
        elif current is not None:
            current.lines.append(line)
    return bodies


def _collective(body: str, line: str, devices: int) -> Collective | None:
    found = _COLLECTIVE.search(line)
    if not found:
        return None
    sent = _sent(found[2], line, found[1], bool(found[3]), devices)
    if found[2] == "all-reduce" and body.startswith(_SUM_AND_CHOICE):
        return Collective("reduce-scatter", 1, sent / 2)
    return Collective(found[2], 1, sent)


def _identity(line: str) -> tuple[str, ...]:
    """Channel and shape of a transfer; its own name where it has no channel."""
    channel = _CHANNEL.search(line)
    if channel is None:
        return (line.split(" = ")[0].strip(),)
    return channel[1], str(_SHAPE.findall(line.split(" = ")[1].split("(%")[0]))


def _times(part: Collective, trips: int) -> Collective:
    return Collective(part.kind, part.count * trips, part.sent * trips)


def _trips(line: str, bodies: Mapping[str, Body]) -> int:
    """Of a while loop that counts from 0: as the compiler says, else the limit in its condition, else 1."""
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = _CONDITION.search(line)
    lines = bodies[condition[1]].lines if condition and condition[1] in bodies else []
    return max((int(limit) for text in lines for limit in _LIMIT.findall(text)), default=1)


def _callees(line: str) -> Iterator[str]:
    for group in _CALLED.findall(line):
        yield from (name.strip().lstrip("%") for name in group.split(","))


def _sent(kind: str, line: str, shape: str, started: bool, devices: int) -> float:
    sizes = [_BYTES.get(d, 4) * math.prod(int(n) for n in dims.split(",") if n) for d, dims in _SHAPE.findall(shape)]
    # The result of a started operation holds its operands too; the larger half is what is gathered.
    size = max(sizes, default=0) if started and kind != "all-reduce" else sum(sizes)
    n = _group_size(line, devices)
    share = (n - 1) / n
    if kind == "reduce-scatter":
        return size * (1 if started else n) * share
    return size * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)


def _group_size(line: str, devices: int) -> int:
    if found := _LISTED.search(line):
        return len(found[1].split(",")) if found[1] else devices
    if found := _IOTA.search(line):
        return int(found[1])
    if found := _MESH.search(line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    return devices
