_base_ = [
    './_base_/models/upernet.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/ade20k_160k.py',
    './_base_/mmseg_runtime.py',
]
pretrained = dict(type='Pretrained', checkpoint='inception_next_base.sail_in1k')
model = dict(
    backbone=dict(type='InceptionNeXt', arch='base', drop_path_rate=0.4, init_cfg=pretrained),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
