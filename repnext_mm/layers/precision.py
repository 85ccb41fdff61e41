"""Parts of a network that half precision would spoil."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, in float32 if it has a narrower type."""
    return x.float() if x.dtype.itemsize < torch.float32.itemsize else x


def autocasts(device: str) -> bool:
    """Whether autocast is on; never on the meta device, of which torch refuses to say."""
    return device != 'meta' and torch.is_autocast_enabled(device)


def run_in_float32(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function(*inputs)` computed in float32 where autocast or the inputs ask for less.

    The result has the dtype of the first input; float32 and float64 inputs are left alone.
    """
    dtype, device = inputs[0].dtype, inputs[0].device.type
    inputs = tuple(at_least_float32(x) for x in inputs)
    if not autocasts(device):
        return function(*inputs).to(dtype)
    with torch.autocast(device, enabled=False):
        return function(*inputs).to(dtype)
