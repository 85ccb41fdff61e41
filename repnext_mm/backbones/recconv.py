"""RecConv: large receptive fields from small kernels at halved resolutions (arXiv 2412.19628).

The shared form is the published networks', the others are the variants of the paper's ablation.
Each maps `(N, C, H, W) -> (N, C, H, W)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import fast
from ..layers.execution import FastLayer, autocasts, run_in_float32

UpsampleMode = Literal['nearest', 'bilinear']
UPSAMPLE_MODES: tuple[UpsampleMode, ...] = get_args(UpsampleMode)
#: Upsampling that is learned: one transposed convolution for all levels of a mixer.
TRANSPOSED = 'transposed'
RECURSIVE_MODES: tuple[str, ...] = (*UPSAMPLE_MODES, TRANSPOSED)


class Upsample(FastLayer):
    """`F.interpolate` to `size`, or to twice the size: `(N, C, H, W) -> (N, C, *size)`.

    Args:
        mode: 'nearest' or 'bilinear', which has half-pixel centers.
    """

    def __init__(self, mode: UpsampleMode = 'bilinear') -> None:
        super().__init__()
        self.mode = mode

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        size = [2 * side for side in x.shape[2:]] if size is None else size
        if self.is_fast():
            return fast.upsample(x, size, self.mode)
        return F.interpolate(x, size=tuple(size), mode=self.mode)

    def extra_repr(self) -> str:
        return f'mode={self.mode!r}'


class TransposedUpsample(nn.ConvTranspose2d):
    """Depthwise transposed convolution of stride 2, cut to `size`: `(N, C, h, w) -> (N, C, *size)`.

    The authors name it as the cure for the throughput of bilinear upsampling. `size` is at most
    twice the size of the input: an odd one was rounded up when it was halved.
    """

    def __init__(self, channels: int, kernel_size: int, bias: bool) -> None:
        options: dict[str, Any] = dict(stride=2, padding=kernel_size // 2, bias=bias)
        super().__init__(channels, channels, kernel_size + 1, groups=channels, **options)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:  # type: ignore[override]
        out = super().forward(x)
        return out if tuple(out.shape[2:]) == tuple(size) else out[..., : size[0], : size[1]]


class DepthwiseConv2d(nn.Conv2d, FastLayer):
    """Depthwise `nn.Conv2d`, computed the fast way."""

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, channels, groups=channels, **options)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.is_fast():
            return super()._conv_forward(x, weight, bias)
        padding = cast(tuple[int, int], self.padding)
        return fast.depthwise_conv2d(x, weight, bias, self.stride[0], padding)


class RecursiveConv(nn.Module):
    """Base of the variants; under autocast the recursion runs in float32.

    In half precision every level rounds its features twice, and the output contains all of it.

    Args:
        channels: C.
        kernel_size: Size of the depthwise kernels, odd.
        level: How often the resolution is halved; the receptive field doubles with each.
        mode: Upsampling between the levels: bilinear, nearest or transposed; without effect where
            the variant has transposed convolutions of its own.
        bias: Whether the convolutions have one.
    """

    #: Variants that upsample by transposed convolutions require sizes that halve evenly.
    transposed: ClassVar[bool] = False
    min_level: ClassVar[int] = 1

    def __init__(
        self,
        channels: int,
        kernel_size: int = 5,
        level: int = 1,
        mode: str = 'bilinear',
        bias: bool = False,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f'kernel_size={kernel_size} of a recursive convolution must be odd.')
        if level < self.min_level:
            raise ValueError(
                f'level={level} is too low for {type(self).__name__}; use {self.min_level} or more.'
            )
        if mode not in RECURSIVE_MODES:
            raise ValueError(f'mode={mode!r} is not one of {", ".join(RECURSIVE_MODES)}.')
        if self.transposed and channels % 2**level:
            raise ValueError(
                f'{type(self).__name__} halves its channels {level} times, which {channels} '
                f'channels cannot: use a multiple of {2**level} or a lower level.'
            )
        self.level = level
        self.mode = mode
        if not self.transposed and level:
            self.upsample: nn.Module = (
                TransposedUpsample(channels, kernel_size, bias)
                if mode == TRANSPOSED
                else Upsample(cast(UpsampleMode, mode))
            )
        options: dict[str, Any] = dict(kernel_size=kernel_size, padding=kernel_size // 2, bias=bias)
        self.build(channels, partial(nn.Conv2d, **options))

    def build(self, channels: int, conv: partial[nn.Conv2d]) -> None:
        """Add the convolutions, made by `conv` (kernel, padding and bias are set)."""
        raise NotImplementedError(f'{type(self).__name__} must define build().')

    def recur(self, x: Tensor) -> Tensor:
        """The recursion in the dtype of `x`."""
        raise NotImplementedError(f'{type(self).__name__} must define recur().')

    def forward(self, x: Tensor) -> Tensor:
        if self.transposed:
            self.check_size(x)
        if autocasts(x.device.type):
            return run_in_float32(self.recur, x)
        return self.recur(x)

    def check_size(self, x: Tensor) -> None:
        height, width = x.shape[2:]
        step = 2**self.level
        # Open sizes, in tracing and export, are no ints.
        if any(isinstance(side, int) and side % step for side in (height, width)):
            raise ValueError(
                f'{type(self).__name__} at level {self.level} cannot compute a {height}x{width} '
                f'feature map: both sides must be multiples of {step}. Pad the images, or use '
                'the recursive or recurrent variant.'
            )

    def extra_repr(self) -> str:
        return f'level={self.level}' + ('' if self.transposed else f', mode={self.mode!r}')


class SharedRecursiveConv(RecursiveConv):
    """One shared convolution `down` for all levels, one of `convs` per level, deepest first.

    At level 0 it is the single convolution `convs.0`.
    """

    min_level = 0

    def build(self, channels: int, conv: partial[nn.Conv2d]) -> None:
        depthwise = partial(DepthwiseConv2d, channels, **conv.keywords)
        if self.level:
            self.down = depthwise(stride=2)
        self.convs = nn.ModuleList(depthwise() for _ in range(self.level + 1))

    def recur(self, x: Tensor) -> Tensor:
        features = [x]
        for _ in range(self.level):
            features.append(self.down(features[-1]))
        out = features.pop()
        for conv in self.convs[: self.level]:
            finer = features.pop()
            out = finer + self.upsample(conv(out), finer.shape[2:])
        return self.convs[-1](out)


class RecurrentConv(RecursiveConv):
    """All levels share their convolutions: `n` down, `a` for what came up, `b` for the level.

    `c` and `d` do the same at full resolution.
    """

    def build(self, channels: int, conv: partial[nn.Conv2d]) -> None:
        depthwise = partial(DepthwiseConv2d, channels, **conv.keywords)
        self.n = depthwise(stride=2)
        if self.level > 1:
            self.a = depthwise()
        self.b, self.c, self.d = depthwise(), depthwise(), depthwise()

    def recur(self, x: Tensor) -> Tensor:
        features = [x]
        for _ in range(self.level):
            features.append(self.n(features[-1]))
        out = self.upsample(self.b(features.pop()), features[-1].shape[2:])
        for _ in range(self.level - 1):
            out = self.a(out) + self.b(features.pop())
            out = self.upsample(out, features[-1].shape[2:])
        return self.c(out) + self.d(x)


class GroupedRecursiveConv(RecursiveConv):
    """Each level halves the channels too, by grouped convolutions, and doubles them going up."""

    transposed = True

    def build(self, channels: int, conv: partial[nn.Conv2d]) -> None:
        widths = [channels // 2**k for k in range(self.level + 1)]
        self.downs = nn.ModuleList(
            conv(wide, narrow, groups=narrow, stride=2) for wide, narrow in pairwise(widths)
        )
        self.convs = nn.ModuleList(conv(w, w, groups=w) for w in reversed(widths))
        self.ups = nn.ModuleList(
            _up(conv, narrow, wide) for wide, narrow in reversed([*pairwise(widths)])
        )

    def recur(self, x: Tensor) -> Tensor:
        features = [x]
        for down in self.downs:
            features.append(down(features[-1]))
        out = features.pop()
        for conv, up in zip(self.convs, self.ups, strict=False):
            out = features.pop() + up(conv(out))
        return self.convs[-1](out)


class SplitRecursiveConv(RecursiveConv):
    """Each level keeps one half of the channels and passes the other half down."""

    transposed = True

    def build(self, channels: int, conv: partial[nn.Conv2d]) -> None:
        widths = [channels // 2**k for k in range(self.level + 1)]
        self.downs = nn.ModuleList(conv(w, w, groups=w, stride=2) for w in widths[1:])
        self.convs = nn.ModuleList(conv(w, w, groups=w) for w in reversed(widths))
        self.ups = nn.ModuleList(_up(conv, w, w) for w in reversed(widths[1:]))

    def recur(self, x: Tensor) -> Tensor:
        kept = []
        for down in self.downs:
            half, x = x.chunk(2, dim=1)
            kept.append(half)
            x = down(x)
        for conv, up in zip(self.convs, self.ups, strict=False):
            x = torch.cat((kept.pop(), up(conv(x))), dim=1)
        return self.convs[-1](x)


def _up(conv: partial[nn.Conv2d], in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    """Transposed convolution that doubles the size: the kernel is one larger than `conv`'s."""
    options = conv.keywords | dict(kernel_size=conv.keywords['kernel_size'] + 1)
    return nn.ConvTranspose2d(in_channels, out_channels, groups=in_channels, stride=2, **options)


#: The variants by their names in a custom `arch`.
RECURSIVE_CONVS: dict[str, type[RecursiveConv]] = {
    'recursive': SharedRecursiveConv,
    'recurrent': RecurrentConv,
    'grouped': GroupedRecursiveConv,
    'split': SplitRecursiveConv,
}
