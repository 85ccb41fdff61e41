_base_ = [
    './_base_/models/retinanet_fpn.py',
    './_base_/datasets/coco_detection.py',
    './_base_/schedules/coco_1x_dense.py',
    './_base_/mmdet_runtime.py',
]
pretrained = dict(type='Pretrained', checkpoint='repnext_m0_distill_300e')
model = dict(
    backbone=dict(type='RepNeXt', arch='m0', out_indices=(1, 2, 3), init_cfg=pretrained),
    neck=dict(in_channels=[80, 160, 320]),
)
