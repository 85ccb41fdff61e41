"""InceptionNeXt: when Inception meets ConvNeXt (arXiv 2303.16900), on timm's blocks.

Published code: https://github.com/sail-sg/inceptionnext (Apache-2.0); the blocks are those of
`timm.models.inception_next`, whose weights load unchanged. Differences: the pyramid contract of
this package's other families, and fusion.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, cast

import torch
from mmengine.registry import MODELS
from timm.layers import trunc_normal_
from timm.models import inception_next as timm_inception_next
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import fast
from ..layers.blocks import GELU, linear_rates, make_stages
from ..layers.execution import FastLayer, are_hooked
from ..layers.fast import Chain, chain
from ..network import Plan
from ..reparam import Fusible, Note, folding, kernels
from .base import PyramidBackbone


class PatchEmbedding(Chain):
    """4x4 convolution of stride 4, then norm. `(N, 3, H, W) -> (N, C, H // 4, W // 4)`."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Conv2d(3, channels, 4, stride=4), nn.BatchNorm2d(channels))

    def fuse(self, plan: Plan, note: Note) -> nn.Module:
        note('convolution and norm to one convolution')
        return folding.fold_norm_backward(*self)


class PatchMerging(Chain):
    """Norm, then 2x2 convolution of stride 2. `(N, C, H, W) -> (N, C', H // 2, W // 2)`."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.BatchNorm2d(in_channels), nn.Conv2d(in_channels, out_channels, 2, stride=2)
        )

    def fuse(self, plan: Plan, note: Note) -> nn.Module:
        if plan == 'upstream':
            return self
        note('norm forward into the unpadded convolution after it')
        return folding.fold_norm_forward(*self)


class InceptionBlock(timm_inception_next.MetaNeXtBlock, Fusible, FastLayer):
    """timm's block: `x + drop_path(gamma * mlp(norm(token_mixer(x))))`, shape-preserving."""

    token_mixer: nn.Module
    norm: nn.Module
    mlp: Any
    drop_path: nn.Module
    gamma: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_fast() or are_hooked(self.children()):
            return super().forward(x)
        mixed = _mixed(self.token_mixer, x)
        out = chain(self, mixed, self.norm, self.mlp.fc1, self.mlp.act, self.mlp.fc2)
        # Folded into `fc2`, a small layer scale would vanish in float16.
        if self.gamma is not None:
            out = out * self.gamma.view(1, -1, 1, 1)
        return x + self.drop_path(out)

    def fuse(self, plan: Plan, note: Note) -> nn.Module:
        if plan == 'upstream':
            return self
        mlp, mixer = self.mlp, self.token_mixer
        if isinstance(self.norm, _BatchNorm):
            note('norm forward into the 1x1 convolution after it')
            mlp.fc1 = folding.fold_norm_forward(self.norm, mlp.fc1)
        if self.gamma is not None:
            note('layer scale backward into the 1x1 convolution before it')
            scale = self.gamma.double()
            weight, bias = folding.folded(mlp.fc2, after=(scale, torch.zeros_like(scale)))
            mlp.fc2 = folding.conv2d(weight, bias, like=mlp.fc2)
        if plan == 'single' and not isinstance(mixer, nn.Conv2d):
            mixer = _single_kernel(mixer, note)
        return FusedInceptionBlock(mixer, mlp, self.drop_path)


def _mixed(mixer: Any, x: Tensor) -> Tensor:
    """`mixer(x)`, for timm's mixer with parts that convolutions compute fast."""
    if type(mixer) is not timm_inception_next.InceptionDWConv2d or are_hooked([mixer]):
        return mixer(x)
    identity, square, row, column = fast.split(x, mixer.split_indexes)
    return fast.join(
        (identity, mixer.dwconv_hw(square), mixer.dwconv_w(row), mixer.dwconv_h(column))
    )


class FusedInceptionBlock(Fusible):
    """A block without norm and layer scale: `x + drop_path(mlp(token_mixer(x)))`."""

    def __init__(self, token_mixer: Any, mlp: nn.Module, drop_path: nn.Module) -> None:
        super().__init__()
        self.token_mixer = token_mixer
        self.mlp = mlp
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.token_mixer(x)))

    def fuse(self, plan: Plan, note: Note) -> nn.Module:
        if plan == 'single' and not isinstance(self.token_mixer, nn.Conv2d):
            self.token_mixer = _single_kernel(self.token_mixer, note)
        return self


def _single_kernel(mixer: timm_inception_next.InceptionDWConv2d, note: Note) -> nn.Conv2d:
    """The one depthwise convolution that an Inception depthwise convolution is."""
    convs = mixer.dwconv_hw, mixer.dwconv_w, mixer.dwconv_h
    band = max(max(conv.kernel_size) for conv in convs)
    note(f'Inception depthwise convolution to one {band}x{band} depthwise convolution')
    passed = mixer.split_indexes[0]
    weights, biases = zip(*map(folding.weights, convs), strict=True)
    identity = kernels.identity_kernel(passed, (band, band), weights[0].dtype, weights[0].device)
    weight = torch.cat((identity, *(kernels.pad_kernel(w, (band, band)) for w in weights)))
    bias = torch.cat((biases[0].new_zeros(passed), *biases))
    return folding.conv2d(weight, bias, like=convs[0], padding=band // 2, groups=len(weight))


def _row(channels: tuple[int, ...], depths: tuple[int, ...], **extra: Any) -> dict[str, Any]:
    return dict(channels=channels, depths=depths, **extra)


@MODELS.register_module(force=True)  # replaces its stand-in of `lazy`
class InceptionNeXt(PyramidBackbone):
    """InceptionNeXt atto, tiny, small and base as a feature pyramid.

    Arguments are those of `PyramidBackbone`; no branches merge before fusing. `drop_path_rate`
    rises linearly from 0 at the first block. Strided convolutions here have no padding: sizes
    are rounded down, and the image needs at least the stride of the last stage in both
    directions.

    A custom `arch` is a dict with `channels` and `depths` (four each), and optionally
    `mlp_ratios` (four), `band_kernel_size`, `square_kernel_size`, `branch_ratio` and
    `ls_init_value` (0 for no layer scale).

    Example:
        >>> import torch
        >>> from repnext_mm import InceptionNeXt
        >>> model = InceptionNeXt('atto').eval()
        >>> [tuple(out.shape) for out in model(torch.zeros(1, 3, 64, 64))]
        [(1, 40, 16, 16), (1, 80, 8, 8), (1, 160, 4, 4), (1, 320, 2, 2)]
    """

    arch_keys: ClassVar = dict(
        channels=...,
        depths=...,
        mlp_ratios=(4, 4, 4, 3),
        band_kernel_size=11,
        square_kernel_size=3,
        branch_ratio=0.125,
        ls_init_value=1e-6,
    )
    # InceptionNeXt paper, table 2; atto: the published code.
    arch_zoo: ClassVar = {
        'atto': _row((40, 80, 160, 320), (2, 2, 6, 2), band_kernel_size=9, branch_ratio=0.25),
        'tiny': _row((96, 192, 384, 768), (3, 3, 9, 3)),
        'small': _row((96, 192, 384, 768), (3, 3, 27, 3)),
        'base': _row((128, 256, 512, 1024), (3, 3, 27, 3)),
    }

    def build(self, settings: dict[str, Any], drop_path_rate: float) -> None:
        channels, depths = settings['channels'], settings['depths']
        rates = linear_rates(drop_path_rate, depths)
        mixer = partial(
            timm_inception_next.InceptionDWConv2d,
            **{k: settings[k] for k in ('band_kernel_size', 'square_kernel_size', 'branch_ratio')},
        )

        def block(i: int, j: int) -> nn.Module:
            return InceptionBlock(
                channels[i],
                token_mixer=mixer,
                act_layer=GELU,
                mlp_ratio=settings['mlp_ratios'][i],
                ls_init_value=settings['ls_init_value'],
                drop_path=rates[i][j],
            )

        self.stem = PatchEmbedding(channels[0])
        self.stages = make_stages(depths, block, lambda i: PatchMerging(*channels[i - 1 : i + 1]))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(cast(nn.Parameter, module.bias))

    @property
    def least_side(self) -> int:
        """The stride of the last asked stage."""
        return self.out_strides[-1]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """`(N, 3, H, W)` to one `(N, C_i, H // stride_i, W // stride_i)` per asked stage.

        Raises:
            ValueError: The image is smaller than the stride of the last asked stage.
        """
        height, width = x.shape[2:]
        smallest = self.least_side
        # Open sizes, in tracing and export, are no ints.
        if any(isinstance(side, int) and side < smallest for side in (height, width)):
            raise ValueError(
                f'a {height}x{width} image is too small for InceptionNeXt, whose last asked stage '
                f'has stride {smallest}: pad it to at least {smallest}x{smallest}.'
            )
        return super().forward(x)
