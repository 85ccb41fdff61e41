"""RecNeXt: efficient recursive convolutions for multi-frequency representations.

arXiv 2412.19628; published code and weights: https://github.com/suous/RecNeXt (Apache-2.0).
Written from the paper; differences: recursions and attention keep float32 under autocast,
attention computes its products in the cheaper order at every size, and the strides of T, S and B
are what they are.

Series m mixes tokens by recursive convolutions (`recconv`), series a by recursive linear attention.
Series l (T, S, B), whose macro design follows LSNet, attends to a quarter of the channels, after a
reparameterizable depthwise convolution.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..layers.blocks import (
    ConvNorm,
    Downsample,
    MetaNeXtBlock,
    channel_mixer,
    conv_stem,
    drop_path,
    linear_rates,
    make_stages,
)
from ..layers.execution import FastLayer, are_hooked, run_in_float32
from ..layers.fast import follow, frozen_conv_norm, join, leave, split
from ..network import Plan
from ..reparam import Fusible, Note, folding, kernels
from .base import NUM_STAGES, PyramidBackbone
from .recconv import RECURSIVE_CONVS, RECURSIVE_MODES, UPSAMPLE_MODES, Upsample, UpsampleMode
from .repnext import RepNeXt

# --- linear attention, for series a and l

Order = Literal['kv', 'qk']
EPS = 1e-6


def cheaper_order(pixels: int, key_width: int, value_width: int) -> Order:
    """Which of the two products to form first: 'kv' is linear in pixels, 'qk' quadratic."""
    if not isinstance(pixels, int):  # traced or exported: the size is open, so stay linear
        return 'kv'
    kv = 2 * pixels * key_width * value_width
    qk = pixels * pixels * (key_width + value_width)
    return 'kv' if kv <= qk else 'qk'


def linear_attention(q: Tensor, k: Tensor, v: Tensor, order: Order | None = None) -> Tensor:
    """Average the values of all pixels, weighted by the products of non-negative `q` and `k`.

    `q`, `k` `(N, heads, D, n)` and `v` `(N, heads, E, n)` over n pixels to `(N, heads, E, n)`.
    The product is associative, so both orders are one function; None chooses the cheaper.
    """
    pixels = q.shape[-1]
    if order is None:
        order = cheaper_order(pixels, q.shape[-2], v.shape[-2])
    # (N, heads, 1, n): the mean weight of all others for each pixel.
    mean_weight = k.mean(-1, keepdim=True).transpose(-1, -2) @ q + EPS
    if order == 'kv':
        return ((v / pixels) @ k.transpose(-1, -2)) @ q / mean_weight
    return (v / pixels) @ (k.transpose(-1, -2) @ q / mean_weight)


class LinearAttention(nn.Module):
    """Linear attention with a 3x3 depthwise positional branch, `(N, C, H, W) -> (N, C, H, W)`.

    Queries and keys are as wide as the values (each from one half of the channels), or half as
    wide with `half_width` (both from all channels). They are made positive by `elu + 1`.
    """

    def __init__(
        self, channels: int, heads: int = 1, half_width: bool = False, bias: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        #: Set to fix the order of the products, for instance to trace both.
        self.order: Order | None = None
        width, groups = (channels, 1) if half_width else (2 * channels, 2)
        self.qk = ConvNorm(channels, width, groups=groups, bias=bias)
        self.pe = ConvNorm(channels, channels, 3, padding=1, groups=channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        # Sums over thousands of pixels overflow in float16, and `elu + 1` of a clearly negative
        # key rounds to 0.
        return run_in_float32(self.attend, x, self.qk(x)) + self.pe(x)

    def attend(self, x: Tensor, qk: Tensor) -> Tensor:
        """Attend over `x` `(N, C, H, W)` with the stacked raw queries and keys `qk`."""
        # Flattened, all are contiguous; what comes before and after has one layout, its own.
        q, k = leave(F.elu(qk) + 1, True).flatten(2).unflatten(1, (2, self.heads, -1)).unbind(1)
        v = leave(x, True).flatten(2).unflatten(1, (self.heads, -1))
        out = linear_attention(q, k, v, self.order).flatten(1, 2).unflatten(-1, x.shape[2:])
        return follow(out, x)

    def extra_repr(self) -> str:
        return f'heads={self.heads}'


class RecursiveAttention(nn.Module):
    """Linear attention at half resolution, added to the input: `(N, C, H, W) -> (N, C, H, W)`."""

    def __init__(
        self,
        channels: int,
        heads: int = 1,
        kernel_size: int = 5,
        mode: UpsampleMode = 'nearest',
        bias: bool = False,
    ) -> None:
        super().__init__()
        conv = partial(
            ConvNorm,
            channels,
            channels,
            kernel_size,
            padding=kernel_size // 2,
            groups=channels,
            bias=bias,
        )
        self.upsample = Upsample(mode)
        self.down = nn.Sequential(conv(stride=2), LinearAttention(channels, heads, bias=bias))
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x + self.upsample(self.down(x), x.shape[2:]))


# --- blocks of series l


class RepMixer(Fusible, FastLayer):
    """`lk` (3x3 and norm) + `sk` (1x1 and norm) + identity, depthwise, shape-preserving.

    While a norm uses batch statistics, the branches must be computed one by one. With frozen
    statistics their one 3x3 kernel is composed in the forward pass.
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
        if not self.is_fast() or self.uses_batch_statistics() or are_hooked(self._modules.values()):
            return self.lk(x) + self.sk(x) + x
        weight, bias = self.merge(
            *(frozen_conv_norm(conv, norm) for conv, norm in (self.lk, self.sk))
        )
        return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=1, groups=self.groups)

    def uses_batch_statistics(self) -> bool:
        return self.lk.norm.training or self.sk.norm.training

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
        attended, passed = split(x, (self.width, (SPLIT - 1) * self.width))
        return join((self.attn(follow(attended, x)), passed))

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
    """A block that also receives and returns the attended channels that are kept for sharing."""

    def forward(self, x: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        x = self.rep_mixer(x)
        mixed, kept = self.token_mixer.share(x, kept)
        return x + self.drop_path(self.channel_mixer(mixed)), *kept


# --- the series

#: Options of the token mixers of a series, with the published values; a sequence contains
#: one value per stage.
TOKEN_MIXERS: dict[str, dict[str, Any]] = {
    'm': dict(type='recursive', kernel_size=5, level=(4, 3, 2, 1), mode='bilinear', bias=False),
    'a': dict(heads=(2, 4, 8, 16), kernel_size=5, mode='nearest'),
    'l': dict(share_channel=False),
}


@dataclass
class Design(ABC):
    """What differs between the series of RecNeXt; per-stage values have one entry per stage."""

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


class ConvolutionDesign(Design):
    """Series m."""

    strides = (4, 8, 16, 32)

    def stem(self) -> nn.Module:
        return conv_stem(self.channels[0])

    def token_mixer(self, channels: int, type: str, **options: Any) -> nn.Module:
        return RECURSIVE_CONVS[type](channels, **options)

    def block(self, stage: int, index: int) -> nn.Module:
        channels = self.channels[stage]
        mixer = self.token_mixer(channels, **self.token_mixers[stage])
        # Recursive attention ends in a norm of its own.
        norm = not isinstance(mixer, RecursiveAttention)
        return MetaNeXtBlock(channels, mixer, self.mlp_ratios[stage], self.drop_path_rate, norm)

    def downsample(self, stage: int) -> nn.Module:
        before, after = self.channels[stage - 1 : stage + 1]
        groups = math.gcd(before, after)
        conv = nn.Conv2d(before, after, 7, stride=2, padding=3, groups=groups)
        return Downsample(after, conv, self.mlp_ratios[stage])


class AttentionDesign(ConvolutionDesign):
    """Series a."""

    def token_mixer(self, channels: int, **options: Any) -> nn.Module:  # type: ignore[override]
        return RecursiveAttention(channels, **options)


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


DESIGNS: dict[str, type[Design]] = {'m': ConvolutionDesign, 'a': AttentionDesign, 'l': LargeDesign}

_T = dict(series='l', channels=(64, 128, 256, 512), depths=(0, 2, 8, 10), mlp_ratio=(2, 2, 2, 1.5))
_S = _T | dict(channels=(128, 256, 384, 512))
_B = _S | dict(depths=(2, 8, 8, 12))
_SHARE = dict(token_mixer=dict(share_channel=True))


@MODELS.register_module(force=True)  # replaces its stand-in of `lazy`
class RecNeXt(PyramidBackbone):
    """RecNeXt M0 to M5, A0 to A5, and T, S, B with and without shared channels, as a pyramid.

    Arguments are those of `PyramidBackbone`. Series m and a have the strides 4, 8, 16, 32;
    series l (T, S, B) has 8, 16, 32, 64. `drop_path_rate` is one constant rate in series m and
    a, and rises linearly from 0 in series l. It defaults to 0, as for the distilled weights;
    the others were trained with 0.2 (M4, A4, B), 0.3 (M5, A5) and 0.1 (S).

    A custom `arch` is a dict with `series`, `channels` and `depths`, and optionally `mlp_ratio`
    and `token_mixer`. The latter is a dict of what to change in the series' token mixers, each
    value for all stages or a sequence of one per stage:

    - m: `type` (recursive, recurrent, grouped or split), `kernel_size`, `level` (0 with type
      recursive is a plain convolution), `mode` (bilinear, nearest or
      transposed, a shared transposed convolution), `bias`;
    - a: `heads`, `kernel_size`, `mode`;
    - l: `share_channel`.

    A recursion over several resolutions is no single convolution, so plan 'single' merges no
    more than 'exact' here.

    Example:
        >>> import torch
        >>> from repnext_mm import RecNeXt
        >>> model = RecNeXt('t').eval()
        >>> [tuple(out.shape) for out in model(torch.zeros(1, 3, 64, 64))]
        [(1, 64, 8, 8), (1, 128, 4, 4), (1, 256, 2, 2), (1, 512, 1, 1)]
        >>> model.out_channels, model.out_strides
        ((64, 128, 256, 512), (8, 16, 32, 64))
    """

    arch_keys: ClassVar = dict(series=..., channels=..., depths=..., mlp_ratio=2, token_mixer={})
    # Series m and a have RepNeXt's widths and depths; series l has those of its own table.
    arch_zoo: ClassVar = {
        **{f'm{i}': RepNeXt.arch_zoo[f'm{i}'] | dict(series='m') for i in range(6)},
        **{f'a{i}': RepNeXt.arch_zoo[f'm{i}'] | dict(series='a') for i in range(3)},
        **{
            f'a{i}': RepNeXt.arch_zoo[f'm{i}'] | dict(series='a', mlp_ratio=1.875)
            for i in range(3, 6)
        },
        't': _T,
        's': _S,
        'b': _B,
        't_share_channel': _T | _SHARE,
        's_share_channel': _S | _SHARE,
        'b_share_channel': _B | _SHARE,
    }

    def build(self, settings: dict[str, Any], drop_path_rate: float) -> None:
        series, channels, depths = (settings[k] for k in ('series', 'channels', 'depths'))
        if series not in DESIGNS:
            raise ValueError(f'arch series={series!r} is not one of {", ".join(DESIGNS)}.')
        mlp_ratios = _per_stage('mlp_ratio', settings['mlp_ratio'])
        token_mixers = _token_mixer_options(series, settings['token_mixer'])
        _check_widths(series, channels, token_mixers)
        design = DESIGNS[series](channels, depths, mlp_ratios, token_mixers, drop_path_rate)
        self.strides = design.strides
        self.stem = nn.Sequential()
        self.stem.add_module('stem', design.stem())
        self.stages = make_stages(depths, design.block, design.downsample)


def _per_stage(key: str, value: Any) -> list[Any]:
    """One value per stage, from one for all or a sequence."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * NUM_STAGES
    if len(value) != NUM_STAGES:
        raise ValueError(f'arch {key}={value} must be one value or {NUM_STAGES}, one per stage.')
    return list(value)


def _token_mixer_options(series: str, changes: dict[str, Any]) -> list[dict[str, Any]]:
    """The keyword arguments of each stage's token mixers."""
    defaults = TOKEN_MIXERS[series]
    unknown = sorted(set(changes) - set(defaults))
    if unknown:
        raise ValueError(
            f'arch token_mixer has no key {unknown} in series {series}; '
            f'allowed: {", ".join(defaults)}.'
        )
    values = {k: _per_stage(f'token_mixer[{k!r}]', v) for k, v in (defaults | changes).items()}
    options = [{k: v[i] for k, v in values.items()} for i in range(NUM_STAGES)]
    for option in options:
        modes = RECURSIVE_MODES if series == 'm' else UPSAMPLE_MODES
        for key, allowed in dict(type=RECURSIVE_CONVS, mode=modes).items():
            if key in option and option[key] not in allowed:
                raise ValueError(
                    f'arch token_mixer[{key!r}]={option[key]!r} is not one of {", ".join(allowed)}.'
                )
    return options


def _check_widths(series: str, channels: Sequence[int], mixers: Sequence[dict[str, Any]]) -> None:
    """Attention splits its channels evenly: into heads and halves, in series l after a quarter."""
    for width, options in zip(channels, mixers, strict=True):
        step = {'m': 1, 'a': math.lcm(2, options.get('heads', 1)), 'l': 8}[series]
        if width % step:
            raise ValueError(
                f'arch["channels"]={tuple(channels)}: {width} must be a multiple of {step} '
                f'in series {series}.'
            )
