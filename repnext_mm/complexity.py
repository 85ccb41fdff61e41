"""Size and cost of a network, counted on the meta device in no memory and little time."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """Learnable values of the complete model."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, size: tuple[int, int], **kwargs: Any) -> int:
    """Multiply-accumulate operations of one forward pass over one image `(1, 3, *size)`.

    Counted by torch's own `FlopCounterMode`: convolutions and matrix products. Norms, activations,
    additions, pooling and upsampling are not counted. `kwargs` go to the forward pass.
    """
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, *size, device=device), **kwargs)
    return counter.get_total_flops() // 2  # it counts the multiplication and the addition
