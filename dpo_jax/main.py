"""Flags of every program: --config=FILE with overrides of its keys, and --workdir."""

from __future__ import annotations

import ast
import contextlib
import logging as std_logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import tensorflow_datasets as tfds
from absl import app, flags, logging

from dpo_jax import buckets, config_flag, processes
from dpo_jax.config import from_config_dict

_KEYS = """Any key of the config can be changed: --config.loss.name=ipo --config.optim.learning_rate=1e-4; None unsets
one: --config.train.steps=100 --config.train.epochs=None. configs/base.py lists all keys with their defaults and units;
`python -m dpo_jax.losses` lists the losses. The same command continues a run that was interrupted.

Exit codes: 0 finished, 1 an error that needs you, 2 a wrong command line, 75 stopped by SIGTERM or Ctrl-C with all
saved, 130 by Ctrl-C at once (twice, or with nothing to save)."""
_KEYS_HINT = "configs/base.py has every key, --help all else"
_INTERRUPTED = 130  # what shells call a program that Ctrl-C has ended
_NOT_GIVEN = re.compile(r"flag --(\w+)=None: Flag --\1 must have a value other than None\.")

# Programs on NVIDIA's GPUs then give the same bits every time, in every process: no sums in the order in which threads
# come, and no kernels chosen by how long they happen to take. Products are those of NVIDIA's library, the fastest there
# without a search.
GPU_FLAGS = {"xla_gpu_deterministic_ops": "true", "xla_gpu_enable_triton_gemm": "false"}
_DRIVER = Path("/dev/nvidiactl")


def main(
    purpose: str,
    program: Callable[..., Any],
    example: str,
    tools: Mapping[str, tuple[str, Callable[[Path], Any]]] | None = None,
    options: Mapping[str, str] | None = None,
    switches: Mapping[str, str] | None = None,
) -> None:
    """Parses the command line and runs a program of (config, workdir), or of (config, **options).

    Args:
      purpose: what the program does; ``--help`` says it.
      program: the program.
      example: a command that runs it.
      tools: what the program can do instead with one path: flag → (its help, the function).
      options: flags of a program that needs no workdir, each with its help; one that is not set is None.
      switches: flags that are set or not, each with its help, of a program of (config, workdir, **switches).
    """
    tools = tools or {}
    own = {name: flags.DEFINE_string(name, None, text) for name, text in (options or {}).items()}
    turned = {name: flags.DEFINE_bool(name, False, text) for name, text in (switches or {}).items()}
    config = config_flag.define("file of the experiment, such as configs/imdb_dpo.py")
    workdir = flags.DEFINE_string("workdir", None, "folder of this run, local or gs://: made when new, else continued")
    coordinator = flags.DEFINE_string("coordinator", None, "host:port of process 0, for several processes; not on TPUs")
    count = flags.DEFINE_integer("num_processes", None, "how many processes the run has", lower_bound=1)
    index = flags.DEFINE_integer("process_id", None, "number of this process, from 0", lower_bound=0)
    paths = {name: flags.DEFINE_string(name, None, text) for name, (text, _) in tools.items()}

    def start() -> None:
        chosen = [name for name, flag in paths.items() if flag.value is not None]
        if chosen:
            tools[chosen[0]][1](buckets.fetched(paths[chosen[0]].value or ""))
        elif options is not None and config.value is not None:
            program(from_config_dict(config.value), **{name: flag.value for name, flag in own.items()})
        elif config.value is None or workdir.value is None:
            needed = "--config is" if options is not None else "--config and --workdir are"
            raise app.UsageError(f"{needed} needed, such as {example}")
        else:
            processes.start(coordinator.value, count.value, index.value)
            program(from_config_dict(config.value), workdir.value, **{name: f.value for name, f in turned.items()})

    launch(
        purpose,
        example,
        start,
        ("config", "workdir", "coordinator", "num_processes", "process_id", *paths, *own, *turned),
    )


def launch(purpose: str, example: str, start: Callable[[], None], names: Sequence[str]) -> None:
    """Parses the command line and starts a program, whose mistakes of the user are told in one line.

    Args:
      purpose: what the program does; ``--help`` says it.
      example: a command that runs it.
      start: the program; it reads the flags itself.
      names: its flags.
    """
    for name in names:
        # --help shows the flags of the program that was started, and this module is none.
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    def begin(_: Sequence[str]) -> None:
        with command():
            start()

    sys.modules["__main__"].__doc__ = f"{purpose}\n\n  {example}\n\n{_KEYS}"
    app.run(begin, flags_parser=parse_flags)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags of a program that is run as ``app.run(main, flags_parser=parse_flags)``.

    A wrong flag, key or value, or a word too many, is the user's mistake: it is told in one line, with exit code 2.
    """
    try:
        rest = flags.FLAGS(argv)
    except SystemExit as end:
        sys.exit(0 if end.code == 1 else end.code)  # absl's --help ends with 1
    except flags.Error as error:
        _refuse(_NOT_GIVEN.sub(r"--\1 is needed", str(error)).replace("\n", "; "))
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:  # of the config file and its overrides
        _refuse(f"--config: {_unquoted(str(error))}", _KEYS_HINT)
    if len(rest) > 1:
        _refuse(f"unexpected arguments: {' '.join(rest[1:])}")
    return rest


def _unquoted(text: str) -> str:
    """A KeyError quotes its message, once for each time that it is raised anew."""
    with contextlib.suppress(ValueError, SyntaxError):
        inner = ast.literal_eval(text)
        return _unquoted(inner) if isinstance(inner, str) else text
    return text


def _refuse(message: str, hint: str = "--help tells more") -> NoReturn:
    print(f"error: {message} ({hint})", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def command() -> Iterator[None]:
    """What every program does around its work.

    It logs in plain words, keeps what is compiled for the next start, and ends without a stack trace: on a user's
    mistake with its one message and exit code 1, or 2 where it is one of the command line, and on Ctrl-C with 130. A
    process of several that fails waits for no other.
    """
    logging.use_absl_handler()
    handler = logging.get_absl_handler()
    handler.addFilter(_ours)
    handler.setFormatter(std_logging.Formatter("%(message)s"))
    logging.set_verbosity(logging.INFO)
    tfds.disable_progress_bar()  # its bars would tear those of dpo_jax.progress
    _keep_programs()
    if _DRIVER.exists():
        os.environ["XLA_FLAGS"] = with_gpu_flags(os.environ.get("XLA_FLAGS", ""))
    try:
        yield
    except app.UsageError as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        processes.leave("interrupted")
        print("\ninterrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except (ValueError, OSError, FloatingPointError) as error:
        processes.leave(f"error: {error}")
        sys.exit(f"error: {error}")
    except Exception:
        processes.leave(traceback.format_exc().rstrip())
        raise


def with_gpu_flags(given: str) -> str:
    """XLA_FLAGS with those for GPUs that it does not set itself; they are read when the first program is compiled."""
    return " ".join([given, *(f"--{name}={value}" for name, value in GPU_FLAGS.items() if name not in given)]).strip()


def _keep_programs() -> None:
    """Has JAX keep compiled programs in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        try:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo_jax" / "programs"
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError) as error:  # no home, or none that can be written
            logging.warning("compiled programs are not kept: %s", error)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)  # many small ones take long together


def _ours(record: std_logging.LogRecord) -> bool:
    """Libraries may warn; what they tell beside that would bury the run's own lines."""
    return record.levelno >= std_logging.WARNING or "site-packages" not in record.pathname
