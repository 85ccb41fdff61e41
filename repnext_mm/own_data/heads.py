"""What can be trained on which labels, and the model of each with any backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope

from .. import backbones
from ..complexity import count_macs, count_parameters
from ..configs import FOLDER
from ..datasets.folders.records import Kind
from ..engine.frameworks import import_framework
from ..engine.inference import without_weights

Model = dict[str, Any]
#: One process has no statistics to synchronize.
NORM = dict(type='BN', requires_grad=True)
#: Channels of a light neck and head, a third of the usual.
LITE = 96
SEPARABLE = dict(type='SeparableConv2d')


@dataclass(frozen=True)
class Head:
    """What is put on a backbone.

    Args:
        title: How papers call it.
        scope: The framework that it belongs to.
        kinds: Labels that it can be trained from; those that it is the first choice for come first.
        lr: AdamW's rate for 16 images, from pretrained weights: that of the head's recipe in
            configs/, with the square root of the batch.
        lr_from_scratch: The same from random weights.
        masks: It is trained with the outlines of objects.
        dense: It takes the three stages with strides 8, 16 and 32.
        base: A file of `configs/_base_/models`.
        monitor: The metric that says which checkpoint is best.
    """

    title: str
    scope: str
    kinds: tuple[Kind, ...]
    lr: float
    lr_from_scratch: float
    base: str = ''
    masks: bool = False
    dense: bool = False
    monitor: str = 'coco/bbox_mAP'


HEADS: dict[str, Head] = {
    'rtmdet': Head('RTMDet', 'mmdet', ('boxes', 'polygons'), 1e-3, 4e-3, 'rtmdet', dense=True),
    'mask_rcnn': Head(
        'Mask R-CNN', 'mmdet', ('polygons',), 2e-4, 1e-3, 'mask_rcnn_fpn',
        masks=True, monitor='coco/segm_mAP',
    ),
    'faster_rcnn': Head(
        'Faster R-CNN', 'mmdet', ('boxes', 'polygons'), 2e-4, 1e-3, 'faster_rcnn_fpn'
    ),
    'retinanet': Head(
        'RetinaNet', 'mmdet', ('boxes', 'polygons'), 1e-4, 5e-4, 'retinanet_fpn', dense=True
    ),
    'rtmdet_ins': Head(
        'RTMDet-Ins', 'mmdet', ('polygons',), 1e-3, 4e-3, 'rtmdet_ins',
        masks=True, dense=True, monitor='coco/segm_mAP',
    ),
    'semantic_fpn': Head(
        'Semantic FPN', 'mmseg', ('masks',), 1e-4, 2e-3, 'semantic_fpn', monitor='mIoU'
    ),
    'upernet': Head('UPerNet', 'mmseg', ('masks',), 6e-5, 5e-4, 'upernet', monitor='mIoU'),
    'classifier': Head(
        'classifier', 'mmengine', ('classes',), 5e-4, 1e-3, monitor='accuracy/top1'
    ),
}  # fmt: skip
#: The first choice for each kind of labels.
CHOICE: dict[Kind, str] = {
    'boxes': 'rtmdet',
    'polygons': 'mask_rcnn',
    'masks': 'semantic_fpn',
    'classes': 'classifier',
}


def build_model_config(
    head: str, network: str, num_classes: int, lite: bool = False, init_cfg: Any = None
) -> Model:
    """The model of a config: a base of this package, with the backbone and classes put in.

    Args:
        head: One of `HEADS`.
        network: Name of a backbone, such as repnext_m0.
        num_classes: Of the data.
        lite: A narrow neck and head, with depthwise convolutions where they are of size 3.
        init_cfg: Of the backbone.

    Raises:
        ValueError: There is no such network, or the head has no light form.
    """
    family, arch = backbones.look_up(network)
    if head == 'classifier':
        if lite:
            raise ValueError('a classifier has no neck that --lite could make lighter.')
        model: Model = dict(type='TimmClassifier', network=network, num_classes=num_classes)
        return model
    row = HEADS[head]
    strides, channels = _pyramid(network)
    indices = tuple(range(len(strides)))
    base = row.base
    if row.dense:
        indices = tuple(i for i in indices if strides[i] in (8, 16, 32))
    elif strides[0] == 8 and row.scope == 'mmdet':
        base += '_stride8'
    path = FOLDER / '_base_' / 'models' / f'{base}.py'
    model = Config.fromfile(path).model.to_dict()
    backbone: Model = dict(type=family.__name__, arch=arch, norm_cfg=NORM)
    if row.dense:
        backbone['out_indices'] = indices
    if init_cfg is not None:
        backbone['init_cfg'] = init_cfg
    model['backbone'] = backbone
    widths = [channels[i] for i in indices]
    if 'neck' in model:
        model['neck']['in_channels'] = widths
        width = model['neck']['out_channels']
        if head.startswith('rtmdet'):
            width = 96 if channels[-1] <= 320 else 128 if channels[-1] <= 448 else 192
            model['neck']['num_csp_blocks'] = 1 if width < 192 else 2
        _set_width(model, model['neck']['out_channels'], width)
    else:
        model['decode_head']['in_channels'] = widths
        model['auxiliary_head']['in_channels'] = widths[2]
    if row.scope == 'mmseg' and strides != (4, 8, 16, 32):
        model['decode_head'].update({'feature_strides': list(strides)} if 'neck' in model else {})
    if lite:
        if head == 'upernet':
            raise ValueError('--lite is for heads with an FPN; choose --head semantic_fpn.')
        LIGHTEN[head](model)
    _everywhere(model, 'num_classes', num_classes)
    _everywhere(model, 'norm_cfg', NORM, only=dict(type='SyncBN'))
    return model


def _pyramid(network: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    family, arch = backbones.look_up(network)
    with torch.device('meta'):
        backbone = family(arch)
    return backbone.out_strides, backbone.out_channels


def _everywhere(node: Any, key: str, value: Any, only: Mapping[str, Any] | None = None) -> None:
    """Set every `key` in a nested config that has it; `only` those that contain this."""
    if isinstance(node, dict):
        for name in node:
            if name == key and (only is None or only.items() <= node[name].items()):
                node[name] = value
            else:
                _everywhere(node[name], key, value, only)
    elif isinstance(node, list | tuple):
        for item in node:
            _everywhere(item, key, value, only)


#: Settings of neck and heads that are the width of the neck.
WIDTHS = ('out_channels', 'in_channels', 'feat_channels', 'conv_out_channels', 'channels')


def _set_width(node: Any, old: int, new: int) -> None:
    """Give neck and heads another width, wherever they have the one of the base."""
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key == 'backbone':
            continue
        if key in WIDTHS and value == old:
            node[key] = new
        elif key == 'in_channels' and isinstance(value, list) and set(value) == {old}:
            node[key] = [new] * len(value)
        else:
            _set_width(value, old, new)


def _lighten_rcnn(model: Model) -> None:
    _set_width(model, 256, LITE)
    model['neck']['conv_cfg'] = SEPARABLE
    roi = model['roi_head']
    roi['bbox_head']['fc_out_channels'] = 256  # of 1024
    if 'mask_head' in roi:
        roi['mask_head'].update(num_convs=2, conv_cfg=SEPARABLE)  # of 4


def _lighten_retinanet(model: Model) -> None:
    _set_width(model, 256, LITE)
    model['neck']['conv_cfg'] = SEPARABLE
    model['bbox_head'].update(stacked_convs=2, conv_cfg=SEPARABLE)  # of 4


def _lighten_rtmdet(model: Model) -> None:
    _set_width(model, model['neck']['out_channels'], 64)
    model['neck'].update(num_csp_blocks=1, use_depthwise=True)


def _lighten_semantic_fpn(model: Model) -> None:
    _set_width(model, 256, LITE)
    model['neck']['conv_cfg'] = SEPARABLE
    model['decode_head'].update(channels=LITE, conv_cfg=SEPARABLE)


LIGHTEN: dict[str, Callable[[Model], None]] = {
    'mask_rcnn': _lighten_rcnn,
    'faster_rcnn': _lighten_rcnn,
    'retinanet': _lighten_retinanet,
    'rtmdet': _lighten_rtmdet,
    'rtmdet_ins': _lighten_rtmdet,
    'semantic_fpn': _lighten_semantic_fpn,
}


def cost(model: Mapping[str, Any], scope: str, size: tuple[int, int]) -> tuple[int, int]:
    """Parameters, and multiply-accumulates for one image, of a model config.

    Two-stage detectors count the proposals that they make of an image without content.
    """
    import_framework(scope)
    with DefaultScope.overwrite_default_scope(scope), torch.device('meta'):
        built = MODELS.build(without_weights(ConfigDict(model)))
    parameters = count_parameters(built)
    built.eval()
    with torch.no_grad():
        if hasattr(built, 'roi_head'):
            macs = _two_stage_macs(built, size)
        else:
            macs = count_macs(built, size)
    return parameters, macs


def _two_stage_macs(model: Any, size: tuple[int, int]) -> int:
    """Backbone, neck and RPN, and the RoI heads on as many proposals as are tested."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        features = model.extract_feat(torch.empty(1, 3, *size, device='meta'))
        model.rpn_head(features)
        heads = model.roi_head
        width = features[0].shape[1]
        proposals = model.test_cfg['rpn']['max_per_img']
        side = heads.bbox_head.roi_feat_size[0]
        heads.bbox_head(torch.empty(proposals, width, side, side, device='meta'))
        if heads.with_mask:
            found = model.test_cfg['rcnn']['max_per_img']
            heads.mask_head(torch.empty(found, width, 14, 14, device='meta'))
    return counter.get_total_flops() // 2
