# The recipe of InceptionNeXt tiny, small and base.
_base_ = ['./data.py', './runtime.py']

model = dict(
    type='TimmClassifier',
    smoothing=0.1,
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5),
)
train_dataloader = dict(batch_size=512)  # x 8 GPUs = 4096

max_epochs = 300
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=4e-3, eps=1e-8, weight_decay=0.05),
    paramwise_cfg=dict(flat_decay_mult=0.0),
)
param_scheduler = None
custom_hooks = [
    dict(type='SeedEachEpoch'),
    dict(type='TimmCosine', lr_min=1e-5, warmup_epochs=20, warmup_lr=1e-6),
]
auto_scale_lr = dict(enable=False, base_batch_size=4096)
