"""What the operators share: number formats, and kernels with a fixed order of summation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: torchvision and torch have few CPU kernels for them, and sums in them lose digits.
NARROW_DTYPES = (torch.float16, torch.bfloat16)


def widen(*tensors: Tensor) -> list[Tensor]:
    """The tensors in one floating-point format of at least 32 bits."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.dtype not in NARROW_DTYPES:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def reproducibly(kernel: Callable[..., Any], *args: Any) -> Any:
    """Call a kernel whose CUDA form adds in no fixed order, such as `_roi_align_backward`.

    After `torch.use_deterministic_algorithms(True)` the CPU computes it: slower, and the same in
    every run. Otherwise it runs where its tensors are.
    """
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if device.type == 'cpu' or not torch.are_deterministic_algorithms_enabled():
        return kernel(*args)
    result = kernel(*(arg.cpu() if isinstance(arg, Tensor) else arg for arg in args))
    if isinstance(result, Tensor):
        return result.to(device)
    return tuple(tensor.to(device) for tensor in result)


def differentiate(
    function: Callable[..., Tensor],
    grad_output: Tensor,
    inputs: tuple[Tensor, ...],
    *constants: Any,
) -> tuple[Tensor, ...]:
    """Gradients of `function(*inputs, *constants)` with regard to each of the inputs."""

    def backward(grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [arg.detach().requires_grad_() for arg in args[: len(inputs)]]
            output = function(*leaves, *args[len(inputs) :])
        if not output.requires_grad:  # nothing entered it, as with 0 RoIs
            return tuple(torch.zeros_like(leaf) for leaf in leaves)
        grads = torch.autograd.grad(output, leaves, grad_output, allow_unused=True)
        return tuple(
            torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads)
        )

    return reproducibly(backward, grad_output, *inputs, *constants)
