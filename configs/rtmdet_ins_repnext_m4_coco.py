_base_ = [
    './_base_/models/rtmdet_ins.py',
    './_base_/datasets/coco_rtmdet_ins.py',
    './_base_/schedules/coco_300e.py',
    './_base_/mmdet_runtime.py',
]
pretrained = dict(type='Pretrained', checkpoint='repnext_m4_distill_300e')
model = dict(
    backbone=dict(type='RepNeXt', arch='m4', out_indices=(1, 2, 3), init_cfg=pretrained),
    neck=dict(in_channels=[128, 256, 512], out_channels=192, num_csp_blocks=2),
    bbox_head=dict(in_channels=192, feat_channels=192),
)
