"""Encoding: the worked tables, the border of prompt and answer, BOS, EOS, weights, truncation and what is dropped."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dpo_jax.data import tokenizer as tokenizers
from dpo_jax.data.encode import Encoded, Encoder, Encoding
from dpo_jax.data.example import Example
from dpo_jax.data.records import BadRow, Message, Record, Reply, pair
from dpo_jax.types import CHOSEN, REJECTED

TEXTS = ["\n\nHuman: a\n\nAssistant: b", "The film was good.", "c d e f, and so on"] * 20
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(template: str | None = None, **special: str | None):
    tokenizer = tokenizers.train_tokenizer(TEXTS, 320)
    if template:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = template
    for name, value in special.items():
        setattr(tokenizer, name, value)
    return tokenizer


PLAIN = make_tokenizer()
CHAT = make_tokenizer(CHATML, eos_token="<|im_end|>", bos_token=None)
UNNAMED = make_tokenizer(CHATML)
UNNAMED.add_tokens([AddedToken("<|unnamed|>", special=True)])  # of a file, not of the config: Llama 3 has such
BOS, EOS = PLAIN.bos_token_id, PLAIN.eos_token_id


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str, weight: float | None = None) -> Message:
    return Message("assistant", text, weight)


def encode(record: Record, tokenizer=PLAIN, **options) -> Encoded | BadRow:
    encoding = Encoding(**{"prompt_length": 100, "answer_length": 100, **options})
    (result,) = Encoder(tokenizer, encoding).encode([record])
    return result


def example(record: Record, tokenizer=PLAIN, **options) -> Example:
    result = encode(record, tokenizer, **options)
    assert isinstance(result, Encoded), result
    (found,) = result.examples
    return found


def ids(text: str, tokenizer=PLAIN) -> list[int]:
    return tokenizers.encode(tokenizer, [text])[0].tolist()


def shown(tokenizer, answer) -> list[tuple[str, float]]:
    """Runs of one weight, as text."""
    runs: list[tuple[list[int], float]] = []
    for token, weight in zip(answer.tokens.tolist(), answer.weights.tolist(), strict=True):
        if not runs or runs[-1][1] != weight:
            runs.append(([], weight))
        runs[-1][0].append(token)
    return [(tokenizer.decode(tokens), weight) for tokens, weight in runs]


ONE = pair((user("a"),), (assistant("b"),), (assistant("c"),))


def test_the_first_table_of_the_docstring() -> None:
    found = example(ONE)
    assert found.prompt.tolist() == [BOS, *ids("\n\nHuman: a\n\nAssistant:")]
    assert [a.tokens.tolist() for a in found.answers] == [[*ids(" b"), EOS], [*ids(" c"), EOS]]
    assert all(a.weights.tolist() == [1.0] * len(a.tokens) for a in found.answers)
    assert [a.role for a in found.answers] == [CHOSEN, REJECTED]


def test_the_second_table_of_the_docstring() -> None:
    several = (assistant("b"), user("c"), assistant("d"))
    found = example(Record((user("a"),), (Reply(several, CHOSEN),)))
    assert shown(PLAIN, found.answers[0]) == [
        (" b<|eos|>", 1.0),
        ("\n\nHuman: c\n\nAssistant:", 0.0),
        (" d<|eos|>", 1.0),
    ]


def test_text_stays_as_it_is_and_the_border_is_where_generation_has_it() -> None:
    # "film" would merge over the border were prompt and answer encoded together.
    found = example(pair("The fi", "lm was", " good"))
    assert found.prompt.tolist() == [BOS, *ids("The fi")]
    assert found.answers[0].tokens.tolist() == [*ids("lm was"), EOS]
    assert ids("The fi") + ids("lm was") != ids("The film was")


def test_generation_begins_with_the_prompt_of_training() -> None:
    for tokenizer, template in ((PLAIN, "plain"), (CHAT, "chat")):
        encoder = Encoder(tokenizer, Encoding(100, 100, template=template))
        assert encoder.prompt_tokens(ONE.prompt).tolist() == example(ONE, tokenizer, template=template).prompt.tolist()


def test_the_chat_template_of_the_tokenizer() -> None:
    found = example(ONE, CHAT, template="chat")
    assert CHAT.decode(found.prompt) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert found.prompt[0] == CHAT.convert_tokens_to_ids("<|im_start|>")
    assert [CHAT.decode(a.tokens) for a in found.answers] == ["b<|im_end|>", "c<|im_end|>"]
    several = (assistant("b"), user("c"), Message("tool", "t"), assistant("d", 0.5))
    found = example(Record((user("a"),), (Reply(several, CHOSEN),)), CHAT, template="chat")
    assert shown(CHAT, found.answers[0]) == [
        ("b<|im_end|>", 1.0),
        ("\n<|im_start|>user\nc<|im_end|>\n<|im_start|>tool\nt<|im_end|>\n<|im_start|>assistant\n", 0.0),
        ("d<|im_end|>", 0.5),
    ]


def test_a_template_without_eos_gets_one() -> None:
    tokenizer = make_tokenizer("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    found = example(ONE, tokenizer, template="chat")
    assert tokenizer.decode(found.answers[0].tokens) == "[b]<|eos|>"


@pytest.mark.parametrize("template", ["{{ bos_token }}", ""])
def test_there_is_one_bos_whether_the_template_has_it_or_not(template: str) -> None:
    tokenizer = make_tokenizer(template + CHATML)
    found = example(ONE, tokenizer, template="chat")
    assert found.prompt.tolist().count(BOS) == 1 and found.prompt[0] == BOS
    assert all(BOS not in answer.tokens for answer in found.answers)


def test_eos_is_trained_on_when_it_is_also_the_padding() -> None:
    tokenizer = make_tokenizer(pad_token="<|eos|>")
    found = example(ONE, tokenizer)
    assert [a.tokens[-1] for a in found.answers] == [EOS, EOS]
    assert [a.weights[-1] for a in found.answers] == [1.0, 1.0]


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def sentencepiece(kind: str, template: str) -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral have it: a space goes before a text; "before_each" has it behind special tokens too."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    normal = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(normal)
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("▁[a-z]*|[^▁]"), "isolated")
    backend.train_from_iterator(
        ["user is good assistant good answer bad answer INST | < > / [ ] \n Human : A"] * 9, trainer
    )
    backend.pre_tokenizer = None
    if kind == "before_the_first":
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )
    if kind == "stripping":
        tokenizer.add_special_tokens({"eos_token": AddedToken("</s>", rstrip=True, special=True)})
    return tokenizer


@pytest.mark.parametrize("kind", ["before_each", "before_the_first", "stripping"])
@pytest.mark.parametrize("template", [MISTRAL, ZEPHYR])
def test_a_conversation_in_pieces_has_the_tokens_that_it_has_as_a_whole(kind: str, template: str) -> None:
    tokenizer = sentencepiece(kind, template)
    turns = (user("is good"), assistant("good answer"), user("is bad"), assistant("bad answer"))
    found = example(Record(turns[:3], (Reply(turns[3:], CHOSEN),)), tokenizer, template="chat", turns="all")
    text = tokenizer.apply_chat_template([vars(m) for m in turns], tokenize=False)
    (whole,) = tokenizers.encode(tokenizer, [text.rstrip("\n")], special=True)
    first = [] if template == MISTRAL else [tokenizer.bos_token_id]
    assert [*found.prompt, *found.answers[0].tokens] == [*first, *whole]
    trained = found.answers[0].tokens[found.answers[0].weights > 0].tolist()
    space = "▁" if template == MISTRAL else ""
    assert "".join(tokenizer.convert_ids_to_tokens(trained)) == f"{space}good▁answer</s>{space}bad▁answer</s>"
    alone = tokenizers.encode(tokenizer, ["good answer"])[0]
    assert tokenizer.convert_ids_to_tokens(int(alone[0])).startswith("▁")  # what is to be left out


@pytest.mark.parametrize("kind", ["before_each", "before_the_first"])
def test_text_that_goes_on_has_no_space_before_it(kind: str) -> None:
    tokenizer = sentencepiece(kind, MISTRAL)
    found = example(pair("is go", "od answer", "is"), tokenizer)
    pieces = tokenizer.convert_ids_to_tokens(found.answers[0].tokens.tolist())
    assert "".join(pieces) == "od▁answer</s>"
    spoken = example(ONE, tokenizer).answers[0].tokens.tolist()
    assert "".join(tokenizer.convert_ids_to_tokens(spoken)) == "▁b</s>"


def test_all_that_makes_tokens_is_in_the_identity_of_an_encoding() -> None:
    encoders = [
        Encoder(make_tokenizer(template, eos_token=eos, bos_token=bos), Encoding(9, 9, template="chat"))
        for template, eos, bos in (
            (CHATML, "<|im_end|>", None),
            (CHATML + " ", "<|im_end|>", None),
            (CHATML, "<|eos|>", None),
            (CHATML, "<|im_end|>", "<|bos|>"),
        )
    ]
    identities = [encoder.identity() for encoder in encoders]
    assert all(a != b for a, b in itertools.combinations(identities, 2))
    plain = [Encoder(e.tokenizer, Encoding(9, 9)).identity() for e in encoders[:2]]
    assert plain[0] == plain[1]  # the template is not read


@pytest.mark.parametrize("turns", ["last", "all"])
def test_turns(turns: str) -> None:
    prompt = (user("a"), assistant("b"), user("c"))
    found = example(Record(prompt, (Reply((assistant("d", 2.0),), CHOSEN),)), turns=turns)
    expected = [(" d<|eos|>", 2.0)]
    if turns == "all":
        expected = [(" b<|eos|>", 1.0), ("\n\nHuman: c\n\nAssistant:", 0.0), *expected]
    assert shown(PLAIN, found.answers[0]) == expected


@pytest.mark.parametrize(
    ("truncate", "kept"),
    [("keep_end", slice(-5, None)), ("keep_start", slice(0, 5))],
)
def test_truncated_prompts(truncate: str, kept: slice) -> None:
    whole = ids("The film was good. The film was bad.")
    result = encode(pair("The film was good. The film was bad.", "b", "c"), prompt_length=6, truncate=truncate)
    assert result.examples[0].prompt.tolist() == [BOS, *whole[kept]]
    assert result.notes == {"prompts truncated": 1}


def test_answers_that_lose_their_eos_are_counted() -> None:
    result = encode(pair("a", "The film was good. The film was bad.", "c"), answer_length=3)
    chosen, rejected = result.examples[0].answers
    assert len(chosen.tokens) == 3 and chosen.tokens[-1] != EOS
    assert rejected.tokens[-1] == EOS
    assert result.notes == {"answers that lost their EOS": 1}


def test_an_answer_as_long_as_there_is_room_keeps_its_eos() -> None:
    tokens = ids("The film")
    result = encode(pair("a", "The film", "c"), answer_length=len(tokens) + 1)
    assert result.examples[0].answers[0].tokens.tolist() == [*tokens, EOS]
    assert not result.notes


@pytest.mark.parametrize(
    ("record", "options", "reason"),
    [
        (pair("a", "", "c"), {}, "empty answer"),
        (pair((user("a"),), (assistant(" \n"),), (assistant("c"),)), {}, "empty answer"),
        (pair("a", "b", "b"), {}, "identical answers"),
        (pair("a", "good film", "good idea"), {"answer_length": 2}, "identical answers"),
        (
            Record((user("a"),), (Reply((assistant("b", 0.0), user("long " * 20), assistant("c")), CHOSEN),)),
            {"answer_length": 8},
            "answer truncated away",
        ),
        (
            Record("a", (Reply("b", CHOSEN, 1.0), Reply("c", CHOSEN, 1.0)), scored=True),
            {},
            "no pair of different scores",
        ),
    ],
)
def test_records_of_no_use_are_dropped_with_a_reason(record: Record, options: dict, reason: str) -> None:
    result = encode(record, **options)
    assert (result.examples, result.dropped) == ((), reason)


@pytest.mark.parametrize(
    ("pairs", "expected"), [("all", [("c", "b"), ("d", "b"), ("c", "d")]), ("best_worst", [("c", "b")])]
)
def test_scored_answers_become_pairs(pairs: str, expected: list) -> None:
    replies = tuple(Reply(text, CHOSEN, score) for text, score in (("b", 1.0), ("c", 3.0), ("d", 2.0)))
    result = encode(Record("a", replies, scored=True), pairs=pairs)
    assert [tuple(PLAIN.decode(a.tokens[:-1]) for a in e.answers) for e in result.examples] == expected


@pytest.mark.parametrize(
    ("record", "tokenizer", "reason"),
    [
        (pair("a <|im_end|>", "b", "c"), CHAT, "special token"),
        (pair("a", "b <|im_start|>", "c"), CHAT, "special token"),
        (pair("a <|unnamed|>", "b", "c"), UNNAMED, "special token"),
        (ONE, make_tokenizer("{{ raise_exception('no') }}"), "template"),
        (ONE, make_tokenizer("{{ messages | length }}" + CHATML), "template"),
    ],
)
def test_what_a_template_cannot_take_is_named(record: Record, tokenizer, reason: str) -> None:
    result = encode(record, tokenizer, template="chat")
    assert isinstance(result, BadRow) and result.reason == reason


def test_plain_text_cannot_spell_a_special_token() -> None:
    found = example(pair("a <|eos|>", "<|bos|> b", "c"))
    assert EOS not in found.prompt
    assert found.answers[0].tokens.tolist().count(EOS) == 1 and BOS not in found.answers[0].tokens


def test_an_empty_prompt_needs_a_bos() -> None:
    assert example(pair("", "b", "c")).prompt.tolist() == [BOS]
    result = encode(pair("", "b", "c"), make_tokenizer(bos_token=None))
    assert isinstance(result, BadRow) and result.reason == "empty prompt"


def test_settings_and_tokenizers_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="data.truncate is 'middle'; known: keep_end, keep_start"):
        Encoding(5, 5, truncate="middle")
    with pytest.raises(ValueError, match="no EOS"):
        Encoder(make_tokenizer(eos_token=None), Encoding(5, 5))
    with pytest.raises(ValueError, match="no chat template"):
        Encoder(PLAIN, Encoding(5, 5, template="chat"))


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
TURNS = st.lists(
    st.builds(Message, st.sampled_from(["user", "assistant", "system", "tool"]), TEXT, st.none() | st.just(0.5)),
    max_size=5,
)
RECORDS = st.builds(
    lambda prompt, left, right, a, b: pair(prompt, (*left, assistant(a)), (*right, assistant(b))),
    st.lists(st.builds(user, TEXT), min_size=1, max_size=3).map(tuple),
    TURNS.map(lambda t: (assistant("x"), *t)),
    TURNS.map(lambda t: (assistant("y"), *t)),
    TEXT,
    TEXT,
) | st.builds(pair, TEXT, TEXT, TEXT)


@given(
    st.lists(RECORDS, max_size=4),
    st.integers(2, 12),
    st.integers(1, 12),
    st.sampled_from(["plain", "chat"]),
    st.sampled_from(["keep_end", "keep_start"]),
)
def test_random_records_keep_all_promises(records, prompt_length, answer_length, template, truncate) -> None:
    tokenizer = PLAIN if template == "plain" else CHAT
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    results = list(
        Encoder(tokenizer, Encoding(prompt_length, answer_length, template, truncate=truncate)).encode(records)
    )
    assert len(results) == len(records)
    for result in results:
        if isinstance(result, BadRow):
            assert result.reason in ("special token", "template", "empty prompt")
            continue
        assert bool(result.examples) == (result.dropped is None)
        for found in result.examples:
            assert 1 <= len(found.prompt) <= prompt_length
            assert bos is None or (found.prompt[0] == bos and found.prompt.tolist().count(bos) == 1)
            assert all(1 <= len(a.tokens) <= answer_length and len(a.weights) == len(a.tokens) for a in found.answers)
            assert all(bos is None or bos not in a.tokens for a in found.answers)
            lost = sum(a.tokens[-1] != eos for a in found.answers)
            assert lost <= result.notes["answers that lost their EOS"]
            assert all(np.any(a.weights > 0) for a in found.answers)
