"""How the backbones of an existing model compute, without changing what they compute."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from .backbones import PyramidBackbone
from .network import networks_in

M = TypeVar('M', bound=nn.Module)


def optimize(
    model: M,
    *,
    save_memory: bool | None = None,
    channels_last: bool | None = None,
    compile: bool | dict[str, Any] = False,
) -> M:
    """Set how every backbone of this package in `model` computes; returns `model` itself.

    Weights, outputs and gradients stay the same up to rounding. Merged kernels, folded norms and
    the memory format need no call: they are on by default where they are faster. In a config,
    `backbone=dict(save_memory=True)` and the hook `CompileBackbone` do the same.

    Args:
        model: A backbone, or a detector or segmentor with one.
        save_memory: Recompute cheap results in backward instead of keeping them; None changes
            nothing. Blocks that `with_cp` recomputes are left alone.
        channels_last: Memory format to compute in; None changes nothing.
        compile: Compile each backbone in place with `torch.compile`, with these options if it is
            a dict. State dict keys stay the same.

    Raises:
        TypeError: `model` contains none of this package's backbones.
    """
    for backbone in networks_in(model, PyramidBackbone, 'set'):
        backbone.set_execution(save_memory=save_memory, channels_last=channels_last)
        if compile:
            backbone.compile(**(compile if isinstance(compile, dict) else {}))
    return model
