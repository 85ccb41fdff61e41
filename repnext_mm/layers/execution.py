"""How layers compute: fast or as published, eagerly or into a file, in which layout and dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class FastLayer(nn.Module):
    """A layer with a fast way and a published way of computing the same function.

    The settings are those of a complete network; `set_execution` passes them on to its layers.
    """

    #: False computes operation by operation as published: the reference.
    fast: bool = True
    #: Recompute cheap intermediate results in backward instead of keeping them.
    save_memory: bool = False

    def is_fast(self) -> bool:
        """Whether to compute the fast way now; exported files contain the published operations."""
        return self.fast and not is_exporting()

    def recomputes(self) -> bool:
        """Whether to recompute cheap results in backward now."""
        return self.save_memory and torch.is_grad_enabled() and runs_eagerly()


def set_execution(network: nn.Module, **settings: Any) -> None:
    """Set attributes of `FastLayer` on all layers of `network` that have them."""
    for layer in network.modules():
        if isinstance(layer, FastLayer):
            for name, value in settings.items():
                setattr(layer, name, value)


def is_hooked(layer: nn.Module) -> bool:
    """Whether a hook reads or changes what `layer` gets or returns.

    Such a layer must be called, and not be computed together with another one. Compilers deal with
    hooks themselves.
    """
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    hooks = hooks or layer._backward_hooks or layer._backward_pre_hooks
    return bool(hooks) and not torch.compiler.is_compiling()


def are_hooked(layers: Iterable[nn.Module | None]) -> bool:
    """Whether one of `layers`, or a layer in it, has a hook."""
    for layer in layers:
        if layer is None:
            continue
        if is_hooked(layer) or (layer._modules and are_hooked(layer._modules.values())):
            return True
    return False


def is_exporting() -> bool:
    """Whether operations are written down for a file, by torch.export or by tracing."""
    if torch.compiler.is_dynamo_compiling():  # in which `is_exporting` always answers True
        return False
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return tracing or torch.compiler.is_exporting()


def runs_eagerly() -> bool:
    """Whether operations run as they are called: compilers and exporters need the plain ones."""
    return not (is_exporting() or torch.compiler.is_compiling())


def is_channels_last(x: Tensor) -> bool:
    """Whether the memory of `x` `(N, C, H, W)` is in the order (N, H, W, C), and in no other."""
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return channels_last and not x.is_contiguous()


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 if that is wider."""
    return torch.float32 if dtype.itemsize < torch.float32.itemsize else dtype


def autocasts(device: str) -> bool:
    """Whether autocast is on; never on the meta device, for which torch does not answer."""
    return device != 'meta' and torch.is_autocast_enabled(device)


def run_in_float32(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function(*inputs)` computed in float32 where autocast or the inputs ask for less.

    The result has the dtype of the first input; float32 and float64 inputs are left alone.
    """
    dtype, device = inputs[0].dtype, inputs[0].device.type
    inputs = tuple(x.to(at_least_float32(x.dtype)) for x in inputs)
    if not autocasts(device):
        return function(*inputs).to(dtype)
    with torch.autocast(device, enabled=False):
        return function(*inputs).to(dtype)
