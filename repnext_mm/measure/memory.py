"""What a training step keeps in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def saved_bytes(function: Callable[[], Any], ignore: Iterable[Tensor] = ()) -> int:
    """Bytes that `function` keeps for its backward pass.

    Every storage counts once and completely, however many views of it are kept. Storages of the
    tensors to `ignore` (parameters, inputs) do not count: they are there anyway. What is
    recomputed in backward does not count either, nor does what is kept outside of
    `save_for_backward`.
    """
    known = {_key(tensor) for tensor in ignore}
    # Holding the storages keeps their addresses from being given to others meanwhile.
    kept: dict[tuple[torch.device, int], torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _key(tensor) not in known:
            kept[_key(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    del output
    return sum(storage.nbytes() for storage in kept.values())


def _key(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that `function` had of the CUDA allocator, above what it held before."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def step_memory(
    forward: Callable[[], Any],
    step: Callable[[], Any],
    model: nn.Module,
    device: torch.device,
    ignore: Iterable[Tensor] = (),
) -> int:
    """Memory of a training step: saved bytes on a CPU, the allocator's peak on a GPU."""
    if device.type == 'cuda':
        return peak_bytes(step, device)
    return saved_bytes(forward, [*model.parameters(), *model.buffers(), *ignore])
