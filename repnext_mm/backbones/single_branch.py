"""A trained RepNeXt M as its single-branch E form (RepNeXt, arXiv 2406.16004, section 3.3)."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..reparam import Note, folding
from .classifier import RepNeXtClassifier
from .repnext import ChunkConv, CopyConv, RepNeXt

#: How the tensors of a downsample or a block follow the order of the stage's channels, by the ends
#: of their names: along which axes.
ALONG_OUTPUT = ('norm.', 'channel_mixer.2.conv.', 'channel_mixer.2.norm.')
ALONG_INPUT = ('channel_mixer.0.conv.weight',)


@torch.no_grad()
def to_single_branch(model: RepNeXt) -> tuple[RepNeXt, list[Tensor]]:
    """The E form of a trained M form, and the order of its channels.

    Each token mixer becomes one convolution. Where the first strip of an 11x11 pair has a bias, the
    five rows at the top and at the bottom differ (see plan 'single'); all else is the same up to
    rounding. A downsample of the E form has the two outputs of a channel side by side, so that its
    channels come in another order: a classifier's heads are reordered with them, and what reads the
    outputs of a backbone has to be.

    Args:
        model: RepNeXt in its training form, in eval mode; it is not changed.

    Returns:
        The E form in eval mode, and for each stage the channels of `model` `(C_i,)` in the order in
        which the E form has them: `e_outputs[i] == m_outputs[i][:, order[i]]`.

    Raises:
        TypeError: `model` is no RepNeXt.
        ValueError: It is fused, in training mode, an E form, or has other downsamples.
    """
    if not isinstance(model, RepNeXt):
        raise TypeError(f'{type(model).__name__} is no RepNeXt, which alone has an E form.')
    if model.plan is not None or model.settings['single_branch']:
        raise ValueError(f'{model.describe()} is not a training form with branches.')
    if model.training:
        raise ValueError('the model is in training mode; call .eval() before converting it.')
    downsamples: list[Any] = [stage.downsample for stage in list(model.stages)[1:]]
    if not all(isinstance(part.token_mixer, CopyConv) for part in downsamples):
        raise ValueError('only downsamples of copy convolutions and doubled widths have an E form.')
    keys = ('channels', 'depths', 'mlp_ratio')
    settings = {key: model.settings[key] for key in keys} | {'single_branch': True}
    options: dict[str, Any] = {'norm_cfg': model.norm_cfg}
    if isinstance(model, RepNeXtClassifier):
        options |= dict(num_classes=model.num_classes, in_chans=model.in_chans)
    else:
        options |= dict(out_indices=model.out_indices)
    named = f'{model.arch}e' if f'{model.arch}e' in model.arch_zoo else settings
    single = type(model)(named, **options).eval().to(next(model.parameters()))

    state = {k: v for k, v in model.state_dict().items() if k.startswith('stem.')}
    order = torch.arange(model.channels[0])
    orders = []
    for i, stage in enumerate(model.stages):
        if i:
            before = order
            half = model.channels[i - 1]
            order = torch.stack((before, half + before), 1).flatten()
            state |= _part(stage.downsample, f'stages.{i}.downsample', order, before)
        for j, block in enumerate(cast(Any, stage.blocks)):
            state |= _part(block, f'stages.{i}.blocks.{j}', order, order)
        orders.append(order)
    for key, value in model.state_dict().items():
        if key.startswith('head.'):
            axis = 1 if key.endswith('linear.weight') else 0
            follows = value.dim() > axis and '.linear.bias' not in key
            state[key] = value.index_select(axis, order.to(value.device)) if follows else value
    single.load_state_dict(state)
    return single, orders


def _part(part: Any, name: str, order: Tensor, before: Tensor) -> dict[str, Tensor]:
    """The tensors of a downsample or a block, with its channels in another order."""
    weight, bias = _merged(part.token_mixer)
    if isinstance(part.token_mixer, CopyConv):  # pairs of outputs, by their input channel
        weight, bias = (t.unflatten(0, (-1, 2))[before].flatten(0, 1) for t in (weight, bias))
    else:
        weight, bias = weight[order], bias[order]
    found = {f'{name}.token_mixer.weight': weight, f'{name}.token_mixer.bias': bias}
    for key, value in part.state_dict().items():
        if key.startswith(ALONG_OUTPUT) and value.dim():
            found[f'{name}.{key}'] = value[order.to(value.device)]
        elif key.startswith(ALONG_INPUT):
            found[f'{name}.{key}'] = value[:, order.to(value.device)]
        elif not key.startswith('token_mixer.'):
            found[f'{name}.{key}'] = value
    return found


def _merged(mixer: ChunkConv | CopyConv) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that a token mixer is."""
    mixer = copy.deepcopy(mixer)
    note = cast(Note, lambda *_: None)
    for name, child in list(mixer.named_children()):
        if hasattr(child, 'fuse'):
            mixer.register_module(name, cast(Any, child).fuse('single', note))
    merged = mixer.fuse('single', note)
    conv = cast(nn.Conv2d, merged if isinstance(merged, nn.Conv2d) else merged.conv)
    weight, bias = folding.weights(conv)
    return weight.to(conv.weight), bias.to(conv.weight)
