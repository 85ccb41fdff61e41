"""RecNeXt T, S and B ("series l"), whose macro design follows LSNet.

Most channels skip the attention; a reparameterizable depthwise convolution comes first in each
block. Every convolution has a bias, although a norm follows it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..layers.conv_norm import ConvNorm
from ..layers.linear_attention import LinearAttention, RecursiveAttention
from ..layers.metanext import Downsample, channel_mixer, conv_stem, drop_path, linear_rates
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
        attended, passed = x.split((self.width, (SPLIT - 1) * self.width), dim=1)
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
    ) -> None:
        super().__init__()
        self.rep_mixer = RepMixer(channels)
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


@dataclass
class Design(ABC):
    """What tells the series of RecNeXt apart; per-stage values have one entry per stage."""

    strides: ClassVar[tuple[int, ...]]

    channels: Sequence[int]
    depths: Sequence[int]
    mlp_ratios: Sequence[float]
    token_mixers: Sequence[dict[str, Any]]
    drop_path_rate: float

    @abstractmethod
    def stem(self) -> nn.Module:
        """`(N, 3, H, W) -> (N, channels[0], H / strides[0], W / strides[0])`, rounded up."""

    @abstractmethod
    def block(self, stage: int, index: int) -> nn.Module:
        """Block `index` of a stage, shape-preserving."""

    @abstractmethod
    def downsample(self, stage: int) -> nn.Module:
        """What leads from the stage before to this one, halving the resolution."""


class LargeDesign(Design):
    """Series l."""

    strides = (8, 16, 32, 64)

    @cached_property
    def rates(self) -> list[list[float]]:
        """Drop path rate of every block."""
        return linear_rates(self.drop_path_rate, self.depths)

    def stem(self) -> nn.Module:
        return conv_stem(self.channels[0], 3, bias=True, final_activation=self.depths[0] == 0)

    def block(self, stage: int, index: int) -> nn.Module:
        channels, share = self.channels[stage], self.token_mixers[stage]['share_channel']
        sharing = share and stage == 3
        mixer: nn.Module
        # Four blocks attend to C / 4 channels each, the fifth reuses these C channels.
        if sharing and (index + 1) % (SPLIT + 1) == 0:
            mixer = SharedChannels()
        else:
            mixer = PartialAttention(channels, recursive=stage < (2 if share else 3))
        block = SharingBlock if sharing else RepMixerBlock
        ratio, rate = self.mlp_ratios[stage], self.rates[stage][index]
        return block(channels, mixer, ratio, rate)

    def downsample(self, stage: int) -> nn.Module:
        before, after = self.channels[stage - 1 : stage + 1]
        mixer = ConvNorm(
            before, after, 5, stride=2, padding=2, groups=math.gcd(before, after), bias=True
        )
        rate = self.rates[stage][0] if self.rates[stage] else 0.0
        return Downsample(after, mixer, self.mlp_ratios[stage], rate, norm=False, bias=True)
