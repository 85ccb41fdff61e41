# RepViT's recipe, as the published training of RepNeXt and RecNeXt uses it.
_base_ = './recipe.py'

train_dataloader = dict(sampler=dict(type='RepeatedAugmentation', num_repeats=3))

optim_wrapper = dict(optimizer=dict(lr=4e-3, weight_decay=0.025))  # 1e-3 x 2048 / 512
custom_hooks = [
    dict(type='SeedEachEpoch'),
    # Epochs 0 and 1 both run at 1e-6.
    dict(type='TimmCosine', lr_min=1e-5, warmup_epochs=5, warmup_lr=1e-6, delay=1),
    dict(type='AdaptiveGradClip', clip_factor=0.02),
    dict(type='KeepEMA', decay=0.99996),
]
auto_scale_lr = dict(enable=False, base_batch_size=2048)
