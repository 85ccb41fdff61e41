"""CARAFE: upsampling in which every output pixel weighs the pixels around its source itself.

Features are `(N, C, H, W)`, masks `(N, group_size * kernel_size ** 2, H * s, W * s)`, outputs
`(N, C, H * s, W * s)` for the scale factor s.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .numerics import widen


class _Taps:
    """The pixels under a kernel one after the other, with axes (N, G, C / G, H, s, W, s)."""

    def __init__(self, features: Tensor, kernel_size: int, group_size: int, scale_factor: int):
        self.shape = features.shape
        self.kernel, self.groups, self.scale = kernel_size, group_size, scale_factor

    def fine(self, tensor: Tensor) -> Tensor:
        """A view of `(N, channels, H * s, W * s)` with the axes above."""
        batch, _, height, width = self.shape
        return tensor.contiguous().view(
            batch, self.groups, -1, height, self.scale, width, self.scale
        )

    def padded(self, features: Tensor) -> Tensor:
        return F.pad(features, [self.kernel // 2] * 4)

    def windows(self, padded: Tensor) -> Iterator[Tensor]:
        """Views `(N, G, C / G, H, 1, W, 1)` of the padded features, one per place of the kernel."""
        batch, channels, height, width = self.shape
        grouped = padded.view(batch, self.groups, channels // self.groups, *padded.shape[2:])
        for row in range(self.kernel):
            for column in range(self.kernel):
                window = grouped[..., row : row + height, column : column + width]
                yield window[..., :, None, :, None]

    def masks(self, masks: Tensor) -> Iterator[Tensor]:
        """Views `(N, G, 1, H, s, W, s)`, one per place of the kernel."""
        return iter(self.fine(masks).split(1, dim=2))


@torch.no_grad()
def carafe_naive_forward(
    features: Tensor,
    masks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Write the weighted sums to `output`."""
    features, masks = widen(features, masks)
    taps = _Taps(features, kernel_size, group_size, scale_factor)
    sums = taps.fine(torch.zeros_like(output, dtype=features.dtype))
    for window, mask in zip(taps.windows(taps.padded(features)), taps.masks(masks)):
        sums.addcmul_(window, mask)
    output.copy_(sums.view(output.shape))


@torch.no_grad()
def carafe_naive_backward(
    top_grad: Tensor,
    features: Tensor,
    masks: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Gradients of features and masks, written to `bottom_grad, mask_grad`."""
    top_grad, features, masks = widen(top_grad, features, masks)
    taps = _Taps(features, kernel_size, group_size, scale_factor)
    grad = taps.fine(top_grad)
    padded = taps.padded(features)
    feature_sums = torch.zeros_like(padded)
    mask_sums = []
    for window, mask, total in zip(
        taps.windows(padded), taps.masks(masks), taps.windows(feature_sums)
    ):
        mask_sums.append((grad * window).sum(2, keepdim=True))
        total += (grad * mask).sum((4, 6), keepdim=True)
    mask_grad.copy_(torch.cat(mask_sums, 2).view(mask_grad.shape))
    border = kernel_size // 2
    height, width = features.shape[2:]
    bottom_grad.copy_(feature_sums[..., border : border + height, border : border + width])


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Write the weighted sums to `output`, and to `rfeatures` what `carafe_backward` needs."""
    rfeatures.copy_(features.detach())
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(
    top_grad: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rtop_grad: Tensor,
    rbottom_grad_hs: Tensor,
    rbottom_grad: Tensor,
    rmask_grad: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Gradients of features and masks, written to `bottom_grad, mask_grad`.

    The other tensors are the compiled operator's buffers and stay as they are.
    """
    sizes = (kernel_size, group_size, scale_factor)
    carafe_naive_backward(top_grad, rfeatures, masks, bottom_grad, mask_grad, *sizes)
