"""RecNeXt: efficient recursive convolutions for multi-frequency representations.

arXiv 2412.19628; published code and weights: https://github.com/suous/RecNeXt (Apache-2.0).
Written from the paper; differences: recursions and attention keep float32 under autocast,
attention takes the cheaper order of its products at every size, and the strides of T, S and B
are what they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from mmengine.registry import MODELS
from torch import nn

from ..layers.linear_attention import RecursiveAttention
from ..layers.metanext import Downsample, MetaNeXtBlock, conv_stem, make_stages
from ..layers.recursive import RECURSIVE_CONVS
from ..layers.upsample import UPSAMPLE_MODES
from .pyramid import NUM_STAGES, PyramidBackbone
from .recnext_l import Design, LargeDesign
from .repnext import RepNeXt

#: What the token mixers of a series can be told, with the published values; a sequence holds
#: one value per stage.
TOKEN_MIXERS: dict[str, dict[str, Any]] = {
    'm': dict(type='recursive', kernel_size=5, level=(4, 3, 2, 1), mode='bilinear', bias=False),
    'a': dict(heads=(2, 4, 8, 16), kernel_size=5, mode='nearest'),
    'l': dict(share_channel=False),
}


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
      recursive is a plain convolution), `mode` (bilinear or nearest), `bias`;
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
        for key, allowed in dict(type=RECURSIVE_CONVS, mode=UPSAMPLE_MODES).items():
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
