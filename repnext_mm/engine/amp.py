"""Mixed precision, on a GPU or on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.utils import apply_to
from torch import nn
from torch.amp.grad_scaler import GradScaler

from .errors import UserError

AMP_DTYPES = ('bfloat16', 'float16')


@OPTIM_WRAPPERS.register_module(force=True)  # replaces its stand-in of `lazy`
class PortableAmpOptimWrapper(AmpOptimWrapper):
    """mmengine's mixed precision without its demand for a GPU.

    Args:
        dtype: 'bfloat16' or 'float16'.
        loss_scale: As mmengine's, which float16 needs and bfloat16 does not.
        kwargs: Those of `OptimWrapper`.
    """

    def __init__(
        self,
        dtype: str = AMP_DTYPES[0],
        loss_scale: str | float | dict[str, Any] = 'dynamic',
        **kwargs: Any,
    ) -> None:
        OptimWrapper.__init__(self, **kwargs)
        if dtype not in AMP_DTYPES:
            raise ValueError(_wrong_dtype(dtype))
        if isinstance(loss_scale, float):
            scaling: dict[str, Any] = dict(init_scale=loss_scale)
        else:
            scaling = loss_scale if isinstance(loss_scale, dict) else {}
        self.loss_scaler = GradScaler(get_device(), **scaling)
        # A number stays as it is; None lets the scaler adapt.
        self._scale_update_param = loss_scale if isinstance(loss_scale, float) else None
        self.cast_dtype = getattr(torch, dtype)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """The forward pass in mixed precision, synchronising gradients when it is time to."""
        with OptimWrapper.optim_context(self, model), torch.autocast(get_device(), self.cast_dtype):
            yield


def enable_amp(cfg: Config, dtype: str | None) -> None:
    """Make `cfg` train in mixed precision, in place.

    Args:
        cfg: Its `optim_wrapper.dtype`, if there is one, holds where `dtype` is None.
        dtype: One of `AMP_DTYPES`; None is the first where the config names none.

    Raises:
        UserError: The config has an optimizer wrapper of another kind, or names another dtype.
    """
    wrapper = cfg.optim_wrapper
    kind = wrapper.get('type', 'OptimWrapper')
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise UserError(f'--amp works with optim_wrapper.type=OptimWrapper, not with {kind}.')
    dtype = dtype or wrapper.get('dtype') or AMP_DTYPES[0]
    if dtype not in AMP_DTYPES:
        raise UserError(_wrong_dtype(dtype))
    wrapper.update(
        type='AmpOptimWrapper',
        dtype=dtype,
        # bfloat16 has the exponents of float32: gradients cannot underflow, so nothing to scale.
        loss_scale='dynamic' if dtype == 'float16' else dict(enabled=False),
    )


def uses_amp(cfg: Config) -> bool:
    """Whether `cfg` trains in mixed precision."""
    return cfg.optim_wrapper.get('type') in ('AmpOptimWrapper', 'PortableAmpOptimWrapper')


def fit_amp_to_cpu(optim_wrapper: dict[str, Any]) -> str | None:
    """Replace mmengine's wrapper, which needs a GPU; returns what now computes, if anything."""
    if optim_wrapper.get('type') != 'AmpOptimWrapper':
        return None
    optim_wrapper['type'] = 'PortableAmpOptimWrapper'
    optim_wrapper.pop('use_fsdp', None)
    optim_wrapper['dtype'] = optim_wrapper.get('dtype') or AMP_DTYPES[0]
    return f'mixed precision in {optim_wrapper["dtype"]}'


def keep_float32_where_needed(model: nn.Module) -> None:
    """Let a detector train under autocast, for which mmcv's RoIAlign and nms lack kernels.

    RoIAlign computes in float32 and returns what autocast asks for; dense heads return
    float32 scores and boxes.
    """
    for module in model.modules():
        if type(module).__name__ == 'RoIAlign':
            module.register_forward_pre_hook(lambda _, args: _float32(args))
            module.register_forward_hook(lambda _, args, output: _autocast(output))
        elif hasattr(module, 'prior_generator'):
            module.register_forward_hook(lambda _, args, output: _float32(output))


def _float32(data: Any) -> Any:
    return apply_to(data, torch.is_tensor, lambda tensor: tensor.float())


def _autocast(data: torch.Tensor) -> torch.Tensor:
    """In the dtype of autocast, which is off in validation."""
    device = data.device.type
    return data.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else data


def _wrong_dtype(dtype: Any) -> str:
    return f'optim_wrapper.dtype={dtype!r} is not one of {", ".join(AMP_DTYPES)}.'
