"""The flag --config: a file that makes the config, any key of which --config.KEY=VALUE changes; None unsets a key."""

from __future__ import annotations

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


def define(text: str, flag_values: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder[ConfigDict]:
    """Defines --config.

    Args:
      text: what ``--help`` says of it.
      flag_values: the flags that it becomes one of.
    """
    for kind, parser in _PARSERS.items():
        config_flags.register_flag_parser_for_type(kind, _OrNone(parser))
    return config_flags.DEFINE_config_file("config", None, text, flag_values)
