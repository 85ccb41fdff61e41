_base_ = [
    './_base_/models/upernet.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/ade20k_160k.py',
    './_base_/mmseg_runtime.py',
]
pretrained = dict(type='Pretrained', checkpoint='inception_next_tiny.sail_in1k')
model = dict(
    backbone=dict(type='InceptionNeXt', arch='tiny', drop_path_rate=0.2, init_cfg=pretrained),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
