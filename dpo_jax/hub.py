"""Where the folder of a model or of its tokenizer lies: on this machine, in a bucket, or on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from dpo_jax import buckets

SETTINGS = ("*.json", "*.jinja")  # config, tokenizer and chat template
MODEL = ("*.safetensors", *SETTINGS)
_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find(name: str, key: str, files: Sequence[str], revision: str | None = None) -> Path:
    """Finds a folder; what is in a bucket or on the hub is copied to this machine first.

    Args:
      name: a folder, also in a bucket, or the id of a model on the hub, such as ``org/model``.
      key: of the config, which holds the name; for messages.
      files: patterns of the files that are wanted from the hub.
      revision: branch, tag or commit on the hub.

    Raises:
      OSError: there is no such folder, and the hub gives none of that name.
    """
    try:
        folder = buckets.fetched(name).expanduser()
    except OSError as error:
        raise OSError(f"{key} is {name!r}: {error}") from error
    return folder if folder.is_dir() else _download(name, key, files, revision)


def _download(name: str, key: str, files: Sequence[str], revision: str | None) -> Path:
    missing = f"{key} is {name!r}: there is no such folder, and"
    if not _ID.fullmatch(name):
        raise FileNotFoundError(f"{missing} it is no id of a model on the hub (org/model); correct the name")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # each version of the client has its own kinds
        raise OSError(
            f"{missing} the hub does not give a model of that name: {error}. Check the name, the network, and for "
            "gated models `hf auth login`"
        ) from error
