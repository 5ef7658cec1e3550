"""How the C library keeps memory: where devices are CPUs, the buffers of a step are its own.

A thread that has an arena of its own by then maps and unmaps every buffer of more than 64 MiB all the same. With huge
pages that costs little: GLIBC_TUNABLES=glibc.malloc.hugetlb=1, which is read when a process starts. One arena from the
start (MALLOC_ARENA_MAX=1) would cost nothing, but tokenizers' threads then wait for each other.
"""

from __future__ import annotations

import contextlib
import ctypes

# Parameters of mallopt(3). A buffer of a step then comes from the heap and goes back to it, and its pages stay mapped;
# as it comes, glibc maps large buffers one by one, and every step pays for all their page faults again.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_SETTINGS = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 2**28))


def keep_freed_pages() -> bool:
    """Asks glibc to keep what this process frees, for what it allocates next; never undone.

    Returns:
      Whether all was granted; False with C libraries that cannot be asked.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    granted = [mallopt(parameter, value) for parameter, value in _SETTINGS]
    return all(granted)


def give_back_free_pages() -> None:
    """Gives the system back, once, what is free between what is in use, where the C library can be asked.

    A compiler leaves much of it, in pieces that are too small for a step's buffers.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
