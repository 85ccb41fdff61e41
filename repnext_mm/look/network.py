"""Inside a network: what the branches of its token mixers answer to, and how far it sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backbones.recconv import RecursiveConv
from ..backbones.repnext import ChunkConv

#: Shares of the gradient of which the extent is given.
SHARES = (0.5, 0.9)


def branches(mixer: nn.Module, output: Tensor) -> dict[str, Tensor]:
    """Parts of a token mixer's output `(N, C, H, W)` by the branch that they are of."""
    if isinstance(mixer, ChunkConv):  # RepNeXt, arXiv 2406.16004, section 3.2
        names = ('identity', 'small', 'medium', 'large')
        return dict(zip(names, output.chunk(4, dim=1), strict=True))
    if (sizes := getattr(mixer, 'split_indexes', None)) is not None:  # InceptionNeXt
        parts = torch.split(output, list(sizes), dim=1)
        return dict(zip(('identity', 'square', '1 x k', 'k x 1'), parts, strict=True))
    return {'output': output}


def token_mixers(backbone: nn.Module) -> dict[str, nn.Module]:
    """The last token mixer of each stage, by name of the stage."""
    found: dict[str, nn.Module] = {}
    for number, stage in enumerate(getattr(backbone, 'stages', ())):
        for module in stage.modules():
            mixer = getattr(module, 'token_mixer', None)
            if isinstance(mixer, nn.Module) and not isinstance(mixer, nn.Identity):
                found[f'stage {number + 1}'] = mixer
    return found


def branch_maps(backbone: nn.Module, image: Tensor) -> dict[str, dict[str, np.ndarray]]:
    """How strongly each branch answers at each place, per stage.

    Args:
        backbone: One with token mixers.
        image: `(1, 3, H, W)`, normalized.

    Returns:
        By stage and branch: `(h, w)` from 0 to 1, the mean over channels of the deviation from
        each channel's mean.
    """
    maps: dict[str, dict[str, np.ndarray]] = {}
    handles = []
    for stage, mixer in token_mixers(backbone).items():

        def keep(module: nn.Module, args: Any, output: Any, stage: str = stage) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            maps[stage] = {
                name: _strength(part[0].float()) for name, part in branches(module, tensor).items()
            }

        handles.append(mixer.register_forward_hook(keep))
    try:
        with torch.no_grad():
            backbone(image)
    finally:
        for handle in handles:
            handle.remove()
    return maps


def _strength(part: Tensor) -> np.ndarray:
    deviation = (part - part.mean((1, 2), keepdim=True)).abs().mean(0)
    low, high = deviation.min(), deviation.max()
    return ((deviation - low) / (high - low).clamp(min=1e-12)).cpu().numpy()


def receptive_fields(backbone: nn.Module, images: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """How much each pixel of the input moves the middle of each stage's output.

    The mean over images and channels of the input's gradient, made positive (Luo et al., arXiv
    1701.04128).

    Args:
        backbone: Returns feature maps `(N, C, h, w)`.
        images: `(1, 3, H, W)` each, of one size.

    Returns:
        By stage: `(H, W)`, with a sum of 1.
    """
    totals: dict[str, np.ndarray] = {}
    with _in_evaluation(backbone):
        for image in images:
            x = image.clone().requires_grad_(True)
            with torch.enable_grad():
                outputs = backbone(x)
            outputs = outputs if isinstance(outputs, list | tuple) else (outputs,)
            for number, output in enumerate(outputs):
                rows, columns = output.shape[2] // 2, output.shape[3] // 2
                (gradient,) = torch.autograd.grad(
                    output[0, :, rows, columns].sum(), x, retain_graph=True
                )
                name = f'stage {number + 1 + _skipped(backbone, outputs)}'
                strength = gradient[0].abs().sum(0).double().cpu().numpy()
                totals[name] = totals.get(name, 0) + strength
    return {name: total / max(total.sum(), 1e-300) for name, total in totals.items()}


def _skipped(backbone: nn.Module, outputs: Sequence[Tensor]) -> int:
    indices = getattr(backbone, 'out_indices', None)
    return int(indices[0]) if indices and len(indices) == len(outputs) else 0


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and parameters without gradients, until the end."""
    training = model.training
    needed = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in needed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in needed:
            parameter.requires_grad_(True)


def extent(field: np.ndarray, share: float) -> int:
    """Side in pixels of the smallest square around the middle with `share` of a field `(H, W)`."""
    # The middle of a stage's output is half a cell beyond that of the input: the center of mass.
    rows, columns = np.indices(field.shape)
    y, x = (field * rows).sum() / field.sum(), (field * columns).sum() / field.sum()
    distance = np.maximum(abs(rows - y), abs(columns - x)).reshape(-1)
    order = distance.argsort(kind='stable')
    reached = field.reshape(-1)[order].cumsum()
    reached /= reached[-1]
    return 1 + 2 * round(float(distance[order][np.searchsorted(reached, share)]))


def recursive_fields(backbone: nn.Module) -> dict[str, str]:
    """What RecNeXt's paper gives for one recursive convolution: kernel x 2^level (section 3.1)."""
    found = {}
    strides = getattr(backbone, 'out_strides', ())
    for number, stage in enumerate(getattr(backbone, 'stages', ())):
        convs = [m for m in stage.modules() if isinstance(m, RecursiveConv)]
        if convs:
            kernel = max(m.kernel_size[0] for m in convs[0].modules() if isinstance(m, nn.Conv2d))
            side = kernel * 2 ** convs[0].level
            pixels = f', {side * strides[number]} pixels' if number < len(strides) else ''
            found[f'stage {number + 1}'] = f'{kernel} x 2^{convs[0].level} = {side} cells{pixels}'
    return found


def untrained(backbone: nn.Module) -> nn.Module:
    """A copy of a backbone with the weights that training began with, but for pretrained ones."""
    import copy

    fresh = copy.deepcopy(backbone)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        for module in fresh.modules():
            reset = getattr(module, 'reset_parameters', None)
            if callable(reset):
                reset()
    fresh.eval()  # that of mm's ResNet returns nothing
    return fresh
