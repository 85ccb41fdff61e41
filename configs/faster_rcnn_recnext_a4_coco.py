_base_ = [
    './_base_/models/faster_rcnn_fpn.py',
    './_base_/datasets/coco_detection.py',
    './_base_/schedules/coco_1x.py',
    './_base_/mmdet_runtime.py',
]
pretrained = dict(type='Pretrained', checkpoint='recnext_a4_distill_300e')
model = dict(
    backbone=dict(type='RecNeXt', arch='a4', init_cfg=pretrained),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
