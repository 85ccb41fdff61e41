"""Folds between modules, on top of the kernel algebra; computed in float64."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import kernels


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


def weights(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """The convolution's weight and bias in float64; zeros for a missing bias."""
    weight = conv.weight.double()
    return weight, weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.double()


def norm_affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift `(C,)`, float64, of a BatchNorm in eval mode."""
    tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, var, weight, bias = (cast(Tensor, t).double() for t in tensors)
    return kernels.norm_affine(mean, var, weight, bias, norm.eps)


def fold_norm_backward(conv: nn.Conv2d, norm: _BatchNorm) -> nn.Conv2d:
    """The convolution that computes `norm(conv(x))`."""
    return conv2d(*kernels.fold_output(*weights(conv), *norm_affine(norm)), like=conv)


def fold_norm_forward(norm: _BatchNorm, conv: nn.Conv2d) -> nn.Conv2d:
    """The convolution that computes `conv(norm(x))`; it must be 1x1 or have no padding."""
    folded = kernels.fold_input(*weights(conv), *norm_affine(norm), padded=any(conv.padding))
    return conv2d(*folded, like=conv)
