_base_ = './_base_/metaformer.py'

model = dict(network='inception_next_atto')
train_dataloader = dict(
    batch_size=160,  # x 8 GPUs = 1280
    dataset=dict(transform=dict(auto_augment='rand-m5-mstd0.5-inc1')),
)
train_cfg = dict(max_epochs=450)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
custom_hooks = [
    dict(type='SeedEachEpoch'),
    dict(type='TimmCosine', lr_min=5e-7, warmup_epochs=20, warmup_lr=1e-6),
]
auto_scale_lr = dict(base_batch_size=1280)
