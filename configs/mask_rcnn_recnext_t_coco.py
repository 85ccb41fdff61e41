_base_ = [
    './_base_/models/mask_rcnn_fpn_stride8.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/coco_1x.py',
    './_base_/mmdet_runtime.py',
]
model = dict(
    backbone=dict(
        type='RecNeXt',
        arch='t',
        init_cfg=dict(type='Pretrained', checkpoint='recnext_t_distill_300e'),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
