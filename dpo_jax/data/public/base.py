"""What a public set is, and its download: whole files that are there or not, never halves."""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from absl import logging

from dpo_jax.data.formats import Parser

_TIMEOUT = 60  # seconds without a byte


@dataclass(frozen=True)
class PublicSet:
    """A public preference set.

    Attributes:
      urls: of the files of every split, ``train`` and ``eval``.
      parse: row → Record. Raises BadRow with the reason "other split" for rows that belong to neither.
      parse_eval: the same for the held-out split, where its rows lie in the same files.
    """

    urls: Mapping[str, tuple[str, ...]]
    parse: Parser
    parse_eval: Parser | None = None

    def parser(self, split: str) -> Parser:
        return self.parse if split == "train" or self.parse_eval is None else self.parse_eval


def download(url: str, folder: Path) -> Path:
    """Fetches a file once.

    Args:
      url: of the file.
      folder: where it goes, under the last parts of its address.

    Returns:
      The file.

    Raises:
      OSError: it cannot be fetched or written; a file that is here already needs no network.
    """
    name = "-".join(url.split("?")[0].rsplit("/", 2)[1:])
    path = folder / name
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{name}.partial")
    logging.info("downloading %s", url)
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, partial.open("wb") as file:
            shutil.copyfileobj(response, file)
            expected = response.headers.get("Content-Length")
        if expected is not None and partial.stat().st_size != int(expected):
            raise OSError(f"{partial.stat().st_size} bytes came, {expected} were promised")
    except (OSError, urllib.error.URLError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(
            f"cannot download {url}: {error}. Look at the network, or fetch the file elsewhere, put it at {path}, and "
            "run again"
        ) from error
    partial.replace(path)
    return path
