"""The flag --config: a file that makes the config, any key of which --config.KEY=VALUE changes; None unsets a key."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

_PARSERS: dict[type, flags.ArgumentParser[Any]] = {
    int: flags.IntegerParser(),
    float: flags.FloatParser(),
    str: flags.ArgumentParser(),
}


class _OrNone(flags.ArgumentParser[Any]):
    """Reads what another parser does, and None; whether a key may be None is for dpo_jax/config.py to say."""

    def __init__(self, parser: flags.ArgumentParser[Any]) -> None:
        super().__init__()
        self._parser = parser

    def parse(self, argument: Any) -> Any:
        return None if argument == "None" else self._parser.parse(argument)

    def flag_type(self) -> str:
        return self._parser.flag_type()


class _File(flags.ArgumentParser[ConfigDict]):
    """Reads a config file, and tells what is wrong with it without the stack of what reads it."""

    def __init__(self, reader: flags.ArgumentParser[ConfigDict]) -> None:
        super().__init__()
        self._reader = reader

    def parse(self, argument: Any) -> ConfigDict | None:
        file = str(argument).partition(":")[0]
        if not Path(file).is_file():
            raise flags.IllegalFlagValueError(f"no config file {file}")
        try:
            return self._reader.parse(argument)
        except (TypeError, ValueError) as error:  # the reader's, whose message is a stack trace
            raise flags.IllegalFlagValueError(f"--config={argument}: {_told(error.__context__ or error)}") from error

    def flag_type(self) -> str:
        return self._reader.flag_type()


def _told(error: BaseException) -> str:
    """What an error says; where it lies, too, unless it is a ValueError, which is written for users."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is the reader's
    if isinstance(error, ValueError) or not frames:
        return str(error)
    return f"{error} ({frames[-1].filename}, line {frames[-1].lineno})"


def define(text: str, flag_values: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder[ConfigDict]:
    """Defines --config.

    Args:
      text: what ``--help`` says of it.
      flag_values: the flags that it becomes one of.
    """
    for kind, parser in _PARSERS.items():
        config_flags.register_flag_parser_for_type(kind, _OrNone(parser))
    holder = config_flags.DEFINE_config_file("config", None, text, flag_values)
    flag_values["config"].parser = _File(flag_values["config"].parser)
    return holder
