"""OpenVINO without harm to the signals of the process.

Each core's CPU plugin gives the process another stack for signal handlers, and puts the former one
back when it ends. Where cores end in the order in which they began, the one put back is gone by
then, and the next signal that Python handles, be it Ctrl-C or the end of a data loader's worker,
is a segmentation fault (seen with OpenVINO 2026.4.1).
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@functools.cache
def openvino_core() -> Any:
    """The one core of this process; it never ends."""
    import openvino

    return openvino.Core()


class _Stack(ctypes.Structure):
    """`stack_t` of Linux."""

    _fields_ = (('sp', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t))


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Put the stack for signal handlers back, whatever others' cores did to it."""
    if sys.platform != 'linux':
        yield
        return
    sigaltstack, stack = ctypes.CDLL(None).sigaltstack, _Stack()
    sigaltstack(None, ctypes.byref(stack))
    try:
        yield
    finally:
        sigaltstack(ctypes.byref(stack), None)
