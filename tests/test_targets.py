"""Exported detectors and segmentors against mm's own predict, of mm's own published configs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

mmdet = pytest.importorskip('mmdet', reason='mmdet is not installed')
mmseg = pytest.importorskip('mmseg', reason='mmseg is not installed')

import published_models  # noqa: E402

from repnext_mm.datasets.shapes import Spec, generate  # noqa: E402
from repnext_mm.deploy import parity  # noqa: E402
from repnext_mm.deploy.formats import FORMATS  # noqa: E402
from repnext_mm.deploy.job import Job  # noqa: E402
from repnext_mm.deploy.targets import (  # noqa: E402
    DetectorTarget,
    Preprocess,
    SegmentorTarget,
    UnsupportedModel,
)
from repnext_mm.deploy.targets.boxes import strongest  # noqa: E402
from repnext_mm.deploy.targets.heads import Atlas, RoIPooling  # noqa: E402
from repnext_mm.engine.quiet import muffled  # noqa: E402
from repnext_mm.reparam.convolution_norms import fold_convolution_norms  # noqa: E402
from repnext_mm.runtimes import ArtifactError, open_artifact  # noqa: E402
from repnext_mm.runtimes.predictor import finish  # noqa: E402

#: Published configs, by kind of head.
DETECTORS = {
    'RetinaNet': 'retinanet/retinanet_r50_fpn_1x_coco',
    'ATSS': 'atss/atss_r50_fpn_1x_coco',
    'FCOS': 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco',
    'FreeAnchor': 'free_anchor/freeanchor_r50_fpn_1x_coco',
    'AutoAssign': 'autoassign/autoassign_r50-caffe_fpn_1x_coco',
    'YOLOF': 'yolof/yolof_r50-c5_8xb8-1x_coco',
    'GFL': 'gfl/gfl_r50_fpn_1x_coco',
    'RTMDet': 'rtmdet/rtmdet_tiny_8xb32-300e_coco',
    'RTMDet-Ins': 'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco',
    'YOLOX': 'yolox/yolox_tiny_8xb8-300e_coco',
    'Faster R-CNN': 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco',
    'Mask R-CNN': 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco',
    'Cascade R-CNN': 'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco',
    'Cascade Mask R-CNN': 'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco',
}
#: What published configs set in pixels or channels that an eighth of the channels changes.
CHANGES: dict[str, dict[str, Any]] = {
    'FCOS': {'bbox_head.norm_cfg': {'type': 'GN', 'num_groups': 4}},
    'RTMDet-Ins': {'test_cfg.max_per_img': 30},
    'Mask R-CNN': {'test_cfg.rcnn.max_per_img': 30, 'test_cfg.rpn.max_per_img': 200},
    'Faster R-CNN': {'test_cfg.rpn.max_per_img': 200},
    'Cascade R-CNN': {'test_cfg.rpn.max_per_img': 200},
    'Cascade Mask R-CNN': {'test_cfg.rcnn.max_per_img': 20, 'test_cfg.rpn.max_per_img': 100},
}
#: Those that are small as they are published.
FULL = ('RTMDet', 'RTMDet-Ins', 'YOLOX')
#: Models with parts that predict in their own way, and what the refusal names.
REFUSED = {
    'detr/detr_r50_8xb2-150e_coco': 'DETR',
    'paa/paa_r50_fpn_1x_coco': 'PAAHead',
    'tood/tood_r50_fpn_1x_coco': 'TOODHead',
    'foveabox/fovea_r50_fpn_4xb4-1x_coco': 'FoveaHead',
    'yolo/yolov3_mobilenetv2_8xb24-320-300e_coco': 'YOLOV3Head',
    'htc/htc-without-semantic_r50_fpn_1x_coco': 'HybridTaskCascadeRoIHead',
    'point_rend/point-rend_r50-caffe_fpn_ms-1x_coco': 'PointRendRoIHead',
    'faster_rcnn/faster-rcnn_r50_fpn_soft-nms_1x_coco': 'soft_nms',
    'vfnet/vfnet_r50_fpn_1x_coco': 'deformable convolutions',
}
SEGMENTORS = {
    'Semantic FPN': 'sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512',
    'UPerNet': 'upernet/upernet_r50_4xb4-160k_ade20k-512x512',
    'PSPNet': 'pspnet/pspnet_r50-d8_4xb4-160k_ade20k-512x512',
    'DeepLabV3+': 'deeplabv3plus/deeplabv3plus_r50-d8_4xb4-160k_ade20k-512x512',
    'FCN': 'fcn/fcn_r50-d8_4xb4-160k_ade20k-512x512',
    'SegFormer': 'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512',
}
SIZE = (160, 192)


@pytest.fixture(scope='module')
def images(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """Drawn scenes as mm loads them, one with zeros on its right and below."""
    from PIL import Image

    root = generate(tmp_path_factory.mktemp('scenes'), Spec(train=1, val=3, size=192))
    files = sorted((root / 'coco' / 'val2017').iterdir())
    pixels = np.stack([np.asarray(Image.open(file))[: SIZE[0], ..., ::-1] for file in files])
    batch = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32)).contiguous()
    batch[1, :, 130:] = 0
    batch[1, :, :, 150:] = 0
    return batch


@pytest.fixture(scope='module')
def sizes() -> Tensor:
    return torch.tensor([SIZE, (130, 150), SIZE], dtype=torch.float32)


@cache
def detector(kind: str) -> tuple[Any, Preprocess | None]:
    model, preprocessor = published_models.build(
        'mmdet', DETECTORS[kind], CHANGES.get(kind), full=kind in FULL
    )
    step = Preprocess.of(preprocessor)
    noise = 40 * torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1)) + 120
    image = step.apply(noise) if step else noise
    published_models.spread(
        model, lambda: parity._detected(model, image, torch.tensor([SIZE], dtype=torch.float32))
    )
    return model, step


def found(
    outputs: dict[str, np.ndarray], target: DetectorTarget, sizes: Tensor
) -> list[dict[str, np.ndarray]]:
    """Detections in each image, as the predictor finishes them."""
    settings = {'task': 'detection', **target.description()}
    shapes = [tuple(int(side) for side in size) for size in sizes]
    return [
        finish({k: v[i] for k, v in outputs.items()}, settings, shape, shape, (1.0, 1.0))  # type: ignore[arg-type]
        for i, shape in enumerate(shapes)
    ]


def expected(model: Any, step: Preprocess | None, images: Tensor, sizes: Tensor) -> list[Any]:
    with torch.no_grad():
        found = parity._detected(model, step.apply(images, sizes) if step else images, sizes)
    # YOLOX has no maximum of its own; a file has COCO's.
    most = 100 if type(model).__name__ == 'YOLOX' else None
    return [{key: value[:most] for key, value in each.items()} for each in found]


@pytest.mark.slow
@pytest.mark.parametrize('nms', ['graph', 'host'])
@pytest.mark.parametrize('kind', DETECTORS)
def test_detections_are_those_of_predict(
    kind: str, nms: str, images: Tensor, sizes: Tensor
) -> None:
    """To the last bit, in PyTorch: what a file adds to that is rounding."""
    model, step = detector(kind)
    if nms == 'host' and ('R-CNN' in kind or 'Ins' in kind):
        with pytest.raises(UnsupportedModel, match='--nms host is not possible'):
            DetectorTarget(model, step, nms=nms)
        return
    target = DetectorTarget(model, step, nms=nms).eval()
    assert (target.stages is not None) == ('R-CNN' in kind)
    if target.stages is not None:
        assert target.takes_atlas
        assert not target.for_format('openvino').takes_atlas
        apart = compared(target, model, step, images, sizes)[0]
        assert apart.same == 3
        assert apart.box_px < 1e-3  # the coordinates in an atlas are rounded otherwise
        assert apart.score < 1e-5
        target.takes_atlas = False
    assert target.dense.many == (kind == 'RTMDet')
    if target.dense.many and nms == 'graph':
        fixed = target.for_format('aoti')
        assert (target.counts, fixed.counts) == (True, False)
        apart = compared(fixed, model, step, images, sizes)[0]
        assert (apart.same, apart.box_px, apart.score) == (3, 0, 0)
    apart, wanted, results = compared(target, model, step, images, sizes)
    assert (apart.same, apart.box_px, apart.score) == (3, 0, 0)
    for one, other in zip(wanted, results, strict=True):
        np.testing.assert_array_equal(other['scores'], one['scores'])
        assert ('masks' in one) == ('masks' in other)
        if 'masks' in one:
            different = (one['masks'] != other['masks'][:, : one['masks'].shape[1]]).sum()
            assert different <= 1e-4 * one['masks'].sum()


def compared(target: Any, model: Any, step: Any, images: Tensor, sizes: Tensor) -> Any:
    """How far what a target finds is from `predict`, in any order where scores are equal."""
    with torch.no_grad():
        outputs = target(images, sizes)
    named = {name: out.numpy() for name, out in zip(target.output_names, outputs, strict=True)}
    wanted = expected(model, step, images, sizes)
    assert sum(len(each['scores']) for each in wanted) > 20
    results = found(named, target, sizes)
    return parity.difference(wanted, results), wanted, results


def test_only_what_is_above_a_threshold_is_sorted() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.7], [0.2, 0.0, 0.1, 0.6]])
    values, places = strongest(scores, 3, 0.25)  # three in the first image, one in the second
    assert places.tolist() == [[1, 3, 2], [3, 0, 2]]
    assert values.tolist() == scores.gather(1, places).tolist()
    assert strongest(scores, 2, 0.25)[1].tolist() == [[1, 3], [3, 0]]
    assert strongest(scores, 3, 0.95)[1].tolist() == [[1], [3]]
    assert strongest(scores, 3, None)[1].shape == (2, 3)
    assert strongest(scores, 9, None)[1].shape == (2, 4)


def test_rounding_decides_where_detections_end() -> None:
    """One for another at the lowest score that is kept; above it, every one must be there."""
    boxes = np.array([[20 * i, 0, 20 * i + 10, 10] for i in range(6)], np.float32)
    scores = np.array([0.9, 0.5, 0.2, 0.2, 0.2 + 2e-6, 0.1], np.float32)

    def chosen(*rows: int) -> dict[str, np.ndarray]:
        part = list(rows)
        return {'boxes': boxes[part], 'scores': scores[part], 'labels': np.zeros(len(part))}

    def same(one: dict, other: dict, end: float, *more: int) -> tuple[int, int, float]:
        found = parity.difference([one], [other], np.array([end]), 1e-5, [chosen(*more)])
        return found.same, found.exchanged, found.found

    assert same(chosen(0, 1, 2), chosen(0, 1, 2), 0.2) == (1, 0, 1.0)
    assert same(chosen(0, 1, 2), chosen(0, 1, 3), 0.2) == (1, 1, 1.0)
    assert same(chosen(0, 1, 2), chosen(0, 1), 0.2) == (1, 1, 1.0)  # at the threshold
    assert same(chosen(0, 1, 2), chosen(0, 1, 4), 0.2)[0] == 1
    scores[4] = 0.2001
    assert same(chosen(0, 1, 2), chosen(0, 1, 4), 0.2)[0] == 0
    assert same(chosen(0, 1, 2), chosen(0, 2, 3), 0.2)[0] == 0
    assert same(chosen(0, 1, 2), chosen(1, 2), 0.2)[2] == pytest.approx(1 - 0.9 / 1.6)
    # All of one score: which are chosen is chance, and that one is found again proves nothing.
    scores[:] = 1
    assert same(chosen(0, 1, 2), chosen(3, 4, 5), 1.0)[::2] == (0, 0.0)
    assert same(chosen(0, 1, 2), chosen(1, 2, 5), 1.0)[0] == 1
    # But that they follow in the trained model's own list does, and what does not is refused.
    assert same(chosen(0, 1, 2), chosen(3, 4, 5), 1.0, 3, 4, 5) == (1, 3, 1.0)
    assert same(chosen(0, 1, 2), chosen(3, 4, 5), 1.0, 3)[0] == 0
    far = chosen(3, 4, 5)
    far['boxes'] = far['boxes'] + 1
    moved = parity.difference([chosen(0, 1, 2)], [far], np.ones(1), 1e-5, [chosen(3, 4, 5)])
    assert (moved.same, moved.box_px) == (1, 1)
    scores[5] = 0.9
    assert same(chosen(0, 1, 2), chosen(0, 1, 5), 1.0, 3, 5)[0] == 0
    scores[:] = [0.9, 0.5, 0.2, 0.2, 0.2, 0.1]
    ends = parity._ends([chosen(0, 1, 2), chosen(0, 1), chosen()], 3, 0.05)
    np.testing.assert_allclose(ends, [0.2, 0.05, 0.05], rtol=1e-6)
    np.testing.assert_allclose(parity._ends([chosen(0, 1)], 2, 0.05), [0.5])


@pytest.mark.parametrize('kind', ['RetinaNet', 'YOLOX', 'Mask R-CNN'])
def test_what_follows_is_found_and_the_limit_stays(
    kind: str, images: Tensor, sizes: Tensor
) -> None:
    model, step = detector(kind)
    cfg = getattr(model, 'roi_head', None) or model.bbox_head
    before = dict(cfg.test_cfg)
    x = step.apply(images, sizes) if step else images
    with torch.no_grad():
        first, more = parity._beyond(model, x, sizes, 4), parity._beyond(model, x, sizes, 2)
    assert dict(cfg.test_cfg) == before
    assert max(len(each['scores']) for each in first) == 4
    for one, other, found in zip(first, more, expected(model, step, images, sizes), strict=True):
        np.testing.assert_array_equal(one['scores'], found['scores'][4:8])
        np.testing.assert_array_equal(other['boxes'], found['boxes'][2:4])


@pytest.mark.parametrize('name, word', REFUSED.items())
def test_heads_that_predict_otherwise_are_refused(name: str, word: str) -> None:
    model, _ = published_models.build('mmdet', name, full=True)
    with pytest.raises(UnsupportedModel, match=word):
        DetectorTarget(model)


def job(target: Any, **options: Any) -> Job:
    metadata = {
        'task': target.task,
        'size': list(SIZE),
        'batch': 1,
        'preprocess': {} if target.preprocess is None else {'mean': 0},
        **target.description(),
        **options,
    }
    made = Job(target, SIZE, metadata, **options)
    metadata |= {'inputs': made.input_names, 'outputs': list(target.output_names)}
    return made


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['RetinaNet', 'GFL', 'RTMDet-Ins', 'Cascade Mask R-CNN'])
def test_files_of_detectors(kind: str, images: Tensor, sizes: Tensor, tmp_path: Path) -> None:
    """Batch and sizes open; images of other sizes than were traced; norms folded, none left."""
    model, step = detector(kind)
    wanted = expected(model, step, images, sizes)
    import copy

    fused = copy.deepcopy(model)
    assert fold_convolution_norms(fused) > 10
    target = DetectorTarget(fused, step).eval()
    made = job(target, dynamic='batch-hw')
    for name in ('onnx', 'openvino', 'pt2'):
        path = tmp_path / f'model{FORMATS[name].suffix}'
        with muffled():
            FORMATS[name].export(made, path)
            operations = FORMATS[name].operations(FORMATS[name].file(path))
        assert not [op for op in operations if 'batchnorm' in op.lower().replace('_', '')]
        with open_artifact(path, threads=1) as artifact:
            inputs = {'image': images, 'image_size': sizes}
            apart = parity.difference(wanted, found(artifact.run_named(inputs), target, sizes))
            assert apart.same == 3, (name, apart)
            assert apart.box_px < 0.01, (name, apart)
            assert apart.score < 1e-4, (name, apart)
            inside = sum(each['masks'].sum() for each in wanted if 'masks' in each)
            assert apart.mask_px <= 1e-3 * inside, (name, apart)
            blank = {'image': images[:1] * 0, 'image_size': sizes[:1]}
            (nothing,) = expected(model, step, images[:1] * 0, sizes[:1])
            (again,) = found(artifact.run_named(blank), target, sizes[:1])
            assert len(again['scores']) == len(nothing['scores'])  # its boxes are nearly ties


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['RetinaNet', 'GFL', 'RTMDet', 'YOLOX'])
def test_core_ml_without_nms(kind: str, tmp_path: Path) -> None:
    """Nothing on Linux runs it: what it promises is looked at."""
    coremltools = pytest.importorskip('coremltools', reason='needs the extra deploy: coremltools')
    model, step = detector(kind)
    assert '--nms host' in DetectorTarget(model, step).refuse('coreml', 'none')
    target = DetectorTarget(model, step, nms='host').eval()
    assert target.refuse('coreml', 'none') == ''
    made = job(target)
    made.metadata['version'] = '0'
    with muffled():
        FORMATS['coreml'].export(made, tmp_path / 'a.mlpackage')
    description = coremltools.utils.load_spec(str(tmp_path / 'a.mlpackage')).description
    assert [given.name for given in description.input] == ['image', 'image_size']
    assert tuple(output.name for output in description.output) == target.output_names
    with torch.no_grad():
        shapes = [out.shape for out in target(*made.example)]
    written = [tuple(out.type.multiArrayType.shape) for out in description.output]
    assert written == [tuple(shape) for shape in shapes]


def test_the_threshold_and_the_maximum_are_inside(tmp_path: Path) -> None:
    import onnx

    model, step = detector('RetinaNet')
    with muffled():
        FORMATS['onnx'].export(job(DetectorTarget(model, step).eval()), tmp_path / 'a.onnx')
    graph = onnx.load(tmp_path / 'a.onnx').graph
    values = {i.name: onnx.numpy_helper.to_array(i).tolist() for i in graph.initializer}
    values |= {
        node.output[0]: onnx.numpy_helper.to_array(node.attribute[0].t).tolist()
        for node in graph.node
        if node.op_type == 'Constant' and node.attribute[0].name == 'value'
    }
    (suppression,) = [node for node in graph.node if node.op_type == 'NonMaxSuppression']
    assert [values[name] for name in suppression.input[2:]] == [[100], [0.5], [-0.5]]
    assert not [node for node in graph.node if node.op_type in ('NonZero', 'Loop', 'If')]


@pytest.fixture(scope='module')
def retinanet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, step = detector('RetinaNet')
    path = tmp_path_factory.mktemp('retinanet') / 'a.onnx'
    with muffled():
        FORMATS['onnx'].export(job(DetectorTarget(model, step).eval(), dynamic='batch-hw'), path)
    return path


@pytest.mark.parametrize(
    'sizes, words',
    [
        (None, 'image_size is missing; it is the height and width of each image'),
        ([[160.0, 193.0]], r'numbers from 1 to \(160, 192\)'),
        ([[0.0, 100.0]], 'numbers from 1'),
        ([160.0, 192.0], r'image_size of shape \(1, 2\)'),
        ([[float('nan'), 192.0]], 'numbers from 1'),
        ([['a', 'b']], 'numbers from 1'),
    ],
)
def test_sizes_that_are_refused(sizes: Any, words: str, retinanet: Path) -> None:
    inputs: dict[str, Any] = {'image': np.zeros((1, 3, *SIZE), np.float32)}
    if sizes is not None:
        inputs['image_size'] = np.array(sizes)
    with open_artifact(retinanet) as artifact, pytest.raises(ArtifactError, match=words):
        artifact.run_named(inputs)


# --- segmentors


@cache
def segmentor(kind: str) -> tuple[Any, Preprocess | None]:
    changes: dict[str, Any] = {'decode_head.num_classes': 20}
    if kind == 'SegFormer':
        changes['decode_head.channels'] = 32
    model, preprocessor = published_models.build(
        'mmseg', SEGMENTORS[kind], changes, full=kind == 'SegFormer'
    )
    step = Preprocess.of(preprocessor)
    noise = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    published_models.spread(model, lambda: parity._segmented(model, noise, SIZE))
    return model, step


@pytest.mark.slow
@pytest.mark.parametrize('kind', SEGMENTORS)
def test_classes_are_those_of_predict(kind: str, images: Tensor, tmp_path: Path) -> None:
    """In PyTorch, and in a file with open sizes at sizes that were not traced."""
    model, step = segmentor(kind)
    assert step is not None
    target = SegmentorTarget(model, step).eval()
    path = tmp_path / 'a.onnx'
    with muffled():
        FORMATS['onnx'].export(job(target, dynamic='batch-hw'), path)
    with open_artifact(path, threads=1) as artifact:
        for height, width, out in ((160, 192, (160, 192)), (96, 160, (131, 217))):
            image = images[:2, :, :height, :width].contiguous()
            with torch.no_grad():
                logits = parity._segmented(model, step.apply(image), out)
                eager = target(image, torch.tensor(out))
            wanted = logits.argmax(1)
            assert len(wanted.unique()) > 3
            assert (eager != wanted).float().mean() <= 1e-4
            result = artifact.run_named({'image': image, 'out_size': np.array(out)})['classes']
            assert result.dtype == np.int32
            assert (result != wanted.numpy()).mean() <= 1e-4
        with pytest.raises(ArtifactError, match='out_size of shape'):
            artifact.run_named({'image': images, 'out_size': np.array([1, 20000])})


def test_a_sliding_window_is_refused() -> None:
    model, _ = segmentor('FCN')
    model.test_cfg['mode'] = 'slide'
    try:
        with pytest.raises(UnsupportedModel, match="mode is 'slide', and a file comp"):
            SegmentorTarget(model)
    finally:
        model.test_cfg['mode'] = 'whole'


# --- norms of others


class Residual(nn.Module):
    """A block whose names say what follows what."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.side = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.norm = nn.BatchNorm2d(4)  # of the sum, which no convolution can take

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.bn1(self.conv1(x)) + self.side(x))


def test_norms_are_folded_where_they_follow_a_convolution() -> None:
    block = Residual().double()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    image = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    before = block.eval()(image)
    assert fold_convolution_norms(block) == 2
    assert isinstance(block.norm, nn.BatchNorm2d)
    torch.testing.assert_close(block(image), before)


def test_a_convolution_that_norms_share_is_copied() -> None:
    """RTMDet's levels share convolutions, and each has norms of its own."""
    model, _ = published_models.build('mmdet', DETECTORS['RTMDet'], full=True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    model = model.double()
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        before = model.bbox_head(model.extract_feat(image))
        assert fold_convolution_norms(model) > 20
        after = model.bbox_head(model.extract_feat(image))
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other)


# --- RoIAlign over an atlas


def extractor(aligned: bool = True) -> Any:
    from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor

    return SingleRoIExtractor(
        roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0, aligned=aligned),
        out_channels=5,
        featmap_strides=[4, 8, 16, 32],
    )


@pytest.mark.parametrize('height, width', [(64, 96), (224, 160), (608, 1024)])
def test_an_atlas_pools_what_its_levels_do(height: int, width: int) -> None:
    """Boxes of all sizes, at every edge, of no size and of all of the image."""
    generator = torch.Generator().manual_seed(0)
    levels = [
        torch.randn(2, 5, height // s, width // s, generator=generator, dtype=torch.float64)
        for s in (4, 8, 16, 32)
    ]
    sides = torch.tensor([width, height] * 2, dtype=torch.float64)
    boxes = torch.rand(400, 4, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    boxes = torch.cat([boxes[:, :2].minimum(boxes[:, 2:]), boxes[:, :2].maximum(boxes[:, 2:])], 1)
    special = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0.3, 0.3, 0.3, 0.9]])
    boxes = torch.cat([boxes.clamp(0, 1), special.double()]) * sides
    images = torch.arange(len(boxes)) % 2
    pooling = RoIPooling(extractor())
    assert pooling.takes_atlas
    pooled = pooling(Atlas.of(levels), boxes, images)
    exact = pooling(levels, boxes, images)
    torch.testing.assert_close(pooled, exact, rtol=0, atol=1e-10)
    assert len({*pooling_levels(boxes)}) >= {64: 1, 224: 2, 608: 4}[height]


def pooling_levels(boxes: torch.Tensor) -> list[int]:
    sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    return (sides / 56 + 1e-6).log2().floor().clamp(0, 3).int().tolist()


def test_who_takes_no_atlas() -> None:
    assert not RoIPooling(extractor(aligned=False)).takes_atlas
