# From scratch on the generated sample data set, in minutes on two CPU cores (tools/demo.py --seg).
_base_ = [
    './_base_/models/semantic_fpn.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/ade20k_80k.py',
    './_base_/mmseg_runtime.py',
]
sample_data_root = 'data/shapes'
data_root = sample_data_root + '/ade'
metainfo = dict(classes=('disc', 'ring', 'square', 'triangle', 'star', 'sky', 'ground'))
norm_cfg = dict(type='BN', requires_grad=True)
channels = 64

model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(type='RepNeXt', arch='m0', norm_cfg=norm_cfg),
    neck=dict(in_channels=[40, 80, 160, 320], out_channels=channels),
    decode_head=dict(
        in_channels=[channels] * 4, channels=channels, num_classes=7, norm_cfg=norm_cfg
    ),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
dataset = dict(
    type='BaseSegDataset', data_root=data_root, metainfo=metainfo, reduce_zero_label=True
)
loader = dict(batch_size=8, num_workers=0, persistent_workers=False)
train_dataloader = dict(**loader, dataset=dict(**dataset, pipeline=train_pipeline))
val_dataloader = dict(**loader, dataset=dict(**dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader

train_cfg = dict(max_iters=400, val_interval=100)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, begin=0, end=50, by_epoch=False),
    dict(type='CosineAnnealingLR', begin=50, end=400, T_max=350, by_epoch=False),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=400))
randomness = dict(seed=0)
