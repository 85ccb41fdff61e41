"""Deformable and masked convolutions.

Feature maps are `(N, C, H, W)`, weights `(C_out, C / groups, kernel_h, kernel_w)`. Offsets are
`(N, deform_groups * kernel_h * kernel_w * 2, H_out, W_out)` in pixels, y before x; masks have one
channel where offsets have two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .numerics import reproducibly, widen


@dataclass(frozen=True)
class _Geometry:
    """How the kernel moves; pairs are (height, width)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    deform_groups: int

    def forward(
        self,
        input: Tensor,
        weight: Tensor,
        offset: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        return torch.ops.torchvision.deform_conv2d(
            *self._arguments(input, weight, offset, mask, bias)
        )

    def backward(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        offset: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Gradients of input, weight, offset, mask and bias."""
        arguments = self._arguments(input, weight, offset, mask, bias)
        return reproducibly(
            torch.ops.torchvision._deform_conv2d_backward,
            grad_output.to(arguments[0].dtype),
            *arguments,
        )

    def _arguments(
        self,
        input: Tensor,
        weight: Tensor,
        offset: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
    ) -> tuple:
        input, weight, offset, *rest = widen(
            input,
            weight,
            offset,
            input.new_zeros(len(input), 1) if mask is None else mask,
            input.new_zeros(len(weight)) if bias is None else bias,
        )
        steps = (*self.stride, *self.padding, *self.dilation, self.groups, self.deform_groups)
        return (input, weight, offset, *rest, *steps, mask is not None)


@torch.no_grad()
def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Deformable convolution, written to `output` `(N, C_out, H_out, W_out)`.

    `columns`, `ones` and `im2col_step` steer the compiled operator's buffers and change nothing.
    """
    geometry = _Geometry((dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    output.copy_(geometry.forward(input, weight, offset))


@torch.no_grad()
def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Gradients of input and offsets, written to `gradInput, gradOffset`."""
    geometry = _Geometry((dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    grads = geometry.backward(gradOutput, input, weight, offset)
    gradInput.copy_(grads[0])
    gradOffset.copy_(grads[2])
    # torchvision computes all gradients at once, and mmcv asks for the weight's next.
    columns.weight_grad = (gradOutput, grads[1])  # type: ignore[attr-defined]


@torch.no_grad()
def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Gradient of the weight times `scale`, written to `gradWeight`."""
    known_for, grad = columns.__dict__.pop('weight_grad', (None, None))
    if known_for is not gradOutput:
        geometry = _Geometry(
            (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group
        )
        # No gradient of the weight depends on its values.
        grad = geometry.backward(gradOutput, input, torch.zeros_like(gradWeight), offset)[1]
    gradWeight.copy_(grad * scale)


@torch.no_grad()
def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Deformable convolution of samples times `mask`, written to `output`."""
    geometry = _Geometry(
        (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), group, deformable_group
    )
    output.copy_(geometry.forward(input, weight, offset, mask, bias if with_bias else None))


@torch.no_grad()
def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """All gradients, written to the tensors `grad_*`; the bias's only `with_bias`."""
    geometry = _Geometry(
        (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), group, deformable_group
    )
    grads = geometry.backward(grad_output, input, weight, offset, mask)
    for target, grad in zip((grad_input, grad_weight, grad_offset, grad_mask), grads):
        target.copy_(grad)
    if with_bias:
        grad_bias.copy_(grads[4])


@torch.no_grad()
def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Write the patches of an image `(1, C, H, W)` around M pixels to `col`.

    `col` is `(C * kernel_h * kernel_w, M)`; a patch's first pixel is `pad_h` rows above its pixel
    and `pad_w` columns to the left of it.
    """
    padded = F.pad(im, (pad_w, kernel_w - 1 - pad_w, pad_h, kernel_h - 1 - pad_h))[0]
    rows = mask_h_idx + torch.arange(kernel_h, device=im.device)[:, None]
    columns = mask_w_idx + torch.arange(kernel_w, device=im.device)[:, None]
    col.copy_(padded[:, rows[:, None], columns[None]].flatten(0, 2))


@torch.no_grad()
def masked_col2im_forward(
    col: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    im: Tensor,
    height: int,
    width: int,
    channels: int,
) -> None:
    """Write values `(channels, M)` to M pixels of an image `(1, channels, height, width)`."""
    im[0, :, mask_h_idx, mask_w_idx] = col.to(im.dtype)
