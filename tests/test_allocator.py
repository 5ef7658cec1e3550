"""Freed memory stays mapped where it was asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dpo_jax.allocator import keep_freed_pages

PROGRAM = """
import resource, sys
import numpy as np
from dpo_jax.allocator import keep_freed_pages

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(2**24).fill(1.0)  # 128 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    assert keep_freed_pages()
faults()
print(faults())
"""


def _faults(mode: str) -> int:
    return int(subprocess.run([sys.executable, "-c", PROGRAM, mode], check=True, capture_output=True).stdout)


@pytest.mark.skipif(not keep_freed_pages(), reason="the C library has no mallopt")
def test_memory_that_was_freed_is_there_again_without_page_faults() -> None:
    # 64 pages of 2 MiB at least; a few faults are the interpreter's own.
    assert _faults("leave") >= 64 > 10 * _faults("keep")


HOLES = """
import resource
import numpy as np
from dpo_jax.allocator import give_back_free_pages, keep_freed_pages

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

keep_freed_pages()
pieces = [np.ones(2**17) for _ in range(128)]  # a MiB each
del pieces[::2]
before = resident()
give_back_free_pages()
print(before - resident())
"""


@pytest.mark.skipif(not keep_freed_pages(), reason="the C library has no mallopt")
def test_what_is_free_between_what_is_in_use_is_given_back() -> None:
    freed = float(subprocess.run([sys.executable, "-c", HOLES], check=True, capture_output=True).stdout)
    assert freed > 48  # MiB, of 64: but for the ends of pieces
