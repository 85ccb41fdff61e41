"""How a network computes its training form: settings that every layer of it shares."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

TrainForm = Literal['merged', 'branches']
TRAIN_FORMS: tuple[TrainForm, ...] = get_args(TrainForm)


class TrainingLayer(nn.Module):
    """A layer that has a fast way and a published way of computing the same function.

    The settings are of a whole network; `configure` gives them to its layers.
    """

    #: 'merged' computes fast, 'branches' operation by operation as published: the reference.
    train_form: TrainForm = 'merged'
    #: Recompute cheap intermediate results in backward instead of keeping them.
    save_memory: bool = False

    def merges(self) -> bool:
        """Whether to compute the fast way now; files hold the published operations."""
        return self.train_form == 'merged' and not is_exporting()

    def recomputes(self) -> bool:
        """Whether to leave cheap results to backward now."""
        return self.save_memory and torch.is_grad_enabled() and runs_eagerly()


def configure(network: nn.Module, **settings: Any) -> None:
    """Set attributes of `TrainingLayer` on all layers of `network` that have them."""
    for layer in network.modules():
        for name, value in settings.items():
            if hasattr(type(layer), name):
                setattr(layer, name, value)


def is_exporting() -> bool:
    """Whether operations are written down for a file, by torch.export or by tracing."""
    if torch.compiler.is_dynamo_compiling():  # in which `is_exporting` always answers True
        return False
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return tracing or torch.compiler.is_exporting()


def runs_eagerly() -> bool:
    """Whether operations run as they are called: compilers and exporters want the plain ones."""
    return not (is_exporting() or torch.compiler.is_compiling())


def is_channels_last(x: Tensor) -> bool:
    """Whether `x` `(N, C, H, W)` lies in memory as (N, H, W, C), and in that way alone."""
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return channels_last and not x.is_contiguous()
