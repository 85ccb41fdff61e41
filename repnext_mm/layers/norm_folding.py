"""Norms computed in weight space: what a norm does to a map, done to the convolution beside it.

A norm scales and shifts each channel. Folding that into a small kernel instead of applying it
to a large map is exact up to rounding, and differentiable: gradients reach the kernel and the
norm's parameters as if both had run.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from ..reparam import kernels
from .forms import runs_eagerly
from .precision import at_least_float32

#: Scale and shift `(C,)`, in at least float32.
Affine = tuple[Tensor, Tensor]


def frozen_affine(norm: _BatchNorm) -> Affine:
    """What a norm in eval mode applies: its running statistics and affine parameters."""
    tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, var, weight, bias = (at_least_float32(cast(Tensor, t)) for t in tensors)
    return kernels.norm_affine(mean, var, weight, bias, norm.eps)


def separate(norm: nn.Module, x: Tensor) -> tuple[Tensor, Affine | None]:
    """Split `norm(x)` into a map and the affine still to be applied to it.

    Where the affine cannot be told apart from the map, the map is `norm(x)` and it is None.
    """
    if isinstance(norm, nn.Identity):
        return x, None
    if isinstance(norm, _BatchNorm):
        if not norm.training:
            return x, frozen_affine(norm)
        if _folds_batch_statistics(norm, x):
            return x, _batch_affine(norm, x)
    return norm(x), None


def convolve(
    x: Tensor,
    conv: nn.Conv2d,
    before: Affine | None = None,
    after: Affine | None = None,
) -> Tensor:
    """`after(conv(before(x)))` as one convolution; `before` only for a 1x1 or unpadded `conv`."""
    if before is None and after is None:
        return conv(x)
    weight, bias = folded(conv, before, after)
    return conv._conv_forward(x, weight.to(x.dtype), bias.to(x.dtype))


def folded(
    conv: nn.Conv2d, before: Affine | None = None, after: Affine | None = None
) -> tuple[Tensor, Tensor]:
    """Weight and bias, in at least float32, of the convolution that is `after(conv(before))`."""
    weight = at_least_float32(conv.weight)
    bias = weight.new_zeros(len(weight)) if conv.bias is None else at_least_float32(conv.bias)
    if before is not None:
        weight, bias = kernels.fold_input(weight, bias, *before, padded=any(conv.padding))
    if after is not None:
        weight, bias = kernels.fold_output(weight, bias, *after)
    return weight, bias


def _folds_batch_statistics(norm: _BatchNorm, x: Tensor) -> bool:
    """Whether to take batch statistics without normalising.

    Shown to pay on CPUs. Synchronised statistics, cumulative averages and single values per
    channel, which torch refuses, stay with the module.
    """
    return (
        type(norm) is nn.BatchNorm2d
        and x.device.type == 'cpu'
        and norm.momentum is not None
        and x.numel() > x.shape[1]
        and runs_eagerly()
    )


def _batch_affine(norm: _BatchNorm, x: Tensor) -> Affine:
    """The affine that `norm` applies in training; moves its running statistics."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    mean, var = _BatchStatistics.apply(x, norm.running_mean, norm.running_var, norm.momentum)
    return kernels.norm_affine(mean, var, norm.weight, norm.bias, norm.eps)


class _BatchStatistics(torch.autograd.Function):
    """Mean and biased variance `(C,)` of a map, with a backward of one pass over it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float
    ) -> tuple[Tensor, Tensor]:
        mean, var = torch.batch_norm_update_stats(x, running_mean, running_var, momentum)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
        x, mean = ctx.saved_tensors
        pixels = x.numel() // x.shape[1]
        slope = grad_var * (2 / pixels)
        offset = grad_mean / pixels - slope * mean
        slope, offset = (t.to(x.dtype).view(1, -1, 1, 1) for t in (slope, offset))
        return torch.addcmul(offset, x, slope), None, None, None
