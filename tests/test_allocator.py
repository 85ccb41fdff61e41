"""What a step frees stays with the process, where nothing else was chosen."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
from tool_runs import environment

from repnext_mm.engine.allocator import VARIABLE, keep_freed_memory

needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != 'glibc', reason='the C library is not glibc'
)
#: Prints whether memory is kept, and the page faults of taking 64 MiB once more.
TAKE_AGAIN = """
import resource, sys, threading
from repnext_mm.engine.allocator import keep_freed_memory
import torch

def take():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = keep_freed_memory()
torch.set_num_threads(1)
# The heap grows for a few times: to align a tensor, glibc before 2.38 asks for more than that.
print(int(kept), min(take() for _ in range(20)))
thread = threading.Thread(target=take)
thread.start()
thread.join()
"""


def faults(**variables: str) -> tuple[bool, int]:
    done = subprocess.run(
        [sys.executable, '-c', TAKE_AGAIN],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    kept, count = done.stdout.split()
    return bool(int(kept)), int(count)


@needs_glibc
def test_memory_is_not_taken_from_the_system_again() -> None:
    kept, count = faults()
    assert kept and count < 16
    # Even in huge pages, 64 MiB are 32 of them.
    assert faults(**{VARIABLE: '0'})[1] >= 32


@needs_glibc
@pytest.mark.parametrize(
    'variables',
    [
        {VARIABLE: '0'},
        {'MALLOC_ARENA_MAX': '2'},
        {'GLIBC_TUNABLES': 'glibc.malloc.mmap_threshold=1048576'},
        {'LD_PRELOAD': 'libjemalloc.so.2'},  # where it is missing, the loader says so and goes on
    ],
    ids=lambda variables: next(iter(variables)),
)
def test_a_choice_of_the_user_stays(variables: dict[str, str]) -> None:
    assert not faults(**variables)[0]


def test_any_other_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, 'yes')
    with pytest.raises(ValueError, match='REPNEXT_MM_KEEP_MEMORY=yes must be 0 or 1'):
        keep_freed_memory()
