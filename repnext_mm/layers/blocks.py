"""The macro design that the families share: stem, block, downsample, stages.

Each block's `forward` is its formula. How it is computed fast is behind `fast`. Fused, blocks are
plain modules without norms.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..network import Plan
from ..reparam import Fusible, Note, folding
from . import fast
from .execution import FastLayer
from .recompute import run_checkpointed


class GELU(nn.GELU, FastLayer):
    """Exact GELU, `(N, C, H, W) -> (N, C, H, W)`."""

    def forward(self, x: Tensor) -> Tensor:
        return fast.gelu(x) if self.is_fast() else F.gelu(x)


class ConvNorm(fast.Chain):
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

    def fuse(self, plan: Plan, note: Note) -> nn.Module:
        note('convolution and norm to one convolution')
        return folding.fold_norm_backward(self.conv, self.norm)


def conv_stem(
    channels: int, steps: int = 2, bias: bool = False, final_activation: bool = False
) -> fast.Chain:
    """Strided 3x3 convolutions with GELU between them, each twice as wide as the one before.

    `(N, 3, H, W) -> (N, channels, H / 2**steps, W / 2**steps)`, rounded up.
    """
    widths = [3, *(channels // 2**k for k in reversed(range(steps)))]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [ConvNorm(before, after, 3, stride=2, padding=1, bias=bias), GELU()]
    return fast.Chain(*(layers if final_activation else layers[:-1]))


def channel_mixer(channels: int, ratio: float, bias: bool = False) -> fast.Chain:
    """Two 1x1 convolutions around a GELU, hidden width `int(channels * ratio)`."""
    hidden = int(channels * ratio)
    return fast.Chain(
        ConvNorm(channels, hidden, bias=bias), GELU(), ConvNorm(hidden, channels, bias=bias)
    )


def drop_path(rate: float) -> nn.Module:
    """Stochastic depth per sample, or nothing at rate 0."""
    if not rate:
        return nn.Identity()
    from timm.layers import DropPath  # takes longer to import than torch

    return DropPath(rate)


def linear_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Drop path rates rising evenly from 0 at the first block to `rate` at the last, per stage."""
    last = max(sum(depths) - 1, 1)
    rates = iter([rate * i / last for i in range(sum(depths))])
    return [[next(rates) for _ in range(depth)] for depth in depths]


class MetaNeXtBlock(Fusible, FastLayer):
    """Token mixer, norm and channel mixer, shape-preserving `(N, C, H, W)`.

    `norm=False` leaves the norm out, for a token mixer that ends in its own.
    """

    norm: nn.Module

    def __init__(
        self,
        channels: int,
        token_mixer: nn.Module,
        mlp_ratio: float,
        drop_path_rate: float = 0.0,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.token_mixer = token_mixer
        self.norm = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.channel_mixer = channel_mixer(channels, mlp_ratio)
        self.drop_path = drop_path(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        # x + drop_path(channel_mixer(norm(token_mixer(x))))
        mixed = fast.chain(self, self.token_mixer(x), self.norm, self.channel_mixer)
        return x + self.drop_path(mixed)

    def fuse(self, plan: Plan, note: Note) -> nn.Module:
        if plan == 'upstream':
            return self
        if isinstance(self.norm, _BatchNorm):
            note('norm forward into the 1x1 convolution after it')
            first = cast(nn.Conv2d, self.channel_mixer[0])
            self.channel_mixer[0] = folding.fold_norm_forward(self.norm, first)
        return FusedBlock(self.token_mixer, self.channel_mixer, self.drop_path)


class FusedBlock(nn.Module):
    """A block without norms: `x + drop_path(channel_mixer(token_mixer(x)))`."""

    def __init__(
        self, token_mixer: nn.Module, channel_mixer: nn.Module, drop_path: nn.Module
    ) -> None:
        super().__init__()
        self.token_mixer = token_mixer
        self.channel_mixer = channel_mixer
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.channel_mixer(self.token_mixer(x)))


class Downsample(Fusible, FastLayer):
    """Token mixer of stride 2 and norm, then a channel mixer with a shortcut.

    `(N, C, H, W) -> (N, out_channels, H / 2, W / 2)`, rounded up. `norm=False` leaves the norm out,
    for a token mixer that ends in its own.
    """

    norm: nn.Module

    def __init__(
        self,
        out_channels: int,
        token_mixer: nn.Module,
        mlp_ratio: float,
        drop_path_rate: float = 0.0,
        norm: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.token_mixer = token_mixer
        self.norm = nn.BatchNorm2d(out_channels) if norm else nn.Identity()
        self.channel_mixer = channel_mixer(out_channels, mlp_ratio, bias)
        self.drop_path = drop_path(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        y = fast.chain(self, x, self.token_mixer, self.norm)  # norm(token_mixer(x))
        return y + self.drop_path(self.channel_mixer(y))

    def fuse(self, plan: Plan, note: Note) -> nn.Module:
        if plan == 'upstream':
            return self
        mixer = self.token_mixer
        if isinstance(self.norm, _BatchNorm):
            # The shortcut starts after the norm, so the norm can only go backward.
            note('norm backward into the convolutions before it')
            if isinstance(mixer, fast.NormFolding):
                mixer = mixer.fold_norm_backward(self.norm)
            else:
                mixer = folding.fold_norm_backward(cast(nn.Conv2d, mixer), self.norm)
        return FusedDownsample(mixer, self.channel_mixer, self.drop_path)


class FusedDownsample(FusedBlock):
    """A downsample without norms: `y = token_mixer(x); y + drop_path(channel_mixer(y))`."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.token_mixer(x)
        return y + self.drop_path(self.channel_mixer(y))


class Stage(nn.Module):
    """An optional downsample, then blocks; one level of the pyramid.

    A block may return more tensors than its output; they are passed to the next block too. With
    `with_cp`, each part's activations are recomputed in backward instead of being kept.
    """

    def __init__(
        self, blocks: list[nn.Module], downsample: nn.Module | None = None, with_cp: bool = False
    ) -> None:
        super().__init__()
        if downsample is not None:
            self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.with_cp = with_cp

    def parts(self) -> list[nn.Module]:
        """The downsample, if there is one, and the blocks."""
        downsample = [self.downsample] if hasattr(self, 'downsample') else []
        return [*downsample, *self.blocks]

    def forward(self, x: Tensor) -> Tensor:
        recompute = self.with_cp and self.training
        state: tuple[Tensor, ...] = (x,)
        for part in self.parts():
            out = run_checkpointed(part, *state) if recompute else part(*state)
            state = out if isinstance(out, tuple) else (out,)
        return state[0]


def make_stages(
    depths: Sequence[int],
    block: Callable[[int, int], nn.Module],
    downsample: Callable[[int], nn.Module],
) -> nn.ModuleList:
    """Stages of `depths` blocks from `block(stage, index)`, with `downsample(stage)` between."""
    return nn.ModuleList(
        Stage([block(i, j) for j in range(depth)], downsample(i) if i else None)
        for i, depth in enumerate(depths)
    )
