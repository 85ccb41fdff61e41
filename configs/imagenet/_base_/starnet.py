# StarNet's recipe, of the published RepNeXt M0 to M2 and M0E to M2E.
_base_ = ['./data.py', './runtime.py']

model = dict(
    type='TimmClassifier',
    smoothing=0.1,
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=0.2, prob=1.0, switch_prob=0.5),
)
train_dataloader = dict(
    batch_size=512,  # x 4 GPUs = 2048
    dataset=dict(
        transform=dict(
            auto_augment='rand-m1-mstd0.5-inc1', color_jitter=None, interpolation='random'
        )
    ),
)
val_dataloader = dict(dataset=dict(transform=dict(crop_pct=0.9)))
test_dataloader = val_dataloader

max_epochs = 310  # 300 of the cosine, and 10 at its end
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=3e-3, eps=1e-8, weight_decay=0.025),
    paramwise_cfg=dict(flat_decay_mult=0.0),
)
param_scheduler = None
custom_hooks = [
    dict(type='SeedEachEpoch'),
    dict(type='TimmCosine', lr_min=1e-6, warmup_epochs=5, warmup_lr=1e-5, cooldown_epochs=10),
]
auto_scale_lr = dict(enable=False, base_batch_size=2048)
