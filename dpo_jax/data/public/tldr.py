"""TL;DR comparisons (Stiennon et al. 2020, arXiv 2009.01325): two summaries of a post, and which was preferred."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from dpo_jax.data import records
from dpo_jax.data.formats import Row
from dpo_jax.data.public.base import PublicSet
from dpo_jax.data.records import BadRow, Record

_ORIGIN = "https://openaipublic.blob.core.windows.net/summarize-from-feedback/dataset/comparisons"
# The other files of the folder compare summaries of news.
_FILES = tuple(f"{_ORIGIN}/batch{number}.json" for number in (*range(3, 21), 22))


def parse(row: Row, train: bool) -> Record:
    """{info: {subreddit, title, post}, summaries: [{text}, {text}], choice, split}.

    The prompt is the one of the paper's policies: "SUBREDDIT: … TITLE: … POST: … TL;DR:".
    """
    if (row.get("split", "train") == "train") != train:
        raise BadRow("other split", f"the row belongs to {row.get('split', 'train')!r}")
    info, summaries = records.field(row, "info"), records.field(row, "summaries")
    choice = records.field(row, "choice")
    if not isinstance(info, Mapping) or not isinstance(summaries, list | tuple) or len(summaries) != 2:
        raise BadRow("wrong type", "expected an object 'info' and two 'summaries'")
    if not all(isinstance(item, Mapping) for item in summaries):
        raise BadRow("wrong type", "a summary is no object")
    if isinstance(choice, bool) or choice not in (0, 1):
        raise BadRow("wrong label", f"choice is {str(choice)[:40]!r}; expected 0 or 1")
    post = records.text_of(records.field(info, "post"), "info.post")
    parts = [records.text_of(info.get(name) or "", f"info.{name}") for name in ("subreddit", "title")]
    texts = [records.text_of(records.field(item, "text"), "summaries.text") for item in summaries]
    prompt = f"SUBREDDIT: r/{parts[0]}\nTITLE: {parts[1]}\nPOST: {post}\nTL;DR:"
    return records.pair(prompt, texts[choice], texts[1 - choice])


SET = PublicSet(
    urls={"train": _FILES, "eval": _FILES},
    parse=functools.partial(parse, train=True),
    parse_eval=functools.partial(parse, train=False),
)
