_base_ = [
    './_base_/models/rtmdet_ins.py',
    './_base_/datasets/coco_rtmdet_ins.py',
    './_base_/schedules/coco_300e.py',
    './_base_/mmdet_runtime.py',
]
pretrained = dict(type='Pretrained', checkpoint='repnext_m0_distill_300e')
model = dict(
    backbone=dict(type='RepNeXt', arch='m0', out_indices=(1, 2, 3), init_cfg=pretrained),
    neck=dict(in_channels=[80, 160, 320], out_channels=96),
    bbox_head=dict(in_channels=96, feat_channels=96),
)
