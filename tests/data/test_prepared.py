import itertools
import json
import os
import signal
import subprocess
import sys
import tracemalloc

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds

from dpo_jax import types
from dpo_jax.data import packing, pairs, prepared
from dpo_jax.data.example import Answer, Example
from dpo_jax.data.prepared_writer import write_examples

TOKENIZER = "a" * 64


def answer(tokens, role=types.CHOSEN, score=0.0, weights=None):
    weights = np.ones(len(tokens), np.float32) if weights is None else np.array(weights, np.float32)
    return Answer(np.array(tokens, np.int32), weights, role, score)


def pair(uid, length=3):
    chosen = answer([21, *range(length - 1), 2], types.CHOSEN, 0.75)
    return Example(uid, np.array([1, 11, 12], np.int32), (chosen, answer([31, 2], types.REJECTED, 0.25, [0.5, 0])))


def single(uid):
    return Example(uid, np.array([1], np.int32), (answer([5, 6, 7, 2]),))


def write(folder, splits, **kwargs):
    return write_examples(splits, folder, name="fake", tokenizer=TOKENIZER, **kwargs)


def as_values(example):
    answers = [(a.tokens.tolist(), a.weights.tolist(), a.role, a.score) for a in example.answers]
    return example.uid, example.prompt.tolist(), answers


def test_record_is_that_of_the_table(tmp_path):
    example = Example(
        7,
        np.array([1, 11, 12], np.int32),
        (answer([21, 22, 2], types.CHOSEN, 0.9), answer([31, 2], types.REJECTED, 0.2)),
    )
    write(tmp_path / "data", {"train": [example]}, to_text=lambda tokens: "é" * len(tokens))
    # Any TFDS user reads the same folder without this package.
    (row,) = tfds.builder_from_directory(tmp_path / "data").as_data_source(split="train")
    assert row["uid"] == 7
    assert row["prompt"].tolist() == [1, 11, 12]
    assert row["answer_tokens"].tolist() == [21, 22, 2, 31, 2]
    assert row["answer_weights"].tolist() == [1, 1, 1, 1, 1]
    assert row["answer_lengths"].tolist() == [3, 2]
    assert row["roles"].tolist() == [1, 2]
    assert row["scores"].tolist() == pytest.approx([0.9, 0.2])
    assert prepared.PreparedExamples(tmp_path / "data", "train").texts(0) == ("ééé", ("ééé", "éé"))


def test_examples_come_back_in_their_order(tmp_path):
    examples = [pair(2**53 - 1 - n, length=1 + n % 5) for n in range(300)]
    metadata = write(tmp_path / "data", {"train": iter(examples), "eval": [single(3), single(2)]}, details={"seed": 0})
    assert metadata.counts == {"train": 300, "eval": 2}
    assert prepared.read_metadata(tmp_path / "data") == metadata
    train, held_out = (prepared.PreparedExamples(tmp_path / "data", split, TOKENIZER) for split in ("train", "eval"))
    assert [as_values(train[n]) for n in range(300)] == [as_values(example) for example in examples]
    assert [as_values(example) for example in held_out] == [as_values(single(3)), as_values(single(2))]
    assert (train.answers, held_out.answers) == (2, 1)
    assert train.roles().tolist() == [[types.CHOSEN, types.REJECTED]] * 300
    assert (train.token_range(), held_out.token_range()) == ((0, 31), (1, 7))
    assert train.texts(0) == ("", ("", ""))
    for array in (train[0].prompt, train[0].answers[1].tokens):
        assert array.dtype == np.int32
    assert train[0].answers[1].weights.dtype == np.float32


def test_many_files_read_as_one(tmp_path):
    examples = [pair(n, length=1 + n % 40) for n in range(200)]
    metadata = write(tmp_path / "data", {"train": examples}, max_shard_bytes=3000)
    assert len(metadata.sizes) > 5
    source = prepared.PreparedExamples(tmp_path / "data", "train")
    assert [as_values(source[n]) for n in range(200)] == [as_values(example) for example in examples]


def test_fingerprint_is_that_of_the_content(tmp_path):
    examples = [pair(n) for n in range(20)]
    first = write(tmp_path / "a", {"train": examples}).fingerprints
    # The same in every process and on every machine.
    assert first["train"].startswith("cea38734a682d2eb")
    assert write(tmp_path / "b", {"train": examples}, max_shard_bytes=1000).fingerprints == first
    assert write(tmp_path / "c", {"train": examples[::-1]}).fingerprints != first
    assert prepared.PreparedExamples(tmp_path / "a", "train").fingerprint == first["train"]


def test_grain_reads_the_source(tmp_path):
    write(tmp_path / "data", {"train": [pair(n) for n in range(10)]})
    source = prepared.PreparedExamples(tmp_path / "data", "train")
    dataset = grain.MapDataset.source(source).shuffle(seed=0).map(lambda example: example.uid)
    assert sorted(dataset) == list(range(10))


def test_memory_does_not_grow_with_the_number_of_examples(tmp_path):
    def peak(count):
        tracemalloc.start()
        write(tmp_path / str(count), {"train": (pair(n, length=200) for n in range(count))}, max_shard_bytes=2**18)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(50)  # what libraries allocate once
    # 500 more examples are 0.7 MB more on disk.
    assert peak(600) - peak(100) < 200_000


# Kills the process in the middle of the second split.
KILLED = """
import os, signal, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
from test_prepared import pair, write

def examples():
    yield from map(pair, range(50))
    os.kill(os.getpid(), signal.SIGKILL)

write(sys.argv[2], {"train": [pair(0)], "eval": examples()})
"""


def run_killed(folder):
    command = [sys.executable, "-c", KILLED, __file__, folder]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def test_killed_writer_leaves_nothing_to_be_read_and_is_done_again(tmp_path):
    run_killed(tmp_path / "data")
    assert not prepared.is_prepared(tmp_path / "data")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".incomplete.data.")
    with pytest.raises(OSError, match="does not exist"):
        prepared.PreparedExamples(tmp_path / "data", "train")

    write(tmp_path / "data", {"train": [pair(0)]})
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert len(prepared.PreparedExamples(tmp_path / "data", "train")) == 1


def test_killed_writer_keeps_the_older_data(tmp_path):
    write(tmp_path / "data", {"train": [pair(5)]})
    run_killed(tmp_path / "data")
    assert prepared.PreparedExamples(tmp_path / "data", "train")[0].uid == 5


def test_failing_source_keeps_the_older_data_and_leaves_no_rest(tmp_path):
    def failing():
        yield pair(1)
        raise RuntimeError("the sampler failed")

    write(tmp_path / "data", {"train": [pair(5)]})
    with pytest.raises(RuntimeError, match="the sampler failed"):
        write(tmp_path / "data", {"train": failing()})
    assert prepared.PreparedExamples(tmp_path / "data", "train")[0].uid == 5
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_another_tokenizer_is_refused_naming_both(tmp_path):
    write(tmp_path / "data", {"train": [pair(0)]})
    with pytest.raises(ValueError, match=f"encoded with the tokenizer {TOKENIZER}, but the tokenizer in use is bbb:"):
        prepared.PreparedExamples(tmp_path / "data", "train", "bbb")


def test_unknown_split_lists_the_splits(tmp_path):
    write(tmp_path / "data", {"train": [pair(0)], "eval": [pair(1), pair(2)]})
    with pytest.raises(ValueError, match=r"no split 'test'; it has train \(1\), eval \(2\)"):
        prepared.PreparedExamples(tmp_path / "data", "test")


@pytest.mark.parametrize("damage", ["cut", "missing", "no metadata", "half metadata", "no dataset_info"])
def test_damaged_folder_is_named_when_it_is_opened(damage, tmp_path):
    folder = tmp_path / "data"
    write(folder, {"train": [pair(n) for n in range(50)]})
    (shard,) = folder.glob("*.array_record*")
    metadata = folder / prepared.METADATA_FILE
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif damage == "missing":
        shard.unlink()
    elif damage == "no metadata":
        metadata.unlink()
    elif damage == "half metadata":
        metadata.write_text(metadata.read_text()[:40])
    else:
        (folder / "dataset_info.json").unlink()
    with pytest.raises(OSError, match="Remove that folder, and the next run prepares it again"):
        prepared.PreparedExamples(folder, "train")


def test_damaged_record_is_named_when_it_is_read(tmp_path):
    folder = tmp_path / "data"
    write(folder, {"train": [pair(n, length=300) for n in range(50)]})
    (shard,) = folder.glob("*.array_record*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 4 : len(content) // 4 + 64] = bytes(64)
    shard.write_bytes(content)
    source = prepared.PreparedExamples(folder, "train")
    with pytest.raises(OSError, match="Cannot read example .*Remove that folder"):
        [source[n] for n in range(50)]


def test_another_version_of_the_format_is_refused(tmp_path):
    write(tmp_path / "data", {"train": [pair(0)]})
    path = tmp_path / "data" / prepared.METADATA_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(ValueError, match="has the format 99, expected 1"):
        prepared.read_metadata(tmp_path / "data")


def test_a_folder_without_roles_contents_and_tokens_beside_its_records_is_read_for_them(tmp_path):
    write(tmp_path / "data", {"train": [pair(0, 9), pair(1)]})
    new = prepared.PreparedExamples(tmp_path / "data", "train")
    path = tmp_path / "data" / prepared.METADATA_FILE
    content = json.loads(path.read_text())
    content["sizes"] = {name: size for name, size in content["sizes"].items() if name.endswith("00001")}
    del content["tokens"]
    path.write_text(json.dumps(content))
    old = prepared.PreparedExamples(tmp_path / "data", "train")
    assert old.roles().tolist() == new.roles().tolist()
    assert old.lengths().tolist() == new.lengths().tolist()
    assert old.contents().tolist() == new.contents().tolist() == packing.example_contents([new[0], new[1]]).tolist()
    assert old.token_range() == new.token_range() == (0, 31)


@pytest.mark.parametrize("index", [-1, 1])
def test_index_outside_is_refused(index, tmp_path):
    write(tmp_path / "data", {"train": [pair(0)]})
    with pytest.raises(IndexError, match=f"Example {index} of 1"):
        prepared.PreparedExamples(tmp_path / "data", "train")[index]


EMPTY = np.zeros(0, np.int32)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example(4, EMPTY, (answer([1]),)), "Example 4 has a prompt of 0 tokens"),
        (Example(4, np.ones(1, np.int32), (answer([]),)), r"answers of \(tokens, weights\) \[\(0, 0\)\]"),
        (Example(4, np.ones(1, np.int32), ()), r"weights\) \[\]"),
        (Example(4, np.ones(1, np.int32), (answer([1, 2], weights=[1]),)), r"\[\(2, 1\)\]"),
        (Example(4, np.ones(1, np.int32), (answer([1], score=float("nan")),)), "not finite"),
    ],
)
def test_malformed_examples_are_refused(example, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "data", {"train": [example]})
    assert not list(tmp_path.iterdir())


def test_examples_of_different_numbers_of_answers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Example 4 of the split 'train' has 1 answers, those before it have 2"):
        write(tmp_path / "data", {"train": [pair(3), single(4)]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("splits", [{}, {"train": []}, {"a split": [pair(0)]}])
def test_nothing_to_write_is_refused(splits, tmp_path):
    with pytest.raises(ValueError, match="expected one"):
        write(tmp_path / "data", splits)
    assert not list(tmp_path.iterdir())


def test_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "data").write_text("x")
    with pytest.raises(OSError, match="a file lies there"):
        write(tmp_path / "data", {"train": [pair(0)]})


def test_folder_under_a_file_is_named(tmp_path):
    (tmp_path / "data").write_text("x")
    with pytest.raises(OSError, match="Cannot write the prepared examples fake to .*Choose another folder"):
        write(tmp_path / "data" / "pairs", {"train": [pair(0)]})


def test_pairs_survive_the_disk(tmp_path):
    made = pairs.pairs_of(np.array([1, 11]), [(np.array([n, 2]), n / 7) for n in range(4)], uid=0)
    write(tmp_path / "data", {"train": made.examples})
    source = prepared.PreparedExamples(tmp_path / "data", "train")
    for written, read in itertools.zip_longest(made.examples, source):
        assert as_values(written) == as_values(read)


def test_folder_of_a_running_writer_is_left_alone(tmp_path):
    leftover = tmp_path / f".incomplete.data.{os.uname().nodename}.{os.getppid()}"
    leftover.mkdir()
    write(tmp_path / "data", {"train": [pair(0)]})
    assert leftover.exists()
