"""Convolution and BatchNorm as one layer, and chains of them with GELU between."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from ..reparam import folding
from ..reparam.plans import Plan
from .forms import TrainingLayer
from .fusible import Fusible, Note
from .gelu import GELU
from .norm_folding import convolve, folded, frozen_affine, separate
from .recompute import Recomputed, kept_as_recipes


class ConvNorm(nn.Sequential, Fusible, TrainingLayer):
    """Conv2d `conv`, then BatchNorm2d `norm`; fuses to one Conv2d with bias.

    With frozen statistics the 'merged' train form folds the norm into the convolution.
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

    def forward(self, x: Tensor, before: nn.Module | None = None) -> Tensor:
        """`before` is a norm to apply to `x` first; only for a 1x1 convolution."""
        return self.normalise(self.convolve(x, before))

    def convolve(self, x: Tensor, before: nn.Module | None = None) -> Tensor:
        """The convolution, with as much of both norms folded into it as can be."""
        if not self.merges():
            return self.conv(x if before is None else before(x))
        affine = None
        if before is not None:
            x, affine = separate(before, x)
        return convolve(x, self.conv, affine, None if self.norm.training else self.affine())

    def normalise(self, y: Tensor) -> Tensor:
        """The part of the norm that `convolve` left."""
        return self.norm(y) if self.norm.training or not self.merges() else y

    def renormalise(self, y: Tensor) -> Tensor:
        """What `normalise` returned in training, without moving the running statistics."""
        return F.batch_norm(
            y, None, None, self.norm.weight, self.norm.bias, training=True, eps=self.norm.eps
        )

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift that the norm applies with frozen statistics."""
        return frozen_affine(self.norm)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution that this is with frozen statistics.

        Differentiable; in at least float32, as a norm computes.
        """
        return folded(self.conv, after=self.affine())

    def fuse(self, plan: Plan, note: Note) -> nn.Module:
        note('convolution and norm to one convolution')
        return folding.fold_norm_backward(self.conv, self.norm)


class ConvChain(nn.Sequential, TrainingLayer):
    """Convolutions, each with its norm, and GELUs between them."""

    def forward(self, x: Tensor, before: nn.Module | None = None) -> Tensor:
        """`before` is a norm to apply to `x` first; only for a chain that starts with 1x1."""
        first = self[0]
        if before is not None and not isinstance(first, ConvNorm):
            x, before = before(x), None
        # How to recompute `x`, where that is cheap.
        recipe: Recomputed | None = None
        for layer in self:
            if not self.recomputes():
                x = layer(x, before) if before is not None else layer(x)
            elif isinstance(layer, ConvNorm):
                with kept_as_recipes(recipe):
                    y = layer.convolve(x, before)
                x = layer.normalise(y)
                renormalises = x is not y and type(layer.norm) is nn.BatchNorm2d
                recipe = Recomputed(x, layer.renormalise, y) if renormalises else None
            else:
                with kept_as_recipes(recipe):
                    out = layer(x)
                recipes = isinstance(layer, GELU)
                recipe = Recomputed(out, layer, recipe or x) if recipes else None
                x = out
            before = None
        return x
