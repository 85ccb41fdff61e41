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
    # From scratch, norms in the neck save a good part of the iterations.
    neck=dict(in_channels=[40, 80, 160, 320], out_channels=channels, norm_cfg=norm_cfg),
    decode_head=dict(
        in_channels=[channels] * 4, channels=channels, num_classes=7, norm_cfg=norm_cfg
    ),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
dataset = dict(
    type='BaseSegDataset', data_root=data_root, metainfo=metainfo, reduce_zero_label=True
)
# Both cores are for the network.
loader = dict(batch_size=4, num_workers=0, persistent_workers=False)
train_dataloader = dict(**loader, dataset=dict(**dataset, pipeline=train_pipeline))
val_dataloader = dict(**loader, dataset=dict(**dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader

max_iters = 750  # x 4 images = 3 epochs
train_cfg = dict(max_iters=max_iters, val_interval=150)
optim_wrapper = dict(optimizer=dict(lr=1.5e-3, fused=True))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, begin=0, end=60, by_epoch=False),
    dict(type='CosineAnnealingLR', begin=0, end=max_iters, by_epoch=False),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=max_iters))
auto_scale_lr = dict(base_batch_size=4)
randomness = dict(seed=0)
