# The recipe of InceptionNeXt tiny, small and base.
_base_ = './recipe.py'

train_dataloader = dict(batch_size=512)  # x 8 GPUs = 4096

optim_wrapper = dict(optimizer=dict(lr=4e-3, weight_decay=0.05))
custom_hooks = [
    dict(type='SeedEachEpoch'),
    dict(type='TimmCosine', lr_min=1e-5, warmup_epochs=20, warmup_lr=1e-6),
]
auto_scale_lr = dict(enable=False, base_batch_size=4096)
