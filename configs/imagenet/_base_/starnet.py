# StarNet's recipe, of the published RepNeXt M0 to M2 and M0E to M2E.
_base_ = './recipe.py'

model = dict(mixup=dict(cutmix_alpha=0.2))
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
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=3e-3, weight_decay=0.025))
custom_hooks = [
    dict(type='SeedEachEpoch'),
    dict(type='TimmCosine', lr_min=1e-6, warmup_epochs=5, warmup_lr=1e-5, cooldown_epochs=10),
]
auto_scale_lr = dict(enable=False, base_batch_size=2048)
