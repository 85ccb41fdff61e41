_base_ = [
    './_base_/models/faster_rcnn_fpn_stride8.py',
    './_base_/datasets/coco_detection.py',
    './_base_/schedules/coco_1x.py',
    './_base_/mmdet_runtime.py',
]
pretrained = dict(type='Pretrained', checkpoint='recnext_s_distill_300e')
model = dict(
    backbone=dict(type='RecNeXt', arch='s', init_cfg=pretrained),
    neck=dict(in_channels=[128, 256, 384, 512]),
)
