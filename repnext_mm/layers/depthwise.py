"""Multi-branch depthwise convolutions that are one depthwise convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..reparam import folding, kernels
from ..reparam.plans import Plan
from .depthwise_conv import depthwise_conv2d
from .forms import TrainingLayer
from .fusible import Fusible, Note
from .norm_folding import Affine

#: One branch: the sizes of the kernels that it applies one after the other.
Branch = tuple[tuple[int, int], ...]


def branch_name(size: tuple[int, int]) -> str:
    """Published name of a branch convolution: 7x7 `conv_7_7`, 1x7 `conv_7_w`, 7x1 `conv_7_h`."""
    height, width = size
    if height == 1:
        return f'conv_{width}_w'
    return f'conv_{height}_h' if width == 1 else f'conv_{height}_{width}'


def branch_dilation(size: tuple[int, int]) -> int:
    """2x2 kernels are spread over a 3x3 window; all others are dense."""
    return 2 if size == (2, 2) else 1


class BranchedDepthwise(Fusible, TrainingLayer):
    """Sum of parallel depthwise branches, each one kernel or a pair of strips in series.

    There is no norm and no nonlinearity inside, so the sum is one depthwise convolution of the
    largest kernel. The 'merged' train form composes that kernel from the branch parameters in
    every forward pass: same parameters and gradients, one convolution instead of one per
    kernel. The 'branches' form computes branch by branch, as published, and is the reference.
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
        """Weight `(C, 1, kh, kw)` and bias `(C,)` of the whole sum, composed in `dtype`."""
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
        """`after` is applied to the output; only where this `merges`."""
        if not self.merges():
            assert after is None
            return self.forward_branches(x)
        weight, bias = self.merged_kernel()
        if after is not None:
            weight, bias = kernels.fold_output(weight, bias, *after)
        height, width = (k // 2 for k in self.kernel_size)
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        return depthwise_conv2d(x, weight, bias, self.stride, (height, width))

    def forward_branches(self, x: Tensor) -> Tensor:
        total: Tensor | None = None
        for branch in self.branches:
            out = x
            for conv in self.convs(branch):
                out = conv(out)
            total = out if total is None else total + out
        assert total is not None
        return total

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


class DeinterleavedConv2d(nn.Module):
    """Grouped convolution C -> 2C whose outputs are reordered from pairs to halves.

    A convolution with C groups puts the two outputs of an input channel side by side; the copy
    convolution that it stands for concatenates all first outputs, then all second ones. Its own
    key `conv` tells its weights from those of a single-branch network, which keeps the pairs.
    `(N, C, H, W) -> (N, 2C, H', W')`
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).unflatten(1, (self.conv.groups, 2)).transpose(1, 2).flatten(1, 2)

    def fold_norm_backward(self, norm: _BatchNorm) -> DeinterleavedConv2d:
        """Fold the norm that follows, whose channels come in halves, into the convolution."""
        scale, shift = (kernels.interleave(*t.chunk(2)) for t in folding.norm_affine(norm))
        folded = kernels.fold_output(*folding.weights(self.conv), scale, shift)
        return DeinterleavedConv2d(folding.conv2d(*folded, like=self.conv))
