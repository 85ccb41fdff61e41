"""Weight files of every kind for one small network, and checks of what was loaded."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomise
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn

from repnext_mm import RepNeXt, reparameterize
from repnext_mm.checkpoints import (
    CheckpointError,
    load_pretrained,
)

State = dict[str, Tensor]


@functools.cache
def network(arch: str = 'm0') -> RepNeXt:
    """A network in eval mode whose every norm and bias is random; never changed by a test."""
    torch.manual_seed(7)
    return randomise(RepNeXt(arch)).eval()


def state_of(arch: str = 'm0') -> State:
    return {k: v.clone() for k, v in network(arch).state_dict().items()}


def classifier(width: int = 320) -> State:
    """Heads of a published classifier: a norm and a linear layer, twice (distillation)."""
    head = nn.Module()
    for name in ('head', 'head_dist'):
        part = nn.Sequential(OrderedDict(norm=nn.BatchNorm1d(width), linear=nn.Linear(width, 5)))
        head.add_module(name, part)
    return {f'head.{k}': v for k, v in head.state_dict().items()}


def under(prefix: str, state: State) -> State:
    return {prefix + k: v for k, v in state.items()}


def assert_holds(model: nn.Module, expected: State) -> None:
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor.to(actual[key]), rtol=0, atol=0)


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    yield
    assert_holds(model, before)


def refuse(
    checkpoint: object, *fragments: str, model: nn.Module | None = None, **kwargs: object
) -> str:
    """Loading fails with one sentence that holds all fragments, and leaves the model alone."""
    model = RepNeXt('m0') if model is None else model
    with unchanged(model), pytest.raises(CheckpointError) as caught:
        load_pretrained(model, checkpoint, **kwargs)  # type: ignore[arg-type]
    text = str(caught.value)
    assert '\n' not in text
    for fragment in fragments:
        assert fragment in text, text
    return text


class Tree(nn.Module):
    """Modules that hold a state dict under its own names; the forward pass is of no interest."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    @classmethod
    def of(cls, state: State) -> Tree:
        root = cls()
        for key, tensor in state.items():
            *path, name = key.split('.')
            module: nn.Module = root
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, cls())
                module = getattr(module, part)
            if tensor.is_floating_point() and 'running' not in name:
                module.register_parameter(name, nn.Parameter(tensor))
            else:
                module.register_buffer(name, tensor)
        return root


def save_torchscript(path: Path, state: State) -> Path:
    torch.jit.script(Tree.of(state)).save(str(path))
    return path


@functools.cache
def fused(arch: str, plan: str) -> RepNeXt:
    return reparameterize(network(arch), plan, accept_inexact=True)


def fused_state(arch: str = 'm0', plan: str = 'upstream') -> State:
    return {k: v.clone() for k, v in fused(arch, plan).state_dict().items()}


def fused_classifier(arch: str = 'm0') -> State:
    return fused_state(arch) | {'head.weight': torch.zeros(5, 320), 'head.bias': torch.zeros(5)}


def save_release(path: Path) -> Path:
    torch.save({'model': state_of() | classifier()}, path)
    return path


def save_timm(path: Path, with_ema: bool) -> Path:
    """As timm's CheckpointSaver writes it, arguments of the run included."""
    raw = state_of() | classifier()
    content = {
        'epoch': 299,
        'arch': 'repnext_m0',
        'state_dict': {k: v + 1 if with_ema else v for k, v in raw.items()},
        'optimizer': {'state': {}, 'param_groups': [{'lr': 0.1}]},
        'version': 2,
        'args': argparse.Namespace(model='repnext_m0', opt_betas=None, crop_pct=0.9),
        'amp_scaler': {'scale': 1.0},
        'metric': 73.8,
    }
    if with_ema:
        content['state_dict_ema'] = raw
    torch.save(content, path)
    return path


def save_upstream_run(path: Path) -> Path:
    """As the published training script writes it: averaged weights beside the raw ones."""
    raw = state_of() | classifier()
    content = {
        'model': raw,
        'model_ema': {k: v + 1 for k, v in raw.items()},
        'epoch': 3,
        'scaler': {},
        'args': argparse.Namespace(output_dir='out'),
    }
    torch.save(content, path)
    return path


def save_mm2(path: Path) -> Path:
    """As MMDetection 2.28 writes it."""
    heads = {
        'neck.lateral_convs.0.conv.weight': torch.ones(4, 4, 1, 1),
        'rpn_head.rpn_conv.weight': torch.ones(4, 4, 3, 3),
        'roi_head.bbox_head.fc_cls.weight': torch.ones(81, 4),
        'roi_head.bbox_head.fc_cls.bias': torch.ones(81),
    }
    meta = {
        'mmdet_version': '2.28.2+',
        'config': 'model = dict()',
        'CLASSES': ('person', np.str_('bicycle')),
        'PALETTE': [(220, 20, 60)],
        'best_score': np.float64(0.429),
        'epoch': 12,
        'iter': np.int64(87960),
        'hook_msgs': {'seed': 1},
    }
    state = OrderedDict(under('backbone.', state_of()) | heads)
    momentum = {0: {'step': 1, 'exp_avg': torch.zeros(2)}}
    torch.save(
        {'meta': meta, 'state_dict': state, 'optimizer': {'state': momentum, 'param_groups': []}},
        path,
    )
    return path


def save_mm3(path: Path) -> Path:
    """As MMEngine's runner writes it."""
    losses = HistoryBuffer()
    losses.update(1.5)
    content = {
        'meta': {'cfg': 'model = dict()', 'dataset_meta': {'classes': ['wall']}},
        'state_dict': under('backbone.', state_of())
        | {
            'decode_head.conv_seg.weight': torch.ones(150, 4, 1, 1),
            'data_preprocessor.mean': torch.zeros(3, 1, 1),
        },
        'message_hub': {'log_scalars': {'train/loss': losses}, 'runtime_info': {'iter': 1}},
    }
    torch.save(content, path)
    return path


def save_safetensors(path: Path) -> Path:
    from safetensors.torch import save_file

    save_file(state_of() | classifier(), path, metadata={'format': 'pt'})
    return path


def save_bare(path: Path, prefix: str = '', legacy: bool = False) -> Path:
    torch.save(under(prefix, state_of()), path, _use_new_zipfile_serialization=not legacy)
    return path


class Evil:
    """Unpickling this without protection creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f'touch "{self.marker}"',)


def drop(state: State, names: list[str]) -> State:
    return {k: v for k, v in state.items() if k not in names}


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def save_hub(path: Path, state: State) -> Path:
    """As timm pushes a model to the hub."""
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in state.items()}, path, metadata={'format': 'pt'})
    return path


def timm_head(width: int = 64) -> State:
    """Heads of InceptionNeXt's classifier in timm."""
    head = nn.Module()
    head.fc1, head.norm, head.fc2 = nn.Linear(width, 8), nn.LayerNorm(8), nn.Linear(8, 5)
    return {f'head.{k}': v.detach() for k, v in head.state_dict().items()}


def save_evil(path: Path, legacy: bool = False) -> Path:
    content = {'model': state_of(), 'x': Evil(path.with_name('ran'))}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


HTML = b'\n<!DOCTYPE html><html><body>404: Not Found</body></html>'
