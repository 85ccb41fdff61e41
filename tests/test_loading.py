"""Weights of every kind of file, into every family, with a report of what was loaded."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA
from networks import TINY, tiny
from torch import nn
from weight_files import (
    assert_holds,
    classifier,
    drop,
    refuse,
    save_bare,
    save_hub,
    save_mm2,
    save_mm3,
    save_release,
    save_safetensors,
    save_timm,
    save_upstream_run,
    saved,
    state_of,
    timm_head,
    under,
)

from repnext_mm import InceptionNeXt, RecNeXt, RepNeXt
from repnext_mm.checkpoints import (
    CheckpointError,
    load_pretrained,
    read_weights,
)

KINDS = {
    'release': ('repnext_m0_distill_300e.pth', save_release, "658|671 tensors under 'model'"),
    'timm': ('a.pth.tar', functools.partial(save_timm, with_ema=False), "under 'state_dict'"),
    'timm EMA': ('b.pth.tar', functools.partial(save_timm, with_ema=True), "'state_dict_ema'"),
    'upstream run': ('checkpoint_best.pth', save_upstream_run, "under 'model', not those"),
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


def test_another_container_is_chosen_by_name(tmp_path: Path) -> None:
    path = save_upstream_run(tmp_path / 'checkpoint_best.pth')
    model = RepNeXt(
        'm0', init_cfg=dict(type='Pretrained', checkpoint=str(path), container='model_ema')
    )
    model.init_weights()
    assert_holds(model, {k: v + 1 for k, v in state_of().items()})
    with pytest.raises(CheckpointError, match="container='ema'; it has 'model', 'model_ema'"):
        load_pretrained(model, path, container='ema')
    with pytest.raises(CheckpointError, match='safetensors file, which has no container'):
        load_pretrained(model, save_safetensors(tmp_path / 'a.safetensors'), container='model')


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


@pytest.mark.parametrize('kind', ['release', 'MMDetection 2.28', 'hub'])
@pytest.mark.parametrize('name', [name for name in TINY if not name.startswith('repnext')])
def test_every_family_loads_every_kind(name: str, kind: str, tmp_path: Path) -> None:
    family, arch = TINY[name]
    state = dict(tiny(name).state_dict())
    head = timm_head() if family is InceptionNeXt else classifier(64)
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
    model = family(arch)
    report = load_pretrained(model, path)
    assert_holds(model, state)
    assert report.complete
    assert report.match.ratio == 1
    expected = {'neck': 1} if kind == 'MMDetection 2.28' else {'head': len(head)}
    assert report.match.ignored == expected


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


def test_allow_partial_loads_what_matches(tmp_path: Path, log: Callable[[], list[str]]) -> None:
    model = RepNeXt('m1')
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = load_pretrained(model, save_release(tmp_path / 'a.pth'), allow_partial=True)
    assert 0 < len(report.match.matched) < 100
    assert_holds(model, before | {k: state_of()[k] for k in report.match.matched})
    assert 'WARNING' in log()[-1]
    torch.save({'other.weight': torch.zeros(1)}, tmp_path / 'b.pth')
    refuse(tmp_path / 'b.pth', '0 of', model=model, allow_partial=True)


def test_incomplete_load_is_a_warning_that_names_the_keys(
    tmp_path: Path, log: Callable[[], list[str]]
) -> None:
    state = drop(state_of(), ['stem.stem.0.conv.weight']) | {'stem.extra': torch.zeros(1)}
    load_pretrained(RepNeXt('m0'), saved(tmp_path / 'a.pth', state))
    line = log()[-1]
    assert 'WARNING' in line
    assert '656 matched, 1 missing (stem.stem.0.conv.weight), 1 unexpected (stem.extra)' in line


def test_non_finite_weights_are_loaded_with_a_warning(
    tmp_path: Path, log: Callable[[], list[str]]
) -> None:
    state = state_of()
    state['stem.stem.0.conv.weight'][0] = torch.nan
    state['stem.stem.2.norm.running_var'][0] = torch.inf
    report = load_pretrained(RepNeXt('m0'), saved(tmp_path / 'a.pth', state))
    assert report.non_finite == ['stem.stem.0.conv.weight', 'stem.stem.2.norm.running_var']
    assert 'NaN or infinity in 2 tensors (stem.stem.0.conv.weight, ' in log()[-1]


def test_load_pretrained_wants_the_backbone(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r'detector\.backbone'):
        load_pretrained(nn.Linear(1, 1), tmp_path)  # type: ignore[arg-type]
