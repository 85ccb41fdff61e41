"""RepNeXt: a fast multi-scale CNN using structural reparameterization (arXiv 2406.16004).

Published code and weights: https://github.com/suous/RepNeXt (Apache-2.0). Written from the
paper; differences: branches are merged in the training form too, stages are the only indices,
and norms can be frozen, synchronized and fully folded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import fast
from ..layers.blocks import Downsample, MetaNeXtBlock, conv_stem, make_stages
from ..layers.execution import FastLayer, are_hooked
from ..network import Plan
from ..reparam import Fusible, Note, folding, kernels
from ..reparam.folding import Affine
from .base import PyramidBackbone

#: One branch: the sizes of the kernels that it applies one after the other.
Branch = tuple[tuple[int, int], ...]

# Section 3.2: the depthwise branches of the small and the medium chunk. The downsample's small
# chunk has its two strips in series.
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

# The variants of the ablation (table 5), by their names in a custom `arch`; none removes the
# convolution of a chunk, which then passes its channels on.
STRIPS: tuple[Branch, ...] = (((1, 7), (7, 1)), ((1, 5), (5, 1)))
SMALL_PATTERNS: dict[str, tuple[Branch, ...]] = {
    'parallel': SMALL,
    'serial': SMALL_SERIAL,
    '3x3': (((3, 3),),),
    'none': (),
}
MEDIUM_PATTERNS: dict[str, tuple[Branch, ...]] = {
    '7x7+5x3+3x5+strips': MEDIUM,
    '7x7+5x3+3x5': MEDIUM[:3],
    '7x7+5x5+3x3': (((7, 7),), ((5, 5),), ((3, 3),)),
    '7x7+5x5+3x3+strips': (((7, 7),), ((5, 5),), ((3, 3),), *STRIPS),
    '7x7': (((7, 7),),),
    'none': (),
}
LARGE_PATTERNS = ('strips', 'dense', 'none')
DOWNSAMPLES = ('copy', '3x3')


def branch_name(size: tuple[int, int]) -> str:
    """Published name of a branch convolution: 7x7 `conv_7_7`, 1x7 `conv_7_w`, 7x1 `conv_7_h`."""
    height, width = size
    if height == 1:
        return f'conv_{width}_w'
    return f'conv_{height}_h' if width == 1 else f'conv_{height}_{width}'


def branch_dilation(size: tuple[int, int]) -> int:
    """2x2 kernels are spread over a 3x3 window; all others are dense."""
    return 2 if size == (2, 2) else 1


class BranchedDepthwise(Fusible, FastLayer):
    """Sum of parallel depthwise branches, each one kernel or a pair of strips in series.

    There is no norm and no nonlinearity inside, so the sum is one depthwise convolution of the
    largest kernel. That kernel is composed from the branch parameters in every forward pass: same
    parameters and gradients, one convolution instead of one per kernel. The reference computes
    branch by branch, as published.
    `(N, C, H, W) -> (N, C, ceil(H / stride), ceil(W / stride))`

    Single kernels have a bias, strip pairs have none (RepNeXt, arXiv 2406.16004, section 3).
    """

    def __init__(
        self,
        channels: int,
        branches: tuple[Branch, ...],
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.branches = branches
        self.stride = stride
        self.kernel_size = max(size for branch in branches for size in branch)
        self.groups = channels
        for branch in branches:
            for size in branch:
                # A strip strides along its own direction only; its partner does the other.
                steps = (stride, stride) if len(branch) == 1 else _strip_stride(size, stride)
                dilation = branch_dilation(size)
                height, width = (dilation * (k - 1) // 2 for k in size)
                conv = nn.Conv2d(
                    channels,
                    channels,
                    size,
                    stride=steps,
                    padding=(height, width),
                    dilation=dilation,
                    groups=channels,
                    bias=len(branch) == 1,
                )
                self.add_module(branch_name(size), conv)

    def convs(self, branch: Branch) -> list[nn.Conv2d]:
        """The convolutions of one branch, in order."""
        return [self.get_submodule(branch_name(size)) for size in branch]  # type: ignore[misc]

    def merged_kernel(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Weight `(C, 1, kh, kw)` and bias `(C,)` of the complete sum, composed in `dtype`."""
        weights, biases = [], []
        for branch in self.branches:
            first, *rest = self.convs(branch)
            weight = kernels.dilate_kernel(first.weight.to(dtype), first.dilation[0])
            for conv in rest:
                weight = kernels.compose_strips(weight, conv.weight.to(dtype))
            weights.append(kernels.pad_kernel(weight, self.kernel_size))
            if first.bias is not None:
                biases.append(first.bias.to(dtype))
        return torch.stack(weights).sum(0), torch.stack(biases).sum(0)

    def forward(self, x: Tensor, after: Affine | None = None) -> Tensor:
        """`after` is applied to the output, only where this layer is fast."""
        if not self.is_fast() or are_hooked(self._modules.values()):
            assert after is None
            return self.forward_branches(x)
        weight, bias = self.merged_kernel()
        if after is not None:
            weight, bias = kernels.fold_output(weight, bias, *after)
        padding = self.kernel_size[0] // 2, self.kernel_size[1] // 2
        return fast.depthwise_conv2d(x, weight.to(x.dtype), bias.to(x.dtype), self.stride, padding)

    def forward_branches(self, x: Tensor) -> Tensor:
        """The sum of all branches, as published."""
        outs = []
        for branch in self.branches:
            out = x
            for conv in self.convs(branch):
                out = conv(out)
            outs.append(out)
        return sum(outs[1:], start=outs[0])

    def fuse(self, plan: Plan, note: Note) -> nn.Module:
        note(f'{len(self.branches)} depthwise branches to one kernel')
        return folding.conv2d(
            *self.merged_kernel(torch.float64),
            like=self.convs(self.branches[0])[0],
            padding=tuple(k // 2 for k in self.kernel_size),
        )

    def extra_repr(self) -> str:
        return f'stride={self.stride}'


def _strip_stride(size: tuple[int, int], stride: int) -> tuple[int, int]:
    return (1, stride) if size[0] == 1 else (stride, 1)


class ChunkConv(Fusible, FastLayer):
    """Four channel chunks: identity, small, medium and large depthwise convolutions.

    `(N, C, H, W) -> (N, C, H, W)`, C divisible by 4 (RepNeXt, arXiv 2406.16004, section 3.2).
    """

    # BranchedDepthwise while training, Conv2d once fused.
    conv_s: Any
    conv_m: Any
    conv_l: Any

    def __init__(
        self,
        channels: int,
        small: tuple[Branch, ...] = SMALL,
        medium: tuple[Branch, ...] = MEDIUM,
        large: str = 'strips',
    ) -> None:
        super().__init__()
        width = channels // 4
        self.conv_s = BranchedDepthwise(width, small) if small else nn.Identity()
        self.conv_m = BranchedDepthwise(width, medium) if medium else nn.Identity()
        self.conv_l = _large_conv(width, large)

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_fast():
            i, s, m, large = x.chunk(4, dim=1)
            return torch.cat((i, self.conv_s(s), self.conv_m(m), self.conv_l(large)), dim=1)
        i, s, m, large = fast.split(x, [x.shape[1] // 4] * 4)
        return fast.join((i, self.conv_s(s), self.conv_m(m), self.conv_l(large)))

    def fuse(self, plan: Plan, note: Note) -> nn.Module:
        convs = [m for m in self.modules() if isinstance(m, nn.Conv2d)]
        if plan != 'single' or not convs:
            return self
        size = max(conv.kernel_size for conv in convs)
        size = (max(size), max(size))
        large, exact = self._large_kernel()
        note(
            f'chunk convolution to one {size[0]}x{size[1]} depthwise convolution',
            'exact' if exact else 'border',
        )
        first = convs[0]
        identity = (
            kernels.identity_kernel(first.groups, size, torch.float64, first.weight.device),
            first.weight.new_zeros(first.groups, dtype=torch.float64),
        )
        chunks = [identity]
        for conv in (self.conv_s, self.conv_m):
            chunks.append(folding.weights(conv) if isinstance(conv, nn.Conv2d) else identity)
        chunks.append(large or identity)
        weight = torch.cat([kernels.pad_kernel(weight, size) for weight, _ in chunks])
        bias = torch.cat([bias for _, bias in chunks])
        groups = 4 * first.groups
        return folding.conv2d(weight, bias, like=first, padding=size[0] // 2, groups=groups)

    def _large_kernel(self) -> tuple[Affine | None, bool]:
        """Weight and bias of the large chunk, and whether they are exact at the borders."""
        if isinstance(self.conv_l, nn.Identity):
            return None, True
        if isinstance(self.conv_l, nn.Conv2d):
            return folding.weights(self.conv_l), True
        (row, row_bias), (column, column_bias) = map(folding.weights, self.conv_l)
        weight = kernels.compose_strips(row, column)
        bias = kernels.strip_bias(column, row_bias, column_bias)
        return (weight, bias), not (row_bias.is_meta or row_bias.any())


def _large_conv(width: int, pattern: str) -> nn.Module:
    pad = LARGE // 2
    if pattern == 'dense':
        return nn.Conv2d(width, width, LARGE, padding=pad, groups=width)
    if pattern == 'none':
        return nn.Identity()
    return fast.Chain(
        nn.Conv2d(width, width, (1, LARGE), padding=(0, pad), groups=width),
        nn.Conv2d(width, width, (LARGE, 1), padding=(pad, 0), groups=width),
    )


class CopyConv(fast.NormFolding, Fusible):
    """Small and medium depthwise convolutions of stride 2 over the same input, concatenated.

    `(N, C, H, W) -> (N, 2C, ceil(H / 2), ceil(W / 2))` (RepNeXt, arXiv 2406.16004, section 3.2).
    """

    conv_s: Any
    conv_m: Any

    def __init__(
        self,
        channels: int,
        small: tuple[Branch, ...] = SMALL_SERIAL,
        medium: tuple[Branch, ...] = MEDIUM,
    ) -> None:
        super().__init__()
        self.conv_s = BranchedDepthwise(channels, small, stride=2)
        self.conv_m = BranchedDepthwise(channels, medium, stride=2)

    def forward(self, x: Tensor, after: Affine | None = None) -> Tensor:
        """`after` is applied to the output, only where this layer is fast."""
        if after is None:
            return fast.join([self.conv_s(x), self.conv_m(x)])
        small, medium = zip(*(t.chunk(2) for t in after), strict=True)
        return fast.join([fast.scaled(self.conv_s, x, small), fast.scaled(self.conv_m, x, medium)])

    def fold_norm_backward(self, norm: _BatchNorm) -> CopyConv:
        """Fold the norm that follows into the two convolutions, each with its own channels."""
        scales, shifts = (t.chunk(2) for t in folding.norm_affine(norm))
        for name, scale, shift in zip(('conv_s', 'conv_m'), scales, shifts, strict=True):
            conv = cast(nn.Conv2d, self.get_submodule(name))
            weight, bias = folding.folded(conv, after=(scale, shift))
            setattr(self, name, folding.conv2d(weight, bias, like=conv))
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


class DeinterleavedConv2d(fast.NormFolding):
    """Grouped convolution C -> 2C whose outputs are reordered from pairs to halves.

    A convolution with C groups puts the two outputs of an input channel side by side; the copy
    convolution that it replaces concatenates all first outputs, then all second ones. Its own key
    `conv` keeps its weights apart from those of a single-branch network, which keeps the pairs.
    `(N, C, H, W) -> (N, 2C, H', W')`
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, after: Affine | None = None) -> Tensor:
        """`after` is applied to the output."""
        pairs = fast.scaled(self.conv, x, after and _in_pairs(after))
        return pairs.unflatten(1, (self.conv.groups, 2)).transpose(1, 2).flatten(1, 2)

    def fold_norm_backward(self, norm: _BatchNorm) -> DeinterleavedConv2d:
        """Fold the norm that follows, whose channels come in halves, into the convolution."""
        weight, bias = folding.folded(self.conv, after=_in_pairs(folding.norm_affine(norm)))
        return DeinterleavedConv2d(folding.conv2d(weight, bias, like=self.conv))


class Projected(fast.NormFolding):
    """A downsample's token mixer and a 1x1 convolution, for widths that do not double.

    `(N, C, H, W) -> (N, out_channels, H', W')`
    """

    def __init__(self, mixer: nn.Module, channels: int, out_channels: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.proj = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, after: Affine | None = None) -> Tensor:
        """`after` is applied to the output."""
        return fast.scaled(self.proj, self.mixer(x), after)

    def fold_norm_backward(self, norm: _BatchNorm) -> Projected:
        """Fold the norm that follows into the 1x1 convolution."""
        self.proj = folding.fold_norm_backward(self.proj, norm)
        return self


def _in_pairs(affine: Affine) -> Affine:
    """Reordered from halves to pairs."""
    scale, shift = (kernels.interleave(*t.chunk(2)) for t in affine)
    return scale, shift


def _row(width: int, depths: tuple[int, ...], **extra: Any) -> dict[str, Any]:
    return dict(channels=tuple(width * 2**i for i in range(4)), depths=depths, **extra)


@MODELS.register_module(force=True)  # replaces its stand-in of `lazy`
class RepNeXt(PyramidBackbone):
    """RepNeXt M0 to M5, and the single-branch M0E to M2E, as a feature pyramid.

    Arguments are those of `PyramidBackbone`. A custom `arch` is a dict with `channels` and
    `depths` (four each), and optionally `mlp_ratio` and `single_branch`. `drop_path_rate` is
    one constant rate for every block; the published weights were trained with 0.

    The variants of the paper's ablation (table 5) are further keys of a custom `arch`:

    - `small`: parallel, serial, 3x3 or none;
    - `medium`: 7x7+5x3+3x5+strips, 7x7+5x3+3x5, 7x7+5x5+3x3, 7x7+5x5+3x3+strips, 7x7 or none;
    - `large`: strips, dense (one 11x11 kernel, with which plan 'single' is exact) or none;
    - `reparameterize`: False trains one kernel for each chunk, also in the downsamples;
    - `downsample`: copy, or 3x3 for one plain depthwise convolution.

    Where widths do not double from stage to stage, a 1x1 convolution follows the downsample's.

    Example:
        >>> import torch
        >>> from repnext_mm import RepNeXt
        >>> model = RepNeXt('m0').eval()
        >>> [tuple(out.shape) for out in model(torch.zeros(1, 3, 64, 64))]
        [(1, 40, 16, 16), (1, 80, 8, 8), (1, 160, 4, 4), (1, 320, 2, 2)]
        >>> model.out_channels, model.out_strides
        ((40, 80, 160, 320), (4, 8, 16, 32))
    """

    arch_keys: ClassVar = dict(
        channels=...,
        depths=...,
        mlp_ratio=2,
        single_branch=False,
        small='parallel',
        medium='7x7+5x3+3x5+strips',
        large='strips',
        reparameterize=True,
        downsample='copy',
    )
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
        self._check(settings)
        self.stem = nn.Sequential()
        self.stem.add_module('stem', conv_stem(channels[0]))

        def block(i: int, _: int) -> nn.Module:
            mixer = _block_mixer(channels[i], settings)
            return MetaNeXtBlock(channels[i], mixer, ratio, drop_path_rate)

        def downsample(i: int) -> nn.Module:
            mixer = _downsample_mixer(channels[i - 1], settings)
            if channels[i] != 2 * channels[i - 1]:
                mixer = Projected(mixer, 2 * channels[i - 1], channels[i])
            return Downsample(channels[i], mixer, ratio)

        self.stages = make_stages(settings['depths'], block, downsample)

    @staticmethod
    def _check(settings: dict[str, Any]) -> None:
        channels, single = settings['channels'], settings['single_branch']
        step = 2 if single else 4
        if any(width < step or width % step for width in channels):
            raise ValueError(
                f'arch["channels"]={tuple(channels)} must be multiples of 4 (of 2 with '
                'single_branch).'
            )
        allowed: dict[str, Iterable[Any]] = {
            'small': SMALL_PATTERNS,
            'medium': MEDIUM_PATTERNS,
            'large': LARGE_PATTERNS,
            'reparameterize': (True, False),
            'downsample': DOWNSAMPLES,
        }
        for key, values in allowed.items():
            if settings[key] not in values:
                raise ValueError(
                    f'arch[{key!r}]={settings[key]!r} must be one of {", ".join(map(str, values))}.'
                )
            if single and settings[key] != RepNeXt.arch_keys[key]:
                raise ValueError(
                    f'arch[{key!r}] is for the branches that single_branch=True does without; '
                    'leave one of them out.'
                )


def _block_mixer(channels: int, settings: dict[str, Any]) -> nn.Module:
    if settings['single_branch']:
        return nn.Conv2d(channels, channels, LARGE, padding=LARGE // 2, groups=channels)
    small, medium = SMALL_PATTERNS[settings['small']], MEDIUM_PATTERNS[settings['medium']]
    if not settings['reparameterize']:
        small, medium = small[:1], medium[:1]
    return ChunkConv(channels, small, medium, settings['large'])


def _downsample_mixer(channels: int, settings: dict[str, Any]) -> nn.Module:
    if settings['single_branch']:
        return nn.Conv2d(channels, 2 * channels, 7, stride=2, padding=3, groups=channels)
    if settings['downsample'] == '3x3':
        return nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, groups=channels)
    if not settings['reparameterize']:
        return CopyConv(channels, SMALL_SERIAL[:1], MEDIUM[:1])
    medium = MEDIUM_PATTERNS[settings['medium']] or MEDIUM
    return CopyConv(channels, SMALL_SERIAL, medium)
