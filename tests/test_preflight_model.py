"""The pre-flight on configs and models: what does not fit is named before the first iteration."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO
from mmengine.config import Config
from mmengine.registry import DefaultScope
from tool_runs import CONFIGS

from repnext_mm import RepNeXt
from repnext_mm.engine.cli import import_framework
from repnext_mm.engine.config_file import load_config
from repnext_mm.engine.preflight import check_config
from repnext_mm.engine.preflight.findings import Finding
from repnext_mm.engine.preflight.model import check_model

pytestmark = pytest.mark.compat
FIVE = ('disc', 'ring', 'square', 'triangle', 'star')


def config(task: str = 'det', **options: Any) -> Config:
    cfg = load_config(str(CONFIGS[task]), options, None, 'none')
    import_framework(cfg.default_scope)
    return cfg


def build(cfg: Config) -> Any:
    registry = __import__(f'{cfg.default_scope}.registry', fromlist=['MODELS']).MODELS
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return registry.build(copy.deepcopy(cfg.model))


def errors(findings: list[Finding], *values: object) -> str:
    found = [f.sentence for f in findings if all(str(value) in f.sentence for value in values)]
    assert found, (values, findings)
    assert all(f.level == 'error' for f in findings)
    return found[0]


# --- what fits stays silent


@pytest.mark.parametrize('path', sorted((REPO / 'configs').glob('*.py')), ids=lambda p: p.stem)
def test_configs_of_this_project(path: Path) -> None:
    cfg = load_config(str(path), {}, None, 'none')
    import_framework(cfg.default_scope)
    assert check_config(cfg) == []


MM_CONFIGS = (
    'mmdet/mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'mmdet/retinanet/retinanet_r50_fpn_1x_coco.py',
    'mmdet/rtmdet/rtmdet-ins_s_8xb32-300e_coco.py',
    'mmdet/cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
    'mmdet/fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'mmdet/ssd/ssd300_coco.py',
    'mmdet/yolox/yolox_s_8xb8-300e_coco.py',
    'mmdet/yolo/yolov3_d53_8xb8-320-273e_coco.py',
    'mmdet/detr/detr_r50_8xb2-150e_coco.py',
    'mmdet/mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
    'mmdet/panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py',
    'mmdet/solo/solo_r50_fpn_1x_coco.py',
    'mmdet/soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py',
    'mmseg/upernet/upernet_r50_4xb2-40k_cityscapes-512x1024.py',
    'mmseg/deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024.py',
    'mmseg/segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
    'mmseg/bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py',
    'mmseg/mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py',
)


@pytest.mark.parametrize('name', MM_CONFIGS)
def test_configs_of_the_frameworks(name: str) -> None:
    framework, _, rest = name.partition('/')
    module = pytest.importorskip(framework, reason=f'{framework} is not installed')
    path = Path(module.__file__).parent / '.mim' / 'configs' / rest
    if not path.exists():
        pytest.skip(f'{framework} is installed without its configs')
    cfg = Config.fromfile(path)
    import_framework(framework)
    assert check_config(cfg) == []


def test_a_model_is_as_it_was() -> None:
    model = build(config()).train()
    model.backbone.stages[0].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert check_model(model, FIVE, batch_size=1, crop=(64, 64)) == []
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


# --- keywords


@pytest.mark.parametrize(
    'options, wrong, meant',
    [
        ({'model.backbone.archh': 'm1'}, 'archh', 'arch'),
        ({'train_cfg.max_epoch': 3}, 'max_epoch', 'max_epochs'),
        ({'train_dataloder.batch_size': 2}, 'train_dataloder', 'train_dataloader'),
        ({'train_dataloader.batchsize': 2}, 'batchsize', 'batch_size'),
        ({'optim_wraper.type': 'OptimWrapper'}, 'optim_wraper', 'optim_wrapper'),
        ({'default_hooks.logger.intervall': 5}, 'intervall', 'interval'),
        ({'model.neck.num_out': 4}, 'num_out', 'num_outs'),
        ({'train_dataloader.dataset.annfile': 'x'}, 'annfile', 'ann_file'),
        ({'val_evaluator.metrics': 'bbox'}, 'metrics', 'metric'),
    ],
)
def test_misspelled_keyword(options: dict[str, Any], wrong: str, meant: str) -> None:
    errors(check_config(config(**options)), wrong, f'did you mean {meant}?')


def test_backbone_merged_into_another() -> None:
    cfg = config()
    cfg.model.backbone.update(depth=50, num_stages=4, style='pytorch')
    errors(check_config(cfg), 'depth, num_stages, style', '_delete_=True')


@pytest.mark.parametrize('where', ['model', 'model.backbone'])
def test_pretrained_of_the_old_backbone(where: str) -> None:
    cfg = config(**{f'{where}.pretrained': 'torchvision://resnet50'})
    errors(check_config(cfg), f'{where}.pretrained', 'torchvision://resnet50', 'init_cfg')


# --- channels and stages


def test_channels_of_the_old_backbone() -> None:
    cfg = config(**{'model.neck.in_channels': [256, 512, 1024, 2048]})
    errors(check_config(cfg), [256, 512, 1024, 2048], 'model.neck.in_channels=[40, 80, 160, 320]')


def test_fewer_stages_than_the_neck_takes() -> None:
    cfg = config(**{'model.backbone.out_indices': (1, 2, 3)})
    errors(check_config(cfg), '3 outputs', 'model.neck.in_channels=[80, 160, 320]')


def test_channels_as_the_backbone_tells_them() -> None:
    """The README says to copy `out_channels`, a tuple, which mmdet's FPN does not take."""
    cfg = config(**{'model.neck.in_channels': RepNeXt('m0').out_channels})
    assert check_config(cfg) == []
    build(cfg)


def test_gray_images_into_three_channels() -> None:
    cfg = config(**{'model.data_preprocessor.mean': [0.0], 'model.data_preprocessor.std': [1.0]})
    errors(check_config(cfg), 'in_channels is 3', '1 values')


def test_channels_of_a_segmentation_head() -> None:
    cfg = config('seg', **{'model.decode_head.in_channels': [256, 256, 256, 256]})
    width = cfg.model.neck.out_channels
    errors(check_config(cfg), [256] * 4, f'model.decode_head.in_channels={[width] * 4}')


# --- strides


def mm_model(name: str, backbone: dict[str, Any], neck: dict[str, Any]) -> Any:
    """A model of mmdet's own config with the backbone exchanged as the README shows."""
    mmdet = pytest.importorskip('mmdet', reason='mmdet is not installed')
    path = Path(mmdet.__file__).parent / '.mim' / 'configs' / name
    cfg = Config.fromfile(path)
    import_framework('mmdet')
    cfg.model.backbone = backbone
    cfg.model.neck.update(neck)
    return build(cfg)


def test_retinanet_with_all_stages_of_a_coarser_backbone() -> None:
    model = mm_model(
        'retinanet/retinanet_r50_fpn_1x_coco.py',
        dict(type='RecNeXt', arch='t'),
        dict(in_channels=[64, 128, 256, 512]),
    )
    found = check_model(model, None)
    errors(found, 'bbox_head', [8, 16, 32, 64, 128], [16, 32, 64, 128, 256])


def test_retinanet_that_fits() -> None:
    model = mm_model(
        'retinanet/retinanet_r50_fpn_1x_coco.py',
        dict(type='RepNeXt', arch='m0'),
        dict(in_channels=[40, 80, 160, 320]),
    )
    assert check_model(model, None) == []


def test_rtmdet_with_four_stages() -> None:
    model = mm_model(
        'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
        dict(type='RepNeXt', arch='m0'),
        dict(in_channels=[40, 80, 160, 320]),
    )
    errors(check_model(model, None), [8, 16, 32], [4, 8, 16, 32])


@pytest.mark.parametrize('part', ['rpn_head.anchor_generator', 'roi_head.bbox_roi_extractor'])
def test_strides_of_mask_rcnn(part: str) -> None:
    name = 'strides' if 'rpn' in part else 'featmap_strides'
    cfg = config(**{f'model.{part}.{name}': [8, 16, 32, 64]})
    errors(check_model(build(cfg), FIVE), [8, 16, 32, 64], [4, 8, 16, 32])


def test_strides_of_semantic_fpn() -> None:
    cfg = config('seg', **{'model.decode_head.feature_strides': [8, 16, 32, 64]})
    errors(check_model(build(cfg), None), [8, 16, 32, 64], [4, 8, 16, 32])


# --- classes, and batches of one


def test_number_of_classes_of_every_head() -> None:
    found = check_model(build(config()), FIVE[:3])
    sentence = errors(found, 'num_classes=5', '3 classes')
    for head in ('bbox_head', 'mask_head'):
        assert f'model.roi_head.{head}.num_classes=3' in sentence


def test_number_of_classes_in_a_cascade() -> None:
    mmdet = pytest.importorskip('mmdet', reason='mmdet is not installed')
    name = 'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py'
    cfg = Config.fromfile(Path(mmdet.__file__).parent / '.mim' / 'configs' / name)
    import_framework('mmdet')
    cfg.model.backbone.init_cfg = None
    cfg.model.roi_head.bbox_head[1].num_classes = 5
    found = check_model(build(cfg), [str(i) for i in range(80)])
    errors(found, 'model.roi_head.bbox_head.1.num_classes=80', 'num_classes=5')


def test_batch_of_one_under_batchnorm() -> None:
    cfg = config('seg')
    cfg.model.backbone = dict(type='RecNeXt', arch='t')
    cfg.model.neck.in_channels = [64, 128, 256, 512]
    cfg.model.decode_head.feature_strides = [8, 16, 32, 64]
    model = build(cfg)
    assert check_model(model, None, batch_size=1, crop=(128, 128)) == []
    errors(check_model(model, None, batch_size=1, crop=(64, 64)), 'batch_size=1', '64 x 64')
    assert check_model(model, None, batch_size=2, crop=(64, 64)) == []
    model.backbone.norm_eval = True  # norms of the neck are left
    errors(check_model(model, None, batch_size=1, crop=(64, 64)), 'the first is model.neck')


def test_pooled_branch_with_a_batch_of_one() -> None:
    cfg = load_config(str(REPO / 'configs/upernet_inception_next_tiny_ade20k.py'), {}, None, 'none')
    import_framework('mmseg')
    cfg.model.backbone.init_cfg = None
    model = build(cfg)
    classes = [str(i) for i in range(150)]
    errors(check_model(model, classes, batch_size=1, crop=(128, 128)), 'decode_head')


# --- stages that never run


@pytest.mark.parametrize('out_indices', [(0,), (0, 1, 2), (1, 2, 3)])
def test_stages_beyond_the_last_output_take_no_gradient(out_indices: tuple[int, ...]) -> None:
    model = RepNeXt('m0', out_indices=out_indices).train()
    sum(out.sum() for out in model(torch.zeros(2, 3, 64, 64))).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    frozen = {name.split('.')[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {str(i) for i in range(out_indices[-1] + 1, 4)}
