"""Folds between modules, on top of the kernel algebra.

Computed in float64, unless another dtype is asked for; differentiable.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import kernels

#: Scale and shift `(C,)`.
Affine = tuple[Tensor, Tensor]


def conv2d(weight: Tensor, bias: Tensor, like: nn.Conv2d, **kwargs: Any) -> nn.Conv2d:
    """A convolution with the given weight, in `like`'s dtype, device and memory format.

    Stride, padding and groups are `like`'s unless given in `kwargs`.
    """
    options: dict[str, Any] = dict(stride=like.stride, padding=like.padding, groups=like.groups)
    options |= kwargs
    out_channels, in_per_group, height, width = weight.shape
    reference = like.weight
    conv = nn.Conv2d(
        in_per_group * options['groups'],
        out_channels,
        (height, width),
        device='meta',
        **options,
    )
    channels_last = reference.is_contiguous(memory_format=torch.channels_last)
    if channels_last and not reference.is_contiguous():
        weight = weight.contiguous(memory_format=torch.channels_last)
    conv.weight = nn.Parameter(weight.to(reference))
    conv.bias = nn.Parameter(bias.to(reference))
    return conv.train(like.training)


def weights(conv: nn.Conv2d, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The convolution's weight and bias; zeros for a missing bias."""
    weight = _cast(conv.weight, dtype)
    return weight, weight.new_zeros(len(weight)) if conv.bias is None else _cast(conv.bias, dtype)


def norm_affine(norm: _BatchNorm, dtype: torch.dtype = torch.float64) -> Affine:
    """Scale and shift `(C,)` of a BatchNorm in eval mode."""
    tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, var, weight, bias = (_cast(cast(Tensor, t), dtype) for t in tensors)
    return kernels.norm_affine(mean, var, weight, bias, norm.eps)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, without the call where it has that dtype."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def folded(
    conv: nn.Conv2d,
    before: Affine | None = None,
    after: Affine | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that computes `after(conv(before(x)))`.

    With `before`, the convolution must be 1x1 or have no padding.
    """
    weight, bias = weights(conv, dtype)
    if before is not None:
        weight, bias = kernels.fold_input(weight, bias, *before, padded=any(conv.padding))
    if after is not None:
        weight, bias = kernels.fold_output(weight, bias, *after)
    return weight, bias


def fold_norm_backward(conv: nn.Conv2d, norm: _BatchNorm) -> nn.Conv2d:
    """The convolution that computes `norm(conv(x))`."""
    return conv2d(*folded(conv, after=norm_affine(norm)), like=conv)


def fold_norm_forward(norm: _BatchNorm, conv: nn.Conv2d) -> nn.Conv2d:
    """The convolution that computes `conv(norm(x))`; it must be 1x1 or have no padding."""
    return conv2d(*folded(conv, before=norm_affine(norm)), like=conv)
