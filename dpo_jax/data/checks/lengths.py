"""How long prompts and answers are, and whether the better answer is simply the longer one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpo_jax.data.checks.case import Case, Finding, labelled_sides
from dpo_jax.data.encode import Encoded, Encoder

_BIAS = 0.6  # share of pairs past which length alone is a way to win


def lengths(cases: Sequence[Case]) -> list[Finding]:
    """Distributions in words, and length bias."""
    words = {"prompt": [len(case.prompt.split()) for case in cases]}
    kept, first, second, labels = labelled_sides(cases)
    paired = bool(kept) and second[0] is not None
    sizes = np.array([len(text.split()) for text in first])
    right = np.array(labels, bool)
    if paired:
        others = np.array([len((text or "").split()) for text in second])
        words["chosen"] = np.where(right, sizes, others).tolist()
        words["rejected"] = np.where(right, others, sizes).tolist()
    else:
        words["desirable"], words["undesirable"] = sizes[right].tolist(), sizes[~right].tolist()
    numbers = {name: _quantiles(values) for name, values in words.items() if values}
    text = "; ".join(f"{name} {n['median']:.0f} (90 % up to {n['p90']:.0f})" for name, n in numbers.items())
    found = [Finding("lengths", len(cases), f"median words: {text}", numbers={"words": words, "quantiles": numbers})]
    better, worse = list(words.values())[1:3] if len(words) == 3 else ([], [])
    if better and worse:
        found.append(_bias(np.array(better), np.array(worse), paired))
    return found


def _bias(better: np.ndarray, worse: np.ndarray, paired: bool) -> Finding:
    if paired:
        longer = float(np.mean(better > worse) + np.mean(better == worse) / 2)
        what = "the chosen answer is the longer one"
    else:
        order = np.searchsorted(np.sort(worse), better, "left") + np.searchsorted(np.sort(worse), better, "right")
        longer = float(order.mean() / 2 / len(worse))
        what = "a desirable answer is longer than an undesirable one"
    means = f"{better.mean():.0f} and {worse.mean():.0f}"
    summary = f"in {100 * longer:.1f} % of the cases {what} (50 % is no bias); mean words {means}"
    serious = not 1 - _BIAS <= longer <= _BIAS
    return Finding("length bias", len(better), summary, serious, numbers={"longer": longer})


def _quantiles(values: Sequence[int]) -> dict[str, float]:
    points = np.quantile(values, [0, 0.5, 0.9, 0.99, 1])
    return dict(zip(("least", "median", "p90", "p99", "most"), map(float, points), strict=True))


def truncation(cases: Sequence[Case], encoder: Encoder) -> list[Finding]:
    """What happens to each row at the configured lengths."""
    cut: list[tuple[str, str]] = []
    lost: list[tuple[str, str]] = []
    refused: list[tuple[str, str]] = []
    for case, result in zip(cases, encoder.encode(case.record for case in cases), strict=True):
        if not isinstance(result, Encoded):
            refused.append((case.place, str(result)))
            continue
        if result.dropped:
            refused.append((case.place, result.dropped))
        if result.notes["prompts truncated"]:
            cut.append((case.place, f"{encoder.encoding.truncate} of {encoder.encoding.prompt_length} tokens"))
        if result.notes["answers that lost their EOS"]:
            lost.append((case.place, f"{result.notes['answers that lost their EOS']} answers"))
    e, total = encoder.encoding, len(cases)
    percent = lambda rows: f"{len(rows)} of {total} rows ({100 * len(rows) / max(1, total):.1f} %)"  # noqa: E731
    return [
        Finding("truncated prompts", len(cut), f"{percent(cut)} have a prompt over {e.prompt_length} tokens", rows=cut),
        Finding(
            "truncated answers",
            len(lost),
            f"{percent(lost)} have an answer over {e.answer_length} tokens, which loses its end and EOS",
            len(lost) > 0.1 * total,
            lost,
        ),
        Finding("not trained on", len(refused), f"{percent(refused)} are dropped or refused", rows=refused),
    ]
