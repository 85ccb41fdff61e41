"""Mixed precision on a GPU."""

from __future__ import annotations

import torch
from mmengine.config import Config

from .errors import UserError

AMP_DTYPES = ('bfloat16', 'float16')


def enable_amp(cfg: Config, dtype: str) -> None:
    """Make `cfg` train in mixed precision with this dtype, in place.

    Raises:
        UserError: The config has an optimizer wrapper of another kind.
    """
    kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise UserError(f'--amp works with optim_wrapper.type=OptimWrapper, not with {kind}.')
    cfg.optim_wrapper.update(
        type='AmpOptimWrapper',
        dtype=dtype,
        # bfloat16 has the exponents of float32: gradients cannot underflow, so nothing to scale.
        loss_scale='dynamic' if dtype == 'float16' else dict(enabled=False),
    )


def keep_roi_align_out_of_bfloat16(model: torch.nn.Module) -> None:
    """mmcv's RoIAlign has no bfloat16 kernel: compute it in float32 and hand back what came in."""
    for module in model.modules():
        if type(module).__name__ == 'RoIAlign':
            module.register_forward_pre_hook(lambda _, args: tuple(a.float() for a in args))
            module.register_forward_hook(lambda _, args, output: output.to(torch.bfloat16))
