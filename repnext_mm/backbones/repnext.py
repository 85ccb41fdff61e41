"""RepNeXt: a fast multi-scale CNN using structural reparameterization (arXiv 2406.16004).

Published code and weights: https://github.com/suous/RepNeXt (Apache-2.0). Written from the
paper; differences: branches are merged in the training form too, stages are the only indices,
and norms can be frozen, synchronised and fully folded.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

from mmengine.registry import MODELS
from torch import nn

from ..layers.metanext import Downsample, MetaNeXtBlock, conv_stem, make_stages
from ..layers.repconv import ChunkConv, CopyConv
from .pyramid import PyramidBackbone


def _row(width: int, depths: tuple[int, ...], **extra: Any) -> dict[str, Any]:
    return dict(channels=tuple(width * 2**i for i in range(4)), depths=depths, **extra)


@MODELS.register_module(force=True)  # replaces its stand-in of `lazy`
class RepNeXt(PyramidBackbone):
    """RepNeXt M0 to M5, and the single-branch M0E to M2E, as a feature pyramid.

    Arguments are those of `PyramidBackbone`. A custom `arch` is a dict with `channels` and
    `depths` (four each), and optionally `mlp_ratio` and `single_branch`. `drop_path_rate` is
    one constant rate for every block; the published weights were trained with 0.

    Example:
        >>> import torch
        >>> from repnext_mm import RepNeXt
        >>> model = RepNeXt('m0').eval()
        >>> [tuple(out.shape) for out in model(torch.zeros(1, 3, 64, 64))]
        [(1, 40, 16, 16), (1, 80, 8, 8), (1, 160, 4, 4), (1, 320, 2, 2)]
        >>> model.out_channels, model.out_strides
        ((40, 80, 160, 320), (4, 8, 16, 32))
    """

    arch_keys: ClassVar = dict(channels=..., depths=..., mlp_ratio=2, single_branch=False)
    # Widths and depths: RepNeXt paper, section 4; E-forms: the single-branch release.
    arch_zoo: ClassVar = {
        'm0': _row(40, (2, 2, 9, 1)),
        'm1': _row(48, (3, 3, 15, 2)),
        'm2': _row(56, (3, 3, 15, 2)),
        'm3': _row(64, (3, 3, 13, 2)),
        'm4': _row(64, (5, 5, 25, 4)),
        'm5': _row(80, (7, 7, 35, 2)),
        'm0e': _row(40, (2, 2, 9, 1), single_branch=True),
        'm1e': _row(48, (3, 3, 15, 2), single_branch=True),
        'm2e': _row(56, (3, 3, 15, 2), single_branch=True),
    }

    def build(self, settings: dict[str, Any], drop_path_rate: float) -> None:
        channels, ratio = settings['channels'], settings['mlp_ratio']
        single = settings['single_branch']
        self._check_widths(channels, single)
        self.stem = nn.Sequential()
        self.stem.add_module('stem', conv_stem(channels[0]))

        def block(i: int, _: int) -> nn.Module:
            mixer = _block_mixer(channels[i], single)
            return MetaNeXtBlock(channels[i], mixer, ratio, drop_path_rate)

        def downsample(i: int) -> nn.Module:
            mixer = _downsample_mixer(channels[i - 1], single)
            return Downsample(channels[i], mixer, ratio)

        self.stages = make_stages(settings['depths'], block, downsample)

    @staticmethod
    def _check_widths(channels: tuple[int, ...], single: bool) -> None:
        doubles = all(b == 2 * a for a, b in pairwise(channels))
        if not doubles or channels[0] % 2 or (channels[0] % 4 and not single):
            raise ValueError(
                f'arch["channels"]={tuple(channels)} must double from stage to stage and start '
                'with a multiple of 4 (of 2 with single_branch).'
            )


def _block_mixer(channels: int, single: bool) -> nn.Module:
    if single:
        return nn.Conv2d(channels, channels, 11, padding=5, groups=channels)
    return ChunkConv(channels)


def _downsample_mixer(channels: int, single: bool) -> nn.Module:
    if single:
        return nn.Conv2d(channels, 2 * channels, 7, stride=2, padding=3, groups=channels)
    return CopyConv(channels)
