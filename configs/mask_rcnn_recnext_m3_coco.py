_base_ = [
    './_base_/models/mask_rcnn_fpn.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/coco_1x.py',
    './_base_/mmdet_runtime.py',
]
model = dict(
    backbone=dict(
        type='RecNeXt',
        arch='m3',
        init_cfg=dict(type='Pretrained', checkpoint='recnext_m3_distill_300e'),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
