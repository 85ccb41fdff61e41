# From scratch on crops of the generated sample data set, in minutes (repnext-mm demo --cls).
_base_ = ['./_base_/data.py', './_base_/runtime.py']
sample_data_root = 'data/shapes'
data_root = sample_data_root + '/imagenet'
metainfo = dict(classes=('disc', 'ring', 'square', 'triangle', 'star'))

model = dict(type='TimmClassifier', network='repnext_m0', num_classes=5, smoothing=0.1)
loader = dict(num_workers=0, pin_memory=False)  # both cores are for the network
train_dataloader = dict(
    **loader,
    batch_size=32,
    dataset=dict(
        root=data_root + '/train',
        metainfo=metainfo,
        transform=dict(
            _delete_=True,
            input_size=64,
            is_training=True,
            scale=(0.6, 1.0),
            vflip=0.5,
            interpolation='bicubic',
        ),
    ),
)
val_dataloader = dict(
    **loader,
    batch_size=32,
    dataset=dict(
        root=data_root + '/val',
        metainfo=metainfo,
        transform=dict(input_size=64, crop_pct=64 / 72),
    ),
)
test_dataloader = val_dataloader

max_epochs = 5  # x 90 iterations (2902 crops / 32)
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.025),
    paramwise_cfg=dict(flat_decay_mult=0.0),
)
param_scheduler = None
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(save_best=None))
custom_hooks = [
    dict(type='SeedEachEpoch'),
    dict(type='TimmCosine', lr_min=1e-5, warmup_epochs=1, warmup_lr=1e-4),
    dict(type='AdaptiveGradClip', clip_factor=0.02),
]
auto_scale_lr = dict(enable=False, base_batch_size=32)
