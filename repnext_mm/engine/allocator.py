"""Memory on a CPU: what a step frees stays with the process, for the next step.

glibc maps every large tensor from the system and returns it when it is freed, so each step pays
for all its pages again: a third of the time of a training step of Mask R-CNN
(docs/benchmarks/training-cpu.md).
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

#: Set to 0, memory is returned to the system as glibc does it.
VARIABLE = 'REPNEXT_MM_KEEP_MEMORY'
#: Variables by which a user chooses or tunes an allocator, and what names it in them.
CHOICES = {
    'LD_PRELOAD': ('malloc', 'mimalloc', 'tbbmalloc'),
    'GLIBC_TUNABLES': ('glibc.malloc.',),
}
#: Parameters of glibc's `mallopt` (malloc.h).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
#: Bytes by which the heap grows at least.
TOP_PAD = 64 * 2**20


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees; returns whether it does.

    It does not where `REPNEXT_MM_KEEP_MEMORY` is 0, where the user chose an allocator or its
    settings, and where the C library is not glibc. Processes forked from this one do the same.

    Raises:
        ValueError: The variable is neither 0 nor 1.
    """
    wanted = os.environ.get(VARIABLE) or '1'
    if wanted not in ('0', '1'):
        raise ValueError(f'{VARIABLE}={wanted} must be 0 or 1.')
    return wanted == '1' and not _is_chosen() and _set()


def _is_chosen() -> bool:
    """Whether the user decided on an allocator."""
    named = any(
        each in os.environ.get(name, '') for name, values in CHOICES.items() for each in values
    )
    return named or any(name.startswith('MALLOC_') for name in os.environ)


@cache
def _set() -> bool:
    if sys.platform != 'linux':
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, 'gnu_get_libc_version'):  # musl
        return False
    # No tensor is mapped on its own, and the end of the heap stays.
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, TOP_PAD))
    taken = [library.mallopt(key, value) for key, value in settings]
    return taken == [1, 1, 1]
