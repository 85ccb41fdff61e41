# RepViT's recipe, as the published training of RepNeXt and RecNeXt uses it.
_base_ = ['./data.py', './runtime.py']

model = dict(
    type='TimmClassifier',
    smoothing=0.1,
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5),
)
train_dataloader = dict(sampler=dict(type='RepeatedAugmentation', num_repeats=3))

max_epochs = 300  # x 625 iterations (1,281,167 images / 2048)
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=4e-3, eps=1e-8, weight_decay=0.025),  # 1e-3 x 2048 / 512
    paramwise_cfg=dict(flat_decay_mult=0.0),  # none on biases and what else is one-dimensional
)
param_scheduler = None
custom_hooks = [
    dict(type='SeedEachEpoch'),
    # Epochs 0 and 1 both run at 1e-6.
    dict(type='TimmCosine', lr_min=1e-5, warmup_epochs=5, warmup_lr=1e-6, delay=1),
    dict(type='AdaptiveGradClip', clip_factor=0.02),
    dict(type='KeepEMA', decay=0.99996),
]
auto_scale_lr = dict(enable=False, base_batch_size=2048)
