"""The steps of MMSyncBN between which mmcv averages over processes.

Inputs are `(N, C, pixels)`, statistics `(C,)` in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def sync_bn_forward_mean(input: Tensor, mean: Tensor) -> None:
    """Write each channel's mean to `mean`."""
    mean.copy_(input.to(mean.dtype).mean((0, 2)))


@torch.no_grad()
def sync_bn_forward_var(input: Tensor, mean: Tensor, var: Tensor) -> None:
    """Write each channel's mean squared distance from `mean` to `var`."""
    var.copy_((input.to(mean.dtype) - mean[:, None]).square_().mean((0, 2)))


@torch.no_grad()
def sync_bn_forward_output(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    norm: Tensor,
    std: Tensor,
    output: Tensor,
    eps: float,
    momentum: float,
    group_size: int,
) -> None:
    """Write the normalized input to `norm` and, scaled, to `output`; update the running means."""
    std.copy_((var + eps).sqrt())
    norm.copy_((input.to(mean.dtype) - mean[:, None]) / std[:, None])
    output.copy_(norm * weight[:, None] + bias[:, None])
    count = input.shape[0] * input.shape[2] * group_size
    unbiased = var * count / (count - 1) if count > 1 else var
    for running, current in ((running_mean, mean), (running_var, unbiased)):
        running.copy_(momentum * current + (1 - momentum) * running)


@torch.no_grad()
def sync_bn_backward_param(
    grad_output: Tensor, norm: Tensor, grad_weight: Tensor, grad_bias: Tensor
) -> None:
    """Gradients of weight and bias, written to `grad_weight, grad_bias`."""
    grad_output = grad_output.to(norm.dtype)
    grad_weight.copy_((grad_output * norm).sum((0, 2)))
    grad_bias.copy_(grad_output.sum((0, 2)))


@torch.no_grad()
def sync_bn_backward_data(
    grad_output: Tensor,
    weight: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    norm: Tensor,
    std: Tensor,
    grad_input: Tensor,
) -> None:
    """Gradient of the input from those of weight and bias, written to `grad_input`."""
    count = grad_output.shape[0] * grad_output.shape[2]
    shared = (grad_weight[:, None] * norm + grad_bias[:, None]) / count
    grad_input.copy_((grad_output - shared) * (weight / std)[:, None])
