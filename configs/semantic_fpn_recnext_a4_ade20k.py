_base_ = [
    './_base_/models/semantic_fpn.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/ade20k_80k.py',
    './_base_/mmseg_runtime.py',
]
model = dict(
    backbone=dict(
        type='RecNeXt',
        arch='a4',
        init_cfg=dict(type='Pretrained', checkpoint='recnext_a4_distill_300e'),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
