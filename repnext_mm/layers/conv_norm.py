"""Convolution and BatchNorm as one layer."""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

from torch import Tensor, nn

from ..reparam import folding, kernels
from ..reparam.plans import Plan
from .fusible import Fusible, Note
from .precision import at_least_float32


class ConvNorm(nn.Sequential, Fusible):
    """Conv2d `conv`, then BatchNorm2d `norm`; fuses to one Conv2d with bias.

    `(N, in_channels, H, W) -> (N, out_channels, H', W')`
    """

    conv: nn.Conv2d
    norm: nn.BatchNorm2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias
        )
        super().__init__(OrderedDict(conv=conv, norm=nn.BatchNorm2d(out_channels)))

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution that this is with frozen statistics.

        Differentiable; in at least float32, as a norm computes.
        """
        norm, weight = self.norm, at_least_float32(self.conv.weight)
        statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        mean, var, scale, shift = (at_least_float32(cast(Tensor, t)) for t in statistics)
        bias = self.conv.bias
        bias = weight.new_zeros(len(weight)) if bias is None else at_least_float32(bias)
        affine = kernels.norm_affine(mean, var, scale, shift, norm.eps)
        return kernels.fold_output(weight, bias, *affine)

    def fuse(self, plan: Plan, note: Note) -> nn.Module:
        note('convolution and norm to one convolution')
        return folding.fold_norm_backward(self.conv, self.norm)
