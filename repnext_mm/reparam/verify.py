"""Proof by computation that two forms of a network agree."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class StageError:
    """Largest difference of one output, absolute and relative to the reference's std."""

    index: int
    shape: tuple[int, ...]
    max_abs: float
    max_rel: float


def noise(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Images of standard normal noise, as a data preprocessor's output is on average."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@torch.no_grad()
def prove(
    reference: nn.Module, other: nn.Module, size: tuple[int, int] = (512, 512), seed: int = 0
) -> list[StageError]:
    """Compare two networks in float64 on one seeded normal image `(1, 3, *size)`.

    Returns one entry per output. Neither model is changed.

    Raises:
        ValueError: A model is in training mode, or the outputs differ in number or shape.
    """
    if reference.training or other.training:
        raise ValueError('both models must be in eval mode; call .eval() on them first.')
    image = noise((1, 3, *size), seed, torch.float64)
    device = next(reference.parameters()).device
    expected, actual = (
        copy.deepcopy(m).to(device).double()(image.to(device)) for m in (reference, other)
    )
    expected, actual = (o if isinstance(o, tuple) else (o,) for o in (expected, actual))
    shapes = [[tuple(t.shape) for t in outs] for outs in (expected, actual)]
    if shapes[0] != shapes[1]:
        raise ValueError(f'the outputs have shapes {shapes[0]} and {shapes[1]}.')
    errors = []
    for i, (e, a) in enumerate(zip(expected, actual, strict=True)):
        worst = float((e - a).abs().max())
        errors.append(
            StageError(i, tuple(e.shape), worst, worst / max(float(e.std(correction=0)), 1e-12))
        )
    return errors
