"""RepNeXt's token mixers: chunk convolution and copy convolution."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..reparam import folding, kernels
from ..reparam.plans import Plan
from .depthwise import Branch, BranchedDepthwise, DeinterleavedConv2d
from .forms import TrainingLayer, is_channels_last, runs_eagerly
from .fusible import Fusible, Note
from .norm_folding import Affine, convolve
from .recompute import Recomputed, kept_as_recipes

SMALL: tuple[Branch, ...] = (((3, 3),), ((1, 3),), ((3, 1),), ((2, 2),))
SMALL_SERIAL: tuple[Branch, ...] = (((3, 3),), ((1, 3), (3, 1)), ((2, 2),))
MEDIUM: tuple[Branch, ...] = (
    ((7, 7),),
    ((5, 3),),
    ((3, 5),),
    ((1, 7), (7, 1)),
    ((1, 5), (5, 1)),
)
LARGE = 11


class StripPair(nn.Sequential, TrainingLayer):
    """A row and a column convolution in series, each with a bias."""

    def forward(self, x: Tensor) -> Tensor:
        row, column = cast('tuple[nn.Conv2d, nn.Conv2d]', tuple(self))
        between = row(x)
        if not self.recomputes():
            return column(between)
        dtype = between.dtype

        def again(source: Tensor) -> Tensor:
            # Backward runs outside the autocast context that the forward pass may have had.
            weight, bias = (cast(Tensor, p).detach().to(dtype) for p in (row.weight, row.bias))
            return row._conv_forward(source.to(dtype), weight, bias)

        with kept_as_recipes(Recomputed(between, again, x)):
            return column(between)


class ChunkConv(Fusible, TrainingLayer):
    """Four channel chunks: identity, small, medium and large depthwise convolutions.

    `(N, C, H, W) -> (N, C, H, W)`, C divisible by 4 (RepNeXt, arXiv 2406.16004, section 3.2).
    """

    # BranchedDepthwise while training, Conv2d once fused.
    conv_s: Any
    conv_m: Any

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = channels // 4
        self.conv_s = BranchedDepthwise(width, SMALL)
        self.conv_m = BranchedDepthwise(width, MEDIUM)
        pad = LARGE // 2
        self.conv_l = StripPair(
            nn.Conv2d(width, width, (1, LARGE), padding=(0, pad), groups=width),
            nn.Conv2d(width, width, (LARGE, 1), padding=(pad, 0), groups=width),
        )

    def forward(self, x: Tensor) -> Tensor:
        i, *chunks = x.chunk(4, dim=1)
        if self.train_form == 'merged' and runs_eagerly() and is_channels_last(x):
            # A chunk has gaps; each convolution would close them, in forward and in backward.
            chunks = [c.contiguous(memory_format=torch.channels_last) for c in chunks]
        s, m, large = chunks
        return torch.cat((i, self.conv_s(s), self.conv_m(m), self.conv_l(large)), dim=1)

    def fuse(self, plan: Plan, note: Note) -> nn.Module:
        if plan != 'single':
            return self
        row, column = cast(list[nn.Conv2d], list(self.conv_l))
        size = (LARGE, LARGE)
        row_weight, row_bias = folding.weights(row)
        column_weight, column_bias = folding.weights(column)
        note(
            'chunk convolution to one 11x11 depthwise convolution',
            'border' if row_bias.is_meta or row_bias.any() else 'exact',
        )
        small, small_bias = folding.weights(self.conv_s)
        medium, medium_bias = folding.weights(self.conv_m)
        weight = torch.cat(
            (
                kernels.identity_kernel(row.groups, size, small.dtype, small.device),
                kernels.pad_kernel(small, size),
                kernels.pad_kernel(medium, size),
                kernels.compose_strips(row_weight, column_weight),
            )
        )
        large_bias = kernels.strip_bias(column_weight, row_bias, column_bias)
        bias = torch.cat((torch.zeros_like(small_bias), small_bias, medium_bias, large_bias))
        return folding.conv2d(weight, bias, like=row, padding=LARGE // 2, groups=4 * row.groups)


class CopyConv(Fusible):
    """Small and medium depthwise convolutions of stride 2 over the same input, concatenated.

    `(N, C, H, W) -> (N, 2C, ceil(H / 2), ceil(W / 2))` (RepNeXt, arXiv 2406.16004, section 3.2).
    """

    conv_s: Any
    conv_m: Any

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_s = BranchedDepthwise(channels, SMALL_SERIAL, stride=2)
        self.conv_m = BranchedDepthwise(channels, MEDIUM, stride=2)

    def forward(self, x: Tensor, after: Affine | None = None) -> Tensor:
        """`after` is applied to the output; only where this `merges`."""
        convs = self.conv_s, self.conv_m
        if after is None:
            return torch.cat([conv(x) for conv in convs], dim=1)
        outs = []
        for conv, half in zip(convs, zip(*(t.chunk(2) for t in after), strict=True), strict=True):
            merges = isinstance(conv, BranchedDepthwise)
            outs.append(conv(x, half) if merges else convolve(x, conv, after=half))
        return torch.cat(outs, dim=1)

    def fold_norm_backward(self, norm: _BatchNorm) -> CopyConv:
        """Fold the norm that follows into the two convolutions, each taking its channels."""
        scales, shifts = (t.chunk(2) for t in folding.norm_affine(norm))
        for name, scale, shift in zip(('conv_s', 'conv_m'), scales, shifts, strict=True):
            conv = cast(nn.Conv2d, self.get_submodule(name))
            folded = kernels.fold_output(*folding.weights(conv), scale, shift)
            setattr(self, name, folding.conv2d(*folded, like=conv))
        return self

    def fuse(self, plan: Plan, note: Note) -> nn.Module:
        if plan != 'single':
            return self
        note('copy convolution to one 7x7 convolution with two outputs per channel')
        small, small_bias = folding.weights(self.conv_s)
        medium, medium_bias = folding.weights(self.conv_m)
        weight = kernels.interleave(kernels.pad_kernel(small, medium.shape[-2:]), medium)
        bias = kernels.interleave(small_bias, medium_bias)
        return DeinterleavedConv2d(folding.conv2d(weight, bias, like=self.conv_m))
