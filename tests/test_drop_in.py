"""Every family in models of mmdet and mmseg themselves: only backbone and channels change."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from mm_models import SAMPLE, build, sample_batch, sample_data, train_and_predict
from mmengine.config import Config

from repnext_mm import InceptionNeXt, RecNeXt, RepNeXt
from repnext_mm.backbones import PyramidBackbone

#: Every family in a detector and in a segmentor, every host with two; they meet in channels alone.
PAIRS = [
    ('RetinaNet', RepNeXt, 'm0'),
    ('RetinaNet', RecNeXt, 'a0'),
    ('RTMDet', RecNeXt, 'm0'),
    ('RTMDet', InceptionNeXt, 'atto'),
    ('UPerNet', RecNeXt, 'm0'),
    ('UPerNet', InceptionNeXt, 'atto'),
    ('SegFormer', RepNeXt, 'm0'),
    ('SegFormer', RecNeXt, 'a0'),
]

#: For detectors without masks; segmentors take the sample's own.
PIPELINES: dict[str, list | None] = {
    'mmdet': [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='PackDetInputs'),
    ],
    'mmseg': None,
}

#: Framework, config of its own, stages to return, and where the channel numbers go.
HOSTS: dict[str, tuple[str, str, tuple[int, ...], Callable[[list[int]], dict]]] = {
    'RetinaNet': (
        'mmdet',
        'retinanet/retinanet_r50_fpn_1x_coco.py',
        (0, 1, 2, 3),
        lambda channels: dict(neck=dict(in_channels=channels)),
    ),
    'RTMDet': (
        'mmdet',
        'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
        (1, 2, 3),
        lambda channels: dict(neck=dict(in_channels=channels)),
    ),
    'UPerNet': (
        'mmseg',
        'upernet/upernet_r50_4xb4-80k_ade20k-512x512.py',
        (0, 1, 2, 3),
        lambda channels: dict(
            pretrained=None,  # the weights of the ResNet that goes
            decode_head=dict(in_channels=channels),
            auxiliary_head=dict(in_channels=channels[2]),
        ),
    ),
    'SegFormer': (
        'mmseg',
        'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
        (0, 1, 2, 3),
        lambda channels: dict(decode_head=dict(in_channels=channels)),
    ),
}


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_data(tmp_path_factory.mktemp('shapes'))


def drop_in(
    folder: Path, host: str, family: type[PyramidBackbone], arch: str, **kwargs: Any
) -> Config:
    """A config over the framework's own, as a user writes it; the channels are the backbone's."""
    scope, base, stages, channels = HOSTS[host]
    backbone = dict(type=family.__name__, arch=arch, out_indices=kwargs.get('stages', stages))
    with torch.device('meta'):
        numbers = family(arch, out_indices=backbone['out_indices']).out_channels
    model = dict(backbone=dict(_delete_=True, **backbone), **channels(list(numbers)))
    path = folder / 'mine.py'
    path.write_text(
        f'_base_ = {import_module(scope).__path__[0] + "/.mim/configs/" + base!r}\n'
        "custom_imports = dict(imports=['repnext_mm'], allow_failed_imports=False)\n"
        f'model = {model!r}\n'
    )
    return Config.fromfile(path)


def check(cfg: Config, scope: str, family: type[PyramidBackbone], root: Path) -> None:
    if scope == 'mmseg':
        cfg.model.data_preprocessor.size = (SAMPLE, SAMPLE)
    model = build(cfg)
    assert isinstance(model.backbone, family)
    losses, results = train_and_predict(model, sample_batch(scope, root, PIPELINES[scope]))
    assert any('loss' in name for name in losses)
    for result in results:
        if scope == 'mmdet':
            assert result.pred_instances.bboxes.shape == (len(result.pred_instances), 4)
        else:
            assert result.pred_sem_seg.data.shape == (1, SAMPLE, SAMPLE)


@pytest.mark.compat
@pytest.mark.parametrize('host, family, arch', PAIRS)
def test_backbone_drops_in(
    host: str, family: type[PyramidBackbone], arch: str, root: Path, tmp_path: Path
) -> None:
    check(drop_in(tmp_path, host, family, arch), HOSTS[host][0], family, root)


@pytest.mark.compat
def test_a_pyramid_from_stride_8_gives_the_first_stages_to_rtmdet(
    root: Path, tmp_path: Path
) -> None:
    """RTMDet takes strides 8, 16 and 32: stages 0 to 2 of RecNeXt T."""
    cfg = drop_in(tmp_path, 'RTMDet', RecNeXt, 't', stages=(0, 1, 2))
    anchors = cfg.model.bbox_head.anchor_generator
    assert tuple(anchors.strides) == RecNeXt('t', out_indices=(0, 1, 2)).out_strides
    check(cfg, 'mmdet', RecNeXt, root)
