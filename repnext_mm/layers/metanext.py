"""The macro design that the families share: stem, block, downsample, stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..reparam import folding
from ..reparam.plans import Plan
from .conv_norm import ConvChain, ConvNorm
from .forms import TrainingLayer
from .fusible import Fusible, Note
from .gelu import GELU
from .norm_folding import convolve, frozen_affine
from .recompute import run_checkpointed
from .repconv import CopyConv


def conv_stem(
    channels: int, steps: int = 2, bias: bool = False, final_activation: bool = False
) -> ConvChain:
    """Strided 3x3 convolutions with GELU between them, each twice as wide as the one before.

    `(N, 3, H, W) -> (N, channels, H / 2**steps, W / 2**steps)`, rounded up.
    """
    widths = [3, *(channels // 2**k for k in reversed(range(steps)))]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [ConvNorm(before, after, 3, stride=2, padding=1, bias=bias), GELU()]
    return ConvChain(*(layers if final_activation else layers[:-1]))


def channel_mixer(channels: int, ratio: float, bias: bool = False) -> ConvChain:
    """Two 1x1 convolutions around a GELU, hidden width `int(channels * ratio)`."""
    hidden = int(channels * ratio)
    return ConvChain(
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


class MetaNeXtBlock(Fusible):
    """`x + drop_path(channel_mixer(norm(token_mixer(x))))`, shape-preserving `(N, C, H, W)`.

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
        return x + self.drop_path(self.channel_mixer(self.token_mixer(x), self.norm))

    def fuse(self, plan: Plan, note: Note) -> nn.Module:
        if plan != 'branches' and isinstance(self.norm, _BatchNorm):
            note('norm forward into the 1x1 convolution after it')
            first = cast(nn.Conv2d, self.channel_mixer[0])
            self.channel_mixer[0] = folding.fold_norm_forward(self.norm, first)
            self.norm = nn.Identity()
        return self


class Downsample(Fusible, TrainingLayer):
    """`y = norm(token_mixer(x)); y + drop_path(channel_mixer(y))`.

    `(N, C, H, W) -> (N, out_channels, H / 2, W / 2)`, rounded up; `token_mixer` does the stride.
    `norm=False` leaves the norm out, for a token mixer that ends in its own.
    """

    token_mixer: Any
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
        y = self.mix(x)
        return y + self.drop_path(self.channel_mixer(y))

    def mix(self, x: Tensor) -> Tensor:
        """`norm(token_mixer(x))`; frozen statistics are folded into the mixer."""
        norm, mixer = self.norm, self.token_mixer
        if self.merges() and isinstance(norm, _BatchNorm) and not norm.training:
            if isinstance(mixer, nn.Conv2d):
                return convolve(x, mixer, after=frozen_affine(norm))
            if isinstance(mixer, CopyConv):
                return mixer(x, frozen_affine(norm))
        return norm(mixer(x))

    def fuse(self, plan: Plan, note: Note) -> nn.Module:
        if plan != 'branches' and isinstance(self.norm, _BatchNorm):
            # The shortcut starts after the norm, so the norm can only go backward.
            note('norm backward into the convolutions before it')
            mixer = self.token_mixer
            if hasattr(mixer, 'fold_norm_backward'):
                self.token_mixer = mixer.fold_norm_backward(self.norm)
            else:
                self.token_mixer = folding.fold_norm_backward(mixer, self.norm)
            self.norm = nn.Identity()
        return self


class Stage(nn.Module):
    """An optional downsample, then blocks; one level of the pyramid.

    A block may return more tensors than its output; the next block takes them too. With
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
