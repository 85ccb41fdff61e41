"""Small networks of every family, for what all of them promise."""

from __future__ import annotations

from typing import Any

import torch
from conftest import randomise
from torch import nn

from repnext_mm import InceptionNeXt, RecNeXt, RepNeXt
from repnext_mm.backbones import PyramidBackbone

_SMALL = dict(channels=(8, 16, 32, 64), depths=(1, 1, 2, 1))

TINY: dict[str, tuple[type[PyramidBackbone], dict[str, Any]]] = {
    'repnext_m': (RepNeXt, _SMALL),
    'repnext_e': (RepNeXt, _SMALL | dict(single_branch=True)),
    'recnext_m': (RecNeXt, _SMALL | dict(series='m')),
    'recnext_a': (RecNeXt, _SMALL | dict(series='a')),
    'recnext_l': (RecNeXt, _SMALL | dict(series='l')),
    # The fifth block of the last stage reuses what four blocks attended to; one comes after it.
    'recnext_l_share': (
        RecNeXt,
        _SMALL | dict(series='l', depths=(0, 1, 1, 6), token_mixer=dict(share_channel=True)),
    ),
    # A layer scale of 1e-6, as published, would hide the blocks.
    'inception_next': (InceptionNeXt, _SMALL | dict(branch_ratio=0.25, ls_init_value=0.5)),
}


def tiny(name: str, **kwargs: Any) -> PyramidBackbone:
    """The network with weights that depend on its shapes alone."""
    family, arch = TINY[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomise(family(arch, **kwargs))


def image(model: PyramidBackbone, **kwargs: Any) -> torch.Tensor:
    """Two images for which even the last stage has several pixels at half its resolution."""
    side = 4 * model.strides[-1]
    return torch.randn(2, 3, side, side, **kwargs)


def grads(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    sum((o.flatten() * torch.linspace(-1, 1, o.numel()).to(o)).sum() for o in model(x)).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
