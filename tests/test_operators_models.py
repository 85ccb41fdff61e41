"""Models of mmdet and mmseg that need mmcv's operators: one training step and one prediction.

Their published configs, with an eighth of the channels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operator_references import use_ours
from published_models import narrowed

mmdet = pytest.importorskip('mmdet', reason='mmdet is not installed')
mmseg = pytest.importorskip('mmseg', reason='mmseg is not installed')

from mmengine.registry import DefaultScope  # noqa: E402
from mmengine.structures import PixelData  # noqa: E402

DEVICES = ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]
#: What an untrained model needs to predict something, and little of it.
PREDICTION = {'score_thr': 0.0, 'nms_pre': 100, 'max_per_img': 30}

DETECTORS: dict[str, dict[str, Any]] = {
    'mask_rcnn/mask-rcnn_r50_fpn_1x_coco': {},
    'faster_rcnn/faster-rcnn_r50_fpn_soft-nms_1x_coco': {},
    'dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco': {},
    'dcn/faster-rcnn_r50_fpn_dpool_1x_coco': {},
    'dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco': {},
    'dcnv2/faster-rcnn_r50_fpn_mdpool_1x_coco': {},
    'carafe/faster-rcnn_r50_fpn-carafe_1x_coco': {},
    'guided_anchoring/ga-retinanet_r50-caffe_fpn_1x_coco': {},
    'cornernet/cornernet_hourglass104_10xb5-crop511-210e-mstest_coco': {
        'backbone.feat_channel': 32,
        'backbone.stage_channels': (32, 32, 48, 48, 48, 64),
        'bbox_head.num_classes': 2,
        'test_cfg.distance_threshold': 1e3,
    },
    'deformable_detr/deformable-detr_r50_16xb2-50e_coco': {
        'positional_encoding.num_feats': 16,
        'bbox_head.embed_dims': 32,
    },
    'point_rend/point-rend_r50-caffe_fpn_ms-1x_coco': {},
}
SEGMENTORS: dict[str, dict[str, Any]] = {
    'psanet/psanet_r50-d8_4xb2-80k_cityscapes-512x1024': {'decode_head.mask_size': (9, 7)},
    'point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024': {},
    'ccnet/ccnet_r50-d8_4xb2-80k_cityscapes-512x1024': {},
}


@pytest.fixture(autouse=True)
def _ours(monkeypatch: pytest.MonkeyPatch) -> None:
    use_ours(monkeypatch)  # compiled ones lack most CPU kernels


def build(package: Any, name: str, changes: dict[str, Any], registry: Any) -> torch.nn.Module:
    built = registry.build(narrowed(package, name, PREDICTION, changes))
    built.init_weights()
    return built


def step(model: torch.nn.Module, data: dict[str, Any], device: str) -> list:
    """Predictions, after a forward and backward pass with finite gradients."""
    model = model.to(device).train()
    losses = model(**model.data_preprocessor(data, True), mode='loss')
    total, _ = model.parse_losses(losses)
    total.backward()
    assert total.isfinite()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(grad.isfinite().all() for grad in grads)
    assert any(grad.any() for grad in grads)
    with torch.no_grad():
        # One image, as MaskedConv2d asks for.
        data = {key: value[:1] for key, value in data.items()}
        return model.eval()(**model.data_preprocessor(data, False), mode='predict')


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', DETECTORS)
def test_detector(name: str, device: str) -> None:
    from mmdet.registry import MODELS
    from mmdet.testing import demo_mm_inputs
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = build(mmdet, name, DETECTORS[name], MODELS)
        data = demo_mm_inputs(2, [(3, 96, 128)] * 2, num_classes=2, with_mask=True)
        for sample in data['data_samples']:
            sample.set_metainfo(dict(border=(0, 0, 0, 0)))  # CornerNet's; the demo's hides all
        predictions = step(model, data, device)
    assert len(predictions) == 1
    for sample in predictions:
        instances = sample.pred_instances
        assert instances.scores.isfinite().all()
        assert instances.bboxes.isfinite().all()
        assert instances.bboxes.shape == (len(instances.scores), 4)
    assert sum(len(sample.pred_instances) for sample in predictions)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', SEGMENTORS)
def test_segmentor(name: str, device: str) -> None:
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = build(mmseg, name, SEGMENTORS[name], MODELS)
        shape = (64, 96)
        model.data_preprocessor.size = shape
        samples = []
        for _ in range(2):
            sample = SegDataSample(
                metainfo=dict(img_shape=shape, ori_shape=shape, pad_shape=shape, flip=False)
            )
            sample.gt_sem_seg = PixelData(data=torch.randint(0, 19, (1, *shape)))
            samples.append(sample)
        images = [torch.randint(0, 256, (3, *shape), dtype=torch.uint8) for _ in range(2)]
        predictions = step(model, dict(inputs=images, data_samples=samples), device)
    assert len(predictions) == 1
    for sample in predictions:
        assert sample.seg_logits.data.shape == (19, *shape)
        assert sample.seg_logits.data.isfinite().all()
