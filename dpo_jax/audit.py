"""Looks at preference data before it is trained on: what is malformed, repeated, contradictory, cut off, a give-away.

    python -m dpo_jax.audit --data=pairs.jsonl --workdir=runs/audit

prints a summary and writes ``audit.json`` (every row concerned) and ``audit.html`` (one page with plots). ``--data``
takes what ``data.path`` does: a file, a folder, a glob, a public set, a mixture.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags

from dpo_jax import buckets, hub
from dpo_jax.data.checks import CHECKS, Case, Finding
from dpo_jax.data.checks.case import share
from dpo_jax.data.checks.lengths import truncation
from dpo_jax.data.checks.page import render
from dpo_jax.data.checks.repeats import overlap
from dpo_jax.data.checks.rows import roles
from dpo_jax.data.encode import PAIRINGS, TEMPLATES, TRUNCATIONS, TURNS, Encoder, Encoding
from dpo_jax.data.files import Line, read_lines
from dpo_jax.data.preparation import OTHER_SPLIT, parse_mixture
from dpo_jax.data.records import BadRow
from dpo_jax.data.tokenizer import open_tokenizer, train_tokenizer

JSON_FILE, PAGE_FILE = "audit.json", "audit.html"
_PLACES = 3  # printed for a finding
_TOKENIZER_CASES = 5000
_TOKENIZER_SIZE = 8192  # tokens

_DATA = flags.DEFINE_string("data", None, "What to audit, as in config.data.path.")
_HELD_OUT = flags.DEFINE_string("eval_data", None, "Held-out data, whose prompts should not be in --data.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the results and downloads go.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Folder or hub id of a tokenizer; without it one is trained.")
_PROMPT = flags.DEFINE_integer("prompt_length", 512, "Longest prompt in training, tokens.", lower_bound=1)
_ANSWER = flags.DEFINE_integer("answer_length", 512, "Longest answer in training, tokens.", lower_bound=1)
_TEMPLATE = flags.DEFINE_enum("template", "plain", TEMPLATES, "As config.data.template.")
_TURNS = flags.DEFINE_enum("turns", "last", TURNS, "As config.data.turns.")
_TRUNCATE = flags.DEFINE_enum("truncate", "keep_end", TRUNCATIONS, "As config.data.truncate.")
_PAIRS = flags.DEFINE_enum("pairs", "all", PAIRINGS, "As config.data.pairs.")


@dataclass(frozen=True)
class Reading:
    """What was read.

    Attributes:
      cases: the rows that are right.
      malformed: (place, reason, message) of those that are not.
      sides: the answers of malformed rows that can still be looked at, each with its own prompt.
      sources: rows of each file, the malformed among them included.
    """

    cases: list[Case]
    malformed: list[tuple[str, str, str]]
    sides: list[Case]
    sources: Counter[str]

    @property
    def rows(self) -> int:
        return self.sources.total()


def read(path: str, downloads: Path, split: str = "train") -> Reading:
    """Reads all rows of a data path; malformed ones never stop it.

    Args:
      path: as ``config.data.path``; weights are ignored.
      downloads: where public sets go.
      split: ``train`` or ``eval``, of public sets.

    Raises:
      ValueError: there are no such files.
      OSError: a file cannot be read.
    """
    reading = Reading([], [], [], Counter())
    for part in parse_mixture(path):
        parse = part.parser(split)
        for line in itertools.chain.from_iterable(map(read_lines, part.files(split, downloads))):
            try:
                case = Case(line.place, parse(_row(line)))
            except BadRow as error:
                if error.reason != OTHER_SPLIT:
                    reading.malformed.append((line.place, error.reason, str(error)))
                    reading.sides.extend(Case(line.place, side) for side in error.sides)
                    reading.sources[line.file] += 1
                continue
            reading.sources[line.file] += 1
            reading.cases.append(case)
    return reading


def _row(line: Line) -> Any:
    if line.error is not None:
        raise line.error
    return line.row


def audit(reading: Reading, held_out: Reading | None, encoder: Encoder) -> list[Finding]:
    """All findings.

    Args:
      reading: the data.
      held_out: held-out data, where there is some.
      encoder: how the data would be trained on.

    Returns:
      Findings, those without rows included.
    """
    findings = [*_malformed(reading), *roles([*reading.cases, *reading.sides])]
    for check in CHECKS.values():
        findings += check(reading.cases)
    findings += truncation(reading.cases, encoder)
    if held_out is not None:
        findings.append(overlap(reading.cases, held_out.cases))
    return findings


def _malformed(reading: Reading) -> Iterator[Finding]:
    by_reason: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for place, reason, message in reading.malformed:
        by_reason[reason].append((place, message))
    for reason, rows in by_reason.items():
        yield Finding(f"malformed: {reason}", len(rows), f"{share(len(rows), reading.rows)} rows", True, rows)
    if not by_reason:
        yield Finding("malformed rows", 0, f"all {reading.rows} rows can be read", True)


def summary(title: str, reading: Reading, findings: Sequence[Finding]) -> str:
    """The findings as text: serious ones are marked, the first rows of each are named."""
    lines = [f"{title}: {reading.rows} rows, {len(reading.cases)} readable"]
    lines += [f"  {count:8d}  {name}" for name, count in reading.sources.items()]
    for finding in findings:
        mark = " " if not finding.count else "!" if finding.serious else "-"
        lines.append(f"{mark} {finding.check}: {_printable(finding.summary)}")
        lines += [f"      {place}: {_printable(detail)}" for place, detail in finding.rows[:_PLACES]]
        if len(finding.rows) > _PLACES:
            lines.append(f"      and {len(finding.rows) - _PLACES} more in {JSON_FILE}")
    return "\n".join(lines)


def _printable(text: str) -> str:
    """Without control characters, which could rewrite the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)[:200]


def write(folder: Path, title: str, reading: Reading, findings: Sequence[Finding]) -> None:
    """Writes ``audit.json`` and ``audit.html``.

    Raises:
      OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = {"rows": reading.rows, "readable": len(reading.cases)}
    content = {
        "data": title,
        **counts,
        "sources": dict(reading.sources),
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }
    (folder / JSON_FILE).write_text(json.dumps(content, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")
    page = render(title, {**counts, **reading.sources}, findings)
    (folder / PAGE_FILE).write_text(page, encoding="utf-8")


def make_encoder(reading: Reading, tokenizer: str | None, encoding: Encoding) -> Encoder:
    """An encoder with the tokenizer of a folder or of the hub, or with one that is trained on the data."""
    if tokenizer is not None:
        return Encoder(open_tokenizer(hub.find(tokenizer, "--tokenizer", hub.SETTINGS)), encoding)
    cases = reading.cases[:: max(1, len(reading.cases) // _TOKENIZER_CASES)]
    texts = (text for case in cases for text in (case.prompt, *case.answers))
    return Encoder(train_tokenizer(texts, _TOKENIZER_SIZE), encoding)


def run(
    data: str,
    workdir: str | Path,
    encoding: Encoding,
    held_out: str | None = None,
    tokenizer: str | None = None,
    show: Callable[[str], None] = print,
) -> list[Finding]:
    """Audits data: prints a summary and writes the results.

    Args:
      data: what to audit, as ``config.data.path``.
      workdir: where the results go.
      encoding: how the data would be trained on.
      held_out: held-out data, the same way.
      tokenizer: folder or hub id of a tokenizer; None trains one.
      show: takes the summary.

    Returns:
      The findings.

    Raises:
      ValueError: there is nothing to read.
      OSError: a file cannot be read, or the results not be written.
    """
    folder = buckets.local(workdir, "the workdir of an audit")
    downloads = folder / "downloads"
    reading = read(data, downloads)
    other = None if held_out is None else read(held_out, downloads, "eval")
    findings = audit(reading, other, make_encoder(reading, tokenizer, encoding))
    write(folder, data, reading, findings)
    show(summary(data, reading, findings))
    show(f"all rows: {folder / JSON_FILE}; with plots: {folder / PAGE_FILE}")
    return findings


def main() -> None:
    """Audits what the flags name."""
    encoding = Encoding(_PROMPT.value, _ANSWER.value, _TEMPLATE.value, _TURNS.value, _TRUNCATE.value, _PAIRS.value)
    assert _DATA.value is not None and _WORKDIR.value is not None  # absl has asked for them
    run(_DATA.value, _WORKDIR.value, encoding, _HELD_OUT.value, _TOKENIZER.value)


if __name__ == "__main__":
    from absl import app

    from dpo_jax.main import command, parse_flags

    def _main(_: list[str]) -> None:
        with command():
            main()

    flags.mark_flags_as_required(["data", "workdir"])
    app.run(_main, flags_parser=parse_flags)
