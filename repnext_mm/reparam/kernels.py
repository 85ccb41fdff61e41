"""Kernel algebra: pure functions on convolution weights, no modules.

Weights are `(out, in / groups, kh, kw)`, biases and per-channel vectors `(out,)`. Every
function is differentiable, keeps the dtype it is given and leaves its arguments unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_kernel(weight: Tensor, size: Sequence[int]) -> Tensor:
    """Embed a kernel in the middle of a zero kernel of `size`.

    A stride-s convolution padded by half its kernel computes the same with either. Raises
    ValueError where the two centres cannot coincide (sizes differ by an odd number).
    """
    dh, dw = size[0] - weight.shape[-2], size[1] - weight.shape[-1]
    if dh < 0 or dw < 0 or dh % 2 or dw % 2:
        raise ValueError(
            f'a {tuple(weight.shape[-2:])} kernel has no centred place in a {tuple(size)} kernel; '
            'the target must be larger by an even number in both directions.'
        )
    if dh == dw == 0:
        return weight
    return F.pad(weight, (dw // 2, dw // 2, dh // 2, dh // 2))


def dilate_kernel(weight: Tensor, dilation: int) -> Tensor:
    """The dense kernel `(dilation * (k - 1) + 1)` of a dilated one: zeros between its entries."""
    if dilation == 1:
        return weight
    kh, kw = weight.shape[-2:]
    dense = weight.new_zeros(*weight.shape[:2], dilation * (kh - 1) + 1, dilation * (kw - 1) + 1)
    dense[..., ::dilation, ::dilation] = weight
    return dense


def compose_strips(first: Tensor, second: Tensor) -> Tensor:
    """Kernel of a depthwise 1xk convolution followed by a depthwise kx1 one (or k x 1, 1 x k).

    Exact with zero padding as long as the first strip has no bias.
    """
    return first * second


def strip_bias(second: Tensor, first_bias: Tensor, second_bias: Tensor) -> Tensor:
    """Bias of a strip pair away from the border, where all of `second` sees the first bias."""
    return second_bias + first_bias * second.sum(dim=(1, 2, 3))


def identity_kernel(
    channels: int,
    size: tuple[int, int],
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Depthwise kernel `(channels, 1, kh, kw)` that returns its input; sizes must be odd."""
    if size[0] % 2 == 0 or size[1] % 2 == 0:
        raise ValueError(f'an identity kernel needs odd sizes, not {tuple(size)}.')
    weight = torch.zeros(channels, 1, *size, dtype=dtype, device=device)
    weight[:, :, size[0] // 2, size[1] // 2] = 1
    return weight


def norm_affine(
    mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Scale and shift `(C,)` that a BatchNorm with frozen statistics applies."""
    scale = weight * (var + eps).rsqrt()
    return scale, bias - mean * scale


def fold_output(
    weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Fold `y -> scale * y + shift` on a convolution's output into the convolution (backward)."""
    return weight * scale.view(-1, 1, 1, 1), bias * scale + shift


def fold_input(
    weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, padded: bool = True
) -> tuple[Tensor, Tensor]:
    """Fold `x -> scale * x + shift` on the input of an ungrouped convolution into it (forward).

    Raises ValueError for a grouped convolution, and for a `padded` one larger than 1x1: its
    zeros come after the shift, which makes the fold wrong on the border.
    """
    pointwise = tuple(weight.shape[-2:]) == (1, 1)
    if weight.shape[1] != scale.numel() or (padded and not pointwise):
        raise ValueError(
            'an affine input folds exactly only into an ungrouped 1x1 or unpadded convolution, not '
            f'into one with a weight of shape {tuple(weight.shape)} for {scale.numel()} channels.'
        )
    return weight * scale.view(1, -1, 1, 1), bias + weight.sum((2, 3)) @ shift


def interleave(first: Tensor, second: Tensor) -> Tensor:
    """Alternate the entries of two tensors along dimension 0: first[0], second[0], first[1], ..."""
    return torch.stack((first, second), dim=1).flatten(0, 1)
