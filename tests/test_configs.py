"""Every config in configs/: it builds, its numbers are those of its backbone, and it computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO
from mm_models import SAMPLE, build, sample_batch, sample_data, train_and_predict
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope

from repnext_mm.backbones import PyramidBackbone
from repnext_mm.complexity import count_macs, count_parameters
from repnext_mm.engine.amp import keep_float32_where_needed

CONFIGS = sorted((REPO / 'configs').glob('*.py'))
#: A row for each method, family and series; the smallest network comes first.
EXPECTED = [
    ('mask_rcnn_repnext_{}_coco', ['m0', 'm1', 'm2', 'm3', 'm4', 'm5']),
    ('semantic_fpn_repnext_{}_ade20k', ['m0', 'm1', 'm2', 'm3', 'm4', 'm5']),
    ('mask_rcnn_recnext_{}_coco', ['m3', 'm4', 'm5']),
    ('mask_rcnn_recnext_{}_coco', ['a3', 'a4', 'a5']),
    ('mask_rcnn_recnext_{}_coco', ['t', 's', 'b']),
    ('semantic_fpn_recnext_{}_ade20k', ['m3', 'm4', 'm5']),
    ('semantic_fpn_recnext_{}_ade20k', ['a3', 'a4', 'a5']),
    ('mask_rcnn_inception_next_{}_coco', ['tiny']),
    ('semantic_fpn_inception_next_{}_ade20k', ['tiny', 'small', 'base']),
    ('upernet_inception_next_{}_ade20k', ['tiny', 'small', 'base']),
    *(
        (f'{head}_{series}_coco', archs)
        for head in ('faster_rcnn', 'retinanet', 'rtmdet', 'rtmdet_ins')
        for series, archs in (
            ('repnext_{}', ['m0', 'm4']),
            ('recnext_{}', ['a4']),
            ('recnext_{}', ['s']),
            ('inception_next_{}', ['tiny']),
        )
    ),
]
#: Widths alone set the others apart, and those are compared without computing.
SMALLEST = [
    *(name.format(archs[0]) for name, archs in EXPECTED),
    *(path.stem for path in CONFIGS if path.stem.endswith('_shapes')),
]


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


def test_there_is_a_config_for_each_model() -> None:
    names = {path.stem for path in CONFIGS if not path.stem.endswith('_shapes')}
    assert names == {name.format(arch) for name, archs in EXPECTED for arch in archs}


@pytest.mark.compat
@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_agrees_with_its_backbone(path: Path) -> None:
    with torch.device('meta'):
        cfg = Config.fromfile(path)
        model = build(cfg)
    backbone = model.backbone
    assert isinstance(backbone, PyramidBackbone)
    channels, strides = backbone.out_channels, backbone.out_strides
    neck = cfg.model.get('neck')
    if neck:
        assert tuple(neck.in_channels) == channels
        channels = (neck.out_channels,) * neck.get('num_outs', len(strides))
        for width in nodes(cfg.model, 'out_channels'):
            assert width == neck.out_channels
    for name in ('decode_head', 'auxiliary_head'):
        head = cfg.model.get(name)
        if head and isinstance(head.in_index, int):
            assert head.in_channels == channels[head.in_index]
        elif head:
            assert tuple(head.in_channels) == tuple(channels[i] for i in head.in_index)

    for used in (*nodes(cfg.model, 'featmap_strides'), *nodes(cfg.model, 'feature_strides')):
        assert tuple(used) == strides
    for generator in nodes(cfg.model, 'anchor_generator'):
        # FPN's levels beyond the backbone's each halve the one before.
        extra = range(1, len(channels) - len(strides) + 1)
        assert tuple(generator.strides) == (*strides, *(strides[-1] * 2**k for k in extra))
    for divisor in nodes(cfg.model, 'pad_size_divisor'):
        assert divisor % strides[-1] == 0
    if path.stem.endswith('_coco') and 'roi_head' not in cfg.model:
        assert strides == (8, 16, 32)  # of RetinaNet and RTMDet, whatever the backbone has
    elif path.stem.endswith('_coco'):
        # Anchors from 32 pixels, RoIs of 14 cells and more, whatever the finest stride is.
        (generator,) = nodes(cfg.model, 'anchor_generator')
        assert [scale * strides[0] for scale in generator.scales] == [32]
        extractors = [m for m in model.modules() if hasattr(m, 'finest_scale')]
        assert len(extractors) == 1 + path.stem.startswith('mask_rcnn')
        assert {extractor.finest_scale for extractor in extractors} == {14 * strides[0]}

    size = 2 * strides[-1]
    with torch.device('meta'):
        features = revert_sync_batchnorm(model).eval().extract_feat(torch.empty(1, 3, size, size))
    assert tuple(f.shape[1] for f in features) == channels
    assert tuple(size // f.shape[2] for f in features[: len(strides)]) == strides

    classes = (cfg.train_dataloader.dataset.get('metainfo') or {}).get('classes')
    if classes is not None:
        assert {*nodes(cfg.model, 'num_classes')} == {len(classes)}


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_is_small_and_loads_published_weights_by_name(path: Path) -> None:
    from repnext_mm.checkpoints import PUBLISHED

    cfg = Config.fromfile(path)
    backbone = cfg.model.backbone
    if 'shapes' in path.stem:
        assert backbone.get('init_cfg') is None  # from scratch
        return
    # Dense heads name the stages that they take, and RTMDet its width.
    assert len(path.read_text().splitlines()) <= 15 + 3 * ('out_indices' in backbone)
    weights = PUBLISHED[backbone.init_cfg.checkpoint]
    assert (weights.family, weights.arch, weights.plan) == (backbone.type, backbone.arch, None)
    assert f'next_{backbone.arch}_' in path.stem


RECIPES = {
    # InceptionNeXt paper: iterations, batch, learning rate; drop path by arch.
    'semantic_fpn': (40000, 32, 2e-4, dict(tiny=0.1, small=0.2, base=0.2)),
    'upernet': (160000, 16, 6e-5, dict(tiny=0.2, small=0.3, base=0.4)),
}


@pytest.mark.parametrize('method', RECIPES)
@pytest.mark.parametrize('arch', ['tiny', 'small', 'base'])
def test_inception_next_has_its_papers_recipe(method: str, arch: str) -> None:
    iterations, batch, rate, drop_path = RECIPES[method]
    cfg = Config.fromfile(REPO / 'configs' / f'{method}_inception_next_{arch}_ade20k.py')
    assert cfg.train_cfg.max_iters == iterations
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == batch
    assert cfg.optim_wrapper.optimizer.lr == rate
    assert cfg.model.backbone.drop_path_rate == drop_path[arch]
    poly = cfg.param_scheduler[-1]
    assert (poly.type, poly.power, poly.end) == (
        'PolyLR',
        dict(semantic_fpn=0.9, upernet=1.0)[method],
        iterations + 1,
    )


@pytest.mark.parametrize('method', RECIPES)
@pytest.mark.parametrize('arch', ['tiny', 'small', 'base'])
def test_inception_next_segmentors_cost_what_is_published(
    method: str, arch: str, published: dict
) -> None:
    """Parameters of all parts, multiplications of what a prediction runs."""
    with torch.device('meta'):
        name = f'{method}_inception_next_{arch}_ade20k'
        model = build(Config.fromfile(REPO / 'configs' / f'{name}.py'))
    model = revert_sync_batchnorm(model).eval()
    if method == 'upernet':
        size, (_, parameters, macs) = (
            (512, 2048),
            published['ade20k_upernet'][f'inception_next_{arch}'],
        )
    else:
        size, (parameters, macs) = (
            (512, 512),
            published['ade20k_semantic_fpn_complexity'][f'inception_next_{arch}'],
        )
    with torch.device('meta'):
        assert count_macs(model, size, mode='tensor') / 1e9 == pytest.approx(macs, rel=0.03)
    assert count_parameters(model) / 1e6 == pytest.approx(parameters, rel=0.03)


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_data(tmp_path_factory.mktemp('shapes'))


#: By how the name of a config begins.
LOSSES = {
    'mask_rcnn': {'loss_rpn_cls', 'loss_rpn_bbox', 'loss_cls', 'loss_bbox', 'loss_mask'},
    'faster_rcnn': {'loss_rpn_cls', 'loss_rpn_bbox', 'loss_cls', 'loss_bbox'},
    'retinanet': {'loss_cls', 'loss_bbox'},
    'rtmdet': {'loss_cls', 'loss_bbox'},
    'rtmdet_ins': {'loss_cls', 'loss_bbox', 'loss_mask'},
    'semantic_fpn': {'decode.loss_ce'},
    'upernet': {'decode.loss_ce'},
}


@pytest.mark.compat
@pytest.mark.parametrize('name', SMALLEST)
def test_one_loss_and_one_prediction(name: str, root: Path) -> None:
    cfg = Config.fromfile(REPO / 'configs' / f'{name}.py')
    model = build(cfg)
    size = 2 * model.backbone.out_strides[-1]  # two cells at the coarsest: enough for statistics
    pipeline = cfg.train_dataloader.dataset.pipeline
    batch = sample_batch(cfg.default_scope, root, pipeline, size)
    detects = cfg.default_scope == 'mmdet'
    if not detects:
        model.data_preprocessor.size = (size, size)  # else it pads to the 512 of the recipe
    losses, results = train_and_predict(model, batch)
    assert LOSSES[name.partition('_re')[0].partition('_inception')[0]] <= set(losses)
    assert ('aux.loss_ce' in losses) == ('auxiliary_head' in cfg.model)
    for result in results:
        if detects:
            found = result.pred_instances
            assert found.bboxes.shape == (len(found), 4)
            assert ('masks' in found) == ('loss_mask' in losses)
            if 'masks' in found:
                assert found.masks.shape[1:] == (SAMPLE, SAMPLE)
        else:
            assert result.pred_sem_seg.data.shape == (1, SAMPLE, SAMPLE)
            assert int(result.pred_sem_seg.data.max()) < 150


@pytest.mark.compat
def test_mask_rcnn_in_bfloat16(root: Path) -> None:
    """As --amp runs it: autocast is the same on the CPU as on a GPU."""
    cfg = Config.fromfile(REPO / 'configs' / 'mask_rcnn_repnext_m0_coco.py')
    model = revert_sync_batchnorm(build(cfg)).train()
    batch = sample_batch('mmdet', root, cfg.train_dataloader.dataset.pipeline, 64)
    inputs = model.data_preprocessor(batch, training=True)
    keep_float32_where_needed(model)
    # Whether an operator would refuse bfloat16 depends on who made it.
    dtypes = {}
    model.backbone.register_forward_hook(lambda _, args, out: dtypes.update(backbone=out[0].dtype))
    model.rpn_head.register_forward_hook(lambda _, args, out: dtypes.update(rpn=out[0][0].dtype))
    for layer in model.roi_head.bbox_roi_extractor.roi_layers:
        layer.register_forward_pre_hook(lambda _, args: dtypes.update(pooled=args[0].dtype))
    with torch.autocast('cpu', torch.bfloat16):
        total, _ = model.parse_losses(model(**inputs, mode='loss'))
    total.backward()
    assert dtypes == dict(backbone=torch.bfloat16, rpn=torch.float32, pooled=torch.float32)
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
