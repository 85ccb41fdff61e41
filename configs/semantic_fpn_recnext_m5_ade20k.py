_base_ = [
    './_base_/models/semantic_fpn.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/ade20k_80k.py',
    './_base_/mmseg_runtime.py',
]
model = dict(
    backbone=dict(
        type='RecNeXt',
        arch='m5',
        init_cfg=dict(type='Pretrained', checkpoint='recnext_m5_distill_300e'),
    ),
    neck=dict(in_channels=[80, 160, 320, 640]),
)
