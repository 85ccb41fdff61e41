# What all recipes share; each states its rate, decay, augmentation and hooks.
_base_ = ['./data.py', './runtime.py']

model = dict(
    type='TimmClassifier',
    smoothing=0.1,
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5),
)
max_epochs = 300
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', eps=1e-8),
    paramwise_cfg=dict(flat_decay_mult=0.0),  # none on biases and what else is one-dimensional
)
param_scheduler = None  # a hook sets the rate
