"""Focal losses.

Logits or probabilities are `(N, C)`, targets `(N,)` classes, `weight` is `(C,)` or empty.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .numerics import widen

#: Smallest probability under a logarithm: that of float32, as compiled.
TINY = torch.finfo(torch.float32).tiny


def _class_weights(weight: Tensor, target: Tensor) -> Tensor:
    """Weight of each target's class `(N,)`; 1 for background and ignored targets."""
    known = (target >= 0) & (target < len(weight))
    return torch.where(known, weight[target.clamp(0, len(weight) - 1)], 1)


def _write(values: Tensor, target: Tensor, weight: Tensor, output: Tensor) -> None:
    """Write per-class values `(N, C)` or per-sample values `(N,)` times the classes' weights."""
    if weight.numel():
        weights = _class_weights(weight, target)
        values = values * weights.view(-1, *[1] * (values.dim() - 1))
    output.copy_(values)


def _one_hot(values: Tensor, hot: Tensor, target: Tensor) -> Tensor:
    """Values `(N, C)` with those of `hot` `(N, 1)` at the targets that are a class."""
    index = target.clamp(0, values.shape[1] - 1)[:, None]
    is_class = ((target >= 0) & (target < values.shape[1]))[:, None]
    return values.scatter(1, index, torch.where(is_class, hot, values.gather(1, index)))


def _at(values: Tensor, target: Tensor) -> Tensor:
    """Values `(N, 1)` of each sample's target, or of a near class where that is none."""
    return values.gather(1, target.clamp(0, values.shape[1] - 1)[:, None])


@torch.no_grad()
def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the loss of every class to `output` `(N, C)`; targets outside it are background."""
    p = widen(input)[0].sigmoid()
    q = 1 - p
    loss = p.pow(gamma) * q.clamp(min=TINY).log_() * (alpha - 1)
    p, q = _at(p, target), _at(q, target)
    hot = q.pow(gamma) * p.clamp(min=TINY).log_() * -alpha
    _write(_one_hot(loss, hot, target), target, weight, output)


@torch.no_grad()
def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of each loss by its own logit, `(N, C)`, to `grad_input`."""
    p = widen(input)[0].sigmoid()
    q = 1 - p
    grad = p.pow(gamma) * (gamma * q * q.clamp(min=TINY).log_() - p) * (alpha - 1)
    p, q = _at(p, target), _at(q, target)
    hot = q.pow(gamma) * (q - gamma * p * p.clamp(min=TINY).log_()) * -alpha
    _write(_one_hot(grad, hot, target), target, weight, grad_input)


def _true_class(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Probability `(N,)` of each target's class, and where there is one.

    Raises:
        RuntimeError: A target is not below C.
    """
    probability = widen(input)[0].gather(1, target.clamp(min=0)[:, None])[:, 0]
    return probability, target >= 0


@torch.no_grad()
def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the loss `(N,)` of probabilities to `output`; a negative target is ignored."""
    p, counts = _true_class(input, target)
    loss = -alpha * (1 - p).pow(gamma) * p.clamp(min=TINY).log()
    _write(torch.where(counts, loss, 0), target, weight, output)


@torch.no_grad()
def softmax_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    buff: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Write the derivatives by the logits, `(N, C)`, to `grad_input`; `buff` is scratch `(N,)`."""
    p, counts = _true_class(input, target)
    q = 1 - p
    slope = gamma * q.pow(gamma - 1) * p * p.clamp(min=TINY).log() - q.pow(gamma)
    _write(torch.where(counts, alpha * slope, 0), target, weight, buff)
    probabilities, factor = widen(input, buff)
    grad = -probabilities * factor[:, None]
    grad_input.copy_(grad.scatter_add(1, target.clamp(min=0)[:, None], factor[:, None]))
