"""Folding the norms of necks, heads and other backbones into the convolutions before them."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

Convolution = nn.Conv2d | nn.ConvTranspose2d


@torch.no_grad()
def fold_convolution_norms(model: nn.Module) -> int:
    """Fold, in place, every BatchNorm that is known to follow a convolution; returns how many.

    Known are mmcv's ConvModule, neighbors in a Sequential, and the pairs `conv1`, `bn1` (or
    `norm1`) of residual blocks. A convolution that several norms share, as between the levels of
    RTMDet's head, is copied for each.

    Args:
        model: In eval mode.
    """
    folded = 0
    for module in list(model.modules()):
        for conv_name, norm_name in list(_pairs(module)):
            conv, norm = getattr(module, conv_name), getattr(module, norm_name)
            transposed = isinstance(conv, nn.ConvTranspose2d)
            exact = fuse_conv_bn_eval(
                copy.deepcopy(conv).double(), copy.deepcopy(norm).double(), transposed
            )
            setattr(module, conv_name, exact.to(conv.weight.dtype))
            setattr(module, norm_name, nn.Identity())
            folded += 1
    return folded


def _pairs(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of a convolution and of the norm that is applied to what it returns, and to that alone.

    Both are direct children.
    """
    if _is_conv_module(module):
        if getattr(module, 'order', None) == ('conv', 'norm', 'act') and module.with_norm:
            names = [('conv', str(module.norm_name))]
        else:
            names = []
    elif isinstance(module, nn.Sequential):
        children = [name for name, _ in module.named_children()]
        names = list(itertools.pairwise(children))
    else:
        children = [name for name, _ in module.named_children()]
        numbered = [re.fullmatch(r'conv(\d+)', name) for name in children]
        names = [
            (found[0], f'{kind}{found[1]}')
            for found in numbered
            for kind in ('bn', 'norm')
            if found and f'{kind}{found[1]}' in children
        ]
    for conv, norm in names:
        first, second = getattr(module, conv, None), getattr(module, norm, None)
        if (
            isinstance(first, Convolution)
            and isinstance(second, _BatchNorm)
            and second.affine
            and second.running_mean is not None
            and second.num_features == first.out_channels
            and not (isinstance(first, nn.ConvTranspose2d) and first.groups > 1)
        ):
            yield conv, norm


def _is_conv_module(module: nn.Module) -> bool:
    return type(module).__name__ == 'ConvModule' and hasattr(module, 'with_norm')
