"""Sets up the process of the tests, before jax is imported for the first time."""

from __future__ import annotations

import os
import shutil
import tempfile

from tests import compiled

os.environ.update(
    JAX_PLATFORMS="cpu",
    # Eight devices, so that programs for several devices run anywhere.
    XLA_FLAGS=f"--xla_force_host_platform_device_count=8 {compiled.FLAGS}",
    # Threads of XLA's pool: with one for each of a few cores, collectives of eight devices can wait for ever.
    NPROC="32",
    # Nothing is fetched: tests use what the repository and its packages hold.
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    NO_GCE_CHECK="true",
    MPLBACKEND="Agg",
    # Compiled programs are kept for the other processes of these tests, small ones too, as for runs (dpo_jax/main.py).
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.2",
    JAX_COMPILATION_CACHE_DIR=(
        os.environ["JAX_COMPILATION_CACHE_DIR"]
        if "PYTEST_XDIST_WORKER" in os.environ
        else tempfile.mkdtemp(prefix="dpo_jax_programs_")
    ),
)

from collections.abc import Iterator

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiling takes as long as it takes, and a failure must show again on the next run.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")


# First, so that what is left at the end is short, and the processes that share the tests end together.
SLOWEST = ("test_imdb.py", "test_processes.py", "test_chaos.py", "test_train.py", "test_lora.py", "test_sweeps.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))


def pytest_unconfigure() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"])


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """Drops compiled programs after each file: thousands of them use up the memory mappings of a process."""
    yield
    jax.clear_caches()
