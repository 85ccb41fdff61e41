"""Upsampling between the levels of a recursion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .forms import TrainingLayer, runs_eagerly

UpsampleMode = Literal['nearest', 'bilinear']
UPSAMPLE_MODES: tuple[UpsampleMode, ...] = get_args(UpsampleMode)


class Upsample(TrainingLayer):
    """`F.interpolate` to `size`, or to twice the size: `(N, C, H, W) -> (N, C, *size)`.

    Bilinear has half-pixel centres. torch's bilinear kernels are slow for contiguous maps: on a
    CPU they run pixel by pixel, on a GPU they are parallel over the pixels alone. To twice the
    size, blends of neighbours do the same faster. The kernels for channels_last stay, for they
    are fast (docs/benchmarks/upsampling-cpu.md).

    Args:
        mode: 'nearest' or 'bilinear'.
    """

    def __init__(self, mode: UpsampleMode = 'bilinear') -> None:
        super().__init__()
        self.mode = mode

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        size = [2 * side for side in x.shape[2:]] if size is None else size
        if self.train_form == 'merged' and self.mode == 'bilinear' and _blends(x, size):
            return _Double.apply(x)
        return F.interpolate(x, size=tuple(size), mode=self.mode)

    def extra_repr(self) -> str:
        return f'mode={self.mode!r}'


def _blends(x: Tensor, size: Sequence[int]) -> bool:
    """Whether blending is right, and faster."""
    return (
        runs_eagerly()
        and [*size] == [2 * side for side in x.shape[2:]]
        and x.is_contiguous()
        and x.device.type in ('cpu', 'cuda')
    )


class _Double(torch.autograd.Function):
    """Bilinear upsampling to twice the size, one direction after the other.

    Each pixel becomes two, a quarter of its width to either side of its centre: three quarters of
    it and one quarter of the neighbour on that side, or all of it where there is none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _spread(_spread(x, 3), 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Along the rows first: there the memory is contiguous, and only half of it is left then.
        return _gather(_gather(grad.contiguous(), 2), 3)


def _spread(x: Tensor, dim: int) -> Tensor:
    """Double the size along `dim`."""
    last = x.shape[dim] - 1
    pairs = torch.stack((x, x), dim + 1)
    before, after = pairs.unbind(dim + 1)
    before.narrow(dim, 1, last).lerp_(x.narrow(dim, 0, last), 0.25)
    after.narrow(dim, 0, last).lerp_(x.narrow(dim, 1, last), 0.25)
    return pairs.flatten(dim, dim + 1)


def _gather(grad: Tensor, dim: int) -> Tensor:
    """The transpose of `_spread`."""
    last = grad.shape[dim] // 2 - 1
    before, after = grad.unflatten(dim, (-1, 2)).unbind(dim + 1)
    total = (before + after).mul_(0.75)
    total.narrow(dim, 1, last).add_(after.narrow(dim, 0, last), alpha=0.25)
    total.narrow(dim, 0, last).add_(before.narrow(dim, 1, last), alpha=0.25)
    # The neighbour that the first and the last pixel lack is the pixel itself.
    total.select(dim, 0).add_(before.select(dim, 0), alpha=0.25)
    total.select(dim, last).add_(after.select(dim, last), alpha=0.25)
    return total
