"""Weights: every file kind, every way to name one, every mistake; with real files throughout."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import io
import json
import multiprocessing
import os
import pickle
import re
import runpy
import sys
import tarfile
import threading
import time
import uuid
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, randomise
from mmengine.logging import HistoryBuffer, MMLogger
from torch import Tensor, nn

from repnext_mm import InceptionNeXt, RecNeXt, RepNeXt, reparameterize
from repnext_mm.checkpoints import (
    PUBLISHED,
    CheckpointError,
    fetch,
    load_pretrained,
    read_run,
    read_weights,
)
from repnext_mm.checkpoints.__main__ import main

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


@pytest.fixture
def log(tmp_path: Path) -> Callable[[], list[str]]:
    """Lines that went to MMEngine's current logger."""
    file = tmp_path / 'mmengine.log'
    MMLogger.get_instance(uuid.uuid4().hex, log_file=str(file))
    return lambda: file.read_text().splitlines()


# --- files of each kind ------------------------------------------------------------------------


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
        'model': {k: v + 1 for k, v in raw.items()},
        'model_ema': raw,
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


KINDS = {
    'release': ('repnext_m0_distill_300e.pth', save_release, "658|671 tensors under 'model'"),
    'timm': ('a.pth.tar', functools.partial(save_timm, with_ema=False), "under 'state_dict'"),
    'timm EMA': ('b.pth.tar', functools.partial(save_timm, with_ema=True), "'state_dict_ema'"),
    'upstream run': ('checkpoint_best.pth', save_upstream_run, "under 'model_ema'"),
    'MMDetection 2.28': ('coco.pth', save_mm2, "prefix 'backbone.'"),
    'MMEngine': ('epoch_1.pth', save_mm3, "prefix 'backbone.'"),
    'safetensors': ('model.safetensors', save_safetensors, 'safetensors file'),
    'bare': ('bare.pth', save_bare, '657 tensors'),
    'bare, legacy format': ('old.pth', functools.partial(save_bare, legacy=True), '657 tensors'),
    'bare, DDP': ('ddp.pth', functools.partial(save_bare, prefix='module.'), "'module.'"),
    'bare, compiled': (
        'compiled.pth',
        functools.partial(save_bare, prefix='_orig_mod.'),
        "'_orig_mod.'",
    ),
    'bare, DDP detector': (
        'ddp_detector.pth',
        functools.partial(save_bare, prefix='module.backbone.'),
        "'module.backbone.'",
    ),
}


@pytest.mark.parametrize('filename, save, said', KINDS.values(), ids=KINDS)
def test_every_kind_loads(
    filename: str,
    save: Callable[[Path], Path],
    said: str,
    tmp_path: Path,
    log: Callable[[], list[str]],
) -> None:
    model = RepNeXt('m0')
    report = load_pretrained(model, save(tmp_path / filename))
    assert_holds(model, state_of())
    assert len(report.match.matched) == 657
    assert report.complete
    assert report.match.ratio == 1
    lines = [line for line in log() if filename in line]
    assert len(lines) == 1
    assert '657 matched, 0 missing, 0 unexpected' in lines[0]
    assert re.search(said, lines[0]), lines[0]


def test_what_is_ignored_is_said(tmp_path: Path) -> None:
    report = load_pretrained(RepNeXt('m0'), save_release(tmp_path / 'a.pth'))
    assert report.match.ignored == {'head': 14}
    report = load_pretrained(RepNeXt('m0'), save_mm2(tmp_path / 'b.pth'))
    assert report.match.ignored == {'neck': 1, 'rpn_head': 1, 'roi_head': 2}
    assert 'ignored: neck 1, rpn_head 1, roi_head 2' in str(report)


@pytest.mark.parametrize('mark', [b'\x80\x01', b'PK'])
def test_safetensors_are_told_by_more_than_their_first_bytes(mark: bytes, tmp_path: Path) -> None:
    """The file begins with the length of its header, which may look like a pickle or a zip."""
    from safetensors.torch import save_file

    path = tmp_path / 'model.safetensors'
    length = int.from_bytes(mark, 'little')
    for padding in range(max(0, length - 200), length):
        save_file({'w': torch.ones(2)}, path, metadata={'padding': 'x' * padding})
        if path.read_bytes().startswith(mark):
            break
    assert path.read_bytes().startswith(mark)
    weights = read_weights(path)
    assert weights.kind == 'safetensors file'
    assert weights.tensors['w'].tolist() == [1, 1]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_load(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state_of().items()}
    torch.save(state, tmp_path / 'half.pth')
    model = RepNeXt('m0')
    load_pretrained(model, tmp_path / 'half.pth')
    assert_holds(model, state)
    assert model.stem.stem[0].conv.weight.dtype is torch.float32


def test_file_without_batch_counters_loads(tmp_path: Path) -> None:
    state = {k: v for k, v in state_of().items() if not k.endswith('num_batches_tracked')}
    torch.save(state, tmp_path / 'a.pth')
    model = RepNeXt('m0')
    report = load_pretrained(model, tmp_path / 'a.pth')
    assert report.complete
    assert_holds(model, model.state_dict() | state)


@pytest.mark.parametrize(
    'name',
    [
        'repnext_m0',
        'repnext_m0e',
        'recnext_m0',
        'recnext_a0',
        'recnext_t',
        'recnext_t_share_channel',
    ],
)
def test_published_key_lists_load(name: str, tmp_path: Path) -> None:
    """Files with exactly the published names, classifier included."""
    fixture = json.loads((DATA / 'parity' / f'{name}.json').read_text())
    shapes = fixture['state_dict'] | fixture['classifier_keys']
    torch.save({'model': {k: torch.ones(shape) for k, shape in shapes.items()}}, tmp_path / 'a.pth')
    family, arch = name.split('_', 1)
    model = dict(repnext=RepNeXt, recnext=RecNeXt)[family](arch)
    report = load_pretrained(model, tmp_path / 'a.pth')
    assert report.complete
    assert len(report.match.matched) == len(fixture['state_dict'])
    assert report.match.ignored == {'head': len(fixture['classifier_keys'])}


@pytest.mark.compat
@pytest.mark.parametrize('norm', ['BN', 'SyncBN'])
def test_init_cfg(norm: str, tmp_path: Path) -> None:
    path = save_mm2(tmp_path / 'a.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(path), prefix='backbone.')
    model = RepNeXt('m0', norm_cfg=dict(type=norm), init_cfg=init_cfg)
    model.init_weights()
    assert_holds(model, state_of())


@pytest.mark.compat
def test_init_cfg_allows_partial(tmp_path: Path) -> None:
    stem = {k: v for k, v in state_of().items() if k.startswith('stem')}
    torch.save(stem, tmp_path / 'stem.pth')
    cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'stem.pth'))
    with pytest.raises(CheckpointError, match='allow_partial'):
        RepNeXt('m0', init_cfg=cfg).init_weights()
    model = RepNeXt('m0', init_cfg=dict(cfg, allow_partial=True))
    rest = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith('stem')}
    model.init_weights()
    assert_holds(model, stem | rest)


# --- fused files -------------------------------------------------------------------------------


def upstream_fused_keys(training: list[str]) -> set[str]:
    """Names after the published fuse(): branches merged, each conv + norm pair one convolution,
    RecNeXt's two convolutions and identity one too.

    Norms of their own stay; the strip pair of conv_l stays.
    """
    merged = set()
    for key in training:
        key = re.sub(r'\.(conv_s|conv_m)\.conv_\w+\.', r'.\1.', key)
        if '.rep_mixer.' in key:
            merged |= {
                re.sub(r'(\.rep_mixer)\..*', rf'\1.{kind}', key) for kind in ('weight', 'bias')
            }
            continue
        key = re.sub(r'\.conv\.(weight|bias)$', r'.\1', key)
        paired = re.sub(r'\.norm\.\w+$', '.conv.weight', key) in training
        if key.endswith('.num_batches_tracked') and paired:
            continue
        if paired:
            key = re.sub(r'\.norm\.\w+$', '.bias', key)
        merged.add(key)
    return merged


@pytest.mark.parametrize('arch', ['m0', 'm0e'])
def test_fused_keys_are_upstreams(arch: str) -> None:
    assert set(fused_state(arch)) == upstream_fused_keys(list(state_of(arch)))


@pytest.mark.parametrize(
    'deploy, script', [('upstream', True), ('upstream', False), (True, True), ('single', True)]
)
def test_fused_archive_loads_into_fused_models(
    deploy: str | bool, script: bool, tmp_path: Path
) -> None:
    path = tmp_path / 'repnext_m0_distill_300e_fused.pt'
    tree = Tree.of(fused_classifier())
    (torch.jit.script(tree) if script else torch.jit.trace(tree, torch.zeros(1))).save(str(path))
    model = RepNeXt('m0', deploy=deploy).eval()
    report = load_pretrained(model, path)
    assert report.complete
    assert report.match.ignored == {'head': 2}
    assert ('fused on loading' in str(report)) == (deploy != 'upstream')
    expected = fused_state(plan='full' if deploy is True else str(deploy))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])


@pytest.mark.parametrize('deploy', ['upstream', True, 'single'])
def test_training_checkpoint_is_fused_into_fused_models(
    deploy: str | bool, tmp_path: Path, log: Callable[[], list[str]]
) -> None:
    model = RepNeXt('m0', deploy=deploy).eval()
    report = load_pretrained(model, save_release(tmp_path / 'a.pth'))
    assert 'training form, fused on loading' in log()[-1]
    assert len(report.match.matched) == 657
    image = torch.randn(1, 3, 64, 64)
    outs = zip(model(image), network()(image), strict=True)
    for i, (actual, expected) in enumerate(outs):
        if deploy == 'single':  # differs on the border rows; that it is close is enough here
            assert (actual - expected).abs().mean() < 0.1 * expected.std(), i
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_fusing_on_loading_uses_the_models_epsilon(tmp_path: Path) -> None:
    norm_cfg = dict(type='BN', eps=0.1)
    reference = RepNeXt('m0', norm_cfg=norm_cfg)
    reference.load_state_dict(state_of())
    model = RepNeXt('m0', norm_cfg=norm_cfg, deploy=True).eval()
    load_pretrained(model, save_bare(tmp_path / 'a.pth'))
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(image)[-1], reference.eval()(image)[-1], rtol=1e-4, atol=1e-4)


def test_fused_state_dict_loads_where_it_came_from(tmp_path: Path) -> None:
    state = fused_state(plan='full')
    torch.save({'state_dict': under('backbone.', state)}, tmp_path / 'fused.pth')
    model = RepNeXt('m0', deploy=True)
    report = load_pretrained(model, tmp_path / 'fused.pth')
    assert_holds(model, state)
    assert report.match.prefix == 'backbone.'
    single = RepNeXt('m0', deploy='single')
    assert 'fused on loading' in str(load_pretrained(single, tmp_path / 'fused.pth'))


@pytest.mark.parametrize(
    'plan, deploy, fix',
    [
        ('upstream', False, "RepNeXt(arch='m0', deploy='upstream')"),
        ('full', False, "RepNeXt(arch='m0', deploy=True)"),
        ('full', 'upstream', "RepNeXt(arch='m0', deploy=True)"),
    ],
)
def test_fused_too_far(plan: str, deploy: str | bool, fix: str, tmp_path: Path) -> None:
    torch.save(fused_state(plan=plan), tmp_path / 'fused.pth')
    refuse(tmp_path / 'fused.pth', fix, model=RepNeXt('m0', deploy=deploy))


def test_fused_archive_into_a_training_model_names_the_fix(tmp_path: Path) -> None:
    path = save_torchscript(tmp_path / 'fused.pt', fused_classifier())
    refuse(path, 'fused', "deploy='upstream'", 'training checkpoint')


def test_code_in_an_archive_does_not_run(tmp_path: Path) -> None:
    """torch.jit.load would run `__setstate__`; this one creates a file."""
    marker = tmp_path / 'ran'

    class Hostile(nn.Module):
        def __init__(self, path: str) -> None:
            super().__init__()
            self.path = path

        def forward(self, x: Tensor) -> Tensor:
            return x

        @torch.jit.export
        def __getstate__(self) -> tuple[str, bool]:
            return self.path, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[str, bool]) -> None:
            self.path = state[0]
            # Used, or the compiler would drop the call.
            self.training = torch.from_file(self.path, shared=True, size=8).numel() > 0

    tree = Tree.of(fused_state())
    tree.add_module('hostile', Hostile(str(marker)))
    path = tmp_path / 'hostile.pt'
    torch.jit.script(tree).save(str(path))
    model = RepNeXt('m0', deploy='upstream')
    load_pretrained(model, path)
    assert_holds(model, fused_state())
    assert not marker.exists()
    torch.jit.load(str(path))
    assert marker.exists(), 'the file was not hostile, so that this test showed nothing'


def test_hostile_pickle_in_an_archive_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / 'ran'
    good = save_torchscript(tmp_path / 'good.pt', fused_state())
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(tmp_path / 'bad.pt', 'w') as target:
        for name in source.namelist():
            evil = name.endswith('/data.pkl')
            target.writestr(name, pickle.dumps(Evil(marker), 2) if evil else source.read(name))
    refuse(tmp_path / 'bad.pt', 'without any tensor', model=RepNeXt('m0', deploy='upstream'))
    assert not marker.exists()


# --- which arch it is --------------------------------------------------------------------------


@pytest.mark.parametrize('file_arch, model_arch', [('m4', 'm3'), ('m3', 'm4'), ('m0', 'm0e')])
def test_wrong_arch_names_the_right_one(file_arch: str, model_arch: str, tmp_path: Path) -> None:
    """All of m3's keys are in m4 with equal shapes, so each must be told from the other."""
    torch.save({'model': RepNeXt(file_arch).state_dict()}, tmp_path / 'a.pth')
    text = refuse(tmp_path / 'a.pth', f"RepNeXt(arch='{model_arch}')", model=RepNeXt(model_arch))
    assert text.endswith(f"it fits RepNeXt(arch='{file_arch}').")


def test_wrong_arch_inside_a_detector(tmp_path: Path) -> None:
    torch.save({'state_dict': under('backbone.', RepNeXt('m2').state_dict())}, tmp_path / 'a.pth')
    refuse(tmp_path / 'a.pth', "fits RepNeXt(arch='m2')")


def test_wrong_arch_of_a_fused_file(tmp_path: Path) -> None:
    torch.save(fused_state('m0'), tmp_path / 'a.pth')
    refuse(tmp_path / 'a.pth', "build RepNeXt(arch='m0', deploy='upstream')", model=RepNeXt('m1'))


def test_custom_arch(tmp_path: Path) -> None:
    arch = dict(channels=(8, 16, 32, 64), depths=(1, 1, 1, 1))
    small = randomise(RepNeXt(arch))
    torch.save(small.state_dict(), tmp_path / 'a.pth')
    model = RepNeXt(arch)
    load_pretrained(model, tmp_path / 'a.pth')
    assert_holds(model, dict(small.state_dict()))
    load_pretrained(RepNeXt(arch, deploy=True), tmp_path / 'a.pth')
    torch.save(reparameterize(small.eval(), 'upstream').state_dict(), tmp_path / 'b.pth')
    refuse(tmp_path / 'b.pth', "RepNeXt(arch=dict(...), deploy='upstream')", model=model)


def test_another_network_fits_nothing(tmp_path: Path) -> None:
    import timm

    torch.save(timm.create_model('resnet10t').state_dict(), tmp_path / 'resnet.pth')
    refuse(tmp_path / 'resnet.pth', '0 of', 'no network of this package', 'conv1')


def test_threshold_is_99_percent_of_both(tmp_path: Path) -> None:
    state = state_of()
    weights = [k for k in state if not k.endswith('num_batches_tracked')]
    spare = {f'stages.0.extra.{i}': torch.zeros(1) for i in range(7)}
    report = load_pretrained(RepNeXt('m0'), _saved(tmp_path / 'a.pth', drop(state, weights[:6])))
    assert 0.99 <= report.match.ratio < 1
    assert report.match.missing == weights[:6]
    refuse(
        _saved(tmp_path / 'b.pth', drop(state, weights[:7])), '650 of 657 keys match', '7 missing'
    )
    refuse(_saved(tmp_path / 'c.pth', state | spare), '657 of 664 keys match', '7 unexpected')
    reshaped = {k: torch.zeros(2, 2) for k in weights[:7]}
    refuse(_saved(tmp_path / 'd.pth', state | reshaped), '650 of 657', '7 of another shape')


def test_incomplete_load_is_a_warning_that_names_the_keys(
    tmp_path: Path, log: Callable[[], list[str]]
) -> None:
    state = drop(state_of(), ['stem.stem.0.conv.weight']) | {'stem.extra': torch.zeros(1)}
    load_pretrained(RepNeXt('m0'), _saved(tmp_path / 'a.pth', state))
    line = log()[-1]
    assert 'WARNING' in line
    assert '656 matched, 1 missing (stem.stem.0.conv.weight), 1 unexpected (stem.extra)' in line


def drop(state: State, names: list[str]) -> State:
    return {k: v for k, v in state.items() if k not in names}


def _saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_allow_partial_loads_what_matches(tmp_path: Path, log: Callable[[], list[str]]) -> None:
    model = RepNeXt('m1')
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = load_pretrained(model, save_release(tmp_path / 'a.pth'), allow_partial=True)
    assert 0 < len(report.match.matched) < 100
    assert_holds(model, before | {k: state_of()[k] for k in report.match.matched})
    assert 'WARNING' in log()[-1]
    torch.save({'other.weight': torch.zeros(1)}, tmp_path / 'b.pth')
    refuse(tmp_path / 'b.pth', '0 of', model=model, allow_partial=True)


def test_prefix(tmp_path: Path) -> None:
    student, teacher = state_of(), {k: v + 1 for k, v in state_of().items()}
    path = _saved(tmp_path / 'a.pth', under('student.', student) | under('teacher.', teacher))
    refuse(path, "'student.' and 'teacher.'", 'prefix=')
    model = RepNeXt('m0')
    for prefix in ('teacher', 'teacher.'):
        report = load_pretrained(model, path, prefix=prefix)
        assert_holds(model, teacher)
    assert report.match.ignored == {'student': 657}
    refuse(path, "prefix='backbone.'", "'student', 'teacher'", prefix='backbone')


def test_larger_network_beside_it_is_not_taken(tmp_path: Path) -> None:
    state = under('teacher.', RepNeXt('m4').state_dict()) | under('student.', state_of('m3'))
    model = RepNeXt('m3')
    report = load_pretrained(model, _saved(tmp_path / 'a.pth', state))
    assert report.match.prefix == 'student.'
    assert_holds(model, state_of('m3'))


# --- files that are not what they should be ----------------------------------------------------


class Evil:
    """Unpickling this without protection creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f'touch "{self.marker}"',)


def save_evil(path: Path, legacy: bool = False) -> Path:
    content = {'model': state_of(), 'x': Evil(path.with_name('ran'))}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def save_plain_pickle(path: Path) -> Path:
    path.write_bytes(pickle.dumps({'model': Evil(path.with_name('ran'))}, protocol=4))
    return path


def save_whole_model(path: Path) -> Path:
    torch.save(network(), path)
    return path


def save_cut(path: Path, legacy: bool = False, keep: float = 0.6) -> Path:
    save_bare(path, legacy=legacy)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def save_cut_safetensors(path: Path) -> Path:
    save_safetensors(path)
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def save_cut_archive(path: Path) -> Path:
    save_torchscript(path, fused_state())
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def save_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


HTML = b'\n<!DOCTYPE html><html><body>404: Not Found</body></html>'
LFS = b'version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 8457344\n'


def save_tar(path: Path) -> Path:
    with tarfile.open(path, 'w') as tar:
        tar.add(save_bare(path.with_name('inner.pth')), 'inner.pth')
    return path


def save_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, 'w') as archive:
        archive.write(save_bare(path.with_name('inner.pth')), 'weights/inner.pth')
    return path


def save_quantised(path: Path) -> Path:
    state = state_of()
    state['stem.stem.0.conv.weight'] = state['stem.stem.0.conv.weight'].to(torch.int8)
    torch.save(state, path)
    return path


def save_sparse(path: Path) -> Path:
    state = state_of()
    state['stem.stem.0.conv.weight'] = state['stem.stem.0.conv.weight'].to_sparse()
    torch.save(state, path)
    return path


BROKEN: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...]]] = {
    'runs code': ('a.pth', save_evil, ('posix.system', 'run code', 'state_dict()')),
    'runs code, legacy': (
        'a.pth',
        functools.partial(save_evil, legacy=True),
        ('posix.system', 'run code'),
    ),
    'runs code, plain pickle': ('a.pkl', save_plain_pickle, ('damaged or not a weight file',)),
    'whole model': ('a.pth', save_whole_model, ('RepNeXt', 'run code', 'state_dict()')),
    'cut short': ('a.pth', save_cut, ('cut short', 'fetch it again')),
    'cut short, legacy': ('a.pth', functools.partial(save_cut, legacy=True), ('cut short',)),
    'cut shorter, legacy': (
        'a.pth',
        functools.partial(save_cut, legacy=True, keep=0.001),
        ('cut short',),
    ),
    'cut short, safetensors': ('a.safetensors', save_cut_safetensors, ('cut short',)),
    'cut short, TorchScript': ('a.pt', save_cut_archive, ('cut short',)),
    'empty': ('a.pth', functools.partial(save_bytes, data=b''), ('is empty',)),
    'web page': ('a.pth', functools.partial(save_bytes, data=HTML), ('web page',)),
    'LFS pointer': ('a.pth', functools.partial(save_bytes, data=LFS), ('git lfs pull',)),
    'text': (
        'a.pth',
        functools.partial(save_bytes, data=b'{"message": "Not Found"}'),
        ('not a weight file',),
    ),
    'gzip': (
        'a.pth',
        functools.partial(save_bytes, data=gzip.compress(b'weights')),
        ('not a weight file',),
    ),
    'tar': ('a.pth.tar', save_tar, ('tar archive', 'unpack')),
    'zip': ('a.pth', save_zip, ('zip archive', 'unpack')),
    'no weights': (
        'a.pth',
        lambda path: torch.save({'epoch': 1, 'lr': 0.1}, path),
        ('no weights', "'epoch', 'lr'", "'state_dict'"),
    ),
    'a tensor': ('a.pth', lambda path: torch.save(torch.zeros(1), path), ('it is a Tensor',)),
    'quantised': ('a.pth', save_quantised, ('stem.stem.0.conv.weight', 'int8')),
    'sparse': ('a.pth', save_sparse, ('stem.stem.0.conv.weight', 'sparse')),
    'missing': ('a.pth', lambda path: None, ('there is no file',)),
    'a folder': ('a.pth', Path.mkdir, ('is a folder',)),
}


@pytest.mark.parametrize('filename, save, fragments', BROKEN.values(), ids=BROKEN)
def test_broken_file(
    filename: str, save: Callable[[Path], object], fragments: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / filename
    save(path)
    refuse(path, filename, *fragments)
    assert not (tmp_path / 'ran').exists()


def test_evil_files_are_evil(tmp_path: Path) -> None:
    """The files above do run code where nothing protects from it."""
    for save in (save_evil, functools.partial(save_evil, legacy=True)):
        torch.load(save(tmp_path / 'a.pth'), weights_only=False)
        assert (tmp_path / 'ran').exists()
        (tmp_path / 'ran').unlink()
    pickle.loads(save_plain_pickle(tmp_path / 'a.pkl').read_bytes())
    assert (tmp_path / 'ran').exists()


def test_reading_allows_nothing_for_others(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    path = save_timm(tmp_path / 'a.pth.tar', with_ema=False)
    read_weights(path)
    assert set(torch.serialization.get_safe_globals()) == before
    # What the user allowed stays allowed.
    entry = (argparse.Namespace, 'argparse.Namespace')
    with torch.serialization.safe_globals([entry]):
        read_weights(path)
        assert entry in torch.serialization.get_safe_globals()


def test_non_finite_weights_are_loaded_with_a_warning(
    tmp_path: Path, log: Callable[[], list[str]]
) -> None:
    state = state_of()
    state['stem.stem.0.conv.weight'][0] = torch.nan
    state['stem.stem.2.norm.running_var'][0] = torch.inf
    report = load_pretrained(RepNeXt('m0'), _saved(tmp_path / 'a.pth', state))
    assert report.non_finite == ['stem.stem.0.conv.weight', 'stem.stem.2.norm.running_var']
    assert 'NaN or infinity in 2 tensors (stem.stem.0.conv.weight, ' in log()[-1]


def test_load_pretrained_wants_the_backbone(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r'detector\.backbone'):
        load_pretrained(nn.Linear(1, 1), tmp_path)  # type: ignore[arg-type]


def test_a_run_needs_a_torch_checkpoint(tmp_path: Path) -> None:
    path = save_torchscript(tmp_path / 'a.pt', fused_state())
    with pytest.raises(CheckpointError, match='TorchScript archive, which a run cannot start'):
        read_run(path)
    # What MMEngine itself would refuse, our own reader's wider allow-list must not let through.
    with pytest.raises(CheckpointError, match=r'argparse\.Namespace'):
        read_run(save_timm(tmp_path / 'b.pth.tar', with_ema=False))
    assert read_run(save_mm2(tmp_path / 'c.pth')).path == str(tmp_path / 'c.pth')


# --- names, URLs, paths ------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """A release page on loopback; counts what it is asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.claim_more = 0
        self.delay = 0.0

    def url(self, path: str) -> str:
        return f'http://127.0.0.1:{self.server_port}{path}'


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        time.sleep(self.server.delay)
        body = self.server.files.get(self.path)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header('Content-Length', str(len(body) + self.server.claim_more))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A torch.hub folder of the test's own."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch_home'))
    return tmp_path / 'torch_home' / 'hub' / 'checkpoints'


def cached(cache: Path) -> list[str]:
    """Files in the cache, without the locks that stay there."""
    return sorted(p.name for p in cache.iterdir() if not p.name.endswith('.lock'))


@pytest.fixture
def release(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    """The server holds the release files of m0, and the published names point there."""
    files = {
        'repnext_m0_distill_300e': save_release,
        'repnext_m0_distill_300e_fused': lambda p: save_torchscript(p, fused_classifier()),
        'repnext_m0_sz224_4xbs512_ep300': functools.partial(save_timm, with_ema=True),
    }
    for name, save in files.items():
        row = PUBLISHED[name]
        save(tmp_path / row.filename)
        server.files[f'/v1.0/{row.filename}'] = (tmp_path / row.filename).read_bytes()
        url = server.url(f'/v1.0/{row.filename}')
        monkeypatch.setitem(PUBLISHED, name, replace(row, url=url))
    return server


def test_published_names() -> None:
    """The names and addresses that the projects' READMEs link, and timm's table."""
    github = 'https://github.com/suous/{}/releases/download/{}'
    hub = 'https://huggingface.co/{}/resolve/main/model.safetensors'
    urls = {
        'repnext_m4_distill_300e': github.format('RepNeXt', 'v1.0/repnext_m4_distill_300e.pth'),
        'recnext_m1_without_distill_300e_fused': github.format(
            'RecNeXt', 'v1.0/recnext_m1_without_distill_300e_fused.pt'
        ),
        'recnext_s_share_channel_distill_300e': github.format(
            'RecNeXt', 'v2.0/recnext_s_share_channel_distill_300e.pth'
        ),
        'recnext_m5_ade20k': github.format('RecNeXt', 'v1.0/recnext_m5_ade20k.pth'),
        'recnext_a3_coco': github.format('RecNeXt', 'v2.0/recnext_a3_coco.pth'),
        'recnext_a0.dist_300e_in1k': hub.format('suous/recnext_a0.dist_300e_in1k'),
        'recnext_b_share_channel.base_300e_in1k': hub.format(
            'suous/recnext_b_share_channel.base_300e_in1k'
        ),
        'inception_next_tiny.sail_in1k': hub.format('timm/inception_next_tiny.sail_in1k'),
        'inception_next_base.sail_in1k_384': hub.format('timm/inception_next_base.sail_in1k_384'),
    }
    for name, url in urls.items():
        assert PUBLISHED[name].url == url
    assert PUBLISHED['repnext_m5_distill_300e_fused'].plan == 'upstream'
    assert PUBLISHED['recnext_t_distill_300e_fused'].plan == 'upstream'
    names = {row.filename for row in PUBLISHED.values()}
    assert {
        'repnext_m0_distill_300e_fused.pt',
        'repnext_m2_sz224_4xbs512_ep300.pth.tar',
        'repnext_m1_sz224_4xbs256_ep300_distill.pth.tar',
        'repnext_m3_coco.pth',
        'repnext_m5_ade20k.pth',
        'recnext_a0.dist_300e_in1k.safetensors',
    } <= names
    repnext = 6 + 6 + 3 + 3 + 3 + 3
    # 18 variants with and without distillation: trained, fused, on the hub; then 6 for each task.
    recnext = 18 * 2 * 3 + 2 * 6
    assert len(names) == len({row.url for row in PUBLISHED.values()}) == len(PUBLISHED)
    assert len(PUBLISHED) == repnext + recnext + 5
    families = {f.__name__: f for f in (RepNeXt, RecNeXt, InceptionNeXt)}
    for name, row in PUBLISHED.items():
        assert row.arch in families[row.family].arch_zoo
        assert f'next_{row.arch}' in name


def test_timm_publishes_what_is_listed_of_it() -> None:
    import timm

    theirs = set(timm.list_pretrained('inception_next*'))
    assert theirs == {n for n, row in PUBLISHED.items() if row.family == 'InceptionNeXt'}


@pytest.mark.parametrize(
    'name, deploy',
    [
        ('repnext_m0_distill_300e', False),
        ('repnext_m0_distill_300e', True),
        ('repnext_m0_distill_300e_fused', 'upstream'),
        ('repnext_m0_sz224_4xbs512_ep300', False),
    ],
)
def test_published_name_is_downloaded_once(
    name: str, deploy: str | bool, release: Server, cache: Path
) -> None:
    for _ in range(2):
        model = RepNeXt('m0', deploy=deploy, init_cfg=dict(type='Pretrained', checkpoint=name))
        model.init_weights()
    plan = 'full' if deploy is True else deploy
    expected = fused_state(plan=plan) if plan else state_of()  # type: ignore[arg-type]
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[key])
    assert release.asked == [f'/v1.0/{PUBLISHED[name].filename}']
    assert cached(cache) == [PUBLISHED[name].filename]


def test_published_name_of_another_arch_is_not_even_downloaded(release: Server) -> None:
    refuse(
        'repnext_m0_distill_300e',
        "holds RepNeXt(arch='m0')",
        'repnext_m3_distill_300e',
        model=RepNeXt('m3'),
    )
    refuse('repnext_m0_distill_300e_fused', "deploy='upstream'", 'repnext_m0_distill_300e')
    assert release.asked == []


def test_unknown_name_gets_the_closest_and_its_siblings() -> None:
    text = refuse('repnext_m4_distil_300', "did you mean 'repnext_m4_distill_300e'", '--list')
    assert all(name in text for name in PUBLISHED if name.startswith('repnext_m4_'))
    refuse('repnext-m4', "did you mean 'repnext_m4")
    refuse('recnext_a3.dist_300e', "did you mean 'recnext_a3.dist_300e_in1k'")


def test_path_that_looks_published_says_so(tmp_path: Path) -> None:
    refuse(
        tmp_path / 'repnext_m4_distill_300e.pth',
        str(tmp_path),
        "checkpoint='repnext_m4_distill_300e' downloads it",
    )


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_bare(tmp_path / 'my weights.pth')
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for text in (path, str(path), path.as_uri(), '~/my weights.pth', 'my weights.pth'):
        assert fetch(text).path.samefile(path)
    refuse('s3://bucket/a.pth', 's3://', 'http, https or file')


def test_url(server: Server, cache: Path, tmp_path: Path) -> None:
    server.files['/a/w.pth'] = save_release(tmp_path / 'a.pth').read_bytes()
    server.files['/b/w.pth'] = save_bare(tmp_path / 'b.pth', 'module.').read_bytes()
    for _ in range(2):
        for path in ('/a/w.pth', '/b/w.pth'):
            model = RepNeXt('m0')
            report = load_pretrained(model, server.url(path))
            assert_holds(model, state_of())
    assert report.match.prefix == 'module.'
    assert server.asked == ['/a/w.pth', '/b/w.pth']
    assert len(cached(cache)) == 2
    assert all(name.endswith('-w.pth') for name in cached(cache))


def flip_a_byte(data: bytes) -> bytes:
    """Damage one weight, which no parser notices."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        info = max(archive.infolist(), key=lambda info: info.file_size)
    at = info.header_offset + 1000
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    'body, fragment',
    [
        (lambda data: None, '404'),
        (lambda data: HTML, 'web page'),
        (lambda data: b'', 'empty'),
        (lambda data: data[: len(data) // 2], 'cut short'),
        (flip_a_byte, 'checksum'),
    ],
    ids=['404', 'web page', 'empty', 'cut', 'damaged'],
)
def test_bad_download_is_not_kept(
    body: Callable[[bytes], bytes | None],
    fragment: str,
    server: Server,
    cache: Path,
    tmp_path: Path,
) -> None:
    good = save_bare(tmp_path / 'a.pth').read_bytes()
    bad = body(good)
    if bad is not None:
        server.files['/w.pth'] = bad
    refuse(server.url('/w.pth'), server.url('/w.pth'), fragment)
    assert cached(cache) == []
    server.files['/w.pth'] = good
    model = RepNeXt('m0')
    load_pretrained(model, server.url('/w.pth'))
    assert_holds(model, state_of())


@pytest.mark.parametrize('legacy', [False, True])
def test_connection_lost_on_the_way(
    legacy: bool, server: Server, cache: Path, tmp_path: Path
) -> None:
    data = save_bare(tmp_path / 'a.pth', legacy=legacy).read_bytes()
    server.files['/w.pth'] = data[:-5000]
    server.claim_more = 5000
    refuse(server.url('/w.pth'), server.url('/w.pth'))
    assert cached(cache) == []


def test_hostile_download_is_not_kept(server: Server, cache: Path, tmp_path: Path) -> None:
    server.files['/w.pth'] = save_evil(tmp_path / 'a.pth').read_bytes()
    refuse(server.url('/w.pth'), 'posix.system')
    assert cached(cache) == []
    assert not (tmp_path / 'ran').exists()


def test_no_server(server: Server, cache: Path) -> None:
    url = server.url('/w.pth')
    server.shutdown()
    server.server_close()
    refuse(url, url, 'refused', str(cache))


def test_cache_that_cannot_be_written(server: Server, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text('a file where the folder should be')
    refuse(server.url('/w.pth'), 'could not be fetched', str(cache))
    assert server.asked == []


def test_processes_that_start_together_download_once(release: Server) -> None:
    name = 'repnext_m0_distill_300e'
    release.delay = 0.5
    context = multiprocessing.get_context('fork')
    with context.Pool(3) as pool:
        paths = [file.path for file in pool.map(fetch, [name] * 3, chunksize=1)]
    assert len(set(paths)) == 1
    assert read_weights(paths[0]).tensors.keys() == (state_of() | classifier()).keys()
    assert len(release.asked) == 1


# --- the command -------------------------------------------------------------------------------


def test_command_says_what_a_file_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, 'argv', ['checkpoints', str(save_mm2(tmp_path / 'a.pth'))])
    monkeypatch.delitem(sys.modules, 'repnext_mm.checkpoints.__main__')
    with pytest.raises(SystemExit) as stop:
        runpy.run_module('repnext_mm.checkpoints', run_name='__main__')
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert "torch checkpoint, 661 tensors under 'state_dict'" in output
    assert "fits RepNeXt(arch='m0'): 657 of 657 keys match" in output
    assert "under 'backbone.'" in output


def test_command_lists_the_published_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['--list']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PUBLISHED)
    assert all(row.url in line for line, row in zip(lines, PUBLISHED.values(), strict=True))
    with pytest.raises(SystemExit, match='2'):
        main([])


def test_command_fails_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['repnext_m9']) == 1
    out, err = capsys.readouterr()
    assert out == ''
    assert err.count('\n') == 1
    assert 'did you mean' in err


def test_command_on_a_strange_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({'conv1.weight': torch.zeros(2)}, tmp_path / 'a.pth')
    assert main([str(tmp_path / 'a.pth')]) == 0
    assert 'fits no backbone of this package' in capsys.readouterr().out


# --- the other families ------------------------------------------------------------------------

SMALL = dict(channels=(8, 16, 32, 64), depths=(1, 1, 1, 1))
LARGE = SMALL | dict(series='l', depths=(0, 1, 1, 5))
NETWORKS = {
    'm': functools.partial(RecNeXt, SMALL | dict(series='m')),
    'a': functools.partial(RecNeXt, SMALL | dict(series='a')),
    'l': functools.partial(RecNeXt, LARGE),
    'l, shared channels': functools.partial(
        RecNeXt, LARGE | dict(token_mixer=dict(share_channel=True))
    ),
    'InceptionNeXt': functools.partial(InceptionNeXt, SMALL),
}


def timm_head(width: int = 64) -> State:
    """Heads of InceptionNeXt's classifier in timm."""
    head = nn.Module()
    head.fc1, head.norm, head.fc2 = nn.Linear(width, 8), nn.LayerNorm(8), nn.Linear(8, 5)
    return {f'head.{k}': v.detach() for k, v in head.state_dict().items()}


def save_hub(path: Path, state: State) -> Path:
    """As timm pushes a model to the hub."""
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in state.items()}, path, metadata={'format': 'pt'})
    return path


@pytest.mark.parametrize('kind', ['release', 'MMDetection 2.28', 'hub'])
@pytest.mark.parametrize('network', NETWORKS.values(), ids=NETWORKS)
def test_every_family_loads_every_kind(
    network: Callable[..., nn.Module], kind: str, tmp_path: Path
) -> None:
    state = dict(randomise(network()).state_dict())
    head = timm_head() if network.func is InceptionNeXt else classifier(64)  # type: ignore[attr-defined]
    path = tmp_path / 'weights'
    if kind == 'release':
        torch.save({'model': state | head}, path)
    elif kind == 'hub':
        save_hub(path, state | head)
    else:
        heads = {'neck.lateral_convs.0.conv.weight': torch.ones(4, 4, 1, 1)}
        meta = dict(mmdet_version='2.28.2', iter=np.int64(87960))
        torch.save(
            dict(meta=meta, state_dict=under('backbone.', state) | heads, optimizer=dict()), path
        )
    model = network()
    report = load_pretrained(model, path)
    assert_holds(model, state)
    assert report.complete
    assert report.match.ratio == 1
    expected = {'neck': 1} if kind == 'MMDetection 2.28' else {'head': len(head)}
    assert report.match.ignored == expected


@pytest.mark.parametrize('name', [name for name in NETWORKS if name != 'InceptionNeXt'])
def test_fused_archives_of_recnext_load(name: str, tmp_path: Path) -> None:
    network = NETWORKS[name]
    trained = randomise(network()).eval()
    branches = dict(reparameterize(trained, 'upstream').state_dict())
    assert set(branches) == upstream_fused_keys(list(trained.state_dict()))
    head = {'head.weight': torch.zeros(5, 64), 'head.bias': torch.zeros(5)}
    path = save_torchscript(tmp_path / 'fused.pt', branches | head)

    model = network(deploy='upstream').eval()
    report = load_pretrained(model, path)
    assert_holds(model, branches)
    assert report.complete
    fused = network(deploy=True).eval()
    # T, S and B have no norm but those that upstream folds too.
    norms_left = any(key.endswith('running_mean') for key in branches)
    assert norms_left == (name in ('m', 'a'))
    assert ('fused on loading' in str(load_pretrained(fused, path))) == norms_left
    image = torch.randn(1, 3, 64, 64)
    for actual, expected in zip(fused(image), trained(image), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server stands in for the Hugging Face hub."""
    monkeypatch.setenv('HF_ENDPOINT', server.url('/'))
    return server


def test_hub_names(hub: Server, cache: Path, tmp_path: Path) -> None:
    state = dict(randomise(RecNeXt('m0')).state_dict())
    path = save_hub(tmp_path / 'a', state | classifier())
    address = '/suous/recnext_m0.dist_300e_in1k/resolve/main/model.safetensors'
    hub.files[address] = path.read_bytes()
    name = 'recnext_m0.dist_300e_in1k'
    for spelt in (name, f'suous/{name}', f'hf-hub:suous/{name}', f'hf_hub:suous/{name}'):
        model = RecNeXt('m0')
        load_pretrained(model, spelt)
        assert_holds(model, state)
    assert hub.asked == [address]
    assert cached(cache) == [f'{name}.safetensors']
    refuse(f'timm/{name}', 'there is no file', model=RecNeXt('m0'))
    refuse(name, "holds RecNeXt(arch='m0')", 'recnext_a0.dist_300e_in1k', model=RecNeXt('a0'))
    refuse('recnext_m0.base_300e_in1k', '404', hub.url('/suous/'), model=RecNeXt('m0'))


def test_weights_of_timm_give_the_features_of_timm(
    hub: Server, cache: Path, tmp_path: Path
) -> None:
    import timm

    theirs = randomise(timm.create_model('inception_next_atto', num_classes=5)).eval()
    path = save_hub(tmp_path / 'a', dict(theirs.state_dict()))
    address = '/timm/inception_next_atto.sail_in1k/resolve/main/model.safetensors'
    hub.files[address] = path.read_bytes()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.forward_intermediates(image, intermediates_only=True)
    for name in ('inception_next_atto.sail_in1k', 'inception_next_atto'):
        model = InceptionNeXt('atto', init_cfg=dict(type='Pretrained', checkpoint=name))
        model.init_weights()
        with torch.no_grad():
            for ours, other in zip(model.eval()(image), expected, strict=True):
                torch.testing.assert_close(ours, other)
    assert hub.asked == [address]


@pytest.mark.parametrize(
    'holder, asked, told',
    [
        ((RecNeXt, 'm0'), (RepNeXt, 'm0'), "RecNeXt(arch='m0')"),
        ((RecNeXt, 'a0'), (RecNeXt, 'm0'), "RecNeXt(arch='a0')"),
        ((RecNeXt, 's_share_channel'), (RecNeXt, 's'), "RecNeXt(arch='s_share_channel')"),
        ((InceptionNeXt, 'atto'), (RepNeXt, 'm0'), "InceptionNeXt(arch='atto')"),
    ],
    ids=['RecNeXt for RepNeXt', 'A for M', 'shared channels', 'InceptionNeXt for RepNeXt'],
)
def test_the_right_family_and_arch_are_named(
    holder: tuple, asked: tuple, told: str, tmp_path: Path
) -> None:
    family, arch = holder
    torch.save(family(arch).state_dict(), tmp_path / 'a.pth')
    family, arch = asked
    assert refuse(tmp_path / 'a.pth', model=family(arch)).endswith(f'it fits {told}.')
