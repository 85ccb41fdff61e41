_base_ = [
    './_base_/models/faster_rcnn_fpn.py',
    './_base_/datasets/coco_detection.py',
    './_base_/schedules/coco_1x.py',
    './_base_/mmdet_runtime.py',
]
pretrained = dict(type='Pretrained', checkpoint='repnext_m0_distill_300e')
model = dict(
    backbone=dict(type='RepNeXt', arch='m0', init_cfg=pretrained),
    neck=dict(in_channels=[40, 80, 160, 320]),
)
