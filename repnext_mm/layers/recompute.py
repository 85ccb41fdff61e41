"""Results recomputed in backward instead of kept: of complete blocks, or of single operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
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


class Recomputed:
    """A feature map that backward computes again, as `function(source)`.

    `source` is a feature map that is kept, or itself recomputed. The memory of `result` is freed as
    soon as the forward pass no longer refers to it.
    """

    def __init__(
        self, result: Tensor, function: Callable[[Tensor], Tensor], source: Tensor | Recomputed
    ) -> None:
        self.memory = result.untyped_storage().data_ptr()
        self.function = function
        self.source = source.detach() if isinstance(source, Tensor) else source
        self._value: Tensor | None = None

    def value(self, keep: bool = False) -> Tensor:
        """The feature map; `keep` it for the next call, which follows at once."""
        value, self._value = self._value, None
        if value is None:
            source = self.source
            with torch.no_grad():
                value = self.function(source if isinstance(source, Tensor) else source.value(True))
        if keep:
            self._value = value
        return value


@contextmanager
def kept_as_recipes(*recipes: Recomputed | None) -> Iterator[None]:
    """In this context autograd keeps the recipe of a feature map where it would save it."""
    if not any(recipes):
        yield
        return
    by_memory = {recipe.memory: recipe for recipe in recipes if recipe is not None}

    def pack(x: Tensor) -> Any:
        recipe = by_memory.get(x.untyped_storage().data_ptr())
        return x if recipe is None else (recipe, x.shape, x.stride(), x.storage_offset())

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        recipe, *view = packed
        return recipe.value().as_strided(*view)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
