"""How the backbones of an existing model compute, without changing what they compute."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from .backbones.pyramid import PyramidBackbone
from .layers.forms import configure

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
        model: A backbone, or a detector or segmentor holding one.
        save_memory: Recompute cheap results in backward instead of keeping them; None leaves
            it as it is. Blocks that `with_cp` recomputes as a whole are left alone.
        channels_last: Memory format to compute in; None leaves it as it is.
        compile: Compile each backbone in place with `torch.compile`, with these options if it is
            a dict. State dict keys stay the same.

    Raises:
        TypeError: `model` holds none of this package's backbones.
    """
    backbones = [m for m in model.modules() if isinstance(m, PyramidBackbone)]
    if not backbones:
        raise TypeError(
            f'{type(model).__name__} holds no backbone of repnext_mm, so there is nothing to set.'
        )
    for backbone in backbones:
        if save_memory is not None:
            configure(backbone, save_memory=save_memory and not backbone.with_cp)
        if channels_last is not None:
            backbone.channels_last = channels_last
        if compile:
            backbone.compile(**(compile if isinstance(compile, dict) else {}))
    return model
