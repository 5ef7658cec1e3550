"""Stanford Human Preferences (Ethayarajh et al. 2022): two comments on a Reddit post; label 1 prefers A, 0 B."""

from __future__ import annotations

from dpo_jax.data import records
from dpo_jax.data.formats import Row
from dpo_jax.data.public.base import PublicSet
from dpo_jax.data.records import Message, Record

_ORIGIN = "https://huggingface.co/datasets/stanfordnlp/SHP/resolve/main"
_DOMAINS = (
    "askacademia",
    "askanthropology",
    "askbaking",
    "askcarguys",
    "askculinary",
    "askdocs",
    "askengineers",
    "askhistorians",
    "askhr",
    "askphilosophy",
    "askphysics",
    "askscience",
    "asksciencefiction",
    "asksocialscience",
    "askvet",
    "changemyview",
    "explainlikeimfive",
    "legaladvice",
)


def parse(row: Row) -> Record:
    """{history, human_ref_A, human_ref_B, labels, score_A, score_B}; the scores are the comments' upvotes."""
    names = ("history", "human_ref_A", "human_ref_B")
    post, first, second = (records.text_of(records.field(row, name), name) for name in names)
    scores = [records.number_of(row[name], name) if name in row else 0.0 for name in ("score_A", "score_B")]
    prefers_first = records.label_of(records.field(row, "labels"), "labels")
    order = (first, second) if prefers_first else (second, first)
    chosen, rejected = ((Message("assistant", text),) for text in order)
    if not prefers_first:
        scores.reverse()
    return records.pair((Message("user", post),), chosen, rejected, (scores[0], scores[1]))


SET = PublicSet(
    urls={
        "train": tuple(f"{_ORIGIN}/{domain}/train.json" for domain in _DOMAINS),
        "eval": tuple(f"{_ORIGIN}/{domain}/validation.json" for domain in _DOMAINS),
    },
    parse=parse,
)
