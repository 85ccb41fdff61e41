"""What torch's safe loading must know to read checkpoints of MMEngine runs.

With `weights_only=True`, its default since 2.6, torch refuses every class that it does not know.
MMEngine's own checkpoints hold its `HistoryBuffer` (a table of logged numbers, whose statistics
functions pickle writes as `getattr(HistoryBuffer, 'mean')`) and NumPy arrays, scalars and dtypes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from .errors import CheckpointError

#: The argument of torch's `add_safe_globals`: a class, or an object and the name that means it.
SafeGlobal = Callable[..., Any] | tuple[Callable[..., Any], str]

# NumPy 1 and 2 write these functions under different module names; both kinds of file are about.
_NUMPY_CORES = ('numpy.core.multiarray', 'numpy._core.multiarray')
# Codes of the plain value types: bool, integers, floats, complex, bytes and str. Not object.
_DTYPE_CODES = '?bhilqBHILQefdgFDGSU'


def statistics_method(owner: Any, name: Any) -> Any:
    """Stand in for `getattr` in a checkpoint: the public methods of HistoryBuffer, nothing else.

    Raises:
        CheckpointError: Anything else is asked for. The error is not an `UnpicklingError`, which
            the onedl stack would answer by loading the file again without protection.
    """
    method = vars(HistoryBuffer).get(name) if isinstance(name, str) else None
    of_buffer = owner is HistoryBuffer or type(owner) is HistoryBuffer
    if not (of_buffer and inspect.isfunction(method)) or name.startswith('_'):
        raise CheckpointError(
            f'the checkpoint asks for the attribute {name!r} of {owner!r}, which could run code, '
            'so it was not loaded; only statistics of HistoryBuffer are allowed.'
        )
    return method if owner is HistoryBuffer else method.__get__(owner)


def mmengine_globals() -> list[SafeGlobal]:
    """Pairs of an object and the name in a checkpoint that means it."""
    reconstruct: Any = np.empty(0).__reduce__()[0]
    scalar: Any = np.float64(0).__reduce__()[0]
    allowed: list[SafeGlobal] = [
        (HistoryBuffer, 'mmengine.logging.history_buffer.HistoryBuffer'),
        (statistics_method, 'builtins.getattr'),
        (np.ndarray, 'numpy.ndarray'),
        (np.dtype, 'numpy.dtype'),
    ]
    for core in _NUMPY_CORES:
        allowed += [(reconstruct, f'{core}._reconstruct'), (scalar, f'{core}.scalar')]
    for dtype in {type(np.dtype(code)) for code in _DTYPE_CODES}:
        allowed.append((dtype, f'{dtype.__module__}.{dtype.__qualname__}'))
    return allowed


def allow_mmengine_checkpoints() -> None:
    """Let torch's safe loading read checkpoints of MMEngine runs; may be called repeatedly.

    Each entry is a pair, not a bare class: the onedl stack allows some of the same classes around
    each load and forgets them after it, which would remove bare entries of ours too.
    """
    torch.serialization.add_safe_globals(mmengine_globals())
