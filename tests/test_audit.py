"""The audit: every check finds what was put there and nothing else; results are whole, escaped and self-contained."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dpo_jax import audit
from dpo_jax.data.checks import CHECKS, Case, Finding, giveaways, groups, lengths, repeats, rows
from dpo_jax.data.checks.case import labelled_sides
from dpo_jax.data.encode import Encoding
from dpo_jax.data.records import Message, Record, Reply, pair
from dpo_jax.types import CHOSEN, REJECTED

WORDS = [
    "apple", "river", "stone", "cloud", "music", "paper", "window", "garden", "silver", "candle", "bridge",
    "summer", "winter", "letter", "forest",
]  # fmt: skip

LETTERS = "abcdefghijklmnopqrstuvwxy"


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


def cases(*records: Record) -> list[Case]:
    return [Case(f"f, line {i}", record) for i, record in enumerate(records)]


def found(findings: list[Finding], check: str) -> list[int]:
    """The rows of a finding, by number."""
    (finding,) = [f for f in findings if f.check == check]
    assert finding.count == len(finding.rows)
    return [int(place.rpartition(" ")[2]) for place, _ in finding.rows]


def sentence(rng: random.Random, count: int = 12) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


def single(prompt: str, answer: str, good: bool) -> Record:
    return Record(prompt, (Reply(answer, CHOSEN if good else REJECTED),))


def test_empty_and_identical_answers() -> None:
    findings = rows.answers(
        cases(pair("p", "a", "b"), pair("p", " \n", "b"), pair("p", "a", "a"), single("p", "", True))
    )
    assert found(findings, "empty answers") == [1, 3]
    assert found(findings, "identical answers") == [2]


def test_roles_and_turns_inside_of_answers() -> None:
    fine = pair((user("a"),), (assistant("b"),), (assistant("c"),))
    twice = pair((user("a"), user("b")), (assistant("c"),), (assistant("d"),))
    inside = pair((user("a"),), (assistant("b\n\nHuman: and then?"),), (assistant("c"),))
    talk = pair("p", "The human: a story", "c")
    middle = pair("p", "Yes. Human: and then?", "c")
    findings = rows.roles(cases(fine, twice, inside, talk, middle))
    assert found(findings, "role order") == [1]
    assert "in 2 conversations" in findings[0].summary
    assert found(findings, "turns inside of answers") == [2, 4]


def test_dialogues_that_differ_are_malformed_and_still_looked_at(tmp_path: Path) -> None:
    row = {
        "chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c",
        "rejected": "\n\nHuman: x\n\nAssistant: d\n\nHuman: e",
    }
    (tmp_path / "hh.jsonl").write_text(json.dumps(row) + "\n")
    reading = audit.read(str(tmp_path / "hh.jsonl"), tmp_path)
    assert [reason for _, reason, _ in reading.malformed] == ["prompts differ"]
    findings = rows.roles(reading.sides)
    assert found(findings, "role order") == [1]
    assert found(findings, "turns inside of answers") == [1]


def test_duplicates_and_near_duplicates() -> None:
    rng = random.Random(0)
    text, other = sentence(rng, 60), sentence(rng, 60)
    nearly = text.replace(text.split()[30], "other", 1)
    findings = repeats.repeats(
        cases(
            pair("p", text, "b"),
            pair("p", text, "b"),
            pair("p", nearly, "b"),
            pair("p", other, "b"),
            pair("q", "x", "b"),
        )
    )
    assert found(findings, "duplicates") == [1]
    assert found(findings, "near duplicates") == [2]


def test_contradictions_circles_and_labels() -> None:
    data = cases(
        pair("p", "a", "b"),
        pair("q", "b", "a"),  # another prompt
        pair("p", "b", "a"),
        pair("r", "a", "b"),
        pair("r", "b", "c"),
        pair("r", "c", "a"),
        pair("s", "a", "b"),
        pair("s", "a", "c"),
        pair("s", "b", "c"),
        single("t", "a", True),
        single("t", "a", False),
    )
    findings = repeats.contradictions(data)
    assert sorted(found(findings, "contradictions")) == [0, 2, 9, 10]
    (circles,) = [f for f in findings if f.check == "circles"]
    assert [place for place, _ in circles.rows] == ["f, line 3 → f, line 4 → f, line 5"]


def test_every_row_of_a_contradiction_is_named() -> None:
    there, back = [pair("p", "a", "b")] * 3, [pair("p", "b", "a")] * 2
    (opposed, _) = repeats.contradictions(cases(*there, *back, single("q", "a", True), *[single("q", "a", False)] * 3))
    assert sorted(found([opposed], "contradictions")) == list(range(9))
    assert opposed.summary == "9 rows say the opposite of another row"
    told = {place: detail.partition(" in ")[2] or detail for place, detail in opposed.rows}
    assert told["f, line 1"] == "contradicts f, line 3" and told["f, line 4"] == "contradicts f, line 0"
    assert told["f, line 5"] == "f, line 6" and told["f, line 8"] == "f, line 5"


def test_a_row_of_many_answers_is_named_once() -> None:
    def scored(*scores: float) -> Record:
        return Record("p", tuple(Reply(t, CHOSEN, s) for t, s in zip("abc", scores, strict=True)), scored=True)

    (opposed, _) = repeats.contradictions(cases(scored(1.0, 2.0, 3.0), scored(3.0, 2.0, 1.0)))
    assert found([opposed], "contradictions") == [0, 1]


def test_scored_answers_hold_no_contradictions() -> None:
    record = Record("p", tuple(Reply(t, CHOSEN, s) for t, s in (("a", 1.0), ("b", 2.0), ("c", 2.0))), scored=True)
    assert [f.count for f in repeats.contradictions(cases(record))] == [0, 0]


def test_prompts_of_both_splits() -> None:
    finding = repeats.overlap(
        cases(pair("One, two?", "a", "b")), cases(pair("other", "a", "b"), pair("one two", "c", "d"))
    )
    assert found([finding], "prompts of both splits") == [1]
    assert "1 of 2 (50.0 %)" in finding.summary


def test_lengths_and_their_bias() -> None:
    data = cases(*(pair("p q", "a b c" if i < 15 else "a", "a b") for i in range(20)))
    plain, bias = lengths.lengths(data)
    assert plain.numbers["quantiles"]["prompt"]["median"] == 2
    assert sorted(plain.numbers["words"]["chosen"]) == [1] * 5 + [3] * 15
    assert bias.numbers["longer"] == 0.75 and bias.serious
    even = lengths.lengths(cases(*(single("p", "a b" if i % 4 < 2 else "a", i % 2 == 0) for i in range(40))))[1]
    assert even.numbers["longer"] == 0.5 and not even.serious


def test_the_better_answer_stands_first_in_every_other_pair() -> None:
    _, first, second, labels = labelled_sides(cases(*(pair("p", "good", "bad") for _ in range(4))))
    assert first == ["good", "bad", "good", "bad"]
    assert second == ["bad", "good", "bad", "good"]
    assert labels == [True, False, True, False]


@pytest.mark.parametrize("kind", ["pairs", "singles"])
def test_giveaways_are_found_only_where_there_are_some(kind: str) -> None:
    rng = random.Random(1)

    def make(telling: bool) -> list[Case]:
        records = []
        for i in range(240):
            good, bad = sentence(rng), sentence(rng) + (" sorry!" if telling else "")
            records.append(
                pair(f"p {i}", good, bad) if kind == "pairs" else single(f"p {i}", good if i % 2 else bad, bool(i % 2))
            )
        return cases(*records)

    told = giveaways.giveaways(make(True))
    assert told[0].serious and told[0].numbers["surface"] > 0.95
    assert told[1].numbers["words"][0][0] == "sorry"
    honest = giveaways.giveaways(make(False))
    assert not honest[0].serious and honest[0].numbers["surface"] < 0.62
    assert len(honest) == 1


def test_flipped_labels_are_disputed() -> None:
    rng = random.Random(2)
    flipped = set(rng.sample(range(600), 60))
    records = []
    for i in range(600):
        good, bad = f"{sentence(rng)} wonderful", f"{sentence(rng)} dreadful"
        records.append(pair(f"p {i}", bad, good) if i in flipped else pair(f"p {i}", good, bad))
    (finding,) = giveaways.label_noise(cases(*records))
    assert finding.numbers["accuracy"] == pytest.approx(0.9, abs=0.02)
    assert finding.numbers["noise"] == pytest.approx(0.1, abs=0.02)
    # Flipped pairs are the least likely of all.
    assert set(np.argsort(finding.numbers["own"])[:60].tolist()) == flipped


def test_no_estimate_where_nothing_can_be_read() -> None:
    rng = random.Random(3)
    (finding,) = giveaways.label_noise(cases(*(pair(f"p {i}", sentence(rng), sentence(rng)) for i in range(200))))
    assert finding.summary.startswith("no estimate")
    (few,) = giveaways.label_noise(cases(pair("p", "a", "b")))
    assert few.count == 0 and "too few" in few.summary


def babble(rng: random.Random) -> str:
    """25 of 600 words: enough to know an answer again."""
    return " ".join(rng.choice(LETTERS) + rng.choice(LETTERS[:24]) for _ in range(25))


def ranked(rng: random.Random, prompts: int) -> list[Case]:
    """All six pairs of four answers to each prompt; nothing in the words tells the better one."""
    return cases(
        *(
            pair(f"p {i}", better, worse)
            for i in range(prompts)
            for better, worse in itertools.combinations([babble(rng) for _ in range(4)], 2)
        )
    )


def test_rows_of_one_prompt_say_nothing_of_each_other() -> None:
    (finding,) = giveaways.label_noise(ranked(random.Random(4), 60))
    assert finding.numbers["accuracy"] < 0.6
    assert finding.summary.startswith("no estimate")


def test_rows_with_one_answer_say_nothing_of_each_other() -> None:
    rng = random.Random(5)
    answers = [(babble(rng), rng.random() < 0.5) for _ in range(60)]
    rows = [single(f"p {i} {j}", answer, good) for i in range(3) for j, (answer, good) in enumerate(answers)]
    (finding,) = giveaways.label_noise(cases(*rows))
    assert finding.numbers["accuracy"] < 0.65


def test_rows_hang_together_over_prompts_and_answers() -> None:
    data = cases(
        pair("p", "a", "b"), pair("q", "b", "c"), single("r", "c", True), pair("b", "d", "e"), pair("p", "f", "g")
    )
    assert np.unique(groups.by_text(data), return_inverse=True)[1].tolist() == [0, 0, 0, 1, 0]
    assert np.unique(groups.by_prompt(data), return_inverse=True)[1].tolist() == [0, 1, 2, 3, 0]
    owner = np.array([0, 0, 1, 2, 2, 3, 4, 5])
    for train, held_out in groups.folds(np.arange(8) % 2, owner):
        assert set(owner[train]) | set(owner[held_out]) == set(range(6))
        assert not set(owner[train]) & set(owner[held_out])


def test_rows_that_hang_together_give_no_estimate() -> None:
    rng = random.Random(6)
    data = cases(*(pair(f"p {i % 4}", sentence(rng), sentence(rng)) for i in range(200)))
    (noise,) = giveaways.label_noise(data)
    assert noise.count == 0 and "too few independent rows (200 labelled ones in 4 groups" in noise.summary
    (look,) = giveaways.giveaways(data)
    assert look.count == 0 and "too few independent rows" in look.summary
    # 40 prompts, but the undesirable rows are all of one: no reader could learn both labels without it.
    lopsided = cases(*(single(f"p {max(i, 40)}", sentence(rng), i > 40) for i in range(80)))
    assert "too few" in giveaways.label_noise(lopsided)[0].summary


def test_an_answer_that_is_always_the_worse_one_is_a_giveaway() -> None:
    rng = random.Random(7)
    refusal = "I am sorry, but I cannot help with that!"
    data = cases(*(pair(f"p {i}", sentence(rng), refusal if i % 2 else sentence(rng)) for i in range(240)))
    look, words = giveaways.giveaways(data)
    assert look.serious and look.numbers["surface"] > 0.7
    assert "sorry" in [word for word, *_ in words.numbers["words"]]


def test_chance_has_no_telling_words_however_often_an_answer_is_compared() -> None:
    for seed in range(4):
        assert len(giveaways.giveaways(ranked(random.Random(seed), 200))) == 1
    rng = random.Random(8)
    # One winner against five losers each: the losers hold five words of six.
    winners = [(f"p {i}", babble(rng), [babble(rng) for _ in range(5)]) for i in range(100)]
    data = cases(*(pair(prompt, good, bad) for prompt, good, worse in winners for bad in worse))
    assert len(giveaways.giveaways(data)) == 1


def test_a_word_counts_once_for_each_answer_and_side() -> None:
    rng = random.Random(9)
    rows = [pair(f"p {i}", f"fine {sentence(rng)}", sentence(rng)) for i in range(40)]
    once, often = (giveaways.giveaways(cases(*rows * times))[-1].numbers["words"] for times in (1, 6))
    assert once == often
    assert once[0] == ("fine", pytest.approx(40**0.5, abs=0.01), 40, 0)


def test_repeated_rows_make_nothing_more_certain() -> None:
    rng = random.Random(10)
    rows = [pair(f"p {i}", sentence(rng), sentence(rng, 10 + i % 5)) for i in range(60)]
    once, often = (giveaways.giveaways(cases(*rows * times))[0].numbers["errors"] for times in (1, 7))
    assert once == pytest.approx({"length": 0.065, "surface": 0.065}, abs=0.007)
    assert often == pytest.approx(once, rel=0.1)
    right = np.array([True, True, False, True, True, False])
    assert groups.standard_error(right, np.array([0, 0, 1, 2, 2, 1])) == pytest.approx((4 / 9 * 6) ** 0.5 / 6)


LINES = [
    {"prompt": "<script>alert(1)</script>", "chosen": "one two three four five six", "rejected": "no"},
    {"prompt": "<script>alert(1)</script>", "chosen": "one two three four five six", "rejected": "no"},
    {"prompt": "q", "chosen": "", "rejected": "no"},
    {"prompt": "r", "chosen": 5, "rejected": "<b>no\x1b[31m</b>"},
]


@pytest.fixture
def audited(tmp_path: Path) -> tuple[Path, list[Finding], str]:
    data, held_out, out = tmp_path / "<i>a.jsonl", tmp_path / "held.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(line) + "\n" for line in LINES) + "not json <b>\x1b\n")
    held_out.write_text(json.dumps({"prompt": "q", "chosen": "x", "rejected": "y"}) + "\n")
    shown: list[str] = []
    findings = audit.run(str(data), out, Encoding(64, 4), str(held_out), show=shown.append)
    return out, findings, "\n".join(shown)


def test_an_audit_names_files_and_lines(audited) -> None:
    out, findings, shown = audited
    written = json.loads((out / audit.JSON_FILE).read_text())
    assert (written["rows"], written["readable"]) == (5, 3)
    by_check = {f["check"]: f for f in written["findings"]}
    places = {check: [int(p.rpartition(" ")[2]) for p, _ in f["rows"]] for check, f in by_check.items()}
    assert places["malformed: wrong type"] == [4]
    assert places["malformed: not JSON"] == [5]
    assert places["empty answers"] == [3]
    assert places["duplicates"] == [2]
    assert places["prompts of both splits"] == [1]
    assert places["truncated answers"] == [1, 2]
    assert places["not trained on"] == [3]
    assert "! duplicates: 1 of 3 (33.3 %)" in shown and "a.jsonl, line 2: repeats" in shown
    assert "\x1b" not in shown
    assert {f.check for f in findings} == set(by_check)


def test_a_tokenizer_that_is_not_there_is_named() -> None:
    reading = audit.Reading([], [], [], Counter())
    with pytest.raises(OSError, match="--tokenizer is '/nowhere': there is no such folder"):
        audit.make_encoder(reading, "/nowhere", Encoding(9, 9))


def test_the_page_is_escaped_and_needs_nothing_else(audited) -> None:
    page = (audited[0] / audit.PAGE_FILE).read_text()
    assert "<script" not in page and "<i>" not in page
    assert "&lt;i&gt;a.jsonl" in page
    assert page.count("data:image/png;base64,") >= 1
    assert not re.search(r"(?:src|href)=\"(?!data:)", page) and "@import" not in page


def test_all_rows_are_told_apart_by_file_and_damage_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(LINES[0]) + "\n")
    (tmp_path / "b.csv").write_text("prompt,completion,label\na,b,true\nc,d,maybe\n")
    (tmp_path / "c.jsonl.gz").write_bytes(b"broken")
    reading = audit.read(str(tmp_path), tmp_path)
    assert list(reading.sources.values()) == [1, 2, 1]
    assert [reason for _, reason, _ in reading.malformed] == ["wrong label", "damaged file"]


@pytest.mark.parametrize("check", CHECKS)
def test_no_check_needs_any_rows(check: str) -> None:
    assert all(finding.count == 0 for finding in CHECKS[check]([]))
