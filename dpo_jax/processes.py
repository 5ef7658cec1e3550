"""Several processes of one run: how they find each other, and who does what only one may do."""

from __future__ import annotations

import glob
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Result = TypeVar("Result")

_TPU_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*")
_LAST_WORDS = 5.0  # seconds in which others that fail too can say why


def start(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Joins the processes of a run; to be called before anything asks for devices.

    On TPUs the processes of a pod find each other by themselves. Elsewhere all three are needed; without any of them
    the run has one process.

    Args:
      coordinator: host:port of process 0.
      count: processes of the run.
      index: number of this one, from 0.

    Raises:
      ValueError: only some of the three, or an index that is none.
    """
    given = {"--coordinator": coordinator, "--num_processes": count, "--process_id": index}
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == len(given):
        if _has_tpus():
            jax.distributed.initialize()
        return
    if missing or count is None or index is None:
        raise ValueError(
            f"{' and '.join(missing)} must be set too: a run of several processes needs all of {list(given)}"
        )
    if not 0 <= index < count:
        raise ValueError(f"--process_id is {index}; with --num_processes {count} expected 0 to {count - 1}")
    jax.distributed.initialize(coordinator, num_processes=count, process_id=index)
    if jax.default_backend() == "cpu":
        # A program that was kept sends its messages in another order than one that another process compiles anew.
        jax.config.update("jax_enable_compilation_cache", False)


def first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


@contextmanager
def in_turn(name: str) -> Iterator[None]:
    """Runs a block in the first process, then in all others at once.

    >>> with in_turn("data"):
    ...     data = prepare_or_open()
    """
    if not first():
        meet(name)
    yield
    if first():
        meet(name)


def meet(name: str) -> None:
    """Waits until all processes are here; ``name`` says where."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def told_by_first(make: Callable[[], int]) -> int:
    """A number that the first process makes and all get."""
    own = make() if first() else 0
    return own if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(own)))


def any_of(own: bool) -> bool:
    """Whether it is so in any process; all get the same answer."""
    return own if jax.process_count() == 1 else _any(_told_by_all(own))


class Poll:
    """Asks all processes again and again whether it is so in any, without waiting for what the devices work on.

    All get the same answers: where there are several, each time that to the question before.
    """

    def __init__(self) -> None:
        self._asked: jax.Array | None = None

    def __call__(self, own: bool) -> bool:
        """Whether it was so in any process when last asked; in a run of one process, whether it is."""
        if jax.process_count() == 1:
            return own
        before, self._asked = self._asked, _told_by_all(own)
        return before is not None and _any(before)


def _told_by_all(own: bool) -> jax.Array:
    """bool [processes], what each says; on its way, behind what the devices are to do already."""
    devices = Mesh(np.array(jax.devices()).reshape(jax.process_count(), -1), ("processes", "devices"))
    said = multihost_utils.host_local_array_to_global_array(np.array([own]), devices, PartitionSpec("processes"))
    return jax.device_put(said, NamedSharding(devices, PartitionSpec()))


def _any(told: jax.Array) -> bool:
    return bool(np.asarray(told.addressable_data(0)).any())


@contextmanager
def failing_together(kind: type[Exception]) -> Iterator[None]:
    """Runs a block that may raise in some processes; all of them raise then, so that none waits for the others.

    Args:
      kind: of the errors.
    """
    error: Exception | None = None
    try:
        yield
    except kind as raised:
        error = raised
    if any_of(error is not None):
        raise error or kind("another process of this run found it so; its log says more")


def leave(reason: str) -> None:
    """Says why a process of several has failed, and ends it with exit code 1; in a run of one, returns.

    To be called when all is closed. Where Python ends the process, JAX waits minutes for the others, which wait for it
    in a collective, and then all are aborted. So they end when the collective fails, or within JAX's 100 s of silence.

    Args:
      reason: for stderr.
    """
    if not jax.distributed.is_initialized():
        return
    try:
        print(reason, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if first():  # the others are aborted when it ends
            time.sleep(_LAST_WORDS)
    finally:
        os._exit(1)


def _has_tpus() -> bool:
    wanted = os.environ.get("JAX_PLATFORMS", "tpu")
    chips = any(glob.glob(pattern) for pattern in _TPU_FILES)
    return "tpu" in wanted and chips and importlib.util.find_spec("libtpu") is not None
