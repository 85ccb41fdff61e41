_base_ = [
    './_base_/models/mask_rcnn_fpn_stride8.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/coco_1x.py',
    './_base_/mmdet_runtime.py',
]
model = dict(
    backbone=dict(
        type='RecNeXt',
        arch='s',
        init_cfg=dict(type='Pretrained', checkpoint='recnext_s_distill_300e'),
    ),
    neck=dict(in_channels=[128, 256, 384, 512]),
)
