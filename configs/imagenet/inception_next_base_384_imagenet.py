_base_ = './_base_/metaformer.py'

# From the weights trained at 224, which `pretrained` names.
model = dict(network='inception_next_base', pretrained=True, drop_path_rate=0.7, mixup=None)
train_dataloader = dict(
    batch_size=64,
    dataset=dict(transform=dict(input_size=384)),
)
val_dataloader = dict(dataset=dict(transform=dict(input_size=384, crop_pct=1.0)))
test_dataloader = val_dataloader
max_epochs = 30
train_cfg = dict(max_epochs=30)
optim_wrapper = dict(optimizer=dict(lr=5e-5))
custom_hooks = [
    dict(type='SeedEachEpoch'),
    dict(type='TimmCosine', lr_min=5e-5),
    dict(type='EMAHook', momentum=1e-4),
]
