"""Depthwise convolution with a weight gradient that stays fast for wide kernels."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .forms import is_channels_last, runs_eagerly

#: Width of the kernels for which oneDNN's depthwise weight gradient is fast on AVX2.
FAST_WIDTH = 3
#: Number of values in a map from which splitting the gradient pays (docs/benchmarks).
WORTHWHILE = 2**17


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: tuple[int, int]
) -> Tensor:
    """`F.conv2d` of `x` `(N, C, H, W)` with a depthwise `weight` `(C, 1, kh, kw)`."""
    if _splits(x, weight, stride):
        return _SplitGradient.apply(x, weight, bias, padding)
    return F.conv2d(x, weight, bias, stride, padding, groups=len(weight))


@cache
def _lacks_wide_gradient() -> bool:
    """Whether this CPU's oneDNN runs wide depthwise weight gradients as padded full groups."""
    return torch.backends.cpu.get_cpu_capability() == 'AVX2'


def _splits(x: Tensor, weight: Tensor, stride: int) -> bool:
    height, width = weight.shape[2:]
    return (
        # Asked first: where sizes are symbols each further answer would be a condition on them.
        runs_eagerly()
        and stride == 1
        and x.numel() >= WORTHWHILE
        and height > FAST_WIDTH
        and width > FAST_WIDTH
        and weight.requires_grad
        and torch.is_grad_enabled()
        and x.device.type == 'cpu'
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled('cpu')
        and is_channels_last(x)
        and _lacks_wide_gradient()
    )


class _SplitGradient(torch.autograd.Function):
    """Stride 1, channels_last; the weight's gradient is taken by groups of its columns."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        ctx.has_bias = bias is not None
        return F.conv2d(x, weight, bias, 1, padding, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _convolution_backward(grad, x, weight, ctx.padding, (True, False, False))[0]
        grad_weight = split_weight_gradient(x, grad, weight, ctx.padding)
        grad_bias = None
        if ctx.has_bias:
            channels = grad.shape[1]
            grad_bias = grad.permute(0, 2, 3, 1).reshape(-1, channels).sum(0)
        return grad_x, grad_weight, grad_bias, None


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, int], mask: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    options = (None, (1, 1), padding, (1, 1), False, (0, 0), len(weight), mask)
    return torch.ops.aten.convolution_backward(grad, x, weight, *options)


def split_weight_gradient(
    x: Tensor, grad: Tensor, weight: Tensor, padding: tuple[int, int]
) -> Tensor:
    """Gradient `(C, 1, kh, kw)` of a depthwise convolution, `FAST_WIDTH` columns at a time.

    Column j of the kernel meets the input shifted by j. In a map padded on both sides that is
    the same memory read j pixels later: what wraps into the next row meets a zero of `grad`,
    padded to the same width.
    """
    n, channels, height, width = x.shape
    kernel_width, pad = weight.shape[3], padding[1]
    padded = width + 2 * pad
    # One more row, so that the last shift stays inside.
    rows = x.new_empty(n * height + 1, padded, channels)
    rows[:, :pad], rows[:, pad + width :], rows[-1] = 0, 0, 0
    rows[:-1].unflatten(0, (n, height))[:, :, pad : pad + width] = x.permute(0, 2, 3, 1)
    spread = x.new_empty(n, height, padded - FAST_WIDTH + 1, channels)
    spread[:, :, width:] = 0
    spread[:, :, :width] = grad.permute(0, 2, 3, 1)
    spread = spread.permute(0, 3, 1, 2)
    strides = (height * padded * channels, 1, padded * channels, channels)
    columns: list[Tensor] = []
    while (done := FAST_WIDTH * len(columns)) < kernel_width:
        # The last group ends with the kernel, and overlaps the one before it.
        start = min(done, kernel_width - FAST_WIDTH)
        shifted = rows.as_strided((n, channels, height, padded), strides, start * channels)
        part = weight[..., start : start + FAST_WIDTH]
        mask = (False, True, False)
        gradient = _convolution_backward(spread, shifted, part, (padding[0], 0), mask)[1]
        columns.append(gradient[..., done - start :])
    return torch.cat(columns, dim=3)
