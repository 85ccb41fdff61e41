"""Every config in configs/: it builds, its numbers are those of its backbone, and it computes."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData

from repnext_mm.backbones.pyramid import PyramidBackbone
from repnext_mm.engine.amp import keep_float32_where_needed

CONFIGS = sorted((REPO / 'configs').glob('*.py'))
SMALL = ('mask_rcnn_repnext_m0_coco', 'semantic_fpn_repnext_m2_ade20k')
LARGE = ('mask_rcnn_repnext_m5_coco', 'semantic_fpn_repnext_m4_ade20k')
SIZE = 96


def build(path: Path) -> tuple[Config, Any]:
    """The config and its model, without weights."""
    cfg = Config.fromfile(path)
    framework = import_module(f'{cfg.default_scope}.utils')
    framework.register_all_modules(init_default_scope=False)
    cfg.model.backbone.init_cfg = None
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return cfg, MODELS.build(cfg.model)


def nodes(node: Any, key: str) -> Iterator[Any]:
    """Every value under `key` in a nested config."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from nodes(value, key)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from nodes(value, key)


def test_there_is_a_config_for_each_size() -> None:
    names = {path.stem for path in CONFIGS}
    for size in range(6):
        assert f'mask_rcnn_repnext_m{size}_coco' in names
        assert f'semantic_fpn_repnext_m{size}_ade20k' in names


@pytest.mark.compat
@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_agrees_with_its_backbone(path: Path) -> None:
    cfg, model = build(path)
    backbone = model.backbone
    assert isinstance(backbone, PyramidBackbone)
    assert tuple(cfg.model.neck.in_channels) == backbone.out_channels

    strides = backbone.out_strides
    for used in (*nodes(cfg.model, 'featmap_strides'), *nodes(cfg.model, 'feature_strides')):
        assert tuple(used) == strides
    levels = cfg.model.neck.num_outs
    for generator in nodes(cfg.model, 'anchor_generator'):
        # FPN's levels beyond the backbone's each halve the one before.
        expected = tuple(strides) + tuple(
            strides[-1] * 2**extra for extra in range(1, levels - len(strides) + 1)
        )
        assert tuple(generator.strides) == expected

    for width in nodes(cfg.model, 'out_channels'):
        assert width == cfg.model.neck.out_channels
    classes = (cfg.train_dataloader.dataset.get('metainfo') or {}).get('classes')
    if classes is not None:
        assert {*nodes(cfg.model, 'num_classes')} == {len(classes)}


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_is_small_and_loads_published_weights_by_name(path: Path) -> None:
    from repnext_mm.checkpoints import PUBLISHED

    cfg = Config.fromfile(path)
    if 'shapes' in path.stem:
        assert cfg.model.backbone.get('init_cfg') is None  # from scratch
        return
    assert len(path.read_text().splitlines()) <= 15
    name = cfg.model.backbone.init_cfg.checkpoint
    assert name in PUBLISHED
    assert f'_{cfg.model.backbone.arch}_' in name


def det_batch() -> dict[str, list]:
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    sample = DetDataSample()
    sample.set_metainfo(
        {
            'img_shape': (SIZE, SIZE),
            'ori_shape': (SIZE, SIZE),
            'pad_shape': (SIZE, SIZE),
            'scale_factor': (1.0, 1.0),
            'batch_input_shape': (SIZE, SIZE),
        }
    )
    masks = torch.zeros(2, SIZE, SIZE, dtype=torch.uint8)
    masks[0, 10:60, 8:50] = 1
    masks[1, 40:80, 30:90] = 1
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[8.0, 10, 50, 60], [30, 40, 90, 80]]),
        labels=torch.tensor([1, 2]),
        masks=BitmapMasks(masks.numpy(), SIZE, SIZE),
    )
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0))
    image = torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8)
    return {'inputs': [image], 'data_samples': [sample]}


def seg_batch() -> dict[str, list]:
    from mmseg.structures import SegDataSample

    samples = []
    for _ in range(2):  # the head normalises over the batch
        sample = SegDataSample()
        sample.set_metainfo({'img_shape': (SIZE, SIZE), 'ori_shape': (SIZE, SIZE)})
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 150, (1, SIZE, SIZE)))
        samples.append(sample)
    images = [torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8) for _ in samples]
    return {'inputs': images, 'data_samples': samples}


@pytest.mark.compat
@pytest.mark.parametrize('name', SMALL + LARGE)
def test_one_loss_and_one_prediction(name: str) -> None:
    cfg, model = build(REPO / 'configs' / f'{name}.py')
    model = revert_sync_batchnorm(model)
    detects = cfg.default_scope == 'mmdet'
    batch = det_batch() if detects else seg_batch()
    if not detects:
        model.data_preprocessor.size = (SIZE, SIZE)  # else it pads to the 512 of the recipe

    model.train()
    losses = model(**model.data_preprocessor(batch, training=True), mode='loss')
    total, named = model.parse_losses(losses)
    total.backward()
    assert torch.isfinite(total)
    assert total > 0
    assert {'loss_mask', 'loss_rpn_cls'} <= set(named) if detects else 'decode.loss_ce' in named
    # The loss reaches the first layer.
    first = next(model.backbone.parameters())
    assert first.grad is not None
    assert first.grad.abs().sum() > 0

    model.eval()
    with torch.no_grad():
        results = model(**model.data_preprocessor(batch, training=False), mode='predict')
    assert len(results) == len(batch['inputs'])
    if detects:
        found = results[0].pred_instances
        assert found.bboxes.shape == (len(found), 4)
        assert found.masks.shape == (len(found), SIZE, SIZE)
    else:
        assert results[0].pred_sem_seg.data.shape == (1, SIZE, SIZE)
        assert int(results[0].pred_sem_seg.data.max()) < 150


@pytest.mark.compat
def test_mask_rcnn_in_bfloat16() -> None:
    """As --amp runs it: autocast is the same on the CPU, and mmcv lacks the kernels there too."""
    _, model = build(REPO / 'configs' / 'mask_rcnn_repnext_m0_coco.py')
    model = revert_sync_batchnorm(model).train()
    inputs = model.data_preprocessor(det_batch(), training=True)
    with torch.autocast('cpu', torch.bfloat16), pytest.raises(RuntimeError, match='BFloat16'):
        model(**inputs, mode='loss')

    keep_float32_where_needed(model)
    with torch.autocast('cpu', torch.bfloat16):
        total, _ = model.parse_losses(model(**inputs, mode='loss'))
    total.backward()
    assert torch.isfinite(total)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) > 100
    assert all(torch.isfinite(g).all() for g in gradients)


def test_segmentation_is_tested_at_multiples_of_32() -> None:
    """2048x512 keep ratio, then both sides up to multiples of 32, as the published evaluation."""
    import numpy as np
    from mmseg.registry import TRANSFORMS
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    cfg = Config.fromfile(REPO / 'configs' / 'semantic_fpn_repnext_m0_ade20k.py')
    resizing = [t for t in cfg.test_dataloader.dataset.pipeline if t.type.startswith('Resize')]
    results = {'img': np.zeros((683, 512, 3), np.uint8), 'img_shape': (683, 512)}
    with DefaultScope.overwrite_default_scope('mmseg'):
        for transform in resizing:
            results = TRANSFORMS.build(transform)(results)
    # 683 x 512 -> 683 x 512 (its short side is 512 already) -> 704 x 512
    assert results['img'].shape == (704, 512, 3)
