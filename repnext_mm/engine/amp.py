"""Mixed precision on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.config import Config
from mmengine.utils import apply_to
from torch import nn

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


def keep_float32_where_needed(model: nn.Module) -> None:
    """Let a detector train in bfloat16, for which mmcv's RoIAlign and nms have no kernels.

    RoIAlign computes in float32 and hands back what came in; dense heads hand on float32 scores
    and boxes.
    """
    for module in model.modules():
        if type(module).__name__ == 'RoIAlign':
            module.register_forward_pre_hook(lambda _, args: _float32(args))
            module.register_forward_hook(lambda _, args, output: output.to(torch.bfloat16))
        elif hasattr(module, 'prior_generator'):
            module.register_forward_hook(lambda _, args, output: _float32(output))


def _float32(data: Any) -> Any:
    return apply_to(data, torch.is_tensor, lambda tensor: tensor.float())
