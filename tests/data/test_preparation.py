"""Preparation: rows in = rows out + rows counted, errors with file and line, mixtures, held-out prompts, caching."""

from __future__ import annotations

import functools
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import base
from dpo_jax import sources
from dpo_jax.config import from_config_dict
from dpo_jax.data import packing, preparation
from dpo_jax.data import tokenizer as tokenizers
from dpo_jax.data.encode import Encoder, Encoding
from dpo_jax.data.formats import parse_row
from dpo_jax.data.mixture import Mixture
from dpo_jax.data.noise import Flipped
from dpo_jax.data.preparation import Part, Reader, Request, encoded_examples, parse_mixture, prepare
from dpo_jax.data.prepared import PreparedExamples, read_metadata
from dpo_jax.data.public import PUBLIC_SETS


@functools.cache
def encoder() -> Encoder:
    return Encoder(tokenizers.train_tokenizer(["some words, in a text"] * 5, 270), Encoding(20, 12))


def row(i: int) -> dict:
    return {"prompt": f"p{i}", "chosen": f"yes {i}", "rejected": "no"}


def write(path: Path, rows) -> Path:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return path


def run(path: Path, on_error: str = "skip", max_skips: float = 1.0):
    reader = Reader(on_error, max_skips)
    examples = list(encoded_examples(reader, reader.records([path], parse_row), encoder(), lambda record: True))
    return examples, reader.tally


def test_every_row_is_used_or_counted(tmp_path: Path) -> None:
    rows = [row(0), "{\n", row(1), {"prompt": "a"}, {"prompt": "a", "chosen": "", "rejected": "b"}, row(2), "\n"]
    examples, tally = run(write(tmp_path / "a.jsonl", rows))
    assert [e.uid for e in examples] == [0, 1, 2]
    assert (tally.rows, tally.used, tally.examples, tally.accounted()) == (6, 3, 3, 6)
    assert tally.malformed == {"not JSON": 1, "missing field": 1}
    assert tally.dropped == {"empty answer": 1}
    # Records are parsed before they are encoded, some hundreds at a time.
    assert sorted((place.rpartition(" ")[2], reason) for place, reason, _ in tally.places) == [
        ("2", "not JSON"),
        ("4", "missing field"),
        ("5", "empty answer"),
    ]


def test_a_malformed_row_stops_by_default(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row(0), {"prompt": "a", "chosen": 3, "rejected": "b"}])
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: wrong type: chosen is int \('3'\).*data.on_error"):
        run(path, on_error="raise")


@pytest.mark.parametrize(("rows", "bad"), [(100, 2), (300, 20)])
def test_too_many_skips_stop(rows: int, bad: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(preparation, "_BEFORE_SHARE", 200)
    path = write(tmp_path / "a.jsonl", ["x\n"] * bad + [row(i) for i in range(rows - bad)])
    with pytest.raises(ValueError, match=r"not JSON: \d+\).*data.max_skips = 0.01.*a.jsonl, line 1"):
        run(path, max_skips=0.01)
    assert len(run(path, max_skips=0.1)[0]) == rows - bad


def test_rows_of_another_number_of_answers_are_malformed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row(0), {"prompt": "a", "completion": "b", "label": True}])
    assert run(path)[1].malformed == {"mixed answers": 1}


LINES = st.one_of(
    st.integers(0, 5).map(lambda i: json.dumps(row(i)).encode()),
    st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")),
    st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected"]), st.text(max_size=6) | st.integers()).map(
        lambda d: json.dumps(d).encode()
    ),
)


@settings(max_examples=50)
@given(st.lists(LINES, max_size=12))
def test_no_row_vanishes(tmp_path_factory, lines: list[bytes]) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    examples, tally = run(path)
    written = [line for line in b"\n".join(lines).split(b"\n") if line.strip()]
    assert tally.rows == max(1, len(written)) == tally.accounted()
    assert len(examples) == tally.examples == tally.used


def request(path: Path, **options) -> Request:
    fields = {
        "part": Part(None, str(path)),
        "held_out": (),
        "eval_share": 0.3,
        "on_error": "raise",
        "max_skips": 0.01,
    }
    return Request(**{**fields, **options})


def test_held_out_prompts_are_not_trained_on(tmp_path: Path) -> None:
    rows = [row(i % 40) | {"chosen": f"answer {i}"} for i in range(80)]
    place = prepare(request(write(tmp_path / "a.jsonl", rows)), encoder(), "t", tmp_path / "data")
    train, held_out = (PreparedExamples(place, split) for split in ("train", "eval"))
    assert len(train) + len(held_out) == 80
    prompts = [{e.prompt.tobytes() for e in source} for source in (train, held_out)]
    assert prompts[0].isdisjoint(prompts[1])
    counted = read_metadata(place).details["rows"]
    assert {s: (c["rows"], c["used"] + c["other_split"]) for s, c in counted.items()} == {
        "train": (80, 80),
        "eval": (80, 80),
    }


def test_a_file_of_held_out_rows(tmp_path: Path) -> None:
    path, other = write(tmp_path / "a.jsonl", [row(0), row(1)]), write(tmp_path / "b.jsonl", [row(2)])
    place = prepare(request(path, held_out=(Part(None, str(other)),)), encoder(), "t", tmp_path / "data")
    assert [len(PreparedExamples(place, split)) for split in ("train", "eval")] == [2, 1]


def test_held_out_rows_of_several_sources(tmp_path: Path) -> None:
    path, hh = write(tmp_path / "a.jsonl", [row(0), row(1)]), write(tmp_path / "b.jsonl", [PUBLIC["hh"][0]] * 3)
    tldr = write(tmp_path / "c.jsonl", [PUBLIC["tldr"][0] | {"split": "valid1"}])
    settings = {"source": "files", "path": str(path), "dir": str(tmp_path / "data"), "vocab_size": 300}

    def held_out(eval_path: str):
        config = base.get_config()
        config.data.update(**settings, eval_path=eval_path, prompt_length=60, answer_length=9)
        config.update({"train": {"steps": 1}, "model": {"context_length": 99}})
        data = sources.open_dataset(from_config_dict(config).data)
        texts = [tokenizers.decode(data.tokenizer, example.prompt) for example in data.held_out]
        return texts, data.held_out.fingerprint

    texts, own = held_out(f"{path} + hh:{hh} + tldr:{tldr}")
    assert Counter(text.strip()[:5] for text in texts) == {"p0": 1, "p1": 1, "Human": 3, "SUBRE": 1}
    assert texts != sorted(texts) and [text.strip()[:1] for text in texts[:3]] != ["p", "p", "H"]  # in a drawn order
    assert own != held_out(f"hh:{hh} + {path} + tldr:{tldr}")[1]
    with pytest.raises(ValueError, match="leave the weights out"):
        held_out(f"2*{path}")


def test_preparation_is_done_once_and_anew_when_anything_changes(tmp_path: Path, monkeypatch) -> None:
    path = write(tmp_path / "a.jsonl", [row(i) for i in range(20)])
    place = prepare(request(path), encoder(), "t", tmp_path / "data")
    with monkeypatch.context() as patched:
        patched.setattr(preparation, "write_examples", None)
        assert prepare(request(path), encoder(), "t", tmp_path / "data") == place
    others = [
        prepare(request(path, eval_share=0.4), encoder(), "t", tmp_path / "data"),
        prepare(request(path), encoder(), "u", tmp_path / "data"),
        prepare(request(write(path, [row(i) for i in range(21)])), encoder(), "t", tmp_path / "data"),
    ]
    assert len({place, *others}) == 4


def test_nothing_left_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row(0) | {"chosen": " "}])
    with pytest.raises(ValueError, match=r"no example is left for 'train': of 1 rows.*'empty answer': 1"):
        prepare(request(path, held_out=(Part(None, str(path)),)), encoder(), "t", tmp_path / "data")


def test_mixtures_are_parsed(tmp_path: Path) -> None:
    assert parse_mixture("a.jsonl") == [Part(None, "a.jsonl")]
    assert parse_mixture("2*a*.jsonl + 0.5*hh + shp:x/*.json") == [
        Part(None, "a*.jsonl", 2.0),
        Part("hh", None, 0.5),
        Part("shp", "x/*.json"),
    ]
    for path in ("", "a + ", "0*a", "-1*a", "hh:"):
        with pytest.raises(ValueError, match=r"expected sources such as"):
            parse_mixture(path)


def test_a_mixture_holds_each_source_as_often_as_its_weight_says(tmp_path: Path) -> None:
    sources = []
    for name, count in (("a", 40), ("b", 10)):
        path = write(tmp_path / f"{name}.jsonl", [row(i) | {"prompt": f"{name}{i}"} for i in range(count)])
        place = prepare(request(path, held_out=(Part(None, str(path)),)), encoder(), "t", tmp_path / "data")
        sources.append(PreparedExamples(place, "train"))
    mixed = Mixture(sources, [0.5, 2.5])
    uids = Counter(mixed[i].uid for i in range(len(mixed)))
    assert len(mixed) == 20 + 25
    assert sorted(Counter(uids[i] for i in range(40)).items()) == [(0, 20), (1, 20)]
    assert sorted(Counter(uids[40 + i] for i in range(10)).items()) == [(2, 5), (3, 5)]
    lengths = [[len(e.prompt), *(len(a.tokens) for a in e.answers)] for e in (mixed[i] for i in range(len(mixed)))]
    assert mixed.lengths().tolist() == lengths
    contents = [packing.contents_of(mixed[i]) for i in range(len(mixed))]
    assert mixed.contents().tolist() == contents and len({row[0] for row in contents}) == len(uids)
    assert mixed.fingerprint == Mixture(sources, [0.5, 2.5]).fingerprint
    assert (
        mixed.fingerprint
        != Mixture(sources, [0.5, 2.0]).fingerprint
        != Mixture(sources, [0.5, 2.0], seed=1).fingerprint
    )
    assert mixed.roles().tolist() == [[a.role for a in mixed[i].answers] for i in range(len(mixed))]
    tokens = [np.concatenate([mixed[i].prompt, *(a.tokens for a in mixed[i].answers)]) for i in range(len(mixed))]
    least, greatest = mixed.token_range()
    assert least <= min(t.min() for t in tokens) and max(t.max() for t in tokens) <= greatest
    noisy = Flipped(mixed, 0.3, 0, mixed.fingerprint)
    labels = {(e.uid, noisy[i].answers[0].tokens.tobytes(), e.answers[0].tokens.tobytes()) for i, e in enumerate(mixed)}
    assert len(labels) == len(uids)  # all copies of an example have one label
    assert sum(theirs != ours for _, ours, theirs in labels) == round(0.3 * len(uids))
    drawn = Mixture(sources, [0.5, 2.5], shuffled=True)
    assert [e.uid for e in drawn] != [e.uid for e in mixed] and {e.uid for e in list(drawn)[:30]} & set(range(40, 50))
    assert sorted(e.uid for e in drawn) == sorted(e.uid for e in mixed)
    assert drawn.contents().tolist() == [packing.contents_of(e) for e in drawn]
    assert drawn.fingerprint != mixed.fingerprint
    with pytest.raises(ValueError, match="leave no example"):
        Mixture(sources, [1.0, 0.01])


def test_the_config_decides_which_half_of_a_source_is_taken(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row(i) for i in range(40)])
    settings = {"source": "files", "path": f"0.5*{path}", "dir": str(tmp_path / "data"), "vocab_size": 300}

    def fingerprint(seed: int, training_seed: int = 0) -> str:
        config = base.get_config()
        config.data.update(**settings, mixture_seed=seed)
        config.update({"seed": training_seed, "train": {"steps": 1}})
        data = sources.open_dataset(from_config_dict(config).data)
        assert len(data.train) == round((40 - len(data.held_out)) / 2)
        return data.train.fingerprint

    assert fingerprint(0) == fingerprint(0, training_seed=1) != fingerprint(1)


PUBLIC = {
    "hh": (
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
        ("user: q", "good", "bad"),
    ),
    "ultrafeedback": (
        {
            "prompt": "q",
            "prompt_id": "1",
            "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}],
            "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}],
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}],
            "score_chosen": 8.5,
            "score_rejected": 4.0,
        },
        ("user: q", "good", "bad"),
    ),
    "shp": (
        {"history": "q", "human_ref_A": "bad", "human_ref_B": "good", "labels": 0, "score_A": 3, "score_B": 9},
        ("user: q", "good", "bad"),
    ),
    "tldr": (
        {
            "info": {"id": "t3", "post": "q", "title": "t", "subreddit": "s"},
            "summaries": [{"text": " bad"}, {"text": " good"}],
            "choice": 1,
            "split": "train",
        },
        ("SUBREDDIT: r/s\nTITLE: t\nPOST: q\nTL;DR:", " good", " bad"),
    ),
}


@pytest.mark.parametrize("name", PUBLIC_SETS)
def test_public_sets_are_read_and_come_from_their_origin(name: str, tmp_path: Path) -> None:
    raw, expected = PUBLIC[name]
    record = PUBLIC_SETS[name].parser("train")(raw)
    assert (record.prompt_text(), *(reply.text() for reply in record.replies)) == expected
    if "score_chosen" in raw or "score_A" in raw:
        assert record.replies[0].score > record.replies[1].score > 0
    urls = [url for urls in PUBLIC_SETS[name].urls.values() for url in urls]
    assert all(url.startswith(("https://huggingface.co/datasets/", "https://openaipublic.blob.core")) for url in urls)
    file = write(tmp_path / "rows.jsonl", [raw] * 3)
    place = prepare(
        request(file, part=Part(name, str(file)), held_out=(Part(name, str(file)),))
        if name != "tldr"
        else request(
            file,
            part=Part(name, str(file)),
            held_out=(Part("hh", str(write(tmp_path / "hh.jsonl", [PUBLIC["hh"][0]]))),),
        ),
        encoder(),
        "t",
        tmp_path / "data",
    )
    assert len(PreparedExamples(place, "train")) == 3


def test_rows_of_the_other_split_are_counted_apart(tmp_path: Path) -> None:
    raw = PUBLIC["tldr"][0]
    reader = Reader("raise", 0.0)
    path = write(tmp_path / "a.json", [raw, raw | {"split": "valid1"}])
    parse = PUBLIC_SETS["tldr"].parser("eval")
    assert len(list(encoded_examples(reader, reader.records([path], parse), encoder(), lambda record: True))) == 1
    assert (reader.tally.rows, reader.tally.used, reader.tally.other_split) == (2, 1, 1)


def test_public_sets_are_downloaded_once(tmp_path: Path, monkeypatch) -> None:
    origin = write(tmp_path / "rows.jsonl", [PUBLIC["hh"][0]])
    from dpo_jax.data.public import base

    path = base.download(origin.as_uri(), tmp_path / "to")
    assert path.read_bytes() == origin.read_bytes()
    origin.unlink()
    assert base.download(origin.as_uri(), tmp_path / "to") == path
    with pytest.raises(
        OSError, match=r"cannot download file:.*Look at the network, or fetch the file elsewhere, put it at"
    ):
        base.download((tmp_path / "none" / "x.jsonl").as_uri(), tmp_path / "to")
    assert [p.name for p in (tmp_path / "to").iterdir()] == [path.name]


def test_a_fixed_order_of_rows_gives_a_fixed_order_of_examples(tmp_path: Path) -> None:
    rows = [row(i) for i in range(30)]
    random.Random(0).shuffle(rows)
    first, second = (run(write(tmp_path / name, rows))[0] for name in ("a.jsonl", "b.jsonl"))
    assert [e.prompt.tolist() for e in first] == [e.prompt.tolist() for e in second]
