"""Depthwise mixing by two convolutions and the identity, which merge into one."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..reparam import folding, kernels
from ..reparam.plans import Plan
from .conv_norm import ConvNorm
from .forms import TrainingLayer
from .fusible import Fusible, Note


class RepMixer(Fusible, TrainingLayer):
    """`lk` (3x3 and norm) + `sk` (1x1 and norm) + identity, depthwise, shape-preserving.

    While a norm uses batch statistics, the branches must be computed one by one. With frozen
    statistics the 'merged' train form composes their one 3x3 kernel in the forward pass.
    """

    # ConvNorm while training, Conv2d while fusing.
    lk: Any
    sk: Any

    def __init__(self, channels: int, bias: bool = True) -> None:
        super().__init__()
        self.groups = channels
        self.lk = ConvNorm(channels, channels, 3, padding=1, groups=channels, bias=bias)
        self.sk = ConvNorm(channels, channels, groups=channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        batch_statistics = self.lk.norm.training or self.sk.norm.training
        if batch_statistics or not self.merges():
            return self.lk(x) + self.sk(x) + x
        weight, bias = self.merge(self.lk.folded(), self.sk.folded())
        return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=1, groups=self.groups)

    def merge(
        self, large: tuple[Tensor, Tensor], small: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Weight `(C, 1, 3, 3)` and bias of the sum of two convolutions and the identity."""
        (weight, bias), (small_weight, small_bias) = large, small
        identity = kernels.identity_kernel(self.groups, (3, 3), weight.dtype, weight.device)
        return weight + kernels.pad_kernel(small_weight, (3, 3)) + identity, bias + small_bias

    def fuse(self, plan: Plan, note: Note) -> nn.Module:
        note('3x3, 1x1 and identity to one 3x3 depthwise convolution')
        merged = self.merge(folding.weights(self.lk), folding.weights(self.sk))
        return folding.conv2d(*merged, like=self.lk)
