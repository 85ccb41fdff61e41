_base_ = [
    './_base_/models/semantic_fpn.py',
    './_base_/datasets/ade20k_batch32.py',
    './_base_/schedules/ade20k_40k.py',
    './_base_/mmseg_runtime.py',
]
pretrained = dict(type='Pretrained', checkpoint='inception_next_tiny.sail_in1k')
model = dict(
    backbone=dict(type='InceptionNeXt', arch='tiny', drop_path_rate=0.1, init_cfg=pretrained),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
