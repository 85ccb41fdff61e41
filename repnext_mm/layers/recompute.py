"""Activation checkpointing that leaves BatchNorm's running statistics right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


@contextmanager
def _statistics_held(module: nn.Module) -> Iterator[None]:
    """Run the norms below `module` without moving their running statistics.

    Momentum 0 rather than no tracking: the same tensors must be saved as in the first run.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    held = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, momentum, count in held:
            norm.momentum, norm.num_batches_tracked = momentum, count


def run_checkpointed(module: nn.Module, *inputs: Tensor) -> Any:
    """`module(*inputs)` with its activations recomputed in backward instead of kept.

    The recomputation must not move the running statistics a second time.
    """

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), _statistics_held(module)

    return checkpoint(module, *inputs, use_reentrant=False, context_fn=contexts)
