"""The parts of RecNeXt T, S and B ("series L"), whose macro design follows LSNet.

Most channels skip the attention; a reparameterizable depthwise convolution comes first in each
block. Every convolution has a bias, although a norm follows it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.conv_norm import ConvNorm
from ..layers.depthwise import TrainForm
from ..layers.linear_attention import LinearAttention, RecursiveAttention
from ..layers.metanext import Downsample, channel_mixer, drop_path
from ..layers.rep_mixer import RepMixer

#: Only every `SPLIT`-th channel is attended to; one shared block reuses as many others.
SPLIT = 4


class PartialAttention(nn.Module):
    """Attention over the first C / 4 channels, the others pass: `(N, C, H, W) -> (N, C, H, W)`."""

    def __init__(self, channels: int, recursive: bool) -> None:
        super().__init__()
        self.width = channels // SPLIT
        self.attn: nn.Module = (
            RecursiveAttention(self.width, bias=True)
            if recursive
            else LinearAttention(self.width, half_width=True, bias=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        attended, passed = x.tensor_split((self.width,), dim=1)
        return torch.cat((self.attn(attended), passed), dim=1)

    def share(self, x: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output, and what is `kept` with this mixer's attended channels added."""
        out = self(x)
        return out, (*kept, out[:, : self.width])


class SharedChannels(nn.Module):
    """Adds the attended channels of the four blocks before, instead of attending again."""

    def share(self, x: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output, and nothing kept."""
        return x + torch.cat(kept, dim=1), ()


class RepMixerBlock(nn.Module):
    """`x = rep_mixer(x); x + drop_path(channel_mixer(token_mixer(x)))`, shape-preserving."""

    token_mixer: Any

    def __init__(
        self,
        channels: int,
        token_mixer: nn.Module,
        mlp_ratio: float,
        drop_path_rate: float,
        train_form: TrainForm,
    ) -> None:
        super().__init__()
        self.rep_mixer = RepMixer(channels, train_form)
        self.token_mixer = token_mixer
        self.channel_mixer = channel_mixer(channels, mlp_ratio, bias=True)
        self.drop_path = drop_path(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.rep_mixer(x)
        return x + self.drop_path(self.channel_mixer(self.token_mixer(x)))


class SharingBlock(RepMixerBlock):
    """A block that also takes and returns the attended channels that are kept for sharing."""

    def forward(self, x: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        x = self.rep_mixer(x)
        mixed, kept = self.token_mixer.share(x, kept)
        return x + self.drop_path(self.channel_mixer(mixed)), *kept


def large_block(
    stage: int, index: int, channels: int, share_channel: bool, **options: Any
) -> RepMixerBlock:
    """Block `index` of a `stage`; `options` are the remaining arguments of `RepMixerBlock`."""
    recursive = stage < (2 if share_channel else 3)
    if not (share_channel and stage == 3):
        return RepMixerBlock(channels, PartialAttention(channels, recursive), **options)
    # Four blocks attend to C / 4 channels each, the fifth reuses these C channels.
    reuses = (index + 1) % (SPLIT + 1) == 0
    mixer = SharedChannels() if reuses else PartialAttention(channels, recursive)
    return SharingBlock(channels, mixer, **options)


def large_downsample(
    in_channels: int, out_channels: int, mlp_ratio: float, drop_path_rate: float
) -> Downsample:
    """`(N, in_channels, H, W) -> (N, out_channels, H / 2, W / 2)`, rounded up."""
    groups = math.gcd(in_channels, out_channels)
    mixer = ConvNorm(in_channels, out_channels, 5, stride=2, padding=2, groups=groups, bias=True)
    return Downsample(out_channels, mixer, mlp_ratio, drop_path_rate, norm=False, bias=True)
