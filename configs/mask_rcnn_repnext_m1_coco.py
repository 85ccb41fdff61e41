_base_ = [
    './_base_/models/mask_rcnn_fpn.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/coco_1x.py',
    './_base_/mmdet_runtime.py',
]
model = dict(
    backbone=dict(
        type='RepNeXt',
        arch='m1',
        init_cfg=dict(type='Pretrained', checkpoint='repnext_m1_distill_300e'),
    ),
    neck=dict(in_channels=[48, 96, 192, 384]),
)
