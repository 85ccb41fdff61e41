"""A convolution in two steps, for light necks and heads."""

from __future__ import annotations

from typing import Any, cast

from mmengine.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module(force=True)  # replaces its stand-in of `lazy`
class SeparableConv2d(nn.Module):
    """A depthwise convolution and a 1x1 convolution; one of size 1 is the second alone.

    It has the attributes that mmcv's `ConvModule` asks of a convolution, so
    `conv_cfg=dict(type='SeparableConv2d')` works in any neck or head that has `conv_cfg`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if groups != 1:
            raise ValueError(f'groups={groups} must be 1: the first step has a group per channel.')
        pair = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
        self.depthwise: nn.Module = nn.Identity()
        if pair != (1, 1):
            self.depthwise = nn.Conv2d(
                in_channels,
                in_channels,
                pair,
                stride,
                padding,
                dilation,
                groups=in_channels,
                bias=False,
                **kwargs,
            )
            stride, padding = 1, 0
        self.pointwise = nn.Conv2d(
            in_channels, out_channels, 1, stride, padding, bias=bias, **kwargs
        )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.padding = pair, stride, padding
        self.dilation, self.output_padding, self.transposed = dilation, (0, 0), False

    @property
    def weight(self) -> nn.Parameter:
        """Of the 1x1 convolution, which initializers of mm draw."""
        return cast(nn.Parameter, self.pointwise.weight)

    @property
    def bias(self) -> nn.Parameter | None:
        """Of the 1x1 convolution."""
        return cast('nn.Parameter | None', self.pointwise.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, out_channels, H, W)` of `x (N, in_channels, H, W)`."""
        return self.pointwise(self.depthwise(x))
